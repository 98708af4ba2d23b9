"""Search over paths: good partial texts are kept, masked again in part and continued in many ways.

arXiv:2501.09732, section 3.2.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sedd.arrays import along, fold
from sedd.denoiser import Denoiser, all_positions
from sedd.errors import FieldError
from sedd.networks.rows import Rows
from sedd.samplers.base import Samples, State, fill, record
from sedd.samplers.noise import coins
from sedd.samplers.reveal import Revealing, complete, masked
from sedd.samplers.search import MOVES, Search, preference, shown, summed
from sedd.samplers.verifier import verifiers_of
from sedd.types import Array, Bool, Float, Int, Key


class Progress(NamedTuple):
    """All branches between two stages; row b·C + c is branch c of request b, the best one first."""

    x_RL: Int[Array, "R L"]
    score_RE: Float[Array, "R E"]
    calls_B: Int[Array, " B"]
    frames: Int[Array, "T R L"] | None
    tick: Int[Array, ""]  # frames so far
    stage: Int[Array, ""]


@dataclass(frozen=True, kw_only=True)
class SearchPaths(Search):
    """Keep the ``paths`` best of many partly revealed texts, and branch from them to the end.

    The search goes in stages. In the first one ``paths``·``branches`` sequences are drawn by
    ``inner`` until a share ``begin`` of their free positions is revealed. Each is completed by one
    draw of all its masked positions, as in ``particle``; the completions are scored, and the
    ``paths`` best sequences are kept, as they were before the completion. In each later stage every
    path is continued by ``branches`` sequences. If a share a is revealed, each of them masks every
    revealed position again with probability min(1, ``remask``/a), and is drawn on, in an order of
    its own, until the expected share has risen by ``reveal``. Then the best ``paths`` are kept
    again. After the last stage all sequences are whole, and the best one is returned.

    It is a search: there is no formula for its law. If all scores are equal, and the inner sampler
    is exact with an order that does not look at tokens (event_jump, planned and ordered, at one
    position a call), the law is that of ``inner``, because masking positions at random and drawing
    them again leaves it as it is.

    After a remasking, ``event_jump`` goes on from the time at which it would have as many revealed
    positions as are left. Other inner samplers with ``steps`` start anew on the masked positions
    and spread them over all of their steps, so that their calls reveal fewer positions as the text
    fills.

    In the paper the first stage draws ``paths`` sequences without scoring them. Here all places of
    the batch are used from the start.
    """

    inner: Revealing
    paths: int = 2
    """Partly revealed texts that are kept after each stage."""
    branches: int = 4
    """Continuations of each path in a stage."""
    begin: float = 0.25
    """Share of the free positions that the first stage reveals, in (0, 1)."""
    remask: float = 0.1
    """Share of the free positions that each later stage masks again, in [0, 1)."""
    reveal: float = 0.35
    """Share of the free positions that each later stage then reveals; more than remask."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("paths", "branches"):
            if getattr(self, name) < 1:
                raise FieldError(name, f"must be at least 1, got {getattr(self, name)}")
        if not 0 < self.begin < 1:
            raise FieldError("begin", f"must be in (0, 1), got {self.begin}")
        if not 0 <= self.remask < 1:
            raise FieldError("remask", f"must be in [0, 1), got {self.remask}")
        if not self.remask + 1e-3 <= self.reveal <= 1:
            raise FieldError(
                "reveal",
                f"must be above remask, {self.remask}, by at least 0.001, and at most 1, got "
                f"{self.reveal}",
            )
        if not isinstance(self.inner, Revealing):
            raise FieldError(
                "inner",
                "must reveal masked positions once (event_jump, ordered, planned, confidence, "
                "entropy_bounded or token_confidence)",
            )

    @property
    def candidates(self):
        return self.paths * self.branches

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of the free positions that is revealed at the end of each stage."""
        shares = [self.begin]
        while shares[-1] < 1:
            share = max(shares[-1] - self.remask, 0.0) + self.reveal
            shares.append(1.0 if share > 1 - 1e-6 else share)
        return tuple(shares)

    def __call__(self, denoiser, keys_B, tokens_BL, fixed_BL, *, trace=False):
        """Run all stages. The loop ends early if a score is nan."""
        self.check(denoiser)
        batch, count, length = len(keys_B), self.candidates, tokens_BL.shape[1]
        denoiser, fixed_RL = denoiser.repeat(count), jnp.repeat(fixed_BL, count, 0)
        slot_keys = fold(jnp.repeat(keys_B, count), jnp.tile(jnp.arange(count), batch))
        x_RL = jnp.where(fixed_RL, jnp.repeat(tokens_BL, count, 0), denoiser.mask_id)
        frames = None
        if trace:
            most = len(self.shares) * (self.inner.max_rounds(denoiser, length) + 1)
            frames = jnp.zeros((most, *x_RL.shape), x_RL.dtype)

        def one_stage(progress):
            stage_keys = fold(fold(slot_keys, MOVES), progress.stage)
            state, frames, tick = self.continued(denoiser, stage_keys, progress, fixed_RL)
            guess_RL, called_R = complete(
                denoiser, state, fold(stage_keys, 2), self.inner.sigma(state)
            )
            scores = self.scores(denoiser, keys_B, guess_RL, fixed_RL)
            value_BC = preference(scores.score_RE.reshape(batch, count, -1))
            _, best_BN = jax.lax.top_k(value_BC, self.paths)
            row_BN = best_BN + count * jnp.arange(batch)[:, None]
            take_R = jnp.repeat(row_BN.reshape(-1), self.branches)
            calls_R = (state.calls_B + called_R) * denoiser.calls_each + scores.calls_R
            return Progress(
                x_RL=state.x_BL[take_R],
                score_RE=scores.score_RE[take_R],
                calls_B=progress.calls_B + summed(calls_R, batch),
                frames=None if frames is None else frames[:, take_R],
                tick=tick,
                stage=progress.stage + 1,
            )

        zero = jnp.zeros((), jnp.int32)
        none_RE = jnp.zeros((batch * count, len(verifiers_of(self.verifier))))
        last = jax.lax.while_loop(
            lambda progress: (
                (progress.stage < len(self.shares))
                & ~denoiser.anywhere(jnp.isnan(progress.score_RE))
            ),
            one_stage,
            Progress(x_RL, none_RE, jnp.zeros(batch, jnp.int32), frames, zero, zero),
        )
        first_B = count * jnp.arange(batch)
        frames = last.frames
        return Samples(
            tokens_BL=last.x_RL[first_B],
            calls_B=last.calls_B,
            rows_B=last.calls_B,
            trace_TBL=None if frames is None else fill(frames[:, first_B], last.tick - 1),
            rounds=last.tick - 1,
            score_B=shown(last.score_RE[first_B]),
            verifier_calls_B=jnp.full(batch, count, jnp.int32) * last.stage * none_RE.shape[1],
        )

    def continued(
        self,
        denoiser: Denoiser,
        keys_R: Key[Array, " R"],
        progress: Progress,
        fixed_RL: Bool[Array, "R L"],
    ) -> tuple[State, Any, Int[Array, ""]]:
        """Mask a share of each branch again, and reveal as many positions as the stage asks for.

        The inner sampler advances the whole batch. A branch that has as many positions as it needs
        keeps its state meanwhile, so that it does not depend on the others.

        Returns:
            The state of the inner sampler, the frames, and how many there are.
        """
        shares, free_RL = np.array(self.shares), ~fixed_RL
        before = np.append(0.0, shares[:-1])
        again = np.where(before > 0, self.remask / np.where(before > 0, before, 1), 0)
        shown_RL = free_RL & (progress.x_RL != denoiser.mask_id)
        share_R = jnp.full(shown_RL.size, jnp.asarray(again, jnp.float32)[progress.stage])
        coin_R = coins(fold(keys_R, 0), Rows.at(all_positions(progress.x_RL)), share_R)
        masked_RL = free_RL & (~shown_RL | coin_R.reshape(shown_RL.shape))
        kept = jnp.asarray(np.maximum(before - self.remask, 0), jnp.float32)[progress.stage]
        state = self.inner.resume(
            denoiser,
            fold(keys_R, 1),
            progress.x_RL,
            masked_RL,
            jnp.full(len(masked_RL), kept),
        )
        left = jnp.asarray(1 - shares, jnp.float32)[progress.stage]
        left_R = jnp.floor(left * free_RL.sum(1) + 1e-3)

        def going(state):
            return self.inner.active(denoiser, state) & (masked(denoiser, state).sum(1) > left_R)

        def one_round(carry):
            state, frames, tick = carry
            going_R, new = going(state), self.inner.advance(denoiser, state)
            state = jax.tree.map(lambda a, b: jnp.where(along(going_R, a), a, b), new, state)
            return state, record(frames, tick, state.x_BL), tick + 1

        frames = record(progress.frames, progress.tick, state.x_BL)
        return jax.lax.while_loop(
            lambda carry: denoiser.anywhere(going(carry[0])),
            one_round,
            (state, frames, progress.tick + 1),
        )


make = SearchPaths
