"""A trained model: loaded, asked for its scores, and evaluated."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sedd.build import Parts, build_parts
from sedd.config import Config
from sedd.data.tokenizers import Tokenizer, tokenizer_from_json
from sedd.denoiser import Denoiser
from sedd.errors import UserError
from sedd.evaluation.bound import BoundResult, evaluate_bound
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
