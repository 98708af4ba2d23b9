"""The loop of the samplers that reveal masked positions by the conditional of clean tokens."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp

from sedd.denoiser import Denoiser
from sedd.errors import FieldError
from sedd.samplers.base import State, SteppedSampler
from sedd.samplers.noise import fold, tokens_at
from sedd.schedules import NoiseSchedule
from sedd.types import Array, Bool, Float, Int, Key

BUCKETS = (1, 4, 16, 64)  # positions of a sequence that are read out together
PROPOSAL = 2**31 - 2  # folded into a round's keys it gives a constraint's; no position is that


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A network call: the conditionals of clean tokens, and draws from them.

    Under a constraint the positions that it governs have the tokens of its proposal.
    """

    denoiser: Denoiser
    hidden: tuple[Array, ...]
    x_BL: Int[Array, "B L"]
    keys_B: Key[Array, " B"]
    proposal_BL: Int[Array, "B L"] | None = None  # -1 where there is none

    def proposing(self, keys_B: Key[Array, " B"], commit_BL: Bool[Array, "B L"]) -> "Reading":
        """With what the constraint proposes, if there is one, when ``commit_BL`` is to be kept."""
        if self.denoiser.constraint is None:
            return self
        none_BL = jnp.full_like(self.x_BL, -1)
        keys_B = fold(keys_B, PROPOSAL)
        proposal_BL = self.denoiser.propose(keys_B, self.x_BL, commit_BL, self.log_probs, none_BL)
        return replace(self, proposal_BL=proposal_BL)

    def log_probs(self, positions_BK: Int[Array, "B K"]) -> Float[Array, "B K N"]:
        """The log conditionals at some positions: the output layer of those alone."""
        return self.denoiser.log_conditional_at(self.hidden, self.x_BL, positions_BK)

    def tokens(
        self, positions_BK: Int[Array, "B K"], log_probs_BKN: Float[Array, "B K N"]
    ) -> Int[Array, "B K"]:
        """Draws at some positions, whose log conditionals are given."""
        drawn_BK = tokens_at(self.keys_B, positions_BK, log_probs_BKN)
        if self.proposal_BL is None:
            return drawn_BK
        proposal_BK = jnp.take_along_axis(self.proposal_BL, positions_BK, 1)
        return jnp.where(proposal_BK >= 0, proposal_BK, drawn_BK)

    def draw(self, select_BL: Bool[Array, "B L"]) -> Int[Array, "B L"]:
        """Tokens at the selected positions, each with its own noise; elsewhere 0, or some token."""
        if self.proposal_BL is not None:
            select_BL = select_BL & (self.proposal_BL < 0)
        drawn_BL = at_positions(
            select_BL,
            lambda positions_BK: self.tokens(positions_BK, self.log_probs(positions_BK)),
            jnp.int32,
        )
        if self.proposal_BL is None:
            return drawn_BL
        return jnp.where(self.proposal_BL < 0, drawn_BL, self.proposal_BL)


@dataclass(frozen=True, kw_only=True)
class Revealing(SteppedSampler):
    """One network call a round and sequence; some of its masked positions are then drawn.

    Every sequence goes at its own pace, and only the positions that are drawn pass through the
    output layer. What is given costs no call.
    """

    needs_absorbing: ClassVar[bool] = True
    needs_time_independent: ClassVar[bool] = True
    redraws: ClassVar[bool] = False  # whether a position may be drawn in several rounds

    @abstractmethod
    def make_plan(
        self, keys_B: Key[Array, " B"], free_BL: Bool[Array, "B L"]
    ) -> Int[Array, " B *l"]:
        """What is decided before the first call; a row a sequence."""

    @abstractmethod
    def choose(
        self, state: State, masked_BL: Bool[Array, "B L"], reading: Reading
    ) -> Bool[Array, "B L"]:
        """The masked positions to reveal in this round: at least one where there are any."""

    def start(self, denoiser, keys_B, tokens_BL, fixed_BL):
        free_BL = ~fixed_BL
        zero_B = jnp.zeros(len(keys_B), jnp.int32)
        return State(
            x_BL=jnp.where(fixed_BL, tokens_BL, denoiser.mask_id),
            free_BL=free_BL,
            keys_B=fold(keys_B, 1),
            calls_B=zero_B,
            round_B=zero_B,
            plan=self.make_plan(fold(keys_B, 0), free_BL),
        )

    def active(self, denoiser, state):
        return masked(denoiser, state).any(1)

    def advance(self, denoiser, state):
        masked_BL, active_B = masked(denoiser, state), self.active(denoiser, state)
        round_keys_B = fold(state.keys_B, state.round_B)
        reading = Reading(
            denoiser=denoiser,
            hidden=denoiser.hidden(state.x_BL),
            x_BL=state.x_BL,
            keys_B=round_keys_B if self.redraws else state.keys_B,
        ).proposing(round_keys_B, masked_BL)
        chosen_BL = masked_BL & self.choose(state, masked_BL, reading)
        if denoiser.constraint is not None and denoiser.constraint.wants_commit:
            reading = reading.proposing(round_keys_B, chosen_BL)
        drawn_BL = reading.draw(chosen_BL)
        return state.moved(jnp.where(chosen_BL, drawn_BL, state.x_BL), active_B, active_B)

    def max_rounds(self, length):
        return length


@dataclass(frozen=True, kw_only=True)
class Ranked(Revealing):
    """Masked positions in the order of a score that the network's output gives; highest first."""

    @abstractmethod
    def score(self, reading: Reading, positions_BK: Int[Array, "B K"]) -> Float[Array, "B K"]:
        """Of masked positions, finite."""

    @abstractmethod
    def count(self, state: State, falling_BL: Float[Array, "B L"]) -> Int[Array, " B"]:
        """How many of the highest to reveal, given the scores in falling order.

        ``state.plan`` is the number of free positions; what is not masked scores -inf.
        """

    def make_plan(self, keys_B, free_BL):
        return free_BL.sum(1)

    def choose(self, state, masked_BL, reading):
        score_BL = at_positions(
            masked_BL, lambda positions_BK: self.score(reading, positions_BK), jnp.float32
        )
        # Behind all others, but before what is not masked: nan would come last and never be chosen.
        least = jnp.finfo(score_BL.dtype).min
        score_BL = jnp.nan_to_num(score_BL, nan=least, neginf=least)
        score_BL = jnp.where(masked_BL, score_BL, -jnp.inf)
        order_BL = jnp.argsort(-score_BL, axis=1, stable=True)
        count_B = self.count(state, jnp.take_along_axis(score_BL, order_BL, 1))
        return jnp.argsort(order_BL, axis=1) < count_B[:, None]


def masked(denoiser: Denoiser, state: State) -> Bool[Array, "B L"]:
    """Free positions that have not been revealed."""
    return state.free_BL & (state.x_BL == denoiser.mask_id)


def at_positions(select_BL: Bool[Array, "B L"], values: Callable[[Array], Array], dtype) -> Array:
    """``values(positions [B, K]) -> [B, K]`` at the selected positions; anything elsewhere.

    K is the smallest bucket that holds the most that any sequence has, and the largest bucket as
    often as needed: shapes stay static, and neither memory nor work is that of all positions.
    """
    batch, length = select_BL.shape
    order_BL = jnp.argsort(~select_BL, axis=1, stable=True)  # the selected ones first
    most = select_BL.sum(1).max()
    sizes = [size for size in BUCKETS if size < length]
    sizes = [*sizes, length] if length <= BUCKETS[-1] else sizes

    def bucket(size):
        def one(i, out_BL):
            # The last slice may reach back over positions that were done: they come out the same.
            positions_BK = jax.lax.dynamic_slice_in_dim(order_BL, i * size, size, 1)
            rows_B1 = jnp.arange(batch)[:, None]
            return out_BL.at[rows_B1, positions_BK].set(values(positions_BK).astype(dtype))

        return lambda out_BL: jax.lax.fori_loop(0, -(-most // size), one, out_BL)

    index = jnp.minimum(jnp.searchsorted(jnp.asarray(sizes), most), len(sizes) - 1)
    return jax.lax.switch(index, [bucket(s) for s in sizes], jnp.zeros((batch, length), dtype))


def check_steps(steps: int | None) -> None:
    """Raise ``FieldError`` where ``steps`` is below 1; None means one position a call."""
    if steps is not None and steps < 1:
        raise FieldError("steps", f"must be at least 1, got {steps}")


def group_size(
    total_B: Int[Array, " B"], steps: int | None, round_B: Int[Array, " B"]
) -> Int[Array, " B"]:
    """How many of ``total_B`` positions to reveal in a round, spread evenly over ``steps``.

    One each without steps, or with more of them than positions. Larger groups come last.
    """
    groups_B = jnp.maximum(total_B if steps is None else jnp.minimum(total_B, steps), 1)
    return total_B // groups_B + (round_B >= groups_B - total_B % groups_B)


def group_of(
    rank_BL: Int[Array, "B L"], total_B: Int[Array, " B"], steps: int | None
) -> Int[Array, "B L"]:
    """The round in which the position of a rank is revealed: the groups of ``group_size``."""
    total_B1 = total_B[:, None]
    groups_B1 = jnp.maximum(total_B1 if steps is None else jnp.minimum(total_B1, steps), 1)
    small_B1, larger_B1 = total_B1 // groups_B1, total_B1 % groups_B1
    in_small_B1 = (groups_B1 - larger_B1) * small_B1
    return jnp.where(
        rank_BL < in_small_B1,
        rank_BL // jnp.maximum(small_B1, 1),
        groups_B1 - larger_B1 + (rank_BL - in_small_B1) // (small_B1 + 1),
    )


def revealed_share(schedule: NoiseSchedule, t: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """The share of positions that are revealed by time t: 0 at t = 1 and 1 at t = 0, exactly."""
    alpha, first, last = (jnp.exp(-schedule.sigma(jnp.asarray(x, float))) for x in (t, 1, 0))
    return (alpha - first) / (last - first)


def dense_rank(values_BL: Int[Array, "B L"], select_BL: Bool[Array, "B L"]) -> Int[Array, "B L"]:
    """0, 1, … for the distinct values of each sequence's selected positions, in rising order.

    Positions that are not selected rank after them.
    """
    values_BL = jnp.where(select_BL, values_BL, jnp.iinfo(jnp.int32).max)
    order_BL = jnp.argsort(values_BL, axis=1, stable=True)
    sorted_BL = jnp.take_along_axis(values_BL, order_BL, 1)
    rank_BL = jnp.cumsum(jnp.diff(sorted_BL, axis=1, prepend=sorted_BL[:, :1]) != 0, axis=1)
    return jnp.take_along_axis(rank_BL, jnp.argsort(order_BL, axis=1), 1)
