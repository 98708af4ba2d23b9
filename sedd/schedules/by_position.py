"""Log-linear noise with a speed of its own at each position of a text."""

import math
from dataclasses import dataclass
from functools import lru_cache

import jax.numpy as jnp

from sedd.errors import FieldError
from sedd.schedules.log_linear import LogLinear
from sedd.types import Array, Float

CORPUS = "corpus"  # in place of numbers: weights are to be measured on the training text
EXPECTED = "positive numbers separated by commas, one for each position"


@dataclass(frozen=True, kw_only=True)
class ByPosition(LogLinear):
    """1 - exp(-σ_i) = λ^w_i at position i, with λ = (1 - eps)·t and the weight w_i of the position.

    On the absorbing process position i is masked with probability λ^w_i. Going back in time,
    masked positions are revealed one by one, the next one being i with probability w_i over the
    sum of the weights of all masked positions. Positions with large weights tend to come first, and
    equal weights are the uniformly random orders of ``log_linear``. The bound of t-DCE is the
    expected NLL over these orders. It is a bound for any weights, and another one for each. The
    same idea for values instead of positions is in arXiv:2406.04329.

    ``sigma`` and ``rate`` are those of a position of weight 1.
    """

    weights: str = ""
    """The weights of positions 0, 1, …: numbers above 0, separated by commas. Positions behind
    them, in longer texts, have the weight 1; empty means 1 for all. In training this may also be
    the name of a file with one number for each position of a row, or the word "corpus". With it the
    weight of a position is the entropy of its token over the training rows, divided by the mean of
    all positions, at least 0.05. The training command replaces both by the numbers, which the saved
    configuration holds."""

    def __post_init__(self):
        super().__post_init__()
        numbers(self.weights)

    @property
    def by_position(self):
        return bool(numbers(self.weights))

    def powers(self, length):
        given = numbers(self.weights)[:length]
        return jnp.asarray([*given, *[1.0] * (length - len(given))], float)

    def check_length(self, length: int) -> None:
        """Raise FieldError if there are weights, but not one for each position of a row."""
        count = len(numbers(self.weights))
        if count not in (0, length):
            raise FieldError(
                "weights", f"must be {length} numbers, one for each position of a row, got {count}"
            )

    def at_positions(self, t_B, length):
        if not self.by_position:
            return super().at_positions(t_B, length)
        w_1L, log_lambda_B1 = self.powers(length)[None], jnp.log((1 - self.eps) * t_B)[:, None]
        log_moved_BL = w_1L * log_lambda_B1
        # -log(1 - λ^w): the first form is accurate for a small λ^w, the second for one near 1.
        sigma_BL = jnp.where(
            log_moved_BL < -0.7,
            -jnp.log1p(-jnp.exp(log_moved_BL)),
            -jnp.log(-jnp.expm1(log_moved_BL)),
        )
        rate_BL = w_1L * jnp.exp(log_moved_BL + sigma_BL) / t_B[:, None]
        return sigma_BL, rate_BL


@lru_cache
def numbers(text: str) -> tuple[float, ...]:
    """The numbers of a list separated by commas; none of an empty text, and of ``CORPUS``.

    Raises:
        FieldError: unless all are finite and above 0.
    """
    if text in ("", CORPUS):
        return ()
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise FieldError(
            "weights", f"must be {EXPECTED}, or a file of them, got {text[:60]!r}"
        ) from None
    for place, value in enumerate(found):
        if not (0 < value < math.inf):
            raise FieldError("weights", f"must be {EXPECTED}, got {value} at position {place}")
    return found


def spelled(values: Float[Array, " L"]) -> str:
    """The option ``weights`` for these numbers, to five digits."""
    return ",".join(f"{value:.5g}" for value in values)


make = ByPosition
