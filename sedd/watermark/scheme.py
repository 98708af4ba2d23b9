"""A watermarking scheme: the secret and the kind of watermark, and which tokens carry it."""

import math
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np

from sedd.constraints.clamp import Clamp
from sedd.constraints.spans import Span
from sedd.errors import FieldError, UserError
from sedd.watermark.base import Watermark
from sedd.watermark.green import Green
from sedd.watermark.gumbel import Gumbel
from sedd.watermark.prf import key_of

Kind = Literal["gumbel", "green"]


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How texts are watermarked, and by which secret.

    Args:
        secret: the secret; ``read_secret`` reads it from a file. It is not shown by ``repr``.
        kind: ``gumbel`` draws tokens with noise that is a function of the secret and leaves the
            law of a text as it is; ``green`` makes tokens of green lists likelier.
        delta: the strength of ``green`` in nats, above 0.
        gamma: the share of the vocabulary in a green list, a multiple of 1/256 in (0, 1).

    Raises:
        FieldError: if a value is out of its range.

    Example:
        >>> import sedd
        >>> model = sedd.load("runs/tiny")
        >>> scheme = sedd.watermark.Scheme(secret=b"any bytes that nobody guesses")
        >>> result = sedd.sample(model, 0, num=2, watermark=scheme)
        >>> text, nonce = result.tokens[1], int(result.nonces[1])
        >>> found = sedd.watermark.detect(text, scheme.secret, nonces=[nonce])
        >>> found.scored == len(text)
        True
    """

    secret: bytes = field(repr=False)
    kind: Kind = "gumbel"
    delta: float = 2.0
    gamma: float = 0.5

    def __post_init__(self):
        if not isinstance(self.secret, bytes) or not self.secret:
            raise FieldError("secret", "must be bytes, at least one")
        if self.kind not in get_args(Kind):
            raise FieldError("kind", f"must be one of {', '.join(get_args(Kind))}, got {self.kind}")
        if not 0 < self.delta < math.inf:
            raise FieldError("delta", f"must be finite and above 0, got {self.delta}")
        check_gamma(self.gamma)

    def batch(self, nonce_B: np.ndarray, scored_BL: np.ndarray) -> Watermark:
        """The watermark of a batch.

        Args:
            nonce_B: the nonce of each sequence, in [0, 2³²).
            scored_BL: the positions that are drawn and not constrained.
        """
        size = len(nonce_B)
        key_BW = jnp.asarray(np.tile(key_of(self.secret, self.kind), (size, 1)))
        if self.kind == "gumbel":
            return Gumbel(
                key_BW=key_BW,
                nonce_B=jnp.asarray(nonce_B, jnp.uint32),
                candidate_B=jnp.zeros(size, jnp.uint32),
            )
        return Green(
            key_BW=key_BW,
            scored_BL=jnp.asarray(scored_BL),
            delta_B=jnp.full(size, self.delta, jnp.float32),
            threshold_B=jnp.full(size, round(256 * self.gamma), jnp.int32),
        )


def check_gamma(gamma: float, field: str = "gamma") -> None:
    """Raise FieldError, of this field, unless ``gamma`` is a multiple of 1/256 in (0, 1)."""
    if not (0 < gamma < 1 and 256 * gamma == round(256 * gamma)):
        raise FieldError(field, f"must be a multiple of 1/256 between 0 and 1, got {gamma}")


def read_secret(path: Path) -> bytes:
    """Read a secret from a file; white space around it is not part of it.

    Raises:
        UserError: the file cannot be read, or holds nothing but white space.
    """
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if not secret:
        raise UserError(
            f"{path}: the file is empty, and a watermark needs a secret (such as a line of "
            "`openssl rand -hex 32`)"
        )
    return secret


def is_readable_by_all(path: Path) -> bool:
    """Whether every user of the machine may read a file."""
    return bool(path.stat().st_mode & stat.S_IROTH)


def drawn_positions(clamp: Clamp, spans: Sequence[Span]) -> np.ndarray:
    """Positions of a sequence that are drawn one by one: neither given nor constrained, [L]."""
    drawn_L = ~clamp.fixed_L
    for span in spans:
        drawn_L[span.start : span.start + span.length] = False
    return drawn_L


def scored_positions(
    tokens_L: np.ndarray, clamp: Clamp, spans: Sequence[Span], stop_ids: Sequence[int]
) -> np.ndarray:
    """Positions of a drawn sequence that carry a watermark, [L].

    Args:
        tokens_L: the drawn sequence.
        clamp: its given tokens.
        spans: its spans under a constraint.
        stop_ids: tokens that end a text: the sampler has copied the first one that it drew to all
            free positions behind it.
    """
    scored_L = drawn_positions(clamp, spans)
    ends = np.flatnonzero(~clamp.fixed_L & np.isin(tokens_L, stop_ids))
    if len(ends):
        scored_L[ends[0] + 1 :] = False
    return scored_L


def runs_of(scored_L: np.ndarray) -> list[list[int]]:
    """The runs of True as [first, end] pairs, the end excluded."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], scored_L, [False]]).astype(np.int8)))
    return edges.reshape(-1, 2).tolist()


def positions_of(runs: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """The inverse of ``runs_of``: which of ``length`` positions lie in a run, [L]."""
    scored_L = np.zeros(length, bool)
    for first, end in runs:
        scored_L[first:end] = True
    return scored_L
