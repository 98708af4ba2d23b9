"""Batches of packed rows: the same global batches for every number of processes, from any step.

Position ``g`` of the batch of a step holds example number ``e = step * G + g``, where G is the size
of the global batch. The number alone determines the example: the weights give its part and how many
examples of that part came before; that count, divided by the part's rows, gives the epoch (the
quotient) and the place in the epoch's permutation (the remainder).
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import lcm
from typing import Any

import grain
import numpy as np

from sedd.data.packing import Packed
from sedd.errors import UserError

CYCLE = 10_000  # the longest cycle of parts: weights are exact to one example in so many


class Batches:
    """An endless iterator over the batches of this process.

    Each is ``step``, ``x0`` (int32 [B, L]), ``scored`` (bool [B, L]) and ``index`` (int32 [B]: the
    place in the global batch), where B is ``batch_size / process_count`` and process p holds places
    p * B and on. A part's rows come in a fresh order each epoch, and a batch may end one epoch and
    begin the next. ``prefetch`` batches are read ahead, in threads.
    """

    def __init__(
        self,
        parts: Sequence[tuple[Packed, float]],
        *,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        prefetch: int = 4,
    ):
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        if batch_size % process_count:
            raise UserError(
                f"batch_size {batch_size} cannot be shared by {process_count} processes: "
                f"it must be a multiple of {process_count}"
            )
        if not 0 <= process_index < process_count:
            raise ValueError(
                f"process_index must be in 0..{process_count - 1}, got {process_index}"
            )
        if start_step < 0:
            raise ValueError(f"start_step must be at least 0, got {start_step}")
        if prefetch < 0:
            raise ValueError(f"prefetch must be at least 0, got {prefetch}")
        if len({packed.length for packed, _ in parts}) != 1:
            raise ValueError("parts must be of one length, and at least one must be given")
        self._parts = [packed for packed, _ in parts]
        self._schedule = Schedule.of([weight for _, weight in parts])
        self._batch_size = batch_size
        self._seed = seed
        self._next_step = start_step
        share = batch_size // process_count
        self._places_B = np.arange(process_index * share, (process_index + 1) * share)
        steps = grain.MapDataset.range(start_step, sys.maxsize).map(self._batch)
        options = grain.ReadOptions(num_threads=min(prefetch, 4), prefetch_buffer_size=prefetch)
        self._batches = iter(steps.to_iter_dataset(options))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        batch = next(self._batches)
        self._next_step = batch["step"] + 1
        return batch

    def state(self) -> dict[str, Any]:
        """The position after the last batch that was returned, as JSON.

        ``next_step`` is the ``start_step`` that goes on; the seed, the batch size and the ``parts``
        (name, rows, tokens and digest of each) determine the batches.
        """
        return {
            "next_step": self._next_step,
            "seed": self._seed,
            "batch_size": self._batch_size,
            "parts": [[p.name, p.num_rows, p.num_tokens_total, p.digest] for p in self._parts],
        }

    def _batch(self, step: int) -> dict[str, Any]:
        part_B, rank_B = self._schedule.locate(int(step) * self._batch_size + self._places_B)
        length = self._parts[0].length
        x0_BL = np.empty((len(part_B), length), np.int32)
        scored_BL = np.empty((len(part_B), length), bool)
        for number, packed in enumerate(self._parts):
            chosen = np.flatnonzero(part_B == number)
            if chosen.size:
                rows = self._rows(number, rank_B[chosen])
                x0_BL[chosen], scored_BL[chosen] = packed.rows(rows)
        return {
            "step": int(step),
            "x0": x0_BL,
            "scored": scored_BL,
            "index": self._places_B.astype(np.int32),
        }

    def _rows(self, part: int, rank: np.ndarray) -> np.ndarray:
        """The rows that hold the examples number ``rank`` of a part."""
        num_rows = self._parts[part].num_rows
        epoch, place = np.divmod(rank, num_rows)
        rows = np.empty_like(rank)
        for number in np.unique(epoch):
            here = epoch == number
            rows[here] = _permutation(num_rows, self._seed, part, int(number))[place[here]]
        return rows


@lru_cache(maxsize=8)
def _permutation(num_rows: int, seed: int, part: int, epoch: int) -> np.ndarray:
    kind = np.uint32 if num_rows <= 1 << 32 else np.int64
    order = np.arange(num_rows, dtype=kind)
    np.random.default_rng([seed, part, epoch]).shuffle(order)
    return order


@dataclass(frozen=True)
class Schedule:
    """Which part each example is of: a cycle that holds each part as often as its weight says."""

    part_of: np.ndarray  # [cycle length]
    before: np.ndarray  # [cycle length], examples of the same part earlier in the cycle
    counts: np.ndarray  # [parts], examples in a cycle

    @classmethod
    def of(cls, weights: Sequence[float]) -> "Schedule":
        """The shortest cycle with these proportions, or the nearest one of ``CYCLE`` examples.

        Among the first e examples each part has its share of e, rounded down or up: the quota
        method (Balinski and Young, 1975), which gives the next place to the part that is due
        soonest of those that would not exceed their share.
        """
        if any(not (weight > 0 and np.isfinite(weight)) for weight in weights):
            raise UserError(f"the weights of a mixture must be positive, got {list(weights)}")
        counts = _proportions(weights)
        cycle = int(counts.sum())
        part_of = np.empty(cycle, np.int64)
        before = np.empty(cycle, np.int64)
        given = [0] * len(weights)
        whole = counts.tolist()
        for place in range(cycle):
            # A part is within its share at ``place + 1`` if given < its share of place + 1.
            due = [k for k, c in enumerate(whole) if given[k] * cycle < c * (place + 1)]
            part = min(due, key=lambda k: (given[k] + 1) / whole[k])
            part_of[place], before[place] = part, given[part]
            given[part] += 1
        return cls(part_of, before, counts)

    def locate(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The part of each example number, and how many examples of that part came before it."""
        cycles, place = np.divmod(examples, len(self.part_of))
        part = self.part_of[place]
        return part, cycles * self.counts[part] + self.before[place]


def _proportions(weights: Sequence[float]) -> np.ndarray:
    """Whole numbers in proportion to the weights; every part gets at least one."""
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact, Fraction(0))
    shares = [weight / total for weight in exact]
    # A decimal such as 0.7 is a binary fraction with a huge denominator: take what it stands for.
    near = [share.limit_denominator(CYCLE) for share in shares]
    cycle = lcm(*(share.denominator for share in near))
    faithful = all(abs(a - b) < Fraction(1, 10**12) for a, b in zip(near, shares, strict=True))
    if faithful and all(near) and sum(near) == 1 and cycle <= CYCLE:
        return np.array([int(share * cycle) for share in near], np.int64)
    counts = [max(1, int(share * CYCLE)) for share in shares]
    by_loss = sorted(range(len(shares)), key=lambda k: counts[k] - shares[k] * CYCLE)
    for k in by_loss[: max(0, CYCLE - sum(counts))]:
        counts[k] += 1
    return np.array(counts, np.int64)
