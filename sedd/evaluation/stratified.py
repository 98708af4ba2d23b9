"""Random noise levels and masks whose mean varies less than that of independent ones.

A mean over independent random noise levels would need many network calls. Three measures reduce its
variance and leave its expectation as it is: the levels are stratified and antithetic (``level``),
they are dense where few positions are masked (``toward_few_masks``), and the masks of consecutive
levels tile the sequence (``tile``). ``benchmarks/bound_variance.py`` measures each of them.
"""

import jax.numpy as jnp

from sedd.arrays import along
from sedd.types import Array, Bool, Float, Int


def level(shared_u_B: Float[Array, " B"], k: Int[Array, ""], strata: int) -> Float[Array, " B"]:
    """Return the k-th of ``strata`` ascending levels in [0, 1), one in each of equal intervals.

    Neighbouring levels are antithetic: one lies u into its interval, the next 1 - u into its own.
    The errors of a linear integrand then cancel. ``shared_u_B`` is u, uniform in [0, 1).
    """
    return (k + jnp.where(k % 2 == 0, shared_u_B, 1 - shared_u_B)) / strata


def toward_few_masks(u: Float[Array, "*b"]) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """Turn uniform levels into levels of density 1/(2√u), and return their importance weights.

    The mean loss over a mask of few positions is the noisiest, with a variance that grows as 1/u;
    this density takes more draws there. It does not help a single draw, since the weights vary and
    no other draws compensate for them.
    """
    return jnp.minimum(u**2, 1 - 2.0**-24), 2 * u


def tile(
    place_BL: Float[Array, "B L"] | Int[Array, "B L"],
    period_B: Float[Array, " B"] | Int[Array, " B"],
    begin_B: Float[Array, " B"],
    size: Float[Array, "..."],
) -> Bool[Array, "B L"]:
    """Choose the positions whose place lies within ``size`` after ``begin``, around a circle.

    Each position has a place on a circle of length ``period``. If the places are a random order of
    the positions (0, 1, …, period - 1), the result is a uniformly random subset of ``size``
    positions; if they are independent and uniform in [0, 1) with period 1, each position is chosen
    independently with probability ``size``. Both hold for any ``begin``. Masks that begin where the
    one before ended cover all positions equally often, so positions that are hard to predict are
    counted no more often than the others.

    ``size`` is [B], or [B, L] where positions are chosen with probabilities of their own.
    """
    around_BL = (place_BL - begin_B[:, None]) % jnp.maximum(period_B, 1)[:, None]
    return around_BL < along(size, around_BL)
