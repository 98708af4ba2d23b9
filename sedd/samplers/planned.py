"""Random order in groups whose sizes are planned to cost the fewest nats for a number of calls.

The sizes come from the price profile of the model (``sedd.price``). arXiv:2510.25544,
arXiv:2511.04647.
"""

import functools
import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from sedd.errors import FieldError
from sedd.samplers.noise import random_rank
from sedd.samplers.reveal import Revealing


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The nats of an unknown token by the number of known tokens, as ``Planned`` uses them.

    Args:
        model: the ``Model.digest`` of the model that was measured.
        nats_L: entry j is the mean nats of a random token, given j random others. Never rising.
    """

    model: str
    nats_L: tuple[float, ...]

    @property
    def length(self) -> int:
        """Tokens of the measured sequences, L."""
        return len(self.nats_L)


@dataclass(frozen=True, kw_only=True)
class Planned(Revealing):
    """Reveal the free positions in random order, in groups whose sizes follow from a price profile.

    Positions of one group are drawn in one network call, independently of each other. A sequence
    with m of its L tokens given takes min(``calls``, L - m) calls. The law is the mean over
    uniformly random orders of a product over groups, each factor being the product of the model's
    conditionals of its positions, given the tokens of earlier groups. At one position a call this
    is the model's own law.

    The expected nats of a text, given the order, are Σ s·h(N) over the groups,
    where s is the size of a group, N the number of tokens known before it, and h(N) the profile's
    nats. The sizes minimise this sum. Sequences with given tokens start at N = m: that is optimal
    if the given tokens stand at random positions, and approximately otherwise, since h was measured
    with random known tokens.
    """

    profile: Profile
    """What the model's tokens cost, given how many are known: ``sedd.price(…).profile``."""
    calls: int | None = None
    """Network calls over which the positions are spread; by default one position a call."""

    def __post_init__(self):
        if self.calls is None:
            return
        if not 1 <= self.calls <= self.profile.length:
            raise FieldError(
                "calls",
                f"must be from 1 to {self.profile.length}, the tokens of a sequence, "
                f"got {self.calls}",
            )

    def make_plan(self, keys_B, free_BL):
        """The round in which each position is drawn."""
        rank_BL = random_rank(keys_B, free_BL)
        if self.calls is None:
            return rank_BL
        start_B = jnp.maximum(self.profile.length - free_BL.sum(1), 0)

        def group(known_B, next_N):
            known_B = next_N[known_B]
            return known_B, known_B - start_B

        next_nN = jnp.asarray(next_known(self.profile.nats_L, self.calls)[::-1])
        _, end_nB = jax.lax.scan(group, start_B, next_nN)
        return jax.vmap(functools.partial(jnp.searchsorted, side="right"))(end_nB.T, rank_BL)

    def choose(self, state, masked_BL, prediction):
        """The positions of the current round."""
        return state.plan == state.round_B[:, None]


def group_sizes(nats_L: tuple[float, ...], calls: int) -> list[int]:
    """Return the sizes of ``calls`` groups of L positions with the least Σ s·h(N).

    Args:
        nats_L: h, never rising.
        calls: number of groups, in 1..L.
    """
    known = [0]
    for next_N in next_known(nats_L, calls)[::-1]:
        known.append(int(next_N[known[-1]]))
    return [after - before for before, after in itertools.pairwise(known)]


@functools.lru_cache(maxsize=16)
def next_known(nats_L: tuple[float, ...], calls: int) -> np.ndarray:
    """Compute the best plans for every number of known tokens and of remaining calls.

    The dynamic program runs backwards from L known tokens. Time O(n L log L), memory O(n L) for
    n calls.

    Args:
        nats_L: h, never rising.
        calls: the most calls, n, in 1..L.

    Returns:
        [n, L + 1], int32: entry (k - 1, N) is how many tokens are known after the next call, if N
        are known now and k calls are left. Exactly k groups are made, or, if only L - N < k tokens
        are unknown, groups of one.
    """
    nats_N, length = np.asarray(nats_L), len(nats_L)
    known_N = np.arange(length + 1)
    # The cost of one position a call from N on, which is the best where the calls suffice for it.
    single_N = np.append(np.cumsum(nats_N[::-1])[::-1], 0.0)
    next_nN = np.tile(np.minimum(known_N + 1, length).astype(np.int32), (calls, 1))
    cost_N = single_N.copy()
    cost_N[:-1], next_nN[0] = nats_N * (length - known_N[:-1]), length
    for k in range(2, calls + 1):
        rows = length - k  # with fewer tokens known there are more unknown tokens than calls
        end_R = _cheapest_ends(nats_N[:rows], cost_N, length - k + 1)
        next_nN[k - 1, :rows] = end_R
        before_N, cost_N = cost_N, single_N.copy()
        cost_N[:rows] = nats_N[:rows] * (end_R - known_N[:rows]) + before_N[end_R]
    return next_nN


def _cheapest_ends(nats_R: np.ndarray, cost_N: np.ndarray, last: int) -> np.ndarray:
    """For each row i, return the j in i+1..``last`` with the least nats[i]·j + cost[j].

    Since ``nats_R`` never rises, the best j never falls as i grows (the costs are a Monge matrix).
    The middle row is therefore searched first, then the middle rows of both halves, each only
    between the results of its neighbours. All searches of one depth are one numpy expression, over
    at most R + N entries.
    """
    rows = len(nats_R)
    best_R = np.zeros(rows, np.int64)
    step = 1 << rows.bit_length()
    while step > 1:
        half = step // 2
        row_M = np.arange(half - 1, rows, step)
        before_M, after_M = row_M - half, row_M + half
        low_M = np.maximum(row_M + 1, np.where(before_M >= 0, best_R[before_M], 0))
        high_M = np.where(after_M < rows, best_R[np.minimum(after_M, rows - 1)], last)
        width_M = high_M - low_M + 1
        begin_M = np.cumsum(width_M) - width_M
        j_E = np.arange(width_M.sum()) + np.repeat(low_M - begin_M, width_M)
        cost_E = np.repeat(nats_R[row_M], width_M) * j_E + cost_N[j_E]
        is_best_E = cost_E == np.repeat(np.minimum.reduceat(cost_E, begin_M), width_M)
        best_R[row_M] = np.minimum.reduceat(np.where(is_best_E, j_E, last), begin_M)
        step = half
    return best_R


make = Planned
