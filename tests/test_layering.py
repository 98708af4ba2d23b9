"""Imports point strictly downward between levels; families of one level stay apart."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = [
    {"types", "errors", "files", "arrays", "progress"},
    {"schedules", "processes", "networks", "data"},
    {"parameterizations", "reshape", "denoiser"},
    {"objectives", "samplers", "constraints"},
    {"training", "evaluation", "interop", "control", "watermark"},
    {"configuration", "model", "evaluating", "sampling", "harness", "requests"},
]  # the commands, and the scripts that call them, are level 6: nothing imports them
LEVEL = {family: level for level, families in enumerate(LEVELS) for family in families}
TOP = len(LEVELS)
BESIDE = {  # inside a level: what a family may still import
    "arrays": {"types"},
    "files": {"errors"},
    "progress": {"errors"},
    "denoiser": {"constraints", "parameterizations", "reshape", "watermark"},
    "reshape": {"parameterizations"},
    "model": {"configuration"},
    "evaluating": {"configuration", "model", "sampling"},
    "sampling": {"configuration", "model", "requests"},
    "control": {"model", "sampling"},
    "harness": {"configuration", "model", "sampling"},
}
PROTOCOLS = {  # modules of another level than their families, so that others can use them
    "sedd.constraints.base": 2,
    "sedd.constraints.windows": 2,
    "sedd.watermark.base": 2,
    "sedd.control.texts": 5,
    "sedd.control.ratio": 5,
}
MODULES_BESIDE_PACKAGES = 12


def imports_of(source, *, at_module_level=False):
    """Every module that a source imports, as dotted names; `from a import b` gives a.b too."""
    tree = ast.parse(source)
    inner = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if at_module_level and node in inner:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def family_of(module):
    parts = module.split(".")
    return parts[1] if parts[0] == "sedd" and len(parts) > 1 else None


def level_of(module):
    own = ".".join(module.split(".")[:3])
    return PROTOCOLS.get(own, LEVEL.get(family_of(module), TOP))


def violations(module, source):
    """What a module imports that it must not."""
    level, family = level_of(module), family_of(module)
    for imported in imports_of(source):
        top = imported.split(".")[0]
        if top == "flax" and family != "networks":
            yield f"{module}: only sedd/networks may import {imported}"
        if top != "sedd" or family_of(imported) in (None, family):
            continue
        other, other_level = family_of(imported), level_of(imported)
        beside = other in BESIDE.get(family, ()) or level == other_level == TOP
        if other_level > level or (other_level == level and not beside):
            yield f"{module} (level {level}) imports {imported} (level {other_level})"
    for imported in imports_of(source, at_module_level=True):
        if imported.split(".")[0] in ("tensorflow", "torch"):
            yield f"{module}: {imported} at module level"


def cycles(graph):
    """Modules that can be reached from themselves."""
    reach = {node: set(others) for node, others in graph.items()}
    for _ in graph:
        for node in graph:
            reach[node] |= {far for near in reach[node] for far in reach.get(near, ())}
    return sorted(node for node in graph if node in reach[node])


def modules():
    for path in sorted((ROOT / "sedd").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield name, path.read_text(encoding="utf-8")
    for path in sorted(ROOT.glob("*.py")):
        yield path.stem, path.read_text(encoding="utf-8")


MODULES = dict(modules())


def test_few_modules_stand_beside_the_packages():
    beside = {p.stem for p in (ROOT / "sedd").glob("*.py")} - {"__init__", "__main__"}
    assert len(beside) <= MODULES_BESIDE_PACKAGES
    families = beside | {p.parent.name for p in (ROOT / "sedd").glob("*/__init__.py")}
    assert families <= {*LEVEL, "commands"}  # each has a level


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downward(module):
    assert not list(violations(module, MODULES[module]))


def test_no_module_imports_itself_through_others():
    graph = {
        name: {i for i in imports_of(source, at_module_level=True) if i in MODULES}
        for name, source in MODULES.items()
    }
    # `from sedd import x` names the package, whose own imports are looked up lazily or not at all.
    graph = {name: others - {"sedd"} for name, others in graph.items()}
    assert not cycles(graph)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sedd.processes.fake", "from sedd.samplers.euler import Euler"),
        ("sedd.processes.fake", "import sedd.networks.base"),
        ("sedd.processes.fake", "from sedd import networks"),
        ("sedd.objectives.fake", "def f():\n    from sedd.samplers.base import Sampler"),
        ("sedd.samplers.fake", "from sedd.objectives.base import Objective"),
        ("sedd.parameterizations.fake", "from sedd.denoiser import Denoiser"),
        ("sedd.training.fake", "from sedd.configuration.config import Config"),
        ("sedd.training.fake", "from sedd.configuration.components import build"),
        ("sedd.training.fake", "import flax.linen as nn"),
        ("sedd.interop.fake", "import torch"),
        ("sedd.data.fake", "from tensorflow.io import gfile"),
        ("sedd.types", "from sedd.schedules import LogLinear"),
        ("sedd.configuration.fake", "from sedd.model import load"),
        ("sedd.model", "from sedd.commands.cli import note"),
        ("sedd.sampling.whole", "def f():\n    from sedd.commands import trace"),
    ],
)
def test_control_a_violation_is_caught(module, source):
    assert list(violations(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sedd.samplers.fake", "from sedd.denoiser import Denoiser"),
        ("sedd.denoiser", "from sedd.parameterizations.base import Parameterization"),
        ("sedd.networks.fake", "import flax.linen as nn"),
        ("sedd.interop.fake", "def f():\n    import torch"),
        ("train", "from sedd.commands.train import main"),
        ("sedd.commands.fake", "from sedd.configuration.config import Config"),
        ("sedd.sampling.whole", "from sedd.model import Model"),
    ],
)
def test_control_what_is_allowed_passes(module, source):
    assert not list(violations(module, source))


def test_control_a_cycle_is_caught():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]
