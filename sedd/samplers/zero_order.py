"""Zero-order search in the noise: draws near the best one so far, or a Markov chain of draws.

arXiv:2501.09732, section 3.2; as a Markov chain, Metropolis-Hastings.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp

from sedd.arrays import fold
from sedd.errors import FieldError
from sedd.networks.rows import Rows
from sedd.samplers.noise import coins
from sedd.samplers.search import (
    AGAIN,
    MOVES,
    Search,
    added,
    either,
    nothing_like,
    preference,
    shown,
    summed,
    take,
)
from sedd.samplers.verifier import verifiers_of
from sedd.types import Array, Bool, Float, Int, Key, Keys


@dataclass(frozen=True, kw_only=True)
class ZeroOrder(Search):
    """Keep a draw of ``inner``, the pivot, and move to draws whose noise is partly the same.

    The noise of a draw has independent parts: that of the sequence as a whole, such as the order of
    its positions, and that of each position in all rounds. A neighbour of the pivot has new noise
    in each part with probability ``rho``. By itself every neighbour follows the law of ``inner``,
    whatever ``rho`` is: at 1 it is independent of the pivot, at 0 it is the pivot.

    The first pivot is the draw of the inner sampler with the request's own noise. A round draws
    ``neighbours`` sequences, all of them neighbours of the pivot; in the first round the pivot
    itself is one of them. So ``rounds``·``neighbours`` sequences are drawn, as many as by
    best_of_n with this n, and at ``rho`` 1 the greedy search has the law of best_of_n.

    Without ``tilt`` the search is greedy: the pivot becomes the best neighbour, unless all score
    lower than it. There is no formula for the law. With several verifiers, the mean ranks among the
    pivot and its neighbours decide.

    With ``tilt``, and one verifier, the pivot is the state of a Markov chain that leaves
    p(x)·exp(tilt·score(x)) exactly invariant, p being the law of ``inner``, for every ``rho`` above
    0 and every number of neighbours. One neighbour is accepted with probability min(1,
    exp(tilt·(its score - the pivot's))). Of several, neighbour j is proposed in proportion to its
    weight w = exp(tilt·score) and accepted with probability min(1, Σ_{i≠pivot} w_i / Σ_{i≠j} w_i),
    where i runs over the pivot and its neighbours. For this to be exact, pivot and neighbours have
    to be exchangeable: all of them are made from one common centre, whose noise differs from that
    of each in a smaller share of the parts. The pivot after the last round is returned. Its law
    tends to the tilted one as ``rounds`` grow; greedy search is the limit of an infinite tilt.
    """

    takes_latent: ClassVar[bool] = False

    neighbours: int = 4
    """Sequences drawn in each round."""
    rounds: int = 16
    """Rounds; rounds times neighbours sequences are drawn for each one that is returned."""
    tilt: float | None = None
    """Weight of the score in exp(tilt·score), to which the law of the samples tends; by default the
    search is greedy."""
    rho: float = 0.1
    """Probability that a part of a neighbour's noise is new, in [0, 1]: 1 is random search."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("neighbours", "rounds"):
            if getattr(self, name) < 1:
                raise FieldError(name, f"must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.rho <= 1:
            raise FieldError("rho", f"must be in [0, 1], got {self.rho}")
        if self.rounds * (self.neighbours + 1) >= 2**31:
            raise FieldError("rounds", "times neighbours must be below 2**31")
        if self.tilt is None:
            return
        if not math.isfinite(self.tilt):
            raise FieldError("tilt", f"must be finite, got {self.tilt}")
        self.check_one_verifier()

    @property
    def candidates(self):
        return self.neighbours

    def __call__(self, denoiser, keys_B, tokens_BL, fixed_BL, *, trace=False):
        """Run all rounds. The loop ends early if a score is nan."""
        self.check(denoiser)
        batch, count, length = len(keys_B), self.neighbours, tokens_BL.shape[1]
        wide, keys_R = denoiser.repeat(count), jnp.repeat(keys_B, count)
        tokens_RL, fixed_RL = (jnp.repeat(rows, count, 0) for rows in (tokens_BL, fixed_BL))

        def draw(version_RP):
            """Draw and score the sequences of some noise."""
            drawn = self.inner(wide, keys_of(keys_R, version_RP), tokens_RL, fixed_RL, trace=trace)
            scores = self.scores(wide, keys_B, drawn.tokens_BL, fixed_RL)
            counted = replace(
                drawn,
                calls_B=drawn.calls_B + scores.calls_R,
                rows_B=drawn.rows_B + scores.calls_R,
                verifier_calls_B=jnp.full(len(keys_R), scores.score_RE.shape[1], jnp.int32),
            )
            return counted, scores.score_RE

        def one_round(carry):
            pivot, version_BP, score_BE, tick = carry
            round_keys_B = fold(fold(keys_B, MOVES), tick)
            version_RP = self.versions(round_keys_B, version_BP, tick)
            drawn, score_RE = draw(version_RP)
            score_BKE = score_RE.reshape(batch, count, -1)
            chosen_B, moves_B = self.choose(round_keys_B, score_BE, score_BKE, tick)
            row_B = chosen_B + count * jnp.arange(batch)
            new = take(drawn, row_B)
            counts = {
                name: summed(getattr(drawn, name), batch)
                for name in ("calls_B", "rows_B", "verifier_calls_B")
            }
            pivot = added(either(moves_B, new, pivot), replace(new, **counts), pivot)
            version_BP = jnp.where(moves_B[:, None], version_RP[row_B], version_BP)
            score_BE = jnp.where(moves_B[:, None], score_RE[row_B], score_BE)
            return pivot, version_BP, score_BE, tick + 1

        def goes_on(carry):
            *_, score_BE, tick = carry
            return (tick < self.rounds) & ~denoiser.anywhere(jnp.isnan(score_BE))

        none_BP = jnp.zeros((batch, 1 + length), jnp.int32)
        nothing = nothing_like(
            lambda: take(draw(jnp.repeat(none_BP, count, 0))[0], jnp.arange(batch))
        )
        lowest_BE = jnp.full((batch, len(verifiers_of(self.verifier))), -jnp.inf)
        pivot, _, score_BE, _ = jax.lax.while_loop(
            goes_on, one_round, (nothing, none_BP, lowest_BE, jnp.zeros((), jnp.int32))
        )
        return replace(pivot, score_B=shown(score_BE))

    def versions(
        self, keys_B: Key[Array, " B"], version_BP: Int[Array, "B P"], tick: Int[Array, ""]
    ) -> Int[Array, "R P"]:
        """Number the versions of the neighbours' noise; row b·K + j is neighbour j of request b.

        Where two texts have equal numbers they have equal noise; 0 is the request's own.
        Column 0 is the noise of the sequence as a whole, column 1 + i that of position i. Going
        from the pivot to a neighbour is two moves, to the centre and from there, each of which
        takes a new version with probability 1 - √(1 - rho).

        Args:
            keys_B: the keys of the round.
            version_BP: the numbers of the pivot; all are 0 at the start.
            tick: the number of the round, from 0.
        """
        batch, count = len(keys_B), self.neighbours
        share, newest = 1 - math.sqrt(1 - self.rho), 1 + tick * (count + 1)
        centre_BP = moved(fold(keys_B, 0), version_BP, share, jnp.full(batch, newest))
        slot_R = jnp.tile(jnp.arange(count), batch)
        keys_R = fold(fold(jnp.repeat(keys_B, count), 1), slot_R)
        version_RP = moved(keys_R, jnp.repeat(centre_BP, count, 0), share, newest + 1 + slot_R)
        itself_R = (tick == 0) & (slot_R == 0)
        return jnp.where(itself_R[:, None], jnp.repeat(version_BP, count, 0), version_RP)

    def choose(
        self,
        keys_B: Key[Array, " B"],
        pivot_BE: Float[Array, "B E"],
        score_BKE: Float[Array, "B K E"],
        tick: Int[Array, ""],
    ) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
        """Choose a neighbour of each request, and whether the search moves to it.

        Args:
            keys_B: the keys of the round.
            pivot_BE: the scores of the pivot.
            score_BKE: the scores of the neighbours.
            tick: the number of the round. In the first one the pivot is one of the neighbours, and
                the search always moves.
        """
        failed_B = jnp.isnan(score_BKE).any((1, 2))
        if self.tilt is None:
            value_BC = preference(jnp.concatenate([pivot_BE[:, None], score_BKE], 1))
            best_B = value_BC[:, 1:].argmax(1)
            return best_B, (value_BC[:, 1:].max(1) >= value_BC[:, 0]) | failed_B
        log_weight_BK = self.tilt * score_BKE[..., 0]
        pivot_B = jnp.where(tick == 0, -jnp.inf, self.tilt * pivot_BE[:, 0])
        chosen_B = jax.vmap(jax.random.categorical)(fold(keys_B, 2), log_weight_BK)
        is_chosen_BK = jnp.arange(self.neighbours) == chosen_B[:, None]
        others_BC = jnp.where(is_chosen_BK, pivot_B[:, None], log_weight_BK)
        log_ratio_B = jax.nn.logsumexp(log_weight_BK, 1) - jax.nn.logsumexp(others_BC, 1)
        uniform_B = jax.vmap(jax.random.uniform)(fold(keys_B, 3))
        return chosen_B, (jnp.log(uniform_B) < log_ratio_B) | failed_B


def moved(
    keys_B: Key[Array, " B"],
    version_BP: Int[Array, "B P"],
    share: float,
    newest_B: Int[Array, " B"],
) -> Int[Array, "B P"]:
    """Replace each version by the newest one with probability ``share``."""
    rows = Rows.at(jnp.broadcast_to(jnp.arange(version_BP.shape[1]), version_BP.shape))
    new_R = coins(keys_B, rows, jnp.full(version_BP.size, share))
    return jnp.where(new_R.reshape(version_BP.shape), newest_B[:, None], version_BP)


def keys_of(keys_B: Key[Array, " B"], version_BP: Int[Array, "B P"]) -> Keys:
    """The keys of some versions of the noise; those of version 0 are the keys of the sequences."""
    keys_BP = jnp.broadcast_to(keys_B[:, None], version_BP.shape)
    other_BP = jax.vmap(jax.vmap(jax.random.fold_in))(fold(keys_BP, AGAIN), version_BP)
    return jnp.where(version_BP == 0, keys_BP, other_BP)


make = ZeroOrder
