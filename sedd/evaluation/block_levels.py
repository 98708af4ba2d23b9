"""The range of noise levels in which the loss of a block model varies least. arXiv:2503.09573.

The objective ``block`` draws the probability of a mask of each block from a range. A smaller range
than (0, 1] may lower the variance of the loss, and with it that of the gradient.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sedd.arrays import fold
from sedd.denoiser import Denoiser
from sedd.evaluation.bound import estimates
from sedd.objectives.block import Block
from sedd.parameterizations.block import cut
from sedd.schedules import LogLinear
from sedd.types import Array, Key

STEPS = 20  # ranges begin and end at multiples of 1/20
NARROWEST = 10  # the width of the narrowest range, in such steps: .5


class Levels(NamedTuple):
    """A range of levels, and how the loss of a block varies in it."""

    low: float
    high: float
    variance_ratio: float
    """The variance divided by that in (0, 1]."""


def least_variance(
    denoiser: Denoiser,
    objective: Block,
    key: Key[Array, ""],
    batches: Iterable[tuple[np.ndarray, ...]],
    *,
    draws: int = 4,
) -> Levels:
    """Find the range of levels of width .5 or more in which the loss of a block varies least.

    The variance is that of the loss of a block over blocks, sequences and draws, as in the paper.
    A level that is uniform in (0, 1] is uniform in a range if it lies there, so that the same draws
    serve all ranges.

    Args:
        denoiser: the model.
        objective: the objective of its training, whose own range makes no difference.
        key: the key of sequence i is ``fold_in(key, i)``.
        batches: pairs of tokens x0_BL and of scored_BL.
        draws: network calls for each sequence.
    """
    every = replace(objective, min_level=0.0, max_level=1.0)
    estimate = BlockDraws(objective=every, draws=draws)
    found = [pairs for *_, pairs in estimates(denoiser, LogLinear(), key, batches, estimate)]
    level_R, nats_R = np.concatenate([pairs.reshape(-1, 2) for pairs in found]).T
    kept_R = ~np.isnan(nats_R)
    return narrowed(level_R[kept_R].astype(np.float64), nats_R[kept_R].astype(np.float64))


def narrowed(level_R: np.ndarray, nats_R: np.ndarray) -> Levels:
    """Choose the range with the least variance of the losses whose level lies in it.

    Args:
        level_R: the levels of R draws, in (0, 1].
        nats_R: their losses.
    """
    whole, best = nats_R.var(), Levels(0.0, 1.0, 1.0)
    for first in range(STEPS - NARROWEST + 1):
        for last in range(first + NARROWEST, STEPS + 1):
            low, high = first / STEPS, last / STEPS
            inside_R = nats_R[(level_R > low) & (level_R <= high)]
            ratio = inside_R.var() / whole if len(inside_R) > 1 and whole > 0 else 1.0
            best = min(best, Levels(low, high, float(ratio)), key=lambda each: each.variance_ratio)
    return best


@dataclass(frozen=True, kw_only=True)
class BlockDraws:
    """The estimate of ``least_variance``: level and loss of each block, [B, D, blocks, 2].

    The loss of a block in which nothing is scored is nan.
    """

    objective: Block
    draws: int

    def __call__(self, denoiser, schedule, keys_B, x0_BL, scored_BL):
        batch, block = len(x0_BL), self.objective.block

        def of_blocks(values_BL):
            return cut(values_BL, block, 0).sum(-1).reshape(batch, -1)

        def draw(number):
            draw_keys_B = fold(keys_B, number)
            u_B = (jax.vmap(jax.random.uniform)(keys_B) + number) / self.draws
            level_BN = self.objective.levels(draw_keys_B, u_B, x0_BL.shape[1])
            corrupted = self.objective.corrupt(draw_keys_B, u_B, x0_BL, scored_BL)
            nats_BL = self.objective.nats(denoiser.network, denoiser.params, corrupted, x0_BL)
            nats_BN = jnp.where(of_blocks(scored_BL) > 0, of_blocks(nats_BL), jnp.nan)
            return jnp.stack([level_BN, nats_BN], -1)

        return jnp.moveaxis(jax.lax.map(draw, jnp.arange(self.draws)), 0, 1)
