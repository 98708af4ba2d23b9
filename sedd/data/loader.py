"""Batches of packed rows: equal global batches for every number of processes, from any step.

The batches are a function of the step, without a state that would have to be saved. Position ``g``
in the global batch of a step holds example number ``e = step * G + g``, where G is the size of the
global batch. This number determines a row in three stages:

1. the weights of the parts determine to which part example e belongs, and its rank among the
   examples of that part (``Schedule``);
2. the rank divided by the number of rows of the part gives the epoch as the quotient;
3. the remainder is the place in the permutation of the rows that belongs to that epoch.
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

CYCLE = 10_000  # longest cycle of a ``Schedule``: weights are exact to one example in 10,000


class Batches:
    """An endless iterator over the batches of this process.

    A batch is a dictionary of ``step``, ``x0`` (int32 [B, L]), ``scored`` (bool [B, L]), ``index``
    (int32 [B], places in the global batch), if a part has segments ``segment`` (int32 [B, L], 0 for
    padding), and if a part has weights ``weight`` (float32 [B]). B is
    ``batch_size / process_count``, and process p holds the places from p * B to (p + 1) * B. The
    rows of a part come in a new order in every epoch. A batch may contain the end of one epoch and
    the beginning of the next.

    Args:
        parts: rows to draw from, each with a positive weight; all of one length.
        batch_size: sequences in a global batch, G; a multiple of ``process_count``.
        seed: seed of the permutations.
        start_step: the first step. To continue an earlier iterator, pass the ``next_step`` that its
            method ``state`` returned.
        process_index: number of this process.
        process_count: number of processes.
        prefetch: batches that threads read in advance.

    Raises:
        UserError: if ``batch_size`` cannot be shared by the processes, or a weight is not positive.
        ValueError: if another argument is out of its range.
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
        """The position after the last returned batch, as a JSON value.

        ``next_step`` is the ``start_step`` with which a new iterator continues. The other entries
        identify what was read: the seed, the batch size, and the name, number of rows, number of
        scored tokens and digest of each part. If one of them differs, a new iterator gives other
        batches, and the run must not be resumed with it. The weights of the parts must be the same
        too; they are not recorded here.
        """
        return {
            "next_step": self._next_step,
            "seed": self._seed,
            "batch_size": self._batch_size,
            "parts": [[p.name, p.num_rows, p.num_tokens_total, p.digest] for p in self._parts],
        }

    def _batch(self, step: int) -> dict[str, Any]:
        """Read the batch of a step; called in threads."""
        part_B, rank_B = self._schedule.locate(int(step) * self._batch_size + self._places_B)
        length = self._parts[0].length
        x0_BL = np.empty((len(part_B), length), np.int32)
        scored_BL = np.empty((len(part_B), length), bool)
        segment_BL = np.ones((len(part_B), length), np.int32)
        weight_B = np.ones(len(part_B), np.float32)
        for number, packed in enumerate(self._parts):
            chosen = np.flatnonzero(part_B == number)
            if chosen.size:
                rows = self._rows(number, rank_B[chosen])
                x0_BL[chosen], scored_BL[chosen], *segment = packed.rows(rows)
                if segment:
                    segment_BL[chosen] = segment[0]
                if packed.weights is not None:
                    weight_B[chosen] = packed.weights[rows]
        segmented = any(packed.segmented for packed in self._parts)
        weighted = any(packed.weights is not None for packed in self._parts)
        return {
            "step": int(step),
            "x0": x0_BL,
            "scored": scored_BL,
            "index": self._places_B.astype(np.int32),
            **({"segment": segment_BL} if segmented else {}),
            **({"weight": weight_B} if weighted else {}),
        }

    def _rows(self, part: int, rank: np.ndarray) -> np.ndarray:
        """Row numbers of the examples of a part, given by their rank among its examples."""
        num_rows = self._parts[part].num_rows
        epoch, place = np.divmod(rank, num_rows)
        rows = np.empty_like(rank)
        for number in np.unique(epoch):
            here = epoch == number
            rows[here] = _permutation(num_rows, self._seed, part, int(number))[place[here]]
        return rows


@lru_cache(maxsize=8)
def _permutation(num_rows: int, seed: int, part: int, epoch: int) -> np.ndarray:
    """The order of the rows of a part in an epoch; recent ones are cached."""
    kind = np.uint32 if num_rows <= 1 << 32 else np.int64
    order = np.arange(num_rows, dtype=kind)
    np.random.default_rng([seed, part, epoch]).shuffle(order)
    return order


@dataclass(frozen=True)
class Schedule:
    """To which part each example belongs: a fixed cycle of parts in proportion to their weights."""

    part_of: np.ndarray  # [cycle], the part of each example in the cycle
    before: np.ndarray  # [cycle], number of earlier examples of the same part in the cycle
    counts: np.ndarray  # [parts], examples of each part in a cycle

    @classmethod
    def of(cls, weights: Sequence[float]) -> "Schedule":
        """The shortest cycle with these proportions, or the nearest one of ``CYCLE`` examples.

        The parts are spread evenly: among the first e examples, each part has its share of e,
        rounded down or up. This is the quota method (Balinski and Young, 1975). A part is eligible
        for the next place if one more example does not bring it above its share rounded up. Of the
        eligible parts, the one with the smallest (examples so far + 1) / weight gets the place.

        Raises UserError if a weight is not positive and finite.
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
            # Parts with fewer examples than their share of the first place + 1 examples.
            due = [k for k, c in enumerate(whole) if given[k] * cycle < c * (place + 1)]
            part = min(due, key=lambda k: (given[k] + 1) / whole[k])
            part_of[place], before[place] = part, given[part]
            given[part] += 1
        return cls(part_of, before, counts)

    def locate(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The part of each example number, and its rank among the examples of that part."""
        cycles, place = np.divmod(examples, len(self.part_of))
        part = self.part_of[place]
        return part, cycles * self.counts[part] + self.before[place]


def _proportions(weights: Sequence[float]) -> np.ndarray:
    """Examples of each part in a cycle: whole numbers, at least 1, in proportion to the weights.

    If no cycle of at most ``CYCLE`` examples has the exact proportions, shares of ``CYCLE`` are
    rounded down, and the parts that lost most by this get one more each.
    """
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact, Fraction(0))
    shares = [weight / total for weight in exact]
    # As a binary fraction, 0.7 has a huge denominator: take the nearest simple fraction, 7/10.
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
