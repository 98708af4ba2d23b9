"""The base of samplers that reveal masked positions by the conditional of clean tokens.

In each round the network is called once for every sequence with masks, the sampler chooses some of
the masked positions, and their tokens are drawn from the conditionals. ``Revealing`` chooses from a
plan that was made in advance; ``Ranked`` chooses by a score of the network's output. The helper
functions below translate a number of steps into groups of positions.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import jax.numpy as jnp
import numpy as np

from sedd.arrays import fold
from sedd.denoiser import Denoiser
from sedd.errors import FieldError
from sedd.networks.rows import Rows
from sedd.samplers.base import State, SteppedSampler
from sedd.samplers.noise import tokens_at, whole
from sedd.schedules import NoiseSchedule
from sedd.types import Array, Bool, Float, Int, Key, Keys

Counts = Literal["late", "early", "dream"]
DREAM_END = 1e-3  # the last time of Dream's steps
PROPOSAL = 2**31 - 2  # folded into a round's keys for constraints; larger than any position


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The conditionals of clean tokens from one network call, with methods that draw from them.

    Positions under a constraint, or in windows that are drawn jointly, take the tokens of a
    proposal, once ``proposing`` has made one. The others are drawn from their own conditionals.
    """

    denoiser: Denoiser
    hidden: tuple[Array, ...]  # of ``denoiser.hidden(x_BL)``
    x_BL: Int[Array, "B L"]
    keys_B: Keys  # of the draws; the position is folded in
    proposal_BL: Int[Array, "B L"] | None = None  # -1 at positions without one

    def proposing(self, keys_B: Keys, commit_BL: Bool[Array, "B L"]) -> "Prediction":
        """Return a copy with a joint proposal, or itself if no tokens are drawn jointly.

        ``commit_BL`` are the positions that the sampler is going to reveal.
        """
        if self.denoiser.constraint is None and self.denoiser.windows is None:
            return self
        none_BL = jnp.full_like(self.x_BL, -1)
        keys_B = fold(keys_B, PROPOSAL)
        proposal_BL = self.denoiser.propose(
            keys_B,
            self.x_BL,
            commit_BL,
            lambda positions_BK: self.denoiser.log_conditional_at(
                self.hidden, self.x_BL, positions_BK
            ),
            none_BL,
            self.hidden,
        )
        return replace(self, proposal_BL=proposal_BL)

    def revealing(self, chosen_BL: Bool[Array, "B L"]) -> "Prediction":
        """Return a copy without proposals for tokens that are revealed alone in their window."""
        if self.denoiser.windows is None or self.proposal_BL is None:
            return self
        several_BL = self.denoiser.windows.several(chosen_BL)
        return replace(self, proposal_BL=jnp.where(several_BL, self.proposal_BL, -1))

    def log_probs(self, rows: Rows) -> Float[Array, "R N"]:
        """The log conditionals of some rows."""
        return self.denoiser.log_conditional_rows(self.hidden, self.x_BL, rows)

    def scored(self, rows: Rows, *, unsharpened: bool = False) -> tuple[Array, Array]:
        """The log conditionals of some rows, and those by which the rows are to be ranked.

        See ``Denoiser.scored_rows``.
        """
        return self.denoiser.scored_rows(self.hidden, self.x_BL, rows, unsharpened=unsharpened)

    def tokens(self, rows: Rows, log_probs_RN: Float[Array, "R N"]) -> Int[Array, " R"]:
        """A token for each row, from the proposal or drawn from the row's log conditionals."""
        drawn_R = tokens_at(self.keys_B, rows, log_probs_RN, self.denoiser.watermark)
        if self.proposal_BL is None:
            return drawn_R
        proposal_R = rows.pick(self.proposal_BL)
        return jnp.where(proposal_R >= 0, proposal_R, drawn_R)

    def draw(self, select_BL: Bool[Array, "B L"]) -> Int[Array, "B L"]:
        """Draw the selected positions; entries elsewhere have no meaning."""
        if self.proposal_BL is not None:
            select_BL = select_BL & (self.proposal_BL < 0)
        drawn_BL = self.denoiser.map_rows(
            select_BL, lambda rows: self.tokens(rows, self.log_probs(rows)), jnp.int32
        )
        if self.proposal_BL is None:
            return drawn_BL
        return jnp.where(self.proposal_BL < 0, drawn_BL, self.proposal_BL)


@dataclass(frozen=True, kw_only=True)
class Revealing(SteppedSampler):
    """A sampler that reveals the masked positions that ``choose`` selects in each round.

    A sequence takes as many rounds as its own masked positions need, and none if it has no masks.
    Only chosen positions pass through the output layer.

    ``redraws`` is set where a position may be drawn in several rounds. Each round then has its own
    noise; otherwise the noise of a position is the same in whichever round it is drawn.
    """

    needs_absorbing: ClassVar[bool] = True
    needs_time_independent: ClassVar[bool] = True
    redraws: ClassVar[bool] = False
    calls_on_tokens: ClassVar[bool] = True

    @abstractmethod
    def make_plan(
        self, keys_B: Key[Array, " B"], free_BL: Bool[Array, "B L"]
    ) -> Int[Array, " B *l"]:
        """Make the plan before the first round: an array with a row for each sequence."""

    @abstractmethod
    def choose(
        self, state: State, masked_BL: Bool[Array, "B L"], prediction: Prediction
    ) -> Bool[Array, "B L"]:
        """Choose the masked positions to reveal in this round.

        At least one of every sequence that has masks must be chosen, or the loop would not end.
        """

    def refuses(self, watermark):
        if watermark.replaces_noise and self.redraws:
            return "it draws all masked positions anew in every round"
        return ""

    def start(self, denoiser, keys_B, tokens_BL, fixed_BL):
        """All free positions masked, with the plan made."""
        free_BL = ~fixed_BL
        return State.starting(
            fold(keys_B, 1),
            x_BL=jnp.where(fixed_BL, tokens_BL, denoiser.mask_id),
            free_BL=free_BL,
            plan=self.make_plan(whole(fold(keys_B, 0)), free_BL),
        )

    def resume(
        self,
        denoiser: Denoiser,
        keys_B: Keys,
        x_BL: Int[Array, "B L"],
        masked_BL: Bool[Array, "B L"],
        share_B: Float[Array, " B"],
    ) -> State:
        """The state of sequences of which a part is revealed: ``start`` on the masked positions.

        Args:
            denoiser: the model.
            keys_B: keys of new noise.
            x_BL: the current tokens.
            masked_BL: the positions to draw.
            share_B: the share of the free positions that is revealed. A sampler with steps of time
                goes on from the time with this share; the others spread the masked positions over
                all of their steps.
        """
        return self.start(denoiser, keys_B, x_BL, ~masked_BL)

    def active(self, denoiser, state):
        """Sequences with masks left."""
        return masked(denoiser, state).any(1)

    def advance(self, denoiser, state):
        """Call the network, choose masked positions and draw their tokens."""
        masked_BL, active_B = masked(denoiser, state), self.active(denoiser, state)
        round_keys_B = fold(state.keys_B, state.round_B)
        prediction = Prediction(
            denoiser=denoiser,
            hidden=denoiser.hidden(state.x_BL),
            x_BL=state.x_BL,
            keys_B=round_keys_B if self.redraws else state.keys_B,
        ).proposing(round_keys_B, masked_BL)
        chosen_BL = masked_BL & self.choose(state, masked_BL, prediction)
        if denoiser.constraint is not None and denoiser.constraint.wants_commit:
            prediction = prediction.proposing(round_keys_B, chosen_BL)
        if not self.redraws:  # the others choose by the tokens that they have drawn
            prediction = prediction.revealing(chosen_BL)
        drawn_BL = prediction.draw(chosen_BL)
        state = state.called(active_B)
        return state.moved(jnp.where(chosen_BL, drawn_BL, state.x_BL), active_B)

    def max_rounds(self, denoiser, length):
        """At most one round for each free position."""
        return length


@dataclass(frozen=True, kw_only=True)
class Ranked(Revealing):
    """A sampler that reveals masked positions by a score of the network's output, highest first."""

    @abstractmethod
    def score(self, prediction: Prediction, rows: Rows) -> Float[Array, " R"]:
        """A finite score of each row; the rows are masked positions."""

    @abstractmethod
    def count(self, state: State, falling_BL: Float[Array, "B L"]) -> Int[Array, " B"]:
        """How many positions to reveal in this round.

        Args:
            state: the state; its ``plan`` is the number of free positions, [B].
            falling_BL: the scores in falling order; -inf for positions that are not masked.
        """

    def make_plan(self, keys_B, free_BL):
        """The number of free positions of each sequence."""
        return free_BL.sum(1)

    def max_rounds(self, denoiser, length):
        """At most one round for each free position; with ``counts`` "dream" all of the steps."""
        options = vars(self)
        dream = options.get("counts") == "dream"
        return options["steps"] if dream else super().max_rounds(denoiser, length)

    def choose(self, state, masked_BL, prediction):
        """The ``count`` masked positions with the highest scores."""
        score_BL = prediction.denoiser.map_rows(
            masked_BL, lambda rows: self.score(prediction, rows), jnp.float32
        )
        # nan ranks behind all other masked positions, but before those that are not masked: sorted
        # as nan it would come last and never be revealed.
        least = jnp.finfo(score_BL.dtype).min
        score_BL = jnp.nan_to_num(score_BL, nan=least, neginf=least)
        score_BL = jnp.where(masked_BL, score_BL, -jnp.inf)
        order_BL = jnp.argsort(-score_BL, axis=1, stable=True)
        count_B = self.count(state, jnp.take_along_axis(score_BL, order_BL, 1))
        return jnp.argsort(order_BL, axis=1) < count_B[:, None]


def complete(
    denoiser: Denoiser, state: State, keys_B: Keys, sigma_B: Float[Array, " B"]
) -> tuple[Int[Array, "B L"], Int[Array, " B"]]:
    """Draw all masked positions of each sequence at once, as a guess at its final tokens.

    Args:
        denoiser: the model.
        state: the state of a sampler between two rounds.
        keys_B: keys of the draws.
        sigma_B: the total noise of the state, for a network that is conditioned on it.

    Returns:
        The completed tokens, and the network calls of each sequence: 1 for a sequence with masks.
        On a process that is not absorbing the guess is the noisy tokens themselves, with 0 calls.
    """
    if not denoiser.process.absorbing:
        return state.x_BL, jnp.zeros(state.calls_B.shape, jnp.int32)
    masked_BL = masked(denoiser, state)
    prediction = Prediction(
        denoiser=denoiser,
        hidden=denoiser.hidden(state.x_BL, sigma_B),
        x_BL=state.x_BL,
        keys_B=keys_B,
    ).proposing(keys_B, masked_BL)
    drawn_BL = prediction.draw(masked_BL)
    return jnp.where(masked_BL, drawn_BL, state.x_BL), masked_BL.any(1).astype(jnp.int32)


def masked(denoiser: Denoiser, state: State) -> Bool[Array, "B L"]:
    """The free positions that are still masked; a given mask is not free."""
    return state.free_BL & (state.x_BL == denoiser.mask_id)


def check_steps(steps: int | None, counts: Counts = "late") -> None:
    """Raise FieldError if ``steps`` is below 1, or ``counts`` is unknown or needs steps.

    None stands for one position a call.
    """
    if steps is not None and steps < 1:
        raise FieldError("steps", f"must be at least 1, got {steps}")
    if counts not in get_args(Counts):
        raise FieldError("counts", f"must be one of {', '.join(get_args(Counts))}, got {counts!r}")
    if steps is None and counts != "late":
        raise FieldError("counts", f"is {counts!r}, which needs steps")


def spread(
    total_B: Int[Array, " B"],
    masked_B: Int[Array, " B"],
    steps: int | None,
    round_B: Int[Array, " B"],
    counts: Counts,
) -> Int[Array, " B"]:
    """How many positions to reveal in round ``round_B`` of ``steps``.

    - ``late``: as ``group_size``: even, and the larger numbers come last.
    - ``early``: even, and the larger numbers come first, as in LLaDA's and SDAR's code.
    - ``dream``: as in Dream's code. With times from 1 down to ``DREAM_END`` in ``steps`` equal
      steps, a step from t to s reveals the share 1 - s/t of the positions that are still masked,
      rounded down; the last step reveals all of them. The number may be 0.

    Args:
        total_B: positions that are masked at the start.
        masked_B: positions that are masked now.
        steps: the number of rounds; None reveals one position a round.
        round_B: the current round, from 0.
        counts: one of the above.
    """
    if steps is None or counts == "late":
        return group_size(total_B, steps, round_B)
    if counts == "early":
        return total_B // steps + (round_B < total_B % steps)
    times = np.linspace(1, DREAM_END, steps + 1).astype(np.float32)
    share = np.append(1 - times[1:] / times[:-1], np.float32(1))[[*range(steps - 1), steps]]
    share_B = jnp.asarray(share)[jnp.minimum(round_B, steps - 1)]
    return jnp.floor(masked_B * share_B).astype(masked_B.dtype)


def group_size(
    total_B: Int[Array, " B"], steps: int | None, round_B: Int[Array, " B"]
) -> Int[Array, " B"]:
    """How many of ``total_B`` positions to reveal in round ``round_B`` of ``steps``.

    The numbers of two rounds differ by at most 1, and the larger ones come last. If ``steps`` is
    None, or larger than the number of positions, every round reveals one position.
    """
    groups_B = jnp.maximum(total_B if steps is None else jnp.minimum(total_B, steps), 1)
    return total_B // groups_B + (round_B >= groups_B - total_B % groups_B)


def group_of(
    rank_BL: Int[Array, "B L"], total_B: Int[Array, " B"], steps: int | None
) -> Int[Array, "B L"]:
    """Return the round, from 0, in which each position is revealed, [B, L].

    Positions are revealed in the order of their ranks; round r takes ``group_size`` of them.

    Args:
        rank_BL: ranks from 0; only ranks below ``total_B`` have a meaningful round.
        total_B: the number of positions to reveal.
        steps: the number of rounds; None reveals one position a round.
    """
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
    """The expected share of positions that are revealed by time t, falling in t.

    It is exp(-σ(t)), scaled to be exactly 0 at t = 1 and 1 at t = 0 for every schedule: all
    positions are masked at the start, and none at the end.
    """
    alpha, first, last = (jnp.exp(-schedule.sigma(jnp.asarray(x, float))) for x in (t, 1, 0))
    return (alpha - first) / (last - first)


def dense_rank(values_BL: Int[Array, "B L"], select_BL: Bool[Array, "B L"]) -> Int[Array, "B L"]:
    """Rank each selected value among the distinct selected values of its sequence, from 0.

    Equal values have equal ranks, and no rank is left out: [7, 3, 7, 9] gives [1, 0, 1, 2].
    Positions that are not selected rank last.
    """
    values_BL = jnp.where(select_BL, values_BL, jnp.iinfo(jnp.int32).max)
    order_BL = jnp.argsort(values_BL, axis=1, stable=True)
    sorted_BL = jnp.take_along_axis(values_BL, order_BL, 1)
    rank_BL = jnp.cumsum(jnp.diff(sorted_BL, axis=1, prepend=sorted_BL[:, :1]) != 0, axis=1)
    return jnp.take_along_axis(rank_BL, jnp.argsort(order_BL, axis=1), 1)
