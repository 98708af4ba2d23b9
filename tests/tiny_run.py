"""A run's directory without a training run, and the commands called in this process."""

import contextlib
import dataclasses
import gc
import importlib
import io
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from sedd.commands.cli import run
from sedd.configuration.build import build_parts
from sedd.configuration.components import options, values
from sedd.configuration.config import Config, DataOptions
from sedd.data.tokenizers import Characters, Tokenizer
from sedd.evaluation.price import Price
from sedd.model import Model
from sedd.training.checkpoint import Checkpoints
from sedd.training.optimizer import make_optimizer
from sedd.training.state import init_state

ROOT = Path(__file__).parents[1]
ALPHABET = "\n abcdefghijklmnopqrstuvwxyz.{}:"
TOKENIZER = Characters.of("characters", ALPHABET, eos=True)
NETWORK = options(
    "networks", "ddit", hidden_dim=16, num_layers=1, num_heads=2, condition_dim=8, dropout=0.0
)
RECIPE = ["--config", str(ROOT / "tests" / "default_config.py")]
TINY = [
    *RECIPE,
    *("--network.hidden-dim", "16", "--network.num-layers", "1", "--network.num-heads", "2"),
    *("--network.condition-dim", "8", "--network.dropout", "0"),
    *("--data.length", "12", "--training.batch-size", "8"),
]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "my", "dog", "run", "far", "away"]

if str(ROOT) not in sys.path:  # where the commands are
    sys.path.insert(0, str(ROOT))


def text(words: int = 2000, seed: int = 0) -> str:
    """Lines of words without much sense."""
    draw = random.Random(seed)
    lines = (" ".join(draw.choice(WORDS) for _ in range(10)) for _ in range(words // 10))
    return ".\n".join(lines) + ".\n"


def config(kind: str = "radd", *, corpus: str = "stdlib", length: int = 12) -> Config:
    """The smallest model: absorbing "radd" or "sedd", "uniform" SEDD, "ar", "any_subset", "block".

    A block model has blocks of 4 positions. "marginal" and "hmm" are "radd" with such a head.
    """
    if kind == "hmm":
        return dataclasses.replace(
            config("radd", corpus=corpus, length=length),
            network=options("networks", "hmm_head", states=4, **values(NETWORK)),
            objective=options("objectives", "hmm", window=6),
        )
    if kind == "marginal":
        return dataclasses.replace(
            config("radd", corpus=corpus, length=length),
            network=options("networks", "marginal_head", **values(NETWORK)),
            objective=options("objectives", "marginal"),
        )
    if kind == "block":
        return dataclasses.replace(
            config("radd", corpus=corpus, length=length),
            parameterization=options("parameterizations", "block", block=4),
            objective=options("objectives", "block"),
            sampler=options("samplers", "semi_autoregressive"),
        )
    if kind in ("ar", "any_subset"):
        name = "autoregressive" if kind == "ar" else kind
        return dataclasses.replace(
            config("radd", corpus=corpus, length=length),
            parameterization=options("parameterizations", name),
            objective=options("objectives", name),
            sampler=options("samplers", "ordered"),
        )
    score = kind != "radd"
    return Config(
        data=DataOptions(corpus=corpus, length=length),
        process=options("processes", "uniform" if kind == "uniform" else "absorbing"),
        parameterization=options("parameterizations", "score" if score else "conditional"),
        objective=options("objectives", "score_entropy" if score else "lambda_dce"),
        network=NETWORK,
        sampler=options("samplers", "tweedie", steps=4),
    )


def make_run(
    directory: Path,
    config: Config,
    *,
    steps=(4,),
    metric: float | None = 1.0,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
) -> Path:
    """What ``train.py`` leaves, with random weights."""
    tokenizer = tokenizer or TOKENIZER
    parts = build_parts(config, tokenizer.num_tokens)
    params = jax.jit(parts.network.init)(jax.random.key(0))
    leaves, treedef = jax.tree.flatten(params)
    noise = np.random.default_rng(seed)
    # In numpy, and the state by one program: a program for each operation and shape takes longer.
    leaves = [
        np.asarray(leaf) + 0.1 * noise.standard_normal(leaf.shape).astype(leaf.dtype)
        for leaf in leaves
    ]
    optimizer = make_optimizer(config.optimizer, config.training.steps)
    start = jax.jit(lambda params: init_state(parts.network, optimizer, 0, params=params))
    state = start(treedef.unflatten(leaves))
    checkpoints = Checkpoints(directory / "checkpoints")
    for step in steps:
        state = dataclasses.replace(state, step=jnp.asarray(step, jnp.int32))
        checkpoints.save(state, data={}, pending={}, metric=metric)
    checkpoints.close()
    (directory / "config.json").write_text(json.dumps(config.to_json()))
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer.to_json()))
    return directory


def profile_of(model: Model, length: int = 12) -> Price:
    """A price profile of the model whose nats fall evenly, as if it had been measured."""
    return Price(
        model=model.digest,
        length=length,
        known_J=np.arange(length),
        nats_FJ=np.linspace(3, 1, length)[None],
        covariance_JJ=np.zeros((length, length)),
        num_sequences=2,
        draws=length,
    )


def truncate(folder: Path) -> None:
    """Cut the largest file somewhere under ``folder`` in two, and lose the second half."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def collect_failed_reads() -> None:
    """Orbax's reads that failed complain when they are collected: let it not be in another test.

    There the complaint, which parses source code, may break a parse (CPython's issue 106905).
    """
    gc.collect()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The ``error: …`` lines; whatever is not a line of the project's own fails here."""
        lines = self.err.splitlines()
        assert all(line.startswith(("error: ", "warning: ", "note: ")) for line in lines), self.err
        return [line for line in lines if line.startswith("error: ")]


def call(name: str, *arguments: object) -> Outcome:
    """``sedd NAME ARGUMENTS`` in this process."""
    command = importlib.import_module(f"sedd.commands.{name}")
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    argv = [f"{name}.py", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch("sedd.progress.QUIET_SECONDS", 600),  # a busy machine adds no line
        mock.patch.dict(os.environ, {"SEDD_CACHE": str(Path(tempfile.gettempdir(), "sedd-tests"))}),
    ):
        gc.disable()  # see `collect_failed_reads`: the command line is parsed as source code
        try:
            run(command.main)
        except SystemExit as stop:
            printed = (stream.buffer.getvalue().decode() for stream in (out, err))
            return Outcome(int(stop.code or 0), *printed)
        finally:
            gc.enable()
    raise AssertionError("a command ends by exiting")
