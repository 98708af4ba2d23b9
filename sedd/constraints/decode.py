"""Dynamic programming over a token automaton, on the device. arXiv:2505.23061, completed.

Everything is exact for the product of the positions' distributions restricted to the language: the
likeliest string, samples, the partition function, marginals and the k best. Logarithms have a
finite zero, ``ZERO``. States × vocabulary is never formed: a position's distribution is reduced to
the automaton's token classes first, and only the automaton's own edges are visited.

S are the automaton's states, C its classes, E its edges, M the tokens that have a class.
"""

from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sedd.arrays import bucket, categorical
from sedd.constraints.token_automaton import TokenAutomaton
from sedd.errors import UserError
from sedd.types import Array, Bool, Float, Int, Key

ZERO = -1e30  # the logarithm of 0: sums of many stay finite in float32
IMPOSSIBLE = -1e29  # what is below holds at least one ZERO


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Tables:
    """An automaton on the device, padded so that another one of about its size fits the program.

    What is padded has the class ``num_classes`` or the state S, and is dropped.
    """

    num_classes: int = field(metadata={"static": True})
    class_of_N: Int[Array, " N"]
    token_M: Int[Array, " M"]  # in the order of their classes
    class_M: Int[Array, " M"]
    source_E: Int[Array, " E"]  # rising
    class_E: Int[Array, " E"]
    target_E: Int[Array, " E"]
    accepting_S: Bool[Array, " S"]


def sizes(automaton: TokenAutomaton) -> tuple[int, ...]:
    """Classes, tokens, edges and states that the program is compiled for."""
    live = int((automaton.class_of >= 0).sum())
    exact = (automaton.num_classes, live, len(automaton.edge_source), automaton.num_states)
    return tuple(bucket(max(size, 64)) for size in exact)


def tables(automaton: TokenAutomaton, sizes: tuple[int, ...]) -> Tables:
    """The tables, padded to ``sizes``."""
    classes, tokens, edges, states = sizes
    class_of = np.where(automaton.class_of < 0, classes, automaton.class_of)
    order = np.argsort(class_of, kind="stable")[: int((automaton.class_of >= 0).sum())]

    def padded(values, size, fill) -> Any:
        return np.concatenate([values, np.full(size - len(values), fill)]).astype(np.int32)

    return Tables(
        num_classes=classes,
        class_of_N=padded(class_of, len(class_of), 0),
        token_M=padded(order, tokens, 0),
        class_M=padded(class_of[order], tokens, classes),
        source_E=padded(automaton.edge_source, edges, states),
        class_E=padded(automaton.edge_class, edges, classes),
        target_E=padded(automaton.edge_target, edges, 0),
        accepting_S=padded(automaton.accepting, states, 0) > 0,
    )


# ---------------------------------------------------------------- recurrences of one sequence


def collect(
    values_X: Float[Array, " X *l"],
    into_X: Int[Array, " X"],
    size: int,
    *,
    best: bool,
    rising: bool = False,
) -> Float[Array, " Y *l"]:
    """The maximum, or the log of the sum, of the values that go to each of ``size`` places."""
    options = {"num_segments": size, "indices_are_sorted": rising}
    top_Y = jnp.maximum(jax.ops.segment_max(values_X, into_X, **options), ZERO)
    if best:
        return top_Y
    shifted_X = jnp.exp(values_X - top_Y[jnp.minimum(into_X, size - 1)])
    sum_Y = jax.ops.segment_sum(shifted_X, into_X, **options)
    return jnp.where(top_Y > IMPOSSIBLE, top_Y + jnp.log(jnp.maximum(sum_Y, 1e-30)), ZERO)


def class_mass(
    table: Tables, log_probs_LN: Float[Array, "L N"], *, best: bool
) -> Float[Array, "L C1"]:
    """What each class of tokens has at each position; the last class is that of the padding."""
    live_ML = jnp.take(log_probs_LN.T, table.token_M, axis=0)  # whole rows move faster
    mass_CL = collect(live_ML, table.class_M, table.num_classes, best=best, rising=True)
    return jnp.pad(mass_CL.T, ((0, 0), (0, 1)), constant_values=ZERO)


def suffix_values(
    table: Tables,
    mass_LC: Float[Array, "L C1"],
    final_S: Float[Array, " S"],
    length: Int[Array, ""],
    *,
    best: bool,
) -> Float[Array, "L1 S"]:
    """What is ahead of each position in each state; from ``length`` on, the final weights."""

    def step(value_S, position):
        mass_C, index = position
        ahead_E = mass_C[table.class_E] + value_S[table.target_E]
        new_S = collect(ahead_E, table.source_E, len(value_S), best=best, rising=True)
        value_S = jnp.where(index < length, new_S, value_S)
        return value_S, value_S

    positions = (mass_LC, jnp.arange(len(mass_LC)))
    _, value_LS = jax.lax.scan(step, final_S, positions, reverse=True)
    return jnp.concatenate([value_LS, final_S[None]])


def walk(
    table: Tables,
    log_probs_LN: Float[Array, "L N"],
    mass_LC: Float[Array, "L C1"],
    value_LS: Float[Array, "L1 S"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    keys_L: Key[Array, " L"] | None,
) -> Int[Array, " L"]:
    """The likeliest string, or with keys a sample, by what is ahead; token 0 from ``length`` on.

    ``mass_LC`` and ``value_LS`` are maxima or sums accordingly. Ties go to the smallest token.
    """

    def step(state, position):
        index, log_probs_N, mass_C, value_S, key = position
        target_C = jnp.full(table.num_classes + 1, -1)
        here_E = jnp.where(table.source_E == state, table.class_E, table.num_classes + 1)
        target_C = target_C.at[here_E].set(table.target_E, mode="drop")
        # Padded edges are of no state, and the padded class leads nowhere.
        ahead_C = jnp.where(target_C < 0, ZERO, value_S[target_C])
        if key is None:
            drawn = likeliest_class(table.class_of_N, log_probs_N, mass_C, ahead_C)
            taken = drawn
        else:  # ZERO is too large for a sum to change
            drawn = categorical(key, ahead_C[table.class_of_N] + log_probs_N).astype(jnp.int32)
            taken = table.class_of_N[drawn]
        return jnp.where(index < length, target_C[taken], state), drawn

    index_L = jnp.arange(len(log_probs_LN))
    positions = (index_L, log_probs_LN, mass_LC, value_LS[1:], keys_L)
    drawn_L = jax.lax.scan(step, start, positions)[1]
    if keys_L is None:
        best_L1 = jnp.take_along_axis(mass_LC, drawn_L[:, None], 1)
        best_LN = (table.class_of_N == drawn_L[:, None]) & (log_probs_LN == best_L1)
        drawn_L = first(best_LN)
    return jnp.where(index_L < length, drawn_L, 0)


def likeliest_class(
    class_of_N: Int[Array, " N"],
    log_probs_N: Float[Array, " N"],
    mass_C: Float[Array, " C1"],
    ahead_C: Float[Array, " C1"],
) -> Int[Array, ""]:
    """That of the first token with the greatest sum of its own value and of what is ahead."""
    score_C = mass_C + ahead_C
    top_C = score_C == score_C.max()

    def of_several():  # to look every token's class up takes most of the time: only for ties
        score_N = ahead_C[class_of_N] + log_probs_N
        return class_of_N[first(score_N == score_N.max())]

    one = top_C.argmax().astype(jnp.int32)
    return jax.lax.cond(top_C.sum() == 1, lambda: one, of_several)


def first(is_best_XN: Bool[Array, "*x N"]) -> Int[Array, "*x"]:
    """The first True of a row, in a pass that the compiler vectorises, as it does not argmax."""
    index_N = jnp.arange(is_best_XN.shape[-1], dtype=jnp.int32)
    return jnp.where(is_best_XN, index_N, len(index_N) - 1).min(-1)


def prefix_values(
    table: Tables, mass_LC: Float[Array, "L C1"], start: Int[Array, ""], length: Int[Array, ""]
) -> Float[Array, "L S"]:
    """The log of the sum over all ways into each state before each position."""
    states = len(table.accepting_S)
    first_S = jnp.where(jnp.arange(states) == start, 0.0, ZERO)

    def step(value_S, position):
        mass_C, index = position
        source_E = jnp.minimum(table.source_E, states - 1)
        reached_E = mass_C[table.class_E] + value_S[source_E]  # ZERO where it is padding
        new_S = collect(reached_E, table.target_E, states, best=False)
        return jnp.where(index < length, new_S, value_S), value_S

    return jax.lax.scan(step, first_S, (mass_LC, jnp.arange(len(mass_LC))))[1]


def clamp(log_probs_LN: Float[Array, "L N"], fixed_L: Int[Array, " L"]) -> Float[Array, "L N"]:
    """Distributions in float32; a fixed position, where ``fixed_L`` >= 0, has its token alone."""
    log_probs_LN = jnp.maximum(log_probs_LN.astype(jnp.float32), ZERO)
    tokens_N = jnp.arange(log_probs_LN.shape[1])
    alone_LN = jnp.where(tokens_N[None] == fixed_L[:, None], 0.0, ZERO)
    return jnp.where(fixed_L[:, None] >= 0, alone_LN, log_probs_LN)


# ---------------------------------------------------------------- a question, compiled


@partial(jax.jit, static_argnames="best")
def _values(table, log_probs_LN, fixed_L, final_S, length, *, best):
    log_probs_LN = clamp(log_probs_LN, fixed_L)
    mass_LC = class_mass(table, log_probs_LN, best=best)
    return log_probs_LN, mass_LC, suffix_values(table, mass_LC, final_S, length, best=best)


@jax.jit
def _most_likely(table, log_probs_LN, fixed_L, final_S, start, length):
    asked = (log_probs_LN, fixed_L, final_S, length)
    log_probs_LN, mass_LC, value_LS = _values(table, *asked, best=True)
    return walk(table, log_probs_LN, mass_LC, value_LS, start, length, None), value_LS


@jax.jit
def _sample(table, log_probs_LN, fixed_L, final_S, start, length, keys_RL):
    asked = (log_probs_LN, fixed_L, final_S, length)
    log_probs_LN, mass_LC, value_LS = _values(table, *asked, best=False)
    draw = partial(walk, table, log_probs_LN, mass_LC, value_LS, start, length)
    return jax.lax.map(draw, keys_RL), value_LS


@jax.jit
def _marginals(table, log_probs_LN, fixed_L, final_S, start, length):
    log_probs_LN, mass_LC, value_LS = _values(
        table, log_probs_LN, fixed_L, final_S, length, best=False
    )
    before_LS = prefix_values(table, mass_LC, start, length)
    states = len(table.accepting_S)

    def around(before_S, after_S):
        """Of each class, everything before and behind it."""
        both_E = before_S[jnp.minimum(table.source_E, states - 1)] + after_S[table.target_E]
        both_E = jnp.where(table.source_E < states, both_E, ZERO)
        return collect(both_E, table.class_E, table.num_classes + 1, best=False)

    around_LC = jax.vmap(around)(before_LS, value_LS[1:])
    around_LC = around_LC.at[:, -1].set(ZERO)
    log_LN = log_probs_LN + around_LC[:, table.class_of_N] - value_LS[0, start]
    return jnp.exp(log_LN), value_LS


@partial(jax.jit, static_argnames="k")
def _top_k(table, log_probs_LN, fixed_L, final_S, start, length, *, k):
    """The k best strings from ``start``, with their log probabilities; ZERO where there are fewer.

    Backward, every state keeps its k best ways ahead as (token, next state, which of its ways).
    """
    log_probs_LN = clamp(log_probs_LN, fixed_L)
    states, classes = len(table.accepting_S), table.num_classes
    live_LM = jnp.take(log_probs_LN, table.token_M, axis=1)

    def best_of(values_X, into_X, size):
        """The k best values of each place and where they stand, k × [size]."""

        def one(values_X, _):
            top_Y = jnp.maximum(jax.ops.segment_max(values_X, into_X, size), ZERO)
            is_top = values_X >= top_Y[jnp.minimum(into_X, size - 1)]
            places_X = jnp.where(is_top, jnp.arange(len(values_X)), len(values_X))
            place_Y = jnp.minimum(jax.ops.segment_min(places_X, into_X, size), len(values_X) - 1)
            taken_X = jnp.arange(len(values_X)) == place_Y[jnp.minimum(into_X, size - 1)]
            return jnp.where(taken_X, 2 * ZERO, values_X), (top_Y, place_Y)

        return jax.lax.scan(one, values_X, length=k)[1]

    def step(value_kS, position):
        live_M, index = position
        top_kC, place_kC = best_of(live_M, table.class_M, classes + 1)
        # A way is an edge, the i-th token of its class and the j-th way ahead of its target.
        ways_Ekk = top_kC.T[table.class_E][:, :, None] + value_kS.T[table.target_E][:, None, :]
        ways_Ekk = jnp.where((table.source_E < states)[:, None, None], ways_Ekk, ZERO)
        into = jnp.repeat(table.source_E, k * k)
        new_kS, place_kS = best_of(ways_Ekk.ravel(), into, states)
        edge_kS, i_kS, j_kS = jnp.unravel_index(place_kS, ways_Ekk.shape)
        token_kS = table.token_M[place_kC[i_kS, table.class_E[edge_kS]]]
        back = (token_kS, table.target_E[edge_kS], j_kS)
        return jnp.where(index < length, new_kS, value_kS), back

    only_first = jnp.where(jnp.arange(k)[:, None] == 0, final_S[None], ZERO)
    value_kS, back_LkS = jax.lax.scan(
        step, only_first, (live_LM, jnp.arange(len(live_LM))), reverse=True
    )

    def follow(carry, position):
        (token_kS, target_kS, way_kS), index = position
        state_k, rank_k = carry
        go = index < length
        token_k = jnp.where(go, token_kS[rank_k, state_k], 0)
        state_after = jnp.where(go, target_kS[rank_k, state_k], state_k)
        return (state_after, jnp.where(go, way_kS[rank_k, state_k], rank_k)), token_k

    first = (jnp.full(k, start), jnp.arange(k))
    _, token_Lk = jax.lax.scan(follow, first, (back_LkS, jnp.arange(len(live_LM))))
    return token_Lk.T, value_kS[:, start]


# ---------------------------------------------------------------- for users


class Automaton(TokenAutomaton):
    """The strings of a language in tokens, and what there is to ask of distributions over them.

    Every method takes ``log_probs_LN``, log probabilities of N tokens at L positions, and answers
    for the product of those distributions restricted to the language. Common options:

    - ``fixed``: [L] tokens that are given, -1 where a position is free;
    - ``start``: the state before the first position, as ``run`` returns it for what came before;
    - ``budget``: how many tokens may follow these L; the string can then still be finished within
      them. 0 by default: it must be complete. With an end-of-text token (``eos_id``) shorter
      strings are filled up with it.

    UserError, naming the position, where nothing is possible, and on nan.
    """

    @classmethod
    def of(cls, automaton: TokenAutomaton) -> "Automaton":
        return cls(**vars(automaton))

    @cached_property
    def tables(self) -> Tables:
        """On the device, for questions about this automaton alone."""
        return jax.tree.map(jnp.asarray, tables(self, sizes(self)))

    def run(self, tokens, start: int = 0) -> int:
        """The state after some tokens; -1 where they cannot be continued to a match."""
        state = start
        for token in np.asarray(tokens).tolist():
            state = self.step(state, token) if state >= 0 else -1
        return state

    def most_likely(self, log_probs_LN, **options) -> tuple[np.ndarray, float]:
        """The string of the highest probability, [L], and its log probability.

        Ties go to the lexicographically smallest tokens.
        """
        asked, start, length = self._ask(log_probs_LN, **options)
        tokens_L, value_LS = _most_likely(self.tables, *asked, start, length)
        return np.asarray(tokens_L[:length]), self._possible(value_LS[0], log_probs_LN, options)

    def sample(self, key, log_probs_LN, num: int = 1, **options) -> np.ndarray:
        """``num`` independent strings, [num, L]."""
        asked, start, length = self._ask(log_probs_LN, **options)
        keys_RL = jax.random.split(key, (num, len(asked[1])))
        tokens_RL, value_LS = _sample(self.tables, *asked, start, length, keys_RL)
        self._possible(value_LS[0], log_probs_LN, options)
        return np.asarray(tokens_RL[:, :length])

    def log_partition(self, log_probs_LN, **options) -> float:
        """The log probability that independent draws at each position are in the language."""
        asked, _, length = self._ask(log_probs_LN, **options)
        *_, value_LS = _values(self.tables, *asked, length, best=False)
        return self._possible(value_LS[0], log_probs_LN, options)

    def marginals(self, log_probs_LN, **options) -> np.ndarray:
        """The probability of each token at each position, [L, N], given that all match."""
        asked, start, length = self._ask(log_probs_LN, **options)
        marginals_LN, value_LS = _marginals(self.tables, *asked, start, length)
        self._possible(value_LS[0], log_probs_LN, options)
        return np.asarray(marginals_LN[:length])

    def top_k(self, log_probs_LN, k: int, **options) -> list[tuple[np.ndarray, float]]:
        """The k likeliest strings and their log probabilities, falling; or all of them."""
        if k < 1:
            raise UserError(f"k must be at least 1, got {k}")
        asked, start, length = self._ask(log_probs_LN, **options)
        tokens_kL, value_k = _top_k(self.tables, *asked, start, length, k=k)
        if float(value_k[0]) <= IMPOSSIBLE:
            self._refuse(log_probs_LN, **options)
        found = zip(np.asarray(tokens_kL[:, :length]), value_k.tolist(), strict=True)
        return [(tokens_L, value) for tokens_L, value in found if value > IMPOSSIBLE]

    def check_span(
        self, length: int, *, fixed=None, start: int = 0, budget: int = 0, possible_LC=None, first=0
    ) -> None:
        """UserError where no string goes with the length and the fixed tokens, and why.

        ``possible_LC`` says which classes have any probability at a position. In messages
        positions count from ``first``.
        """
        fixed = np.full(length, -1) if fixed is None else np.asarray(fixed)
        final_S = self.final(budget)
        none = np.full(length, -1)
        if not self._ways(none, final_S)[0][start]:
            needs = int(self.distance[start])
            have = f"{length} tokens are left" + (f" and {budget} after them" if budget else "")
            if needs > length + budget:
                raise UserError(f"{self.pattern!r} needs at least {needs} tokens: {have}")
            raise UserError(f"{self.pattern!r} matches nothing of exactly that length: {have}")
        for position in np.flatnonzero(fixed >= 0):
            upto = np.where(np.arange(length) <= position, fixed, -1)
            if not self._ways(upto, final_S)[0][start]:
                raise UserError(
                    f"the token {fixed[position]} that is given at position {first + position} "
                    f"contradicts {self.pattern!r}"
                )
        if possible_LC is None:
            return
        ways_LS = self._ways(fixed, final_S)
        reached_S = np.arange(self.num_states) == start
        for position in range(length):
            edges_E = reached_S[self.edge_source] & ways_LS[position + 1][self.edge_target]
            edges_E &= self._allowed(fixed[position])
            if not (edges_E & possible_LC[position, self.edge_class]).any():
                states = np.unique(self.edge_source[edges_E])
                raise UserError(
                    f"position {first + position}: all tokens that {self.pattern!r} allows there, "
                    f"in state {', '.join(map(str, states[:5]))}, have probability 0"
                )
            edges_E &= possible_LC[position, self.edge_class]
            reached_S = np.zeros(self.num_states, bool)
            reached_S[self.edge_target[edges_E]] = True
        # Each position has a way on, but none is a way through.
        raise UserError(f"no string of {self.pattern!r} has a probability above 0")

    def final(self, budget: int) -> np.ndarray:
        """The states from which exactly ``budget`` tokens, the filling ones included, can match."""
        if budget < 0:
            raise UserError(f"budget must be at least 0, got {budget}")
        return self._ways(np.full(budget, -1), self.accepting)[0]

    def _ways(self, fixed_L: np.ndarray, final_S: np.ndarray) -> np.ndarray:
        """Which states have a way to the end before each position, [L + 1, S]."""
        ways_LS = np.zeros((len(fixed_L) + 1, self.num_states), bool)
        ways_LS[-1] = final_S
        given = np.flatnonzero(fixed_L >= 0)
        position = len(fixed_L) - 1
        while position >= 0:
            edges_E = ways_LS[position + 1][self.edge_target] & self._allowed(fixed_L[position])
            ways_LS[position, self.edge_source[edges_E]] = True
            first = position
            if fixed_L[position] < 0 and (ways_LS[position] == ways_LS[position + 1]).all():
                # Settled: the same down to the next token that is given.
                first = int(given[given < position].max(initial=-1)) + 1
                ways_LS[first:position] = ways_LS[position]
            position = first - 1
        return ways_LS

    def _allowed(self, token: int) -> np.ndarray:
        """The edges that a given token takes; all where it is -1."""
        if token < 0:
            return np.ones(len(self.edge_source), bool)
        return self.edge_class == self.class_of[token]

    def _ask(self, log_probs_LN, *, fixed=None, start: int = 0, budget: int = 0):
        """The padded arguments of the compiled functions."""
        log_probs_LN = jnp.asarray(log_probs_LN)
        tokens = len(self.class_of)
        if log_probs_LN.ndim != 2 or log_probs_LN.shape[1] != tokens:
            raise UserError(
                f"log_probs must be [length, {tokens}], a row a position and a column a token, "
                f"got {list(log_probs_LN.shape)}"
            )
        length = len(log_probs_LN)
        if fixed is not None and np.shape(fixed) != (length,):
            raise UserError(f"fixed must be [{length}], got {list(np.shape(fixed))}")
        if fixed is not None and not (np.asarray(fixed) < tokens).all():
            raise UserError(f"fixed: {np.max(fixed)} is no token, they are 0 to {tokens - 1}")
        if not 0 <= start < self.num_states:
            raise UserError(f"start must be a state, 0 to {self.num_states - 1}, got {start}")
        bad_L = np.asarray(jnp.isnan(log_probs_LN).any(1))
        if bad_L.any():
            position = int(bad_L.argmax())
            raise UserError(
                f"position {position}: the log probabilities hold nan, in "
                f"{self.states_after(position, start)}"
            )
        more = bucket(max(length, 8)) - length
        fixed_L = np.full(length + more, -1, np.int32)
        fixed_L[:length] = -1 if fixed is None else fixed
        final_S = np.full(len(self.tables.accepting_S), ZERO, np.float32)
        final_S[: self.num_states][self.final(budget)] = 0.0
        padded_LN = jnp.pad(log_probs_LN, ((0, more), (0, 0)))
        return (padded_LN, fixed_L, final_S), start, length

    def states_after(self, length: int, start: int = 0) -> str:
        """The first of the states that so many tokens can lead to, for a message."""
        reached_S = np.arange(self.num_states) == start
        for _ in range(length):
            reached_S = np.bincount(
                self.edge_target[reached_S[self.edge_source]], minlength=self.num_states
            ).astype(bool)
        states = ", ".join(map(str, np.flatnonzero(reached_S)[:5]))
        return f"state {states} of {self.pattern!r}"

    def _possible(self, value_S, log_probs_LN, options) -> float:
        """The value of the start; UserError where it is that of nothing."""
        value = float(value_S[options.get("start", 0)])
        if value <= IMPOSSIBLE:
            self._refuse(log_probs_LN, **options)
        return value

    def _refuse(self, log_probs_LN, *, fixed=None, start: int = 0, budget: int = 0):
        live_N = self.class_of >= 0
        possible_LC = np.zeros((len(log_probs_LN), self.num_classes), bool)
        rows, columns = np.nonzero(np.asarray(log_probs_LN)[:, live_N] > IMPOSSIBLE)
        possible_LC[rows, self.class_of[live_N][columns]] = True
        if fixed is not None:
            given = np.flatnonzero(np.asarray(fixed) >= 0)
            possible_LC[given] = True
        self.check_span(
            len(log_probs_LN), fixed=fixed, start=start, budget=budget, possible_LC=possible_LC
        )
