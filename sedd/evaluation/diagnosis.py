"""What a masked model predicts, by the distance to the nearest revealed token.

Two faults of discrete diffusion show in these figures (arXiv:2512.22630). Far from revealed tokens
predictions drift towards the frequencies of the tokens, and the commonest token is the most likely
one everywhere. And tokens that are drawn in one network call are independent of each other, though
the text is not. See ``docs/diagnostics.md``.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from sedd.data.baselines import log_unigram
from sedd.denoiser import Denoiser
from sedd.errors import FieldError, UserError
from sedd.evaluation.bound import estimates
from sedd.evaluation.diagnosis_draws import READINGS, DiagnosisDraws, distance_bins
from sedd.evaluation.measured import Measured, ratio_of
from sedd.schedules import LogLinear
from sedd.types import Array, Key

RATES = (0.25, 0.5, 0.75, 0.95)
LEAST_TEXTS = 8  # with fewer texts in a mean no standard error is given: it would be unreliable
FIGURES = {  # what is averaged, and its name for a reader
    "entropy": "entropy, nats",
    "nats": "nats of truth",
    "accuracy": "accuracy",
    "kl_unigram": "KL to unigram",
    "commonest_top1": "commonest top-1",
    "neighbour_tv": "TV of neighbours",
    "pair_tv": "pair TV",
}
NUMBER_OF = {"neighbour_tv": "neighbours", "pair_tv": "pairs"}  # the divisor; else "count"


@dataclass(frozen=True, kw_only=True, eq=False)
class Diagnosis:
    """Means over masked positions, by mask rate and by distance to the nearest revealed token.

    Args:
        length: tokens in a sequence, L.
        rates: the mask rates, each the probability that a position is masked.
        repeats: masks of each rate for each sequence.
        sums_SRDK: sums of ``READINGS`` for each sequence, mask rate and bin of distances.
        trained: whether the frequencies of tokens are those of the training text; otherwise they
            are those of the evaluated text.
        log_unigram_N: log probabilities of the tokens by these frequencies, float32.
        counts_N: occurrences of each token in the evaluated text.
    """

    length: int
    rates: tuple[float, ...]
    repeats: int
    sums_SRDK: np.ndarray
    trained: bool
    log_unigram_N: np.ndarray
    counts_N: np.ndarray

    @property
    def num_sequences(self) -> int:
        """The number of sequences."""
        return len(self.sums_SRDK)

    @property
    def commonest(self) -> int:
        """The id of the commonest token."""
        return int(self.log_unigram_N.argmax())

    @property
    def distances(self) -> list[tuple[int, int]]:
        """The first and last distance of each bin in which positions were seen.

        (0, 0) stands for positions without any revealed token in their segment.
        """
        seen_D = self._sums("count").sum((0, 1)) > 0
        return [bin for bin, seen in zip(distance_bins(self.length), seen_D, strict=True) if seen]

    def mean(
        self, figure: str, *, rate: float | None = None, distance: int | None = None
    ) -> Measured:
        """Return a mean over masked positions, and its standard error over sequences.

        Args:
            figure: ``entropy`` (of the prediction, nats), ``nats`` (-log p of the true token),
                ``accuracy``, ``kl_unigram`` (KL divergence of the prediction from the token
                frequencies, nats) or ``commonest_top1`` (share of positions at which the commonest
                token is the likeliest). Of pairs of masked neighbours: ``neighbour_tv`` (total
                variation between their two predictions) or ``pair_tv`` (total variation between
                p(a)·p(b | a) and p(a)·p(b)).
            rate: one of the mask rates; None for all of them together.
            distance: a distance, whose bin is taken; 0 for positions without a revealed token, None
                for all positions. That of a pair of neighbours is the smaller one of the two.

        Returns:
            The mean, nan if there is no such position or pair. Its error is None with fewer than
            ``LEAST_TEXTS`` sequences in the mean.

        Raises:
            FieldError: the figure, the rate or the distance is none of this diagnosis.
        """
        if figure not in FIGURES:
            raise FieldError("figure", f"must be one of {', '.join(FIGURES)}, got {figure!r:.40}")
        top_S, bottom_S = (
            self._of(reading, rate, distance)
            for reading in (figure, NUMBER_OF.get(figure, "count"))
        )
        texts = (bottom_S > 0).sum()
        if not texts:
            return Measured(math.nan)
        value, error = ratio_of(top_S, bottom_S)
        # The readings are float32: further decimals would be rounding errors.
        known = None if error is None or texts < LEAST_TEXTS else round(error, 6)
        return Measured(round(value, 6), known)

    def count(self, *, rate: float | None = None, distance: int | None = None) -> int:
        """Return the number of masked positions that were read, as in ``mean``."""
        return int(self._of("count", rate, distance).sum())

    def without_context(self) -> dict[str, float | None]:
        """Return the figures of a model that predicts the frequencies of tokens everywhere."""
        p_N, log_p_N = np.exp(self.log_unigram_N.astype(np.float64)), self.log_unigram_N
        share_N = self.counts_N / self.counts_N.sum()
        return {
            "entropy": float(-(p_N * log_p_N).sum()),
            "nats": float(-(share_N * log_p_N).sum()),
            "accuracy": float(share_N[self.commonest]),
            "kl_unigram": 0.0,
            "commonest_top1": 1.0,
            "neighbour_tv": 0.0,
            "pair_tv": 0.0,
        }

    def to_json(self) -> dict[str, Any]:
        """Return all figures, for each mask rate and distance, for ``json.dump``."""
        cells = []
        for rate in (None, *self.rates):
            for distance in (None, *self.distances):
                first = None if distance is None else distance[0]
                of = {"rate": rate, "distance": first}
                cell: dict[str, Any] = {
                    "rate": rate,
                    "distance": None if distance is None else list(distance),
                    "positions": self.count(**of),
                }
                for figure in FIGURES:
                    value, error = self.mean(figure, **of)
                    cell[figure] = None if math.isnan(value) else value
                    cell[f"{figure}_error"] = error
                cells.append(cell)
        return {
            "length": self.length,
            "num_sequences": self.num_sequences,
            "rates": list(self.rates),
            "masks_for_each_rate": self.repeats,
            "network_calls": 2 * self.repeats * len(self.rates),
            "unigram": "training text" if self.trained else "evaluated text",
            "commonest": {
                "id": self.commonest,
                "frequency": float(np.exp(self.log_unigram_N[self.commonest])),
            },
            "without_context": self.without_context(),
            "cells": cells,
        }

    def _sums(self, reading: str) -> np.ndarray:
        """The sums of one reading, [S, R, D]."""
        return self.sums_SRDK[..., READINGS.index(reading)]

    def _of(self, reading: str, rate: float | None, distance: int | None) -> np.ndarray:
        """The sum of one reading over positions of a rate and a distance, for each sequence."""
        sums_SRD = self._sums(reading)
        if rate is not None:
            if rate not in self.rates:
                rates = ", ".join(map(str, self.rates))
                raise FieldError("rate", f"must be one of {rates}, got {rate}")
            sums_SRD = sums_SRD[:, [self.rates.index(rate)]]
        if distance is not None:
            bins = distance_bins(self.length)
            found = [d for d, (first, last) in enumerate(bins) if first <= distance <= last]
            if not found:
                raise FieldError("distance", f"must be from 0 to {bins[-2][1]}, got {distance}")
            sums_SRD = sums_SRD[..., found]
        return sums_SRD.sum((1, 2), dtype=np.float64)


def measure_predictions(
    denoiser: Denoiser,
    key: Key[Array, ""],
    batches: Iterable[tuple[np.ndarray, ...]],
    *,
    length: int,
    counts_N: np.ndarray,
    train_counts_N: np.ndarray | None = None,
    rates: Sequence[float] = RATES,
    draws: int = 64,
    padded: bool = False,
) -> Diagnosis:
    """Mask texts at several rates, and measure the predictions at the masked positions.

    Args:
        denoiser: the model, on the absorbing process.
        key: the draws of a sequence depend on this key and on its place in the data alone.
        batches: tokens x0_BL, the positions that may be masked, and, if a row holds several texts,
            their segments.
        length: tokens in a sequence.
        counts_N: occurrences of each token in the evaluated text.
        train_counts_N: those in the training text; None if they are unknown.
        rates: mask rates.
        draws: network calls for each sequence, two for each mask; or the largest multiple of
            2·``len(rates)`` below it.
        padded: whether positions behind the last one that may be masked are padding. Otherwise
            they are given.

    Raises:
        UserError: the model has no conditionals for masks anywhere.
        FieldError: a rate is not in (0, 1) or occurs twice, or there are too few draws.
    """
    check_conditionals(denoiser)
    repeats = repeats_of(rates, draws)
    trained = train_counts_N is not None
    log_unigram_N = log_unigram(train_counts_N if trained else counts_N).astype(np.float32)
    estimate = DiagnosisDraws(rates=tuple(rates), repeats=repeats, padded=padded)
    # The draws depend on no noise schedule.
    found = estimates(
        denoiser, LogLinear(), key, batches, estimate, shared=(jnp.asarray(log_unigram_N),)
    )
    return Diagnosis(
        length=length,
        rates=estimate.rates,
        repeats=repeats,
        sums_SRDK=np.concatenate([sums_BRDK for *_, sums_BRDK in found]),
        trained=trained,
        log_unigram_N=log_unigram_N,
        counts_N=counts_N,
    )


def repeats_of(rates: Sequence[float], draws: int) -> int:
    """The number of masks of each rate that ``draws`` network calls allow, two for each mask.

    Raises:
        FieldError: see ``measure_predictions``.
    """
    for rate in rates:
        if not 0 < rate < 1:
            raise FieldError("rates", f"must be between 0 and 1, exclusive, got {rate}")
    if not rates or len(set(rates)) < len(rates):
        raise FieldError("rates", f"must be one or more distinct numbers, got {list(rates)}")
    if draws < 2 * len(rates):
        raise FieldError(
            "draws",
            f"must be at least {2 * len(rates)}, two network calls for each of {len(rates)} mask "
            f"rates, got {draws}",
        )
    return draws // (2 * len(rates))


def check_conditionals(denoiser: Denoiser) -> None:
    """Raise UserError unless the model predicts tokens that are masked anywhere."""
    if denoiser.causal:
        raise UserError("an autoregressive model predicts no masked tokens")
    if denoiser.block is not None:
        raise UserError(
            "tokens are masked anywhere, and a block model has predictions only where all earlier "
            "blocks are clean"
        )
    if not denoiser.process.absorbing:
        raise UserError(
            "predictions of masked tokens need an absorbing process, and this model's is "
            f"{type(denoiser.process).__name__.lower()}"
        )
