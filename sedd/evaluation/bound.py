"""The bound on -log p(x0) of a corpus, with its errors. See ``docs/evaluation.md``.

``score_sequences`` runs an estimate of ``sedd.evaluation.monte_carlo`` over batches, split over
devices, and yields float64 terms of each sequence; ``summarise`` makes the figures of a corpus from
them; ``evaluate_bound`` does both. They are separate, so that an evaluation can keep finished
sequences in a file and resume from it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from operator import itemgetter
from typing import Any

import jax
import numpy as np

from sedd.denoiser import Denoiser
from sedd.evaluation.estimators import REPLICATES, Estimator, is_exact, label_of, resolve
from sedd.evaluation.measured import ratio_of
from sedd.evaluation.monte_carlo import MonteCarlo, SequenceNats
from sedd.networks.base import Attend
from sedd.networks.mesh import Placement, device_mesh, on_host
from sedd.schedules import NoiseSchedule
from sedd.types import Array, Key


@dataclass(frozen=True, kw_only=True)
class BoundResult:
    """A bound on the negative log likelihood of a corpus, in nats, and its standard errors.

    For autoregressive models, and for one order of the tokens (which may be a random one, drawn for
    each sequence), the figures are the likelihood itself (``exact``), all of it in ``diffusion``.

    If the prior and the reconstruction were left out on request (neither ``is_bound`` nor
    ``exact``), ``nats_per_token`` is the diffusion term alone, as a mean over t in [t_min, 1];
    ``prior`` and ``reconstruction`` are computed all the same.

    Args:
        nats_per_token: the bound divided by the number of scored tokens.
        standard_error: of ``nats_per_token``, over sequences. It contains the Monte-Carlo error;
            for a single sequence it is the Monte-Carlo error alone.
        standard_error_draws: the Monte-Carlo error of ``nats_per_token`` for these sequences. It is
            0 for random orders, where it is not estimated; the ``standard_error`` over two or more
            sequences contains it.
        prior: the KL divergence of the prior, in nats per token.
        diffusion: the diffusion term, in nats per token.
        reconstruction: the reconstruction term, in nats per token.
        nats_per_sequence: the bound of a sequence, as a mean over sequences.
        num_sequences: evaluated sequences.
        num_tokens: scored tokens.
        draws: noise levels, or random orders, for each sequence; 0 if the figures are exact.
        estimator: "k_dce", "t_dce", "score_entropy" or "exact"; for orders of the tokens, for
            example "forward order" or "8 random orders".
        is_bound: whether the figures are an upper bound; False for an exact likelihood.
        exact: whether the figures are the negative log likelihood itself.
        num_characters: of the scored text; None if the tokenizer does not tell.
        num_bytes: of the scored text; None if the tokenizer does not tell.
        sequence_nats: the bound of each sequence, [S].
    """

    nats_per_token: float
    standard_error: float
    standard_error_draws: float
    prior: float
    diffusion: float
    reconstruction: float
    nats_per_sequence: float
    num_sequences: int
    num_tokens: int
    draws: int
    estimator: str
    is_bound: bool = True
    exact: bool = False
    num_characters: int | None = None
    num_bytes: int | None = None
    sequence_nats: np.ndarray | None = None

    @property
    def perplexity(self) -> float:
        """exp(nats per token), an upper bound if ``is_bound``; infinite where a float overflows."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf

    @property
    def bits_per_character(self) -> float | None:
        """The bound in bits per character of the scored text; None if these are not counted."""
        return self._bits_per(self.num_characters)

    @property
    def bits_per_byte(self) -> float | None:
        """The bound in bits per byte of the scored text; None if these are not counted."""
        return self._bits_per(self.num_bytes)

    def _bits_per(self, units: int | None) -> float | None:
        if not units:
            return None
        return self.nats_per_token * self.num_tokens / units / math.log(2)

    def to_json(self) -> dict[str, Any]:
        """Return every figure for ``json.dump``, except for the nats of single sequences."""
        figures = {k: v for k, v in vars(self).items() if k != "sequence_nats"}
        figures |= {
            "perplexity": self.perplexity,
            "bits_per_character": self.bits_per_character,
            "bits_per_byte": self.bits_per_byte,
        }
        # JSON has no infinity.
        return {k: None if v in (math.inf, -math.inf) else v for k, v in figures.items()}


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The estimated terms of S sequences and the sizes of their texts, in float64.

    ``summarise`` needs nothing else. Terms are in nats, as in ``SequenceNats``. ``characters_S``
    and ``bytes_S`` are 0 if the text was not counted.
    """

    prior_S: np.ndarray
    diffusion_SR: np.ndarray
    reconstruction_SR: np.ndarray
    tokens_S: np.ndarray
    characters_S: np.ndarray
    bytes_S: np.ndarray

    def __len__(self) -> int:
        return len(self.prior_S)

    @classmethod
    def join(cls, parts: Sequence["Scored"]) -> "Scored":
        """Concatenate the sequences of several parts, in their order."""
        names = [field.name for field in fields(cls)]
        return cls(**{n: np.concatenate([getattr(p, n) for p in parts]) for n in names})


@partial(jax.jit, static_argnames=("placement", "schedule", "estimate"))
def batch_nats(
    denoiser, schedule, shared, index_B, x0_BL, scored_BL, segment_BL=None, *, placement, estimate
):
    """Estimate the rows of a batch, split over the devices of the placement.

    Each row draws with the key of its place ``index_B`` in the corpus; the key is the first entry
    of ``shared``, and the others are further arguments of the estimate. Texts of a row that are in
    different segments do not see each other.
    """

    def on_device(params, shared, rows):
        key, *more = shared
        index_B, x0_BL, scored_BL, segment_BL = rows
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, index_B)
        attend = denoiser.attend if segment_BL is None else Attend(segment_BL=segment_BL)
        model = replace(denoiser, params=params, attend=attend)
        return estimate(model, schedule, keys_B, x0_BL, scored_BL, *more)

    return placement.run(
        on_device, denoiser.params, shared, (index_B, x0_BL, scored_BL, segment_BL)
    )


def score_sequences(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    key: Key[Array, ""],
    batches: Iterable[tuple[np.ndarray, ...]],
    estimate: Callable[..., SequenceNats],
    *,
    first: int = 0,
    count_text=None,
) -> Iterator[Scored]:
    """Estimate the terms of each batch, and yield them batch by batch; see ``estimates``.

    Args:
        denoiser: the model.
        schedule: its noise schedule.
        key: see ``estimates``.
        batches: pairs of tokens x0_BL and of scored_BL, each of any size; empty ones are skipped.
        estimate: a hashable function with the positional arguments of ``sequence_nats``.
        first: the place in the corpus of the first sequence, for an evaluation that is resumed.
        count_text: maps the ids of scored tokens to (characters, bytes) of their text.
    """
    for x0_BL, scored_BL, nats in estimates(
        denoiser, schedule, key, batches, estimate, first=first
    ):
        yield _scored(nats, x0_BL, scored_BL, count_text)


def estimates(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    key: Key[Array, ""],
    batches: Iterable[tuple[np.ndarray, ...]],
    estimate: Callable[..., Any],
    *,
    first: int = 0,
    shared: tuple[Array, ...] = (),
) -> Iterator[tuple[np.ndarray, np.ndarray, Any]]:
    """Run an estimate on each batch, split over devices.

    These are the devices on which the parameters were placed (``sedd.load(…, mesh=…)``). All of
    their processes must then call this function together, with the same arguments. Parameters that
    were not placed are copied to all devices of this process.

    Args:
        denoiser: the model.
        schedule: its noise schedule.
        key: the key of sequence i is ``fold_in(key, i)``, where i is its place in the corpus. The
            estimates therefore do not depend on the batches or on the devices.
        batches: pairs of tokens x0_BL and of scored_BL, each of any size; empty ones are skipped.
            A third array, segment_BL, gives the segment of each position.
        estimate: a hashable function of (denoiser, schedule, keys_B, x0_BL, scored_BL) that returns
            arrays with a row for each sequence.
        first: the place in the corpus of the first sequence.
        shared: arrays that every device sees whole, further arguments of the estimate.

    Yields:
        x0_BL, scored_BL, and the estimate of the batch as numpy arrays.
    """

    def numbered():
        number = first
        for batch in batches:
            count = len(batch[0])
            yield np.arange(number, number + count), *batch
            number += count

    return keyed_estimates(denoiser, schedule, key, numbered(), estimate, shared=shared)


def keyed_estimates(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    key: Key[Array, ""],
    batches: Iterable[tuple[np.ndarray, ...]],
    estimate: Callable[..., Any],
    *,
    shared: tuple[Array, ...] = (),
) -> Iterator[tuple[np.ndarray, np.ndarray, Any]]:
    """``estimates`` of sequences that have numbers of their own.

    Args:
        denoiser: the model.
        schedule: its noise schedule.
        key: the key of a sequence is ``fold_in(key, number)``.
        batches: the numbers [B] in 0..2**32 - 1, the tokens x0_BL, scored_BL and, if a row holds
            several texts, segment_BL. B is any size, and every size of L is compiled once.
        estimate: see ``estimates``.
        shared: see ``estimates``.
    """
    stacked = denoiser.network.stacked
    placement = Placement.of(denoiser.params, stacked)
    if placement is None:
        placement = Placement.on(device_mesh(jax.local_devices()), denoiser.params, stacked)
        denoiser = replace(denoiser, params=placement.place(denoiser.params))
    shared = placement.replicate((key, *shared))
    padded = 0
    for number_B, x0_BL, scored_BL, *segment in batches:
        size = len(x0_BL)
        if not size:
            continue
        # Rows repeat to fill the largest batch so far: a short last batch compiles no new program,
        # and every device gets the same number of rows.
        padded = max(padded, -(-size // placement.num_devices) * placement.num_devices)
        rows = np.resize(np.arange(size), padded)
        given = (number_B, x0_BL, scored_BL, *segment)
        each = placement.spread(tuple(array[rows] for array in given))
        nats = on_host(
            batch_nats(denoiser, schedule, shared, *each, placement=placement, estimate=estimate)
        )
        yield x0_BL, scored_BL, jax.tree.map(itemgetter(slice(size)), nats)


def _scored(nats: SequenceNats, x0_BL, scored_BL, count_text) -> Scored:
    """The terms of a batch in float64, with its text counted."""
    counted = [(0, 0)] * len(x0_BL)
    if count_text is not None:
        counted = [
            count_text(x0_L[scored_L]) for x0_L, scored_L in zip(x0_BL, scored_BL, strict=True)
        ]
    terms = (nats.prior_B, nats.diffusion_BR, nats.reconstruction_BR)
    prior_S, diffusion_SR, reconstruction_SR = (np.asarray(term, np.float64) for term in terms)
    return Scored(
        prior_S=prior_S,
        diffusion_SR=diffusion_SR,
        reconstruction_SR=reconstruction_SR,
        tokens_S=scored_BL.sum(-1).astype(np.float64),
        characters_S=np.array([c for c, _ in counted], np.float64),
        bytes_S=np.array([b for _, b in counted], np.float64),
    )


def summarise(
    scored: Sequence[Scored],
    *,
    draws: int,
    estimator: str,
    t_min: float = 1e-3,
    outer_terms: bool = True,
) -> BoundResult:
    """Compute the figures of a corpus from the terms of its sequences.

    Args:
        scored: the sequences, in one or more parts.
        draws: noise levels for each sequence; 0 if the terms are exact.
        estimator: what ``label_of`` says of the estimator.
        t_min: the smallest time of a score entropy.
        outer_terms: whether to add the prior and the reconstruction of a score entropy. Without
            them the figures are no bound. The other estimators do not have these terms.

    Raises:
        ValueError: if there is no sequence, or no scored token.
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
    total_S, num_tokens = total_SR.mean(-1), s.tokens_S.sum()
    if not num_tokens:
        raise ValueError("no token of these sequences is scored")
    per_token, error = ratio_of(total_S, s.tokens_S)
    error_draws = 0.0
    if not exact:  # the replicates of an exact NLL are equal, but for rounding
        error_draws = math.sqrt((total_SR.var(-1, ddof=1) / REPLICATES).sum()) / num_tokens
    return BoundResult(
        nats_per_token=per_token,
        standard_error=float(error_draws if error is None else error),
        standard_error_draws=float(error_draws),
        prior=float(s.prior_S.sum() / num_tokens),
        diffusion=float(diffusion_SR.mean(-1).sum() / num_tokens),
        reconstruction=float(s.reconstruction_SR.mean(-1).sum() / num_tokens),
        nats_per_sequence=float(total_S.mean()),
        num_sequences=len(s),
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
    batches: Iterable[tuple[np.ndarray, ...]],
    *,
    draws: int = 16,
    t_min: float = 1e-3,
    estimator: Estimator = "auto",
    outer_terms: bool = True,
    count_text=None,
) -> BoundResult:
    """Compute the bound of a corpus, given as batches (x0_BL, scored_BL) of any size.

    No sequence is dropped. The result does not depend on the batch size or on the number of
    devices, up to rounding: the draws of a sequence depend on its place in the corpus alone.

    Args:
        denoiser: the model.
        schedule: its noise schedule.
        key: the source of all draws.
        batches: pairs of tokens and of positions to score, see ``estimates``.
        draws: noise levels for each sequence; a multiple of 4.
        t_min: the smallest time of a score entropy, in (0, 1).
        estimator: as in ``MonteCarlo``.
        outer_terms: whether the prior and the reconstruction are added to a score entropy. Without
            them the result is no bound, but the mean over t in [t_min, 1].
        count_text: maps ids of scored tokens to (characters, bytes), for figures per character.

    Raises:
        FieldError: if ``draws`` is not a positive multiple of 4.
        ValueError: if the model lacks the estimator, or no token is scored.
    """
    estimate = MonteCarlo(draws=draws, t_min=t_min, estimator=estimator)
    scored = score_sequences(denoiser, schedule, key, batches, estimate, count_text=count_text)
    resolved = resolve(estimator, denoiser, schedule)
    return summarise(
        list(scored),
        draws=0 if is_exact(resolved) else draws,
        estimator=label_of(resolved),
        t_min=t_min,
        outer_terms=outer_terms,
    )
