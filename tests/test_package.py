"""The installed package: complete, usable away from the checkout, and quiet when imported."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tiny_run
from tiny_run import ROOT

SOURCES = ("sedd", "configs", "pyproject.toml", "README.md", "LICENSE")
PYTHON_FILES = ("*.py", "*.pyi", "*.html", "py.typed")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: setuptools writes beside what it builds."""
    top = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, top / "source" / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, top / "source" / name)
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(top)]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *flags, str(top / "source")],
        check=True,
        capture_output=True,
        text=True,
    )
    (built,) = top.glob("*.whl")
    return built


def test_the_wheel_holds_every_file(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        str(path.relative_to(ROOT))
        for pattern in PYTHON_FILES
        for path in (ROOT / "sedd").rglob(pattern)
    }
    recipes = {f"sedd/recipes/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert "sedd/commands/trace.html" in sources
    assert "sedd/py.typed" in sources
    assert sources <= held
    assert recipes <= held
    assert {name.split("/")[0].split("-")[0] for name in held} == {"sedd", "sedd_jax"}


@pytest.mark.nightly
def test_an_installed_package_trains_samples_and_evaluates(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)  # a pure wheel is its files
    (tmp_path / "text.txt").write_text(tiny_run.text())
    environment = {
        **os.environ,
        "PYTHONPATH": str(site),
        "SEDD_CACHE": str(tmp_path / "cache"),
    }

    def sedd(*arguments):
        result = subprocess.run(
            [sys.executable, "-m", "sedd", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert "--training.steps INT" in sedd("train", "--config", "quickstart", "--help")
    sedd(
        *("train", "--config", "quickstart", "--workdir", "run", "--data.length", "12"),
        *("--network.hidden-dim", "16", "--network.num-layers", "1", "--network.num-heads", "2"),
        *("--data.corpus", "text.txt", "--data.tokenizer", "bytes", "--training.steps", "2"),
    )
    assert sedd("sample", "--checkpoint", "run", "--steps", "2")
    assert "perplexity" in sedd("evaluate", "--checkpoint", "run", "--data", "text.txt")
    assert (tmp_path / "run" / "checkpoints").is_dir()


INSTALL = re.compile(r"(?:pip3?|pipx|uv) (?:install|add)[^`\n;]*")

IMPORTS = """
import logging, os, signal, sys, warnings
import flax, grain, jax, numpy, optax, orbax.checkpoint, rich, scipy.sparse, scipy.special
import tensorboardX, tokenizers, yaml

NAMES = sorted({"absl", "asyncio", "jax", *logging.root.manager.loggerDict})

def state():
    loggers = [logging.root, *map(logging.getLogger, NAMES)]
    return {
        "logging": [(x.name, x.level, x.filters[:], x.handlers[:], x.disabled) for x in loggers],
        "hooks": (sys.excepthook, sys.displayhook, sys.unraisablehook),
        "path": sys.path[:],
        "warnings": warnings.filters[:],
        "environment": dict(os.environ),
        "signals": {s: signal.getsignal(s) for s in signal.valid_signals()},
        "jax": dict(jax.config.values),
        "umask": os.umask(os.umask(0o22)),
        "streams": (sys.stdout, sys.stderr, sys.stdout.errors, sys.stderr.errors),
        "cwd": os.getcwd(),
    }

before = state()
import importlib, pkgutil, sedd
for info in pkgutil.walk_packages(sedd.__path__, "sedd."):
    if not info.name.startswith(("sedd.commands", "sedd.recipes", "sedd.__main__")):
        importlib.import_module(info.name)
[getattr(sedd, name) for name in sedd.__all__]
after = state()
for name in before:
    if before[name] != after[name]:
        print(name, before[name], after[name], sep="\\n")
"""


def test_importing_every_module_changes_nothing_in_the_process():
    """Not logging, hooks, warnings, signals, the environment or JAX's settings."""
    result = subprocess.run(
        [sys.executable, "-c", IMPORTS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (result.stdout, result.stderr) == ("", "")


def test_nothing_tells_to_install_another_project():
    """The name sedd of the package index is somebody else's: extras are installed from here."""
    texts = [
        path
        for folder in ("sedd", "docs", "benchmarks", "configs", "requirements")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md", ".txt", ".html")
    ]
    texts += [*ROOT.glob("*.md"), *ROOT.glob("*.py"), ROOT / "Makefile", ROOT / "pyproject.toml"]
    installs = [line for path in texts for line in INSTALL.findall(path.read_text())]
    assert len(installs) > 10
    assert [line for line in installs if re.search(r"(?<![\w./-])['\"]?sedd(?![\w-])", line)] == []
    wrong = ("pip install sedd", "pip install 'sedd[hub]'", 'uv pip install -U "sedd[tf]" x')
    for line in wrong:  # the control
        assert re.search(r"(?<![\w./-])['\"]?sedd(?![\w-])", INSTALL.findall(line)[0])


def test_the_version_is_one(wheel):
    import sedd

    assert Path(wheel).name.startswith(f"sedd_jax-{sedd.__version__}-")
    assert f"version: {sedd.__version__}" in (ROOT / "CITATION.cff").read_text()
