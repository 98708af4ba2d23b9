"""Measures the curve h of a ``Price``: h(j) is the nats of an unknown token, given j known ones.

h is estimated by k-DCE's draws. All sequences are measured at the same numbers of known tokens, so
that every figure of a price is a mean over sequences, with a standard error that contains the
covariances between the h(j) and the noise of the draws.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from sedd.arrays import fold
from sedd.denoiser import Denoiser
from sedd.errors import FieldError, UserError
from sedd.evaluation.bound import estimates
from sedd.evaluation.price import Price
from sedd.evaluation.stratified import tile
from sedd.objectives.base import Corrupted
from sedd.objectives.k_dce import KDCE
from sedd.samplers.noise import random_rank
from sedd.schedules import NoiseSchedule
from sedd.types import Array, Key

LEVELS = 128  # most numbers of known tokens that are measured; more draws repeat them
TURN = 1.5  # of 1 to 5 it had the smallest errors of sums and differences; see ``ProfileDraws``
FOLDS = 8  # parts of the sequences; a plan of all others is priced on each of them


@dataclass(frozen=True, kw_only=True)
class ProfileDraws:
    """Estimates h at some numbers of known tokens for each sequence of a batch.

    Args:
        known: the numbers of known tokens.
        repeats: independent draws of each.
    """

    known: tuple[int, ...]
    repeats: int

    def __call__(self, denoiser, schedule, keys_B, x0_BL, scored_BL) -> Array:
        """The mean nats of the masked tokens at each level, [B, J]; one network call for each draw.

        The masks of one repeat are arcs of one random circular order of the positions. Each arc is
        a uniformly random subset. As more tokens are known, the beginning of the arc moves forward
        by TURN positions for each of them, and its end by TURN - 1. Neighbouring levels thus share
        most of their masks, and the differences between them, on which plans depend, are precise;
        over all levels every position is masked about equally often, as in the bound's draws.
        """
        objective = KDCE(schedule=schedule, parameterization=denoiser.parameterization)
        batch, length = x0_BL.shape

        def repeat(r):
            place_BL = random_rank(fold(keys_B, r), scored_BL)

            def measure(known):
                arc = (length, TURN * known, length - known)
                masked_BL = tile(place_BL, *(jnp.full(batch, value) for value in arc))
                corrupted = Corrupted(
                    xt_BL=jnp.where(masked_BL, denoiser.mask_id, x0_BL),
                    weight_BL=masked_BL / (length - known),
                )
                nats_BL = objective.nats(denoiser.network, denoiser.params, corrupted, x0_BL)
                return nats_BL.sum(-1)

            return jax.lax.map(measure, jnp.asarray(self.known, jnp.float32))

        return jax.lax.map(repeat, jnp.arange(self.repeats)).mean(0).T


def measure_price(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    key: Key[Array, ""],
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    model: str,
    length: int,
    draws: int,
) -> Price:
    """Measure the price profile of a model on sequences of one length.

    Network calls: ``draws`` for each sequence, or the largest multiple of the levels below it.

    Args:
        denoiser: the model.
        schedule: its noise schedule.
        key: the draws of a sequence depend on this key and on its place in the data alone.
        batches: pairs of tokens x0_BL and of positions to score, which must be all positions.
        model: the digest of the model.
        length: tokens in a sequence.
        draws: network calls for each sequence, at least 2. If there are as many as tokens, h is
            measured at every number of known tokens (up to ``LEVELS`` of them); see ``levels``.

    Raises:
        FieldError: if ``draws`` is below 2.
        UserError: if the model is not a time-independent absorbing one, a position is not scored,
            or positions differ in their noise.
    """
    check_model(denoiser)
    if schedule.by_position:
        raise UserError(
            "the price of parallelism is that of uniformly random orders, and the schedule "
            "by_position of this model draws others"
        )
    if draws < 2:
        raise FieldError("draws", f"must be at least 2, got {draws}")
    known_J = levels(length, draws)
    estimate = ProfileDraws(known=tuple(known_J.tolist()), repeats=draws // len(known_J))
    parts = []
    for _, scored_BL, nats in estimates(denoiser, schedule, key, batches, estimate):
        check_scored(scored_BL.all())
        parts.append(np.asarray(nats, np.float64))
    if not parts:
        raise ValueError("there is no sequence to measure")
    nats_SJ = np.concatenate(parts)
    folds = min(FOLDS, len(nats_SJ))
    size, count = nats_SJ.shape
    covariance_JJ = np.full((count, count), math.nan)
    if size > 1:
        covariance_JJ = np.atleast_2d(np.cov(nats_SJ, rowvar=False)) / size
    return Price(
        model=model,
        length=length,
        known_J=known_J,
        nats_FJ=np.stack([nats_SJ[fold::folds].mean(0) for fold in range(folds)]),
        covariance_JJ=covariance_JJ,
        num_sequences=size,
        draws=estimate.repeats * count,
    )


def levels(length: int, draws: int) -> np.ndarray:
    """Return the numbers of known tokens at which h is measured, from 0 to ``length`` - 1.

    All of them if ``draws`` and ``LEVELS`` allow it. Otherwise they are dense at both ends
    (Chebyshev's points): near 0 h falls steeply, and near L few tokens are averaged in a draw.
    """
    count = min(length, draws, LEVELS)
    if count == length:
        return np.arange(length)
    angle_J = np.linspace(0, math.pi, count)
    return np.unique(np.round((length - 1) * (1 - np.cos(angle_J)) / 2).astype(int))


def check_model(denoiser: Denoiser) -> None:
    """Raise UserError unless the model is time-independent, absorbing, and draws in any order."""
    if denoiser.causal:
        raise UserError(
            "an autoregressive model has no price of parallelism: it draws one token a call"
        )
    if denoiser.block is not None:
        raise UserError(
            "the price of parallelism is that of random orders of a whole text, and a block model "
            "draws its blocks from left to right"
        )
    if not denoiser.process.absorbing or not denoiser.time_independent:
        raise UserError(
            "the price of parallelism needs a time-independent absorbing model, and this one is of "
            "another process or depends on the noise level"
        )


def check_scored(whole: bool | np.bool) -> None:
    """Raise UserError if not all tokens are scored: h is defined for texts of one length."""
    if not whole:
        raise UserError(
            "some rows have padding or given tokens, and the price is that of texts of one length; "
            "--cut wrapped makes full rows of a corpus"
        )
