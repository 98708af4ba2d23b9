"""The bound on -log p(x0), by Monte Carlo, with its errors. See ``docs/evaluation.md``.

Time-independent absorbing models: the expected NLL over all orders, estimated by stratified k-DCE;
it has no other terms. Every other model: KL of the prior, the integral of the score entropy over
t in [t_min, 1], and the reconstruction at t_min; left out, any of them makes it no bound at all.
Autoregressive models have no bound but the likelihood itself, in one call.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sedd.arrays import at
from sedd.denoiser import Denoiser
from sedd.errors import FieldError
from sedd.objectives.autoregressive import Autoregressive
from sedd.objectives.base import Corrupted
from sedd.objectives.k_dce import KDCE
from sedd.objectives.score_entropy import ScoreEntropy
from sedd.samplers.noise import random_rank
from sedd.schedules import NoiseSchedule
from sedd.types import Array, Bool, Float, Int, Key

Estimator = Literal["auto", "k_dce", "score_entropy", "exact"]
REPLICATES = 4  # independent estimates of each sequence's bound; their spread is the draws' error


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SequenceNats:
    """R independent estimates of each sequence's bound, in nats, as three separate terms.

    An exact NLL is the diffusion term of every replicate; the other terms are 0.
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
) -> SequenceNats:
    """The bound on -log p(x0) of each sequence, given its positions that are not scored.

    The ``draws`` noise levels form 4 independent replicates. Within a replicate the levels are
    stratified, and the masks of consecutive levels tile the sequence. Network calls: ``draws``, and
    4 more if there is a reconstruction term; 1 if the NLL is exact. Raises ValueError on an
    estimator that the model does not have.
    """
    check_draws(draws)
    estimator = resolve(estimator, denoiser)
    if estimator == "exact":
        return _exact_nats(denoiser, schedule, keys_B, x0_BL, scored_BL)
    strata = draws // REPLICATES
    process, parameterization = denoiser.process, denoiser.parameterization
    any_order = estimator == "k_dce"
    if any_order:
        objective = KDCE(schedule=schedule, parameterization=parameterization)
    else:
        objective = ScoreEntropy(schedule=schedule, parameterization=parameterization, t_min=t_min)
    scored_B = scored_BL.sum(-1)
    period_B = scored_B if any_order else jnp.ones_like(scored_B)
    # The probability λ of a mask, from t_min to 1; float32 ends a little below 1.
    low, high = (-jnp.expm1(-schedule.sigma(jnp.float32(t))) for t in (t_min, 1.0))
    high = jnp.minimum(high, 1 - 2.0**-22)

    def replicate(r):
        replicate_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, r)
        u_key_B, place_key_B, draw_key_B, end_key_B = jax.vmap(
            lambda key: jax.random.split(key, 4), out_axes=1
        )(replicate_keys_B)
        shared_u_B = jax.vmap(jax.random.uniform)(u_key_B)
        if any_order:
            place_BL = random_rank(place_key_B, scored_BL)
        else:
            place_BL = jax.vmap(lambda key: jax.random.uniform(key, x0_BL.shape[1:]))(place_key_B)

        def draw(carry, k):
            total_B, begin_B = carry
            u_B, density_B = level(shared_u_B, k, strata), 1.0
            if process.absorbing and strata > 1:
                u_B, density_B = toward_few_masks(u_B)
            size_B = jnp.zeros_like(u_B)
            if not process.absorbing:
                t_B = t_min + (1 - t_min) * u_B
                sigma_B, weight_B = schedule.sigma(t_B), (1 - t_min) * schedule.rate(t_B)
                draw_keys_B = jax.vmap(jax.random.fold_in, (0, None))(draw_key_B, k)
                xt_BL = jnp.where(scored_BL, process.corrupt(draw_keys_B, x0_BL, sigma_B), x0_BL)
            else:
                sigma_B = None
                if any_order:
                    size_B = jnp.minimum(1 + jnp.floor(u_B * scored_B), scored_B)
                    weight_B = scored_B / jnp.maximum(size_B, 1)
                else:
                    # The integral of rate dt = dσ = dλ/(1 - λ), whatever the schedule.
                    size_B = low + (high - low) * u_B
                    sigma_B, weight_B = -jnp.log1p(-size_B), (high - low) / (1 - size_B)
                masked_BL = scored_BL & tile(place_BL, period_B, begin_B, size_B)
                xt_BL = jnp.where(masked_BL, process.mask, x0_BL)
            counts_BL = scored_BL & process.can_move(xt_BL)
            corrupted = Corrupted(
                xt_BL=xt_BL,
                weight_BL=jnp.where(counts_BL, weight_B[:, None], 0.0),
                sigma=sigma_B,
            )
            nats_BL = objective.nats(denoiser.network, denoiser.params, corrupted, x0_BL)
            end_B = (begin_B + size_B) % jnp.maximum(period_B, 1)
            return (total_B + density_B * nats_BL.sum(-1), end_B), None

        nothing_B = jnp.zeros(x0_BL.shape[0])
        (total_B, _), _ = jax.lax.scan(draw, (nothing_B, nothing_B), jnp.arange(strata))
        mean_B = total_B / strata
        if any_order:
            return mean_B, jnp.zeros_like(mean_B)
        return mean_B, _reconstruction(denoiser, schedule, end_key_B, x0_BL, scored_BL, t_min)

    diffusion_RB, reconstruction_RB = jax.lax.map(replicate, jnp.arange(REPLICATES))
    per_token = 0.0 if any_order else process.prior_kl(schedule.sigma(jnp.float32(1.0)))
    return SequenceNats(
        prior_B=per_token * scored_B,
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


def _reconstruction(denoiser, schedule, keys_B, x0_BL, scored_BL, t_min) -> Float[Array, " B"]:
    """-log p(x0 | xt at t_min), by the last step of the τ-leaping samplers."""
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


def level(shared_u_B: Float[Array, " B"], k: Int[Array, ""], strata: int) -> Float[Array, " B"]:
    """The k-th of ``strata`` ascending draws in [0, 1), one in each of equal intervals.

    Neighbouring intervals are antithetic: the draw lies u into one and 1 - u into the next, so that
    the error of a linear integrand cancels.
    """
    return (k + jnp.where(k % 2 == 0, shared_u_B, 1 - shared_u_B)) / strata


def toward_few_masks(u: Float[Array, "*b"]) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """Levels of density 1/(2√u) from uniform ones, and the weight that makes them count evenly.

    The mean loss of few masked positions is the noisiest: its variance goes with 1/u. (A single
    draw has no others to cancel the spread of the weight itself.)
    """
    return jnp.minimum(u**2, 1 - 2.0**-24), 2 * u


def tile(
    place_BL: Float[Array, "B L"] | Int[Array, "B L"],
    period_B: Float[Array, " B"] | Int[Array, " B"],
    begin_B: Float[Array, " B"],
    size_B: Float[Array, " B"],
) -> Bool[Array, "B L"]:
    """The positions whose place is within ``size`` after ``begin``, around a circle.

    Where places are a random order it is a random subset of that size, and where they are uniform
    every position by itself, wherever it begins. Masks that begin where the last one ended cover
    all positions equally often: those that are hard to guess no more than the others.
    """
    around_BL = (place_BL - begin_B[:, None]) % jnp.maximum(period_B, 1)[:, None]
    return around_BL < size_B[:, None]


def resolve(estimator: Estimator, denoiser: Denoiser) -> Estimator:
    """The estimator that "auto" means for a model, or the named one; ValueError if it lacks it.

    For an autoregressive model it is always "exact".
    """
    if denoiser.causal:
        return "exact"
    if estimator == "exact":
        raise ValueError("estimator exact needs an autoregressive model")
    any_order = denoiser.process.absorbing and denoiser.time_independent
    if estimator == "k_dce" and not any_order:
        raise ValueError("estimator k_dce needs a time-independent absorbing model")
    if estimator == "auto":
        return "k_dce" if any_order else "score_entropy"
    return estimator


def check_draws(draws: int) -> None:
    """Raise FieldError unless ``draws`` splits evenly into the replicates."""
    if draws < REPLICATES or draws % REPLICATES:
        raise FieldError("draws", f"must be a positive multiple of {REPLICATES}, got {draws}")


@dataclass(frozen=True, kw_only=True)
class BoundResult:
    """A bound on the negative log likelihood of a corpus, in nats, and how far to trust it.

    Of an autoregressive model, and of any in one order, it is the likelihood itself (``exact``),
    all of it in ``diffusion``.

    Per-token figures divide by the scored tokens. ``standard_error`` is of ``nats_per_token`` over
    sequences (it contains the Monte-Carlo noise; with a single sequence it is that noise alone);
    ``standard_error_draws`` is over the Monte-Carlo draws for these very sequences. Where the outer
    terms were left out on request (neither ``is_bound`` nor ``exact``), ``nats_per_token`` is the
    diffusion term alone, as a mean over [t_min, 1], and the others are given all the same.
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
    estimator: str  # "k_dce", "score_entropy", "exact", or the order that the NLL is of
    is_bound: bool = True  # a true upper bound; the NLL itself is none, and says ``exact``
    exact: bool = False  # the negative log likelihood itself
    num_characters: int | None = None  # of the scored text, where the tokenizer knows
    num_bytes: int | None = None
    sequence_nats: np.ndarray | None = None  # [S], each sequence's bound

    @property
    def perplexity(self) -> float:
        """exp(nats per token): an upper bound where ``is_bound``, infinite beyond a float."""
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
        figures = {k: v for k, v in vars(self).items() if k != "sequence_nats"}
        figures |= {
            "perplexity": self.perplexity,
            "bits_per_character": self.bits_per_character,
            "bits_per_byte": self.bits_per_byte,
        }
        # JSON knows no infinity.
        return {k: None if v in (math.inf, -math.inf) else v for k, v in figures.items()}


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What was estimated for S sequences: all that a result is made of, in float64."""

    prior_S: np.ndarray
    diffusion_SR: np.ndarray
    reconstruction_SR: np.ndarray
    tokens_S: np.ndarray
    characters_S: np.ndarray  # 0 where nobody counted
    bytes_S: np.ndarray

    def __len__(self) -> int:
        return len(self.prior_S)

    @classmethod
    def join(cls, parts: Sequence["Scored"]) -> "Scored":
        """One after the other."""
        names = [field.name for field in fields(cls)]
        return cls(**{n: np.concatenate([getattr(p, n) for p in parts]) for n in names})


@dataclass(frozen=True, kw_only=True)
class MonteCarlo:
    """``sequence_nats`` with its options, as a value that compiled programs are kept for."""

    draws: int = 16
    t_min: float = 1e-3
    estimator: Estimator = "auto"

    def __post_init__(self):
        check_draws(self.draws)

    def __call__(self, denoiser, schedule, keys_B, x0_BL, scored_BL) -> SequenceNats:
        return sequence_nats(denoiser, schedule, keys_B, x0_BL, scored_BL, **vars(self))


@partial(jax.jit, static_argnames=("mesh", "schedule", "estimate"))
def _batch_nats(denoiser, schedule, key, index_B, x0_BL, scored_BL, *, mesh, estimate):
    def on_device(denoiser, key, index_B, x0_BL, scored_BL):
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, index_B)
        return estimate(denoiser, schedule, keys_B, x0_BL, scored_BL)

    # Sequences know nothing of each other: no device waits for another.
    rows = PartitionSpec("devices")
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(), rows, rows, rows),
        out_specs=rows,
        check_vma=False,
    )(denoiser, key, index_B, x0_BL, scored_BL)


def score_sequences(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    key: Key[Array, ""],
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    estimate: Callable[..., SequenceNats],
    *,
    first: int = 0,
    count_text=None,
    devices: Sequence[Any] | None = None,
) -> Iterator[Scored]:
    """Each of the batches (x0_BL, scored_BL), estimated on all local devices (or ``devices``).

    ``estimate`` is hashable and has the arguments of ``sequence_nats``. ``first`` is the place of
    the first sequence in the whole: a sequence's draws depend on its place, never on the batches or
    the devices.
    """
    devices = jax.local_devices() if devices is None else devices
    mesh = Mesh(np.asarray(devices), ("devices",))
    denoiser = jax.device_put(denoiser, NamedSharding(mesh, PartitionSpec()))
    padded = 0
    for x0_BL, scored_BL in batches:
        size = len(x0_BL)
        if not size:
            continue
        # A short last batch compiles nothing new, and every device has as many rows.
        padded = max(padded, -(-size // len(devices)) * len(devices))
        rows = np.resize(np.arange(size), padded)
        nats = _batch_nats(
            denoiser,
            schedule,
            key,
            jnp.asarray(first + rows),
            jnp.asarray(x0_BL[rows]),
            jnp.asarray(scored_BL[rows]),
            mesh=mesh,
            estimate=estimate,
        )
        counted = [(0, 0)] * size
        if count_text is not None:
            counted = [
                count_text(x0_L[scored_L]) for x0_L, scored_L in zip(x0_BL, scored_BL, strict=True)
            ]
        terms = (nats.prior_B, nats.diffusion_BR, nats.reconstruction_BR)
        prior_S, diffusion_SR, reconstruction_SR = (np.asarray(a, np.float64)[:size] for a in terms)
        yield Scored(
            prior_S=prior_S,
            diffusion_SR=diffusion_SR,
            reconstruction_SR=reconstruction_SR,
            tokens_S=scored_BL.sum(-1).astype(np.float64),
            characters_S=np.array([c for c, _ in counted], np.float64),
            bytes_S=np.array([b for _, b in counted], np.float64),
        )
        first += size


def summarise(
    scored: Sequence[Scored],
    *,
    draws: int,
    estimator: str,
    t_min: float = 1e-3,
    outer_terms: bool = True,
) -> BoundResult:
    """The figures of a corpus; ``estimator`` is what ``resolve`` returned, or the name of an order.

    With 0 draws they are exact, and no bound. ``outer_terms=False`` leaves out the prior and the
    reconstruction of a score entropy, which is then none either; other estimators have neither.
    ValueError where no token is scored.
    """
    if not sum(map(len, scored)):
        raise ValueError("there is no sequence to evaluate")
    s = Scored.join(scored)
    exact = draws == 0
    whole = outer_terms or estimator != "score_entropy"
    diffusion_SR = s.diffusion_SR if whole else s.diffusion_SR / (1 - t_min)
    total_SR = diffusion_SR
    if whole:
        total_SR = s.prior_S[:, None] + diffusion_SR + s.reconstruction_SR
    total_S, num, num_tokens = total_SR.mean(-1), len(s), s.tokens_S.sum()
    if not num_tokens:
        raise ValueError("no token of these sequences is scored")
    per_token = total_S.sum() / num_tokens
    error_draws = 0.0  # rounding gives equal replicates a variance of their own
    if not exact:
        error_draws = math.sqrt((total_SR.var(-1, ddof=1) / REPLICATES).sum()) / num_tokens
    if num > 1:  # of the ratio of two sums over sequences
        residual_S = total_S - per_token * s.tokens_S
        error = math.sqrt(num / (num - 1) * (residual_S**2).sum()) / num_tokens
    else:
        error = error_draws
    return BoundResult(
        nats_per_token=float(per_token),
        standard_error=float(error),
        standard_error_draws=float(error_draws),
        prior=float(s.prior_S.sum() / num_tokens),
        diffusion=float(diffusion_SR.mean(-1).sum() / num_tokens),
        reconstruction=float(s.reconstruction_SR.mean(-1).sum() / num_tokens),
        nats_per_sequence=float(total_S.mean()),
        num_sequences=num,
        num_tokens=int(num_tokens),
        draws=draws,
        estimator=estimator,
        is_bound=whole and not exact,
        exact=exact,
        num_characters=int(s.characters_S.sum()) or None,
        num_bytes=int(s.bytes_S.sum()) or None,
        sequence_nats=total_S,
    )


def evaluate_bound(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    key: Key[Array, ""],
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    draws: int = 16,
    t_min: float = 1e-3,
    estimator: Estimator = "auto",
    outer_terms: bool = True,
    count_text=None,
    devices: Sequence[Any] | None = None,
) -> BoundResult:
    """The bound over batches of (x0_BL, scored_BL), each of any size; no sequence is dropped.

    A sequence's draws depend on its place in the whole, never on the batches: the result is the
    same for every batch size and number of devices, up to the last bits. ``count_text(ids) ->
    (characters, bytes)``, if given, counts the text of the scored tokens.
    """
    estimate = MonteCarlo(draws=draws, t_min=t_min, estimator=estimator)
    scored = score_sequences(
        denoiser, schedule, key, batches, estimate, count_text=count_text, devices=devices
    )
    resolved = resolve(estimator, denoiser)
    return summarise(
        list(scored),
        draws=0 if resolved == "exact" else draws,
        estimator=resolved,
        t_min=t_min,
        outer_terms=outer_terms,
    )
