"""The bound on -log p(x0), by Monte Carlo, with its errors. See ``docs/evaluation.md``.

Time-independent absorbing models: the expected NLL over all orders, estimated by stratified k-DCE;
it has no other terms. Every other model: KL of the prior, the integral of the score entropy over
t in [t_min, 1], and the reconstruction at t_min; left out, any of them makes it no bound at all.
Autoregressive models have no bound but the likelihood itself, in one call.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sedd.denoiser import Denoiser
from sedd.objectives.autoregressive import Autoregressive
from sedd.objectives.base import Objective
from sedd.objectives.k_dce import KDCE
from sedd.objectives.score_entropy import ScoreEntropy
from sedd.processes.base import at
from sedd.schedules import NoiseSchedule
from sedd.types import Array, Bool, Float, Int, Key

REPLICATES = 4  # independent estimates of each sequence's bound; their spread is the draws' error


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SequenceNats:
    """Estimates of one sequence's bound, its three terms apart, in nats for R replicates.

    Where the NLL is exact it is the diffusion term of each replicate, and the others are 0.
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
) -> SequenceNats:
    """The bound of each sequence by itself: positions not scored are given, not modelled.

    The ``draws`` noise levels form 4 independent replicates; within one they are stratified.
    Network calls: ``draws``, and 4 more for models with a reconstruction term; 1 where the NLL is
    exact.
    """
    check_draws(draws)
    if denoiser.causal:
        return _exact_nats(denoiser, schedule, keys_B, x0_BL, scored_BL)
    strata = draws // REPLICATES
    process, parameterization = denoiser.process, denoiser.parameterization
    exact_ends = is_any_order(denoiser)
    objective: Objective = (
        KDCE(schedule=schedule, parameterization=parameterization)
        if exact_ends
        else ScoreEntropy(schedule=schedule, parameterization=parameterization, t_min=t_min)
    )

    def replicate(r):
        replicate_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, r)
        u_key_B, draw_key_B, end_key_B = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(
            replicate_keys_B
        )
        shared_u_B = jax.vmap(jax.random.uniform)(u_key_B)

        def draw(total_B, k):
            corrupted = objective.corrupt(
                jax.vmap(jax.random.fold_in, (0, None))(draw_key_B, k),
                (shared_u_B + k / strata) % 1.0,
                x0_BL,
                scored_BL,
            )
            nats_BL = objective.nats(denoiser.network, denoiser.params, corrupted, x0_BL)
            return total_B + nats_BL.sum(-1), None

        total_B, _ = jax.lax.scan(draw, jnp.zeros(x0_BL.shape[0]), jnp.arange(strata))
        mean_B = total_B / strata
        if exact_ends:
            return mean_B, jnp.zeros_like(mean_B)
        sigma_B = jnp.full(x0_BL.shape[0], schedule.sigma(jnp.float32(t_min)))
        xt_BL = jnp.where(scored_BL, process.corrupt(end_key_B, x0_BL, sigma_B), x0_BL)
        log_score_BLV = denoiser.log_score(xt_BL, sigma_B)
        log_probs_BLV = process.denoise(log_score_BLV, xt_BL, sigma_B[:, None])
        unknown_BL = scored_BL & process.can_move(xt_BL)
        reconstruction_B = -jnp.where(unknown_BL, at(log_probs_BLV, x0_BL), 0.0).sum(-1)
        return (1 - t_min) * mean_B, reconstruction_B

    diffusion_RB, reconstruction_RB = jax.lax.map(replicate, jnp.arange(REPLICATES))
    per_token = 0.0 if exact_ends else process.prior_kl(schedule.sigma(jnp.float32(1.0)))
    return SequenceNats(
        prior_B=per_token * scored_BL.sum(-1),
        diffusion_BR=diffusion_RB.T,
        reconstruction_BR=reconstruction_RB.T,
    )


def _exact_nats(denoiser, schedule, keys_B, x0_BL, scored_BL) -> SequenceNats:
    """-log p(x0) of an autoregressive model, of which every replicate is the same."""
    objective = Autoregressive(schedule=schedule, parameterization=denoiser.parameterization)
    zero_B = jnp.zeros(len(x0_BL))
    corrupted = objective.corrupt(keys_B, zero_B, x0_BL, scored_BL)
    nats_BL = objective.nats(denoiser.network, denoiser.params, corrupted, x0_BL)
    return SequenceNats(
        prior_B=zero_B,
        diffusion_BR=jnp.repeat(nats_BL.sum(-1)[:, None], REPLICATES, 1),
        reconstruction_BR=jnp.zeros((len(x0_BL), REPLICATES)),
    )


def estimator_of(denoiser: Denoiser) -> str:
    """How the NLL is found: "exact", or a bound on it by "k_dce" or "score_entropy"."""
    if denoiser.causal:
        return "exact"
    return "k_dce" if is_any_order(denoiser) else "score_entropy"


def is_any_order(denoiser: Denoiser) -> bool:
    """Whether the bound is the expected NLL over all orders, without prior or reconstruction."""
    masks = denoiser.process.mask_id is not None
    return masks and denoiser.time_independent and not denoiser.causal


def check_draws(draws: int) -> None:
    """Raise ValueError unless ``draws`` splits evenly into the replicates."""
    if draws < REPLICATES or draws % REPLICATES:
        raise ValueError(f"draws must be a positive multiple of {REPLICATES}, got {draws}")


@dataclass(frozen=True, kw_only=True)
class BoundResult:
    """A bound on the negative log likelihood of a corpus, in nats, and how far to trust it.

    Of an autoregressive model it is the likelihood itself, all of it in ``diffusion``.

    Per-token figures divide by the scored tokens. ``standard_error`` is of ``nats_per_token`` over
    sequences (it contains the Monte-Carlo noise; with a single sequence it is that noise alone);
    ``standard_error_draws`` is over the Monte-Carlo draws for these very sequences.
    """

    nats_per_token: float
    standard_error: float
    standard_error_draws: float
    prior: float  # the three terms, nats per token
    diffusion: float
    reconstruction: float
    nats_per_sequence: float
    num_sequences: int
    num_tokens: int
    draws: int  # 0 where it is exact
    estimator: str  # "k_dce", "score_entropy", or "exact": then it is no bound but the NLL itself
    num_characters: int | None = None  # of the scored text, where the tokenizer knows
    num_bytes: int | None = None
    sequence_nats: np.ndarray | None = None  # [S], each sequence's bound

    @property
    def exact(self) -> bool:
        """Whether it is the negative log likelihood itself, and no bound on it."""
        return self.estimator == "exact"

    @property
    def perplexity(self) -> float:
        """exp(nats per token): an upper bound unless ``exact``, infinite beyond a float."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf

    @property
    def bits_per_character(self) -> float | None:
        return self._bits_per(self.num_characters)

    @property
    def bits_per_byte(self) -> float | None:
        return self._bits_per(self.num_bytes)

    def _bits_per(self, units: int | None) -> float | None:
        if not units:
            return None
        return self.nats_per_token * self.num_tokens / units / math.log(2)

    def to_json(self) -> dict[str, Any]:
        """Every figure, ready for ``json.dump``; the per-sequence nats are left out."""
        fields = {k: v for k, v in vars(self).items() if k != "sequence_nats"}
        fields |= {
            "perplexity": self.perplexity,
            "bits_per_character": self.bits_per_character,
            "bits_per_byte": self.bits_per_byte,
        }
        # JSON knows no infinity.
        return {k: None if v in (math.inf, -math.inf) else v for k, v in fields.items()}


@partial(jax.jit, static_argnames=("schedule", "draws", "t_min"))
def _batch_nats(denoiser, schedule, key, index_B, x0_BL, scored_BL, *, draws, t_min):
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, index_B)
    return sequence_nats(denoiser, schedule, keys_B, x0_BL, scored_BL, draws=draws, t_min=t_min)


def evaluate_bound(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    key: Key[Array, ""],
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    draws: int = 16,
    t_min: float = 1e-3,
    count_text=None,
) -> BoundResult:
    """The bound over batches of (x0_BL, scored_BL), each of any size; no sequence is dropped.

    A sequence's draws depend on its place in the whole, never on the batches: the result is the
    same for every batch size, up to the last bits. ``count_text(ids) -> (characters, bytes)``, if
    given, counts the text of the scored tokens.
    """
    check_draws(draws)
    totals, tokens, priors, diffusions, reconstructions = [], [], [], [], []
    characters = num_bytes = 0
    first, padded = 0, 0
    for x0_BL, scored_BL in batches:
        if not len(x0_BL):
            continue
        size, padded = len(x0_BL), max(padded, len(x0_BL))
        rows = np.resize(np.arange(size), padded)  # a short last batch compiles nothing new
        nats = _batch_nats(
            denoiser,
            schedule,
            key,
            jnp.asarray(first + rows),
            jnp.asarray(x0_BL[rows]),
            jnp.asarray(scored_BL[rows]),
            draws=draws,
            t_min=t_min,
        )
        prior_B, diffusion_BR, reconstruction_BR = (
            np.asarray(a, np.float64)[:size]
            for a in (nats.prior_B, nats.diffusion_BR, nats.reconstruction_BR)
        )
        totals.append(prior_B[:, None] + diffusion_BR + reconstruction_BR)
        priors.append(prior_B)
        diffusions.append(diffusion_BR.mean(-1))
        reconstructions.append(reconstruction_BR.mean(-1))
        tokens.append(scored_BL.sum(-1))
        if count_text is not None:
            counted = count_text(x0_BL[scored_BL])
            characters, num_bytes = characters + counted[0], num_bytes + counted[1]
        first += size
    if not first:
        raise ValueError("there is no sequence to evaluate")
    total_SR, tokens_S = np.concatenate(totals), np.concatenate(tokens).astype(np.float64)
    total_S, num_tokens = total_SR.mean(-1), tokens_S.sum()
    if not num_tokens:
        raise ValueError("no token of these sequences is scored")
    per_token = total_S.sum() / num_tokens
    error_draws = math.sqrt((total_SR.var(-1, ddof=1) / REPLICATES).sum()) / num_tokens
    if first > 1:  # of the ratio of two sums over sequences
        residual_S = total_S - per_token * tokens_S
        error = math.sqrt(first / (first - 1) * (residual_S**2).sum()) / num_tokens
    else:
        error = error_draws
    return BoundResult(
        nats_per_token=float(per_token),
        standard_error=float(error),
        standard_error_draws=float(error_draws),
        prior=float(np.concatenate(priors).sum() / num_tokens),
        diffusion=float(np.concatenate(diffusions).sum() / num_tokens),
        reconstruction=float(np.concatenate(reconstructions).sum() / num_tokens),
        nats_per_sequence=float(total_S.mean()),
        num_sequences=first,
        num_tokens=int(num_tokens),
        draws=0 if denoiser.causal else draws,
        estimator=estimator_of(denoiser),
        num_characters=characters if count_text is not None else None,
        num_bytes=num_bytes if count_text is not None else None,
        sequence_nats=total_S,
    )
