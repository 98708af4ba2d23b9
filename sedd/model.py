"""A trained model: loaded, asked for its scores, and evaluated."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sedd.configuration.build import Parts, build_parts
from sedd.configuration.components import options, options_type
from sedd.configuration.config import Config, DataOptions, default_cache_dir
from sedd.data.tokenizers import Pretrained, Tokenizer, build_tokenizer, tokenizer_from_json
from sedd.denoiser import Denoiser
from sedd.errors import UserError
from sedd.evaluation.bound import BoundResult, evaluate_bound
from sedd.interop.hub import fetch
from sedd.interop.layouts import find_config
from sedd.interop.published import Published, load_published
from sedd.training.checkpoint import find_checkpoints
from sedd.types import Array, Float, Int, Key

GPT2_TOKENS = 50257
UNKNOWN = "unknown"  # what a published configuration does not say


@dataclass(frozen=True, kw_only=True)
class Model:
    """Everything that sampling and evaluation need."""

    denoiser: Denoiser
    parts: Parts
    config: Config
    tokenizer: Tokenizer | None
    source: str  # where it came from, for messages

    @property
    def network_config(self):
        """The network's options."""
        return self.config.network

    @property
    def process(self):
        return self.parts.process

    @property
    def schedule(self):
        return self.parts.schedule

    @property
    def time_independent(self) -> bool:
        return self.denoiser.time_independent

    @property
    def length(self) -> int:
        """Tokens in a training sequence."""
        return self.config.data.length

    def log_score(
        self, x_BL: Int[Array, "B L"], sigma_B: Float[Array, " B"]
    ) -> Float[Array, "B L V"]:
        """See ``Denoiser.log_score``."""
        return _log_score(self.denoiser, jnp.asarray(x_BL), jnp.asarray(sigma_B))

    def log_conditional(
        self, x_BL: Int[Array, "B L"], sigma_B: Float[Array, " B"] | None = None
    ) -> Float[Array, "B L N"]:
        """See ``Denoiser.log_conditional``."""
        sigma_B = None if sigma_B is None else jnp.asarray(sigma_B)
        return _log_conditional(self.denoiser, jnp.asarray(x_BL), sigma_B)


_log_score = jax.jit(Denoiser.log_score)
_log_conditional = jax.jit(Denoiser.log_conditional)


def load(path: str | Path, *, step: int | Literal["best"] | None = None) -> Model:
    """The model of a run's directory, or of a published checkpoint's; averaged (EMA) parameters.

    Of a run the newest whole checkpoint by default, ``"best"`` by validation, or that of a step.
    ``hf://OWNER/NAME`` or ``hf://OWNER/NAME@REVISION`` is a published one on the Hugging Face hub.
    UserError when there is none, it is damaged, or it does not fit its configuration.
    """
    source, path = str(path), fetch(str(path))
    if not path.is_dir():
        raise UserError(f"checkpoint {path}: no such directory")
    if find_config(path) is not None:
        if step is not None:
            raise UserError(f"--step {step}: checkpoint {source} is a published one, without steps")
        return _from_published(load_published(path), path, source)
    config = read_config(path)
    if config is None:
        above = [p for p in path.absolute().parents[:2] if (p / "config.json").exists()]
        hint = f"; did you mean {above[0]}?" if above else ""
        raise UserError(f"checkpoint {path}: not a run's directory (it has no config.json){hint}")
    tokenizer = read_tokenizer(path)
    parts = build_parts(config, tokenizer.num_tokens)
    expected = jax.eval_shape(parts.network.init, jax.random.key(0))
    checkpoints = find_checkpoints(path)
    if step == "best":
        step = checkpoints.best()
        if step is None:
            raise UserError(f"checkpoint {path}: none was validated, so there is no best one")
    params = jax.device_put(checkpoints.restore_params(step, abstract_params=expected))
    return Model(
        denoiser=parts.denoiser(params),
        parts=parts,
        config=config,
        tokenizer=tokenizer,
        source=source,
    )


def _from_published(published: Published, path: Path, source: str) -> Model:
    """A published checkpoint as the model of a configuration that describes it."""
    network, what = published.network, published.description
    tokenizer = _published_tokenizer(path, what.num_tokens)
    conditional = what.parameterization == "conditional"
    if conditional:
        timed = network.time_conditioned
        reading = options("parameterizations", "conditional", time_independent=not timed)
        objective = "mdlm" if timed else "lambda_dce"
    else:
        reading, objective = options("parameterizations", "score"), "score_entropy"
    fields = [field.name for field in dataclasses.fields(options_type("networks", "ddit"))]
    schedule = dict(what.schedule)
    config = Config(
        data=DataOptions(
            corpus=what.corpus or UNKNOWN,
            tokenizer=UNKNOWN if tokenizer is None else tokenizer.name,
            length=what.length,
        ),
        process=options("processes", what.process),
        schedule=options("schedules", schedule.pop("name"), **schedule),
        parameterization=reading,
        network=options("networks", "ddit", **{name: getattr(network, name) for name in fields}),
        objective=options("objectives", objective),
    )
    parts = build_parts(config, what.num_tokens)
    return Model(
        denoiser=parts.denoiser(jax.device_put(published.params)),
        parts=parts,
        config=config,
        tokenizer=tokenizer,
        source=source,
    )


def _published_tokenizer(path: Path, num_tokens: int) -> Tokenizer | None:
    """That of the directory, or GPT-2's where the vocabulary is of its size, or None."""
    file = path / "tokenizer.json"
    if file.is_file():
        # Ours, or as Hugging Face's library writes it.
        tokenizer = _read_json(
            file,
            lambda data: (
                tokenizer_from_json(data)
                if "kind" in data
                else Pretrained.of(file.name, json.dumps(data))
            ),
        )
    elif num_tokens == GPT2_TOKENS:
        tokenizer = build_tokenizer("gpt2", None, cache_dir=Path(default_cache_dir()).expanduser())
    else:
        return None
    if tokenizer.num_tokens != num_tokens:
        raise UserError(
            f"{file}: it has {tokenizer.num_tokens} tokens, and the checkpoint {num_tokens} beside "
            "the mask: it is not the tokenizer that the model was trained with"
        )
    return tokenizer


def read_config(workdir: Path) -> Config | None:
    """The configuration that a run was started with, or None where there is no run."""
    path = workdir / "config.json"
    return _read_json(path, _run_config) if path.exists() else None


def _run_config(data: dict[str, Any]) -> Config:
    if data and not data.keys() & {field.name for field in dataclasses.fields(Config)}:
        raise UserError(
            f"an unknown layout, with the keys {', '.join(data)}: expected the configuration of a "
            "run, or the published one of SEDD, RADD or MDLM"
        )
    return Config.from_json(data)


def read_tokenizer(workdir: Path) -> Tokenizer:
    """The tokenizer that a run was trained with."""
    return _read_json(workdir / "tokenizer.json", tokenizer_from_json)


def _read_json(path: Path, reader: Callable[[Any], Any]) -> Any:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the run's directory is incomplete") from None
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: must hold an object, got {type(data).__name__}")
    try:
        return reader(data)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def evaluate(
    model: Model,
    x0_BL: np.ndarray,
    key: Key[Array, ""],
    *,
    scored_BL: np.ndarray | None = None,
    draws: int = 16,
    batch_size: int = 32,
) -> BoundResult:
    """The bound over sequences of token ids [S, L]. See ``sedd.evaluation.bound``."""
    x0_BL = np.asarray(x0_BL)
    scored_BL = np.ones(x0_BL.shape, bool) if scored_BL is None else np.asarray(scored_BL)

    def batches() -> Iterable[tuple[np.ndarray, np.ndarray]]:
        for first in range(0, len(x0_BL), batch_size):
            yield x0_BL[first : first + batch_size], scored_BL[first : first + batch_size]

    return evaluate_bound(
        model.denoiser,
        model.schedule,
        key,
        batches(),
        draws=draws,
        count_text=text_counter(model.tokenizer),
    )


def text_counter(tokenizer: Tokenizer | None):
    """A function from ids to (characters, bytes) of their text; None where a tokenizer has none.

    Counts are of the tokens' own bytes, so that a code point cut by a sequence's end counts once.
    """
    if tokenizer is None:
        return None
    try:
        pieces = tokenizer.token_bytes()
    except UserError:
        return None
    num_bytes = np.array([len(piece or b"") for piece in pieces])
    characters = np.array([sum(byte & 0xC0 != 0x80 for byte in piece or b"") for piece in pieces])
    return lambda ids: (int(characters[ids].sum()), int(num_bytes[ids].sum()))
