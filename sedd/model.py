"""A trained model, and what is done with it: load, sample, evaluate."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sedd.build import Parts, build_parts
from sedd.components import build
from sedd.config import Config
from sedd.constraints.clamp import Clamp, free
from sedd.data.tokenizers import Tokenizer, tokenizer_from_json
from sedd.denoiser import Denoiser
from sedd.errors import UserError
from sedd.evaluation.bound import BoundResult, evaluate_bound
from sedd.networks.base import Attend
from sedd.samplers.base import Sampler
from sedd.training.checkpoint import find_checkpoints
from sedd.types import Array, Float, Int, Key


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
        self, x_BL: Int[Array, "B L"], sigma_B: Float[Array, "B"]
    ) -> Float[Array, "B L V"]:
        """See ``Denoiser.log_score``."""
        return _log_score(self.denoiser, jnp.asarray(x_BL), jnp.asarray(sigma_B))

    def log_conditional(
        self, x_BL: Int[Array, "B L"], sigma_B: Float[Array, "B"] | None = None
    ) -> Float[Array, "B L N"]:
        """See ``Denoiser.log_conditional``."""
        sigma_B = None if sigma_B is None else jnp.asarray(sigma_B)
        return _log_conditional(self.denoiser, jnp.asarray(x_BL), sigma_B)


_log_score = jax.jit(Denoiser.log_score)
_log_conditional = jax.jit(Denoiser.log_conditional)


def load(path: str | Path, *, step: int | Literal["best"] | None = None) -> Model:
    """The model of a run's directory, with a checkpoint's averaged (EMA) parameters.

    The newest whole checkpoint by default, ``"best"`` by validation, or that of a step. UserError
    when there is none, it is damaged, or it is of another configuration than the directory's.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"checkpoint {path}: no such directory")
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
        source=str(path),
    )


def read_config(workdir: Path) -> Config | None:
    """The configuration that a run was started with, or None where there is no run."""
    path = workdir / "config.json"
    return _read_json(path, Config.from_json) if path.exists() else None


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


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """Samples, the network calls each needed, and their text where there is a tokenizer."""

    tokens: np.ndarray  # [B, L]
    calls: np.ndarray  # [B]
    text: list[str] | None
    trace: np.ndarray | None  # [T, B, L]
    times: np.ndarray | None  # [T], diffusion times of the trace's frames


@partial(jax.jit, static_argnames=("sampler", "trace"))
def _run_sampler(sampler: Sampler, denoiser, keys_B, tokens_BL, fixed_BL, *, trace):
    return sampler(denoiser, keys_B, tokens_BL, fixed_BL, trace=trace)


def sample(
    model: Model,
    key: Key[Array, "..."],
    *,
    num: int = 1,
    length: int | None = None,
    sampler: str | Sampler = "tweedie",
    clamp: Clamp | Sequence[Clamp] | None = None,
    trace: bool = False,
    **options,
) -> SampleResult:
    """Draw ``num`` sequences of ``length`` tokens (default: the training length).

    ``key`` is one key, from which each sequence gets its own, or one key a sequence. ``clamp`` is
    one for all or one a sequence; sequences of different lengths share a batch, padded and masked.
    ``options`` are the sampler's, such as ``steps=128``. UserError on an unknown sampler or option.
    """
    if num < 1:
        raise UserError(f"num must be at least 1, got {num}")
    if clamp is None:
        clamp = free(model.length if length is None else length)
    elif length is not None:
        raise UserError("a clamp has a length of its own: give no length beside it")
    clamps = list(clamp) if isinstance(clamp, Sequence) else [clamp]
    keys_B = key if key.ndim else jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(num))
    num = len(keys_B)
    if len(clamps) == 1:
        clamps = clamps * num
    if len(clamps) != num:
        raise UserError(f"{len(clamps)} clamps for {num} sequences")
    if isinstance(sampler, str):
        sampler = build("samplers", sampler, schedule=model.schedule, **options)
    elif options:
        raise UserError(f"the sampler is built already: it takes no {', '.join(options)}")
    lengths = [c.length for c in clamps]
    longest = max(lengths)
    tokens_BL = np.zeros((num, longest), np.int32)
    fixed_BL = np.ones((num, longest), bool)  # padding is fixed: it is never drawn
    segment_BL = np.zeros((num, longest), np.int32)
    for row, c in enumerate(clamps):
        tokens_BL[row, : c.length], fixed_BL[row, : c.length] = c.tokens_L, c.fixed_L
        segment_BL[row, : c.length] = 1
    attend = None if min(lengths) == longest else Attend(segment_BL=jnp.asarray(segment_BL))
    samples = _run_sampler(
        sampler,
        model.parts.denoiser(model.denoiser.params, attend),
        keys_B,
        jnp.asarray(tokens_BL),
        jnp.asarray(fixed_BL),
        trace=trace,
    )
    tokens = np.asarray(samples.tokens_BL)
    text = None
    if model.tokenizer is not None:
        text = [model.tokenizer.decode(row[:n]) for row, n in zip(tokens, lengths, strict=True)]
    return SampleResult(
        tokens=tokens,
        calls=np.asarray(samples.calls_B),
        text=text,
        trace=None if samples.trace_TBL is None else np.asarray(samples.trace_TBL),
        times=None if samples.times_T is None else np.asarray(samples.times_T),
    )


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
