"""Exact questions about a product of distributions restricted to a language. arXiv:2505.23061.

The most likely string, samples, the partition function, marginals and the k best strings, each in
one compiled program over the recursions of ``sedd.constraints.recursions``.
"""

import bisect
from collections.abc import Callable
from functools import cached_property, partial
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from sedd.arrays import bucket
from sedd.constraints.recursions import (
    IMPOSSIBLE,
    ZERO,
    class_tokens,
    collect,
    given_masses,
    gumbel,
    masses,
    no_noise,
    prefix_values,
    suffix_values,
    walk,
)
from sedd.constraints.tables import Tables, sizes_of, tables
from sedd.constraints.token_automaton import TokenAutomaton
from sedd.errors import UserError
from sedd.types import Array, Float, Int

DRAWS = 16  # samples of one question that are drawn together

# ---------------------------------------------------------------- compiled questions


@partial(jax.jit, static_argnames="best")
def _values(table, log_probs_LN, fixed_L, final_S, length, *, best):
    mass = masses(table, log_probs_LN, best=best)
    mass_LC = given_masses(table, mass.class_CR.T, fixed_L)
    return mass, mass_LC, suffix_values(table, mass_LC, final_S, length, best=best)


def _walk(table, mass, mass_LC, value_LS, noise, fixed_L, start, length):
    token_LC = class_tokens(table, mass, noise).T
    drawn_L = walk(table, mass_LC + noise.class_CR.T, token_LC, value_LS, start, length)
    return jnp.where(fixed_L >= 0, fixed_L, drawn_L)


@jax.jit
def _most_likely(table, log_probs_LN, fixed_L, final_S, start, length):
    mass, mass_LC, value_LS = _values(table, log_probs_LN, fixed_L, final_S, length, best=True)
    noise = no_noise(table, len(log_probs_LN))
    return _walk(table, mass, mass_LC, value_LS, noise, fixed_L, start, length), value_LS


@jax.jit
def _sample(table, log_probs_LN, fixed_L, final_S, start, length, keys_RL):
    mass, mass_LC, value_LS = _values(table, log_probs_LN, fixed_L, final_S, length, best=False)

    def draw(keys_L):
        noise = gumbel(table, keys_L)
        return _walk(table, mass, mass_LC, value_LS, noise, fixed_L, start, length)

    return jax.lax.map(draw, keys_RL, batch_size=DRAWS), value_LS


def given_alone(log_probs_LN: Float[Array, "L N"], fixed_L: Int[Array, " L"]) -> Array:
    """Log probabilities in float32, at least ``ZERO``; a given token, ``fixed_L`` >= 0, has all."""
    log_probs_LN = jnp.maximum(log_probs_LN.astype(jnp.float32), ZERO)
    is_own_LN = jnp.arange(log_probs_LN.shape[1]) == fixed_L[:, None]
    return jnp.where(fixed_L[:, None] >= 0, jnp.where(is_own_LN, 0.0, ZERO), log_probs_LN)


@jax.jit
def _marginals(table, log_probs_LN, fixed_L, final_S, start, length):
    _, mass_LC, value_LS = _values(table, log_probs_LN, fixed_L, final_S, length, best=False)
    before_LS = prefix_values(table, mass_LC, start, length)

    def around(before_S, after_S):
        """The log probability of everything before and behind each class."""
        both_E = before_S[table.source_E] + after_S[table.target_E]
        return collect(both_E, table.class_E, table.num_classes, best=False, rising=False)

    around_LC = jax.vmap(around)(before_LS, value_LS[1:])
    around_LC1 = jnp.pad(around_LC, ((0, 0), (0, 1)), constant_values=ZERO)
    log_LN = (
        given_alone(log_probs_LN, fixed_L) + around_LC1[:, table.class_of_N] - value_LS[0, start]
    )
    return jnp.exp(log_LN), value_LS


@partial(jax.jit, static_argnames="k")
def _top_k(table, log_probs_LN, fixed_L, final_S, start, length, *, k):
    """The k best strings from ``start``, with their log probabilities; ZERO where there are fewer.

    Backward, every state keeps its k best ways ahead as (token, next state, which of its ways).
    """
    states, classes = len(table.accepting_S), table.num_classes
    token_M = table.token_KT.ravel()
    class_M = table.class_of_N.at[token_M].get(mode="fill", fill_value=classes)
    live_LM = given_alone(log_probs_LN, fixed_L)[:, token_M]  # that of padding is dropped

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
        top_kC, place_kC = best_of(live_M, class_M, classes)
        # A way is an edge, the i-th token of its class and the j-th way ahead of its target.
        ways_Ekk = top_kC.T[table.class_E][:, :, None] + value_kS.T[table.target_E][:, None, :]
        ways_Ekk = jnp.where((table.source_E < states)[:, None, None], ways_Ekk, ZERO)
        into = jnp.repeat(table.source_E, k * k)
        new_kS, place_kS = best_of(ways_Ekk.ravel(), into, states)
        edge_kS, i_kS, j_kS = jnp.unravel_index(place_kS, ways_Ekk.shape)
        token_kS = token_M[place_kC[i_kS, table.class_E[edge_kS]]]
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
        return jax.tree.map(jnp.asarray, tables(self, sizes_of([self])))

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
        self,
        length: int,
        *,
        fixed=None,
        start: int = 0,
        budget: int = 0,
        possible_LC=None,
        first: int = 0,
        text_of: Callable[[int], str] | None = None,
    ) -> None:
        """Raise UserError, with the reason, if no string has this length and the given tokens.

        One backward pass over the positions; a second question is asked only for the message.

        Args:
            length: the number of positions.
            fixed: [length] given tokens, -1 where a position is free.
            start: the state before the first position.
            budget: how many tokens may follow.
            possible_LC: whether a class has any probability at a position; all by default.
            first: the position of the span in its sequence, for messages.
            text_of: the text of a token, for messages.
        """
        fixed = np.full(length, -1) if fixed is None else np.asarray(fixed)
        final_S = self.final(budget)
        ways_LS = self._ways(fixed, final_S)
        if not ways_LS[0, start]:
            self._refuse_span(fixed, final_S, start, budget, first, text_of)
        if possible_LC is None:
            return
        reached_S = np.arange(self.num_states) == start
        for position in range(length):
            edges_E = reached_S[self.edge_source] & ways_LS[position + 1][self.edge_target]
            if fixed[position] >= 0:
                edges_E &= self.edge_class == self.class_of[fixed[position]]
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

    def _refuse_span(self, fixed_L, final_S, start, budget, first, text_of) -> NoReturn:
        """Raise UserError: the length alone is impossible, or the first token that contradicts it.

        That token ends the shortest impossible prefix of the given ones, found by bisection.
        """
        length = len(fixed_L)
        given = np.flatnonzero(fixed_L >= 0)

        def impossible(count):
            end = given[count - 1] + 1 if count else 0
            upto_L = np.where(np.arange(length) < end, fixed_L, -1)
            return not self._ways(upto_L, final_S)[0, start]

        if impossible(0):
            needs = int(self.distance[start])
            have = f"{length} tokens are left" + (f" and {budget} after them" if budget else "")
            if needs > length + budget:
                raise UserError(f"{self.pattern!r} needs at least {needs} tokens: {have}")
            raise UserError(f"{self.pattern!r} matches nothing of exactly that length: {have}")
        count = bisect.bisect_left(range(len(given)), True, key=lambda i: impossible(i + 1))
        position = int(given[count])
        token = int(fixed_L[position])
        text = "" if text_of is None else text_of(token)
        text = f", {text!r}," if text else ""
        raise UserError(
            f"the token {token}{text} that is given at position {first + position} contradicts "
            f"{self.pattern!r}"
        )

    def final(self, budget: int) -> np.ndarray:
        """The states from which exactly ``budget`` tokens, the filling ones included, can match."""
        if budget < 0:
            raise UserError(f"budget must be at least 0, got {budget}")
        return self._ways(np.full(budget, -1), self.accepting)[0]

    def _ways(self, fixed_L: np.ndarray, final_S: np.ndarray) -> np.ndarray:
        """Whether each state before each position has a way to the end, bool [L + 1, S]."""
        ways_LS = np.zeros((len(fixed_L) + 1, self.num_states), bool)
        ways_LS[-1] = final_S
        given = np.flatnonzero(fixed_L >= 0)
        position = len(fixed_L) - 1
        while position >= 0:
            source_E, target_E = self._edges_of(int(fixed_L[position]))
            ways_LS[position, source_E[ways_LS[position + 1][target_E]]] = True
            first = position
            if fixed_L[position] < 0 and (ways_LS[position] == ways_LS[position + 1]).all():
                # A fixed point: the same for all positions down to the next given token.
                first = int(given[: np.searchsorted(given, position)].max(initial=-1)) + 1
                ways_LS[first:position] = ways_LS[position]
            position = first - 1
        return ways_LS

    @cached_property
    def _by_class(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The edges in the order of their classes, and where each class begins."""
        order = np.argsort(self.edge_class, kind="stable")
        begins = np.searchsorted(self.edge_class[order], np.arange(self.num_classes + 1))
        return self.edge_source[order], self.edge_target[order], begins

    def _edges_of(self, token: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources and targets of the edges that a given token takes; all edges for -1."""
        if token < 0:
            return self.edge_source, self.edge_target
        source_E, target_E, begins = self._by_class
        cls = self.class_of[token]
        own = slice(begins[cls], begins[cls + 1]) if cls >= 0 else slice(0)
        return source_E[own], target_E[own]

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
