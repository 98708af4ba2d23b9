"""Estimates of the bound on -log p(x0) of single sequences, inside compiled programs.

There is one estimator for each kind of model:

- ``k_dce``, for time-independent absorbing models: the expected NLL over all orders of the tokens
  (arXiv:2406.03736, equation 3.10). It has no other terms. For a block model these are the orders
  within each block, and one network call has a number of masks for every block.
- ``t_dce``, for the same models if the positions differ in their noise (the schedule
  ``by_position``): the expected NLL over the orders of this noise. It has no other terms.
- ``score_entropy``, for every diffusion model: the integral of the score entropy over t in
  [t_min, 1], the KL divergence of the prior, and the reconstruction of x0 from the tokens at t_min
  (arXiv:2310.16834, theorem 3.6). Without the last two terms the sum is not a bound.
- ``exact``, for autoregressive models and for block models with blocks of one position: the
  likelihood itself, in one network call.
- ``ordered``, for time-independent absorbing models: the likelihood of the tokens in one order, or
  averaged over several random orders (``sedd.evaluation.ordered``).

The noise levels of one estimate are spread so that their mean varies little
(``sedd.evaluation.stratified``). The draws then depend on each other, so their spread does not give
the error of their mean. They are therefore split into four independent replicates, whose spread
does. ``sedd.evaluation.bound`` sums up a corpus from these estimates.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from sedd.arrays import at, fold
from sedd.denoiser import Denoiser
from sedd.evaluation.estimators import REPLICATES, Estimator, check_draws, resolve
from sedd.evaluation.ordered import Order, nats_over_orders
from sedd.evaluation.stratified import level, tile, toward_few_masks
from sedd.objectives.autoregressive import Autoregressive
from sedd.objectives.base import Corrupted, Objective
from sedd.objectives.block import Block
from sedd.objectives.k_dce import KDCE
from sedd.objectives.score_entropy import ScoreEntropy
from sedd.objectives.t_dce import TDCE
from sedd.parameterizations.block import cut, joined
from sedd.samplers.noise import random_rank
from sedd.schedules import NoiseSchedule
from sedd.types import Array, Bool, Float, Int, Key

GOLDEN = 0.6180339887498949  # multiples of it modulo 1 are spread evenly, however many there are
TINY = 1e-30  # below every noise level that is drawn, so that its weight is finite


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SequenceNats:
    """R independent estimates of each sequence's bound, in nats, as three separate terms.

    The bound is the sum of the terms, averaged over the replicates R. For k-DCE and for an exact
    NLL the prior and the reconstruction are 0; the replicates of an exact NLL are all the same.
    """

    prior_B: Float[Array, " B"]
    diffusion_BR: Float[Array, "B R"]
    reconstruction_BR: Float[Array, "B R"]


def sequence_nats(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    keys_B: Key[Array, " B"],
    x0_BL: Int[Array, "B L"],
    scored_BL: Bool[Array, "B L"],
    *,
    draws: int,
    t_min: float = 1e-3,
    estimator: Estimator = "auto",
    order: Order = "forward",
    orders: int = 1,
) -> SequenceNats:
    """Estimate the bound on -log p(x0) of each sequence, given its positions that are not scored.

    Network calls: ``draws``, and 4 more if there is a reconstruction term; 1 if the NLL is exact;
    for ``ordered`` those of ``nats_over_orders``.

    Args:
        denoiser: the model; its ``attend`` may set padding apart, which must not be scored.
        schedule: its noise schedule.
        keys_B: one key a sequence; an estimate depends on its own key alone.
        x0_BL: clean tokens.
        scored_BL: positions whose tokens are counted; the others are never corrupted.
        draws: noise levels for each sequence; a multiple of 4.
        t_min: the smallest time of a score entropy, in (0, 1).
        estimator: "auto" takes exact for an autoregressive model and for blocks of one position,
            ordered for an any-subset model, k_dce for other time-independent absorbing ones (t_dce
            if the schedule is by_position with weights), and score_entropy for all others.
        order: the order of the estimator ``ordered``.
        orders: how many random orders it averages over.

    Raises:
        FieldError: if ``draws`` is not a positive multiple of 4.
        ValueError: if the model does not have the estimator.
    """
    check_draws(draws)
    estimator = resolve(estimator, denoiser, schedule)
    if estimator == "exact":
        return _exact_nats(denoiser, schedule, keys_B, x0_BL, scored_BL)
    if estimator == "ordered":
        nats_B = nats_over_orders(denoiser, keys_B, x0_BL, scored_BL, order=order, orders=orders)
        return _one_term(nats_B)
    return _sampled_nats(denoiser, schedule, keys_B, x0_BL, scored_BL, draws, t_min, estimator)


def _sampled_nats(
    denoiser, schedule, keys_B, x0_BL, scored_BL, draws, t_min, estimator
) -> SequenceNats:
    """The three terms of k_dce or score_entropy, from random noise levels."""
    diffusion = _Diffusion.of(denoiser, schedule, x0_BL, scored_BL, estimator, t_min)

    def replicate(r):
        u_key_B, place_key_B, draw_key_B, end_key_B = jax.vmap(
            lambda key: jax.random.split(jax.random.fold_in(key, r), 4), out_axes=1
        )(keys_B)
        mean_B = diffusion.mean(u_key_B, place_key_B, draw_key_B, draws // REPLICATES)
        if estimator != "score_entropy":
            return mean_B, jnp.zeros_like(mean_B)
        return mean_B, _reconstruction(denoiser, schedule, end_key_B, x0_BL, scored_BL, t_min)

    diffusion_RB, reconstruction_RB = jax.lax.map(replicate, jnp.arange(REPLICATES))
    prior = _prior(denoiser, schedule) if estimator == "score_entropy" else 0.0
    return SequenceNats(
        prior_B=prior * scored_BL.sum(-1),
        diffusion_BR=diffusion_RB.T,
        reconstruction_BR=reconstruction_RB.T,
    )


def _prior(denoiser: Denoiser, schedule: NoiseSchedule) -> Float[Array, ""]:
    """The prior term of a token, in nats."""
    return denoiser.process.prior_kl(schedule.sigma(jnp.float32(1.0)))


@dataclass(frozen=True, kw_only=True)
class _Diffusion:
    """The diffusion term of a batch of sequences: corruptions and their weighted losses.

    ``lowest`` and ``highest`` are the probabilities of a mask at t_min and at 1. On an absorbing
    process the level of a score entropy is drawn between them, and the schedule cancels.
    """

    denoiser: Denoiser
    schedule: NoiseSchedule
    x0_BL: Int[Array, "B L"]
    scored_BL: Bool[Array, "B L"]
    objective: Objective
    t_min: float
    lowest: Float[Array, ""]
    highest: Float[Array, ""]

    @classmethod
    def of(cls, denoiser, schedule, x0_BL, scored_BL, estimator, t_min) -> "_Diffusion":
        """Choose the objective of the estimator, and compute the range of mask probabilities."""
        common = {"schedule": schedule, "parameterization": denoiser.parameterization}
        if estimator == "k_dce":
            objective = (KDCE if denoiser.block is None else Block)(**common)
        elif estimator == "t_dce":
            objective = TDCE(**common)
        else:
            objective = ScoreEntropy(**common, t_min=t_min)
        lowest, highest = (-jnp.expm1(-schedule.sigma(jnp.float32(t))) for t in (t_min, 1.0))
        if estimator == "t_dce":
            lowest, highest = jnp.zeros_like(lowest), jnp.ones_like(highest)
        return cls(
            denoiser=denoiser,
            schedule=schedule,
            x0_BL=x0_BL,
            scored_BL=scored_BL,
            objective=objective,
            t_min=t_min,
            lowest=lowest,
            # In float32 σ(1) may round the probability to 1, whose σ is infinite.
            highest=jnp.minimum(highest, 1 - 2.0**-22),
        )

    @property
    def any_order(self) -> bool:
        """Whether the level is a number of masks (k-DCE), and not a time."""
        return isinstance(self.objective, KDCE | Block)

    @property
    def block(self) -> int:
        """Positions of which the level determines how many are masked: a block, or all."""
        length = self.x0_BL.shape[1]
        return min(self.denoiser.block or length, length)

    def mean(self, u_key_B, place_key_B, draw_key_B, strata: int) -> Float[Array, " B"]:
        """The mean over ``strata`` noise levels of one replicate, in nats of a sequence.

        All levels share one uniform draw and one assignment of places to positions. Consecutive
        masks start where the one before ended, so the scan carries that place along. The R blocks
        of the batch, B if a sequence is one block, have their own levels and masks.
        """
        absorbing = self.denoiser.process.absorbing
        shared_u_R = self._shared_levels(u_key_B)
        place_RW = self._places(place_key_B)

        def draw(carry, k):
            total_B, begin_R = carry
            u_R, density_R = level(shared_u_R, k, strata), jnp.ones_like(shared_u_R)
            if absorbing and strata > 1:
                u_R, density_R = toward_few_masks(u_R)
            if absorbing:
                corrupted, begin_R = self._mask(u_R, density_R, place_RW, begin_R)
            else:
                keys_B = fold(draw_key_B, k)
                corrupted = self._corrupt(u_R, keys_B)
            nats_BL = self.objective.nats(
                self.denoiser.network, self.denoiser.params, corrupted, self.x0_BL
            )
            return (total_B + nats_BL.sum(-1), begin_R), None

        start = (jnp.zeros(self.x0_BL.shape[0]), jnp.zeros_like(shared_u_R))
        (total_B, _), _ = jax.lax.scan(draw, start, jnp.arange(strata))
        return total_B / strata

    def _shared_levels(self, key_B):
        """One uniform draw for each block, [R]; those of a sequence are spread over [0, 1).

        The errors of the blocks then do not add up, as they would if all had the same level.
        """
        u_B = jax.vmap(jax.random.uniform)(key_B)
        blocks = jnp.arange(-(-self.x0_BL.shape[1] // self.block))
        return ((u_B[:, None] + GOLDEN * blocks[None]) % 1.0).reshape(-1)

    def _places(self, key_B):
        """The place of each position on the circle of ``tile``: a random rank, or uniform draws."""
        length = self.x0_BL.shape[1]
        if not self.any_order:
            return jax.vmap(lambda key: jax.random.uniform(key, (length,)))(key_B)
        rank_RW = cut(random_rank(key_B, self.scored_BL), self.block, length)
        return jnp.argsort(jnp.argsort(rank_RW, 1), 1)

    def _mask(self, u_R, density_R, place_RW, begin_R) -> tuple[Corrupted, Float[Array, " R"]]:
        """Mask the positions that come next; returns where the next mask begins as well.

        For k-DCE the size of a mask is the number of its positions, uniform in 1..W in a block of W
        scored positions; otherwise it is the probability λ of a mask, uniform between its values at
        t_min and 1. The integral of the score entropy over t has the measure
        rate(t) dt = dσ = dλ/(1 - λ). For t-DCE λ is uniform in [0, 1], position i is masked with
        probability λ^w_i, and its weight is w_i/λ.
        """
        batch, length = self.x0_BL.shape
        scored_RW = cut(self.scored_BL, self.block, False)
        scored_R = scored_RW.sum(-1)
        if self.any_order:
            period_R, sigma_R = scored_R, None
            size_R = jnp.minimum(1 + jnp.floor(u_R * scored_R), scored_R)
            weight_R = scored_R / jnp.maximum(size_R, 1)
        else:
            period_R = jnp.ones_like(scored_R)
            size_R = self.lowest + (self.highest - self.lowest) * u_R
            sigma_R = -jnp.log1p(-size_R)
            weight_R = (self.highest - self.lowest) / (1 - size_R)
        size, powers_1L = size_R, None
        if isinstance(self.objective, TDCE):
            powers_1L = self.schedule.powers(length)[None]
            sigma_R, weight_R = None, 1 / jnp.maximum(size_R, TINY)
            size = size_R[:, None] ** powers_1L
        masked_RW = scored_RW & tile(place_RW, period_R, begin_R, size)
        xt_BL = jnp.where(joined(masked_RW, batch, length), self.denoiser.process.mask, self.x0_BL)
        end_R = (begin_R + size_R) % jnp.maximum(period_R, 1)
        weight_RW = jnp.broadcast_to((density_R * weight_R)[:, None], scored_RW.shape)
        if powers_1L is not None:
            weight_RW = weight_RW * powers_1L
        return self._weighted(xt_BL, joined(weight_RW, batch, length), sigma_R), end_R

    def _corrupt(self, u_B, keys_B) -> Corrupted:
        """Corrupt the tokens at a time that is uniform in [t_min, 1]."""
        t_B = self.t_min + (1 - self.t_min) * u_B
        sigma_B, weight_B = self.schedule.sigma(t_B), (1 - self.t_min) * self.schedule.rate(t_B)
        noisy_BL = self.denoiser.process.corrupt(keys_B, self.x0_BL, sigma_B)
        xt_BL = jnp.where(self.scored_BL, noisy_BL, self.x0_BL)
        return self._weighted(xt_BL, weight_B[:, None], sigma_B)

    def _weighted(self, xt_BL, weight_BL, sigma_B) -> Corrupted:
        """Give the weight to the scored positions that can still change."""
        counts_BL = self.scored_BL & self.denoiser.process.can_move(xt_BL)
        return Corrupted(
            xt_BL=xt_BL,
            weight_BL=jnp.where(counts_BL, weight_BL, 0.0),
            sigma=sigma_B,
            attend=self.denoiser.attend,
        )


def _exact_nats(denoiser, schedule, keys_B, x0_BL, scored_BL) -> SequenceNats:
    """-log p(x0) of an autoregressive model, or of a model with blocks of one position."""
    common = {"schedule": schedule, "parameterization": denoiser.parameterization}
    # A block of one position is masked in every draw at the level 1.
    objective = Autoregressive(**common) if denoiser.causal else Block(**common, min_level=1.0)
    zero_B = jnp.zeros(len(x0_BL))
    corrupted = objective.corrupt(keys_B, zero_B, x0_BL, scored_BL)
    corrupted = replace(corrupted, attend=denoiser.attend)
    nats_BL = objective.nats(denoiser.network, denoiser.params, corrupted, x0_BL)
    return _one_term(nats_BL.sum(-1))


def _one_term(nats_B: Float[Array, " B"]) -> SequenceNats:
    """Nats that are no sum of terms; all replicates are the same, so that their spread is 0."""
    nats_BR = jnp.repeat(nats_B[:, None], REPLICATES, 1)
    return SequenceNats(
        prior_B=jnp.zeros_like(nats_B),
        diffusion_BR=nats_BR,
        reconstruction_BR=jnp.zeros_like(nats_BR),
    )


def _reconstruction(denoiser, schedule, keys_B, x0_BL, scored_BL, t_min) -> Float[Array, " B"]:
    """-log p(x0 | xt at t_min), where p is the last denoising step of the τ-leaping samplers.

    The output layer is read a chunk of rows at a time, at the positions that can still change.
    """
    process = denoiser.process
    sigma_B = jnp.full(x0_BL.shape[0], schedule.sigma(jnp.float32(t_min)))
    xt_BL = jnp.where(scored_BL, process.corrupt(keys_B, x0_BL, sigma_B), x0_BL)
    hidden = denoiser.hidden(xt_BL, sigma_B)

    def nats(rows):
        log_score_RV = denoiser.log_score_rows(hidden, xt_BL, sigma_B, rows)
        log_probs_RV = process.denoise(log_score_RV, rows.pick(xt_BL), rows.pick(sigma_B))
        return -at(log_probs_RV, rows.pick(x0_BL))

    unknown_BL = scored_BL & process.can_move(xt_BL)
    return denoiser.map_rows(unknown_BL, nats, sigma_B.dtype).sum(-1)


@dataclass(frozen=True, kw_only=True)
class MonteCarlo:
    """Estimates the bound on -log p of each sequence of a batch.

    Instances are hashable, and equal options share one compiled program.

    Args:
        draws: noise levels for each sequence; a multiple of 4, else ``FieldError``.
        t_min: the smallest time of a score entropy, in (0, 1).
        estimator: "k_dce", "t_dce", "score_entropy", "exact", or "ordered" (the exact NLL in one
            order). "auto" is exact for autoregressive models and blocks of one position, ordered
            for any-subset models, k_dce for other time-independent absorbing ones (t_dce if the
            schedule has weights of positions), score_entropy else.
        order: "forward", "backward" or "random", for the estimator ordered.
        orders: number of random orders over which the estimator ordered averages the likelihood.
    """

    draws: int = 16
    t_min: float = 1e-3
    estimator: Estimator = "auto"
    order: Order = "forward"
    orders: int = 1

    def __post_init__(self):
        check_draws(self.draws)

    def __call__(self, denoiser, schedule, keys_B, x0_BL, scored_BL) -> SequenceNats:
        """Estimate each sequence's bound; the arguments are those of ``sequence_nats``."""
        return sequence_nats(denoiser, schedule, keys_B, x0_BL, scored_BL, **vars(self))
