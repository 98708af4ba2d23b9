"""Exact decoding from a product of distributions restricted to a language (arXiv:2505.23061).

The network gives independent distributions of the tokens at L positions. ``Automaton`` computes,
for that product restricted to the strings that match a pattern: the most likely string, samples,
the partition function, marginals and the k most likely strings. Each is one compiled program over
the dynamic programs of ``recursions``. Lengths and automata are padded to few sizes, so that
other patterns of similar size share a program.
"""

import bisect
from collections.abc import Callable
from functools import cached_property, partial
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from sedd.arrays import bucket
from sedd.constraints.k_best import k_best
from sedd.constraints.recursions import (
    IMPOSSIBLE,
    ZERO,
    class_tokens,
    given_log_probs,
    given_masses,
    gumbel,
    masses,
    no_noise,
    suffix_values,
    token_marginals,
    walk,
)
from sedd.constraints.regex import shown
from sedd.constraints.tables import Tables, sizes_of, tables
from sedd.constraints.token_automaton import TokenAutomaton
from sedd.errors import UserError

DRAWS = 16  # samples drawn side by side; more of them are drawn in turns

# ---------------------------------------------------------------- compiled programs


@partial(jax.jit, static_argnames="best")
def _values(table, log_probs_LN, fixed_L, final_S, length, *, best):
    """Masses of all tokens, masses of the classes given the fixed tokens, and suffix values."""
    mass = masses(table, log_probs_LN, best=best)
    mass_LC = given_masses(table, mass.class_CR.T, fixed_L)
    return mass, mass_LC, suffix_values(table, mass_LC, final_S, length, best=best)


def _walk(table, mass, mass_LC, value_LS, noise, fixed_L, start, length):
    """One string: the most likely one, or a sample if ``noise`` is Gumbel noise."""
    token_LC = class_tokens(table, mass, noise).T
    drawn_L = walk(table, mass_LC + noise.class_CR.T, token_LC, value_LS, start, length)
    return jnp.where(fixed_L >= 0, fixed_L, drawn_L)


@jax.jit
def _most_likely(table, log_probs_LN, fixed_L, final_S, start, length):
    """The most likely string and the suffix values."""
    mass, mass_LC, value_LS = _values(table, log_probs_LN, fixed_L, final_S, length, best=True)
    noise = no_noise(table, len(log_probs_LN))
    return _walk(table, mass, mass_LC, value_LS, noise, fixed_L, start, length), value_LS


@jax.jit
def _sample(table, log_probs_LN, fixed_L, final_S, start, length, keys_RL):
    """A sample for each row of keys, and the suffix values, which the samples share."""
    mass, mass_LC, value_LS = _values(table, log_probs_LN, fixed_L, final_S, length, best=False)

    def draw(keys_L):
        noise = gumbel(table, keys_L)
        return _walk(table, mass, mass_LC, value_LS, noise, fixed_L, start, length)

    return jax.lax.map(draw, keys_RL, batch_size=DRAWS), value_LS


@jax.jit
def _marginals(table, log_probs_LN, fixed_L, final_S, start, length):
    """The marginals of all tokens and the suffix values."""
    _, mass_LC, value_LS = _values(table, log_probs_LN, fixed_L, final_S, length, best=False)
    given_LN = given_log_probs(log_probs_LN, fixed_L)
    return token_marginals(table, given_LN, mass_LC, value_LS, start, length), value_LS


@partial(jax.jit, static_argnames="k")
def _top_k(table, log_probs_LN, fixed_L, final_S, start, length, *, k):
    """The k most likely strings and their log probabilities."""
    return k_best(table, given_log_probs(log_probs_LN, fixed_L), final_S, start, length, k=k)


# ---------------------------------------------------------------- public interface


class Automaton(TokenAutomaton):
    """A language as an automaton over tokens, and exact decoding from distributions over it.

    ``compile_regex`` and ``compile_json_schema`` build one. The decoding methods (``most_likely``,
    ``sample``, ``log_partition``, ``marginals``, ``top_k``) take ``log_probs_LN``, the log
    probabilities of N tokens at L positions, and these options:

    - ``fixed``: [L] given tokens, -1 where a position is free.
    - ``start``: the state before the first position, from ``run`` on the tokens before; default 0.
    - ``budget``: how many tokens may follow the L positions to complete the string; 0 by default.

    With an end-of-text token (``eos_id``) the string may end early and is filled up with it. Then
    ``budget`` is a maximum; without an end-of-text token, exactly ``budget`` tokens follow.

    Methods return the log probability of a string under the unrestricted product. Subtract
    ``log_partition`` to condition it on a match. A token in ``fixed`` counts as certain. The
    methods raise UserError, with the reason, if no string is possible or a probability is nan.
    """

    @classmethod
    def of(cls, automaton: TokenAutomaton) -> "Automaton":
        """The automaton with the decoding methods."""
        return cls(**vars(automaton))

    @cached_property
    def tables(self) -> Tables:
        """The automaton as arrays on the device, padded to the smallest sizes that it fits."""
        return jax.tree.map(jnp.asarray, tables(self, sizes_of([self])))

    def run(self, tokens, start: int = 0) -> int:
        """The state after some tokens, or -1 if no match begins with them.

        Args:
            tokens: token ids.
            start: the state before the first of them.
        """
        state = start
        for token in np.asarray(tokens).tolist():
            state = self.step(state, token) if state >= 0 else -1
        return state

    def most_likely(self, log_probs_LN, **options) -> tuple[np.ndarray, float]:
        """The string of the highest probability, [L], and its log probability.

        Of several such strings it is the one with the lexicographically smallest tokens.
        """
        arrays, start, length = self._padded(log_probs_LN, **options)
        tokens_L, value_LS = _most_likely(self.tables, *arrays, start, length)
        return np.asarray(tokens_L[:length]), self._possible(value_LS[0], log_probs_LN, options)

    def sample(self, key, log_probs_LN, num: int = 1, **options) -> np.ndarray:
        """Draw ``num`` independent strings, [num, L], from the restricted product."""
        arrays, start, length = self._padded(log_probs_LN, **options)
        keys_RL = jax.random.split(key, (num, len(arrays[1])))
        tokens_RL, value_LS = _sample(self.tables, *arrays, start, length, keys_RL)
        self._possible(value_LS[0], log_probs_LN, options)
        return np.asarray(tokens_RL[:, :length])

    def log_partition(self, log_probs_LN, **options) -> float:
        """The log probability that tokens drawn independently at each position match."""
        arrays, _, length = self._padded(log_probs_LN, **options)
        *_, value_LS = _values(self.tables, *arrays, length, best=False)
        return self._possible(value_LS[0], log_probs_LN, options)

    def marginals(self, log_probs_LN, **options) -> np.ndarray:
        """The probability of each token at each position, [L, N], given that the string matches."""
        arrays, start, length = self._padded(log_probs_LN, **options)
        marginals_LN, value_LS = _marginals(self.tables, *arrays, start, length)
        self._possible(value_LS[0], log_probs_LN, options)
        return np.asarray(marginals_LN[:length])

    def top_k(self, log_probs_LN, k: int, **options) -> list[tuple[np.ndarray, float]]:
        """The k most likely strings with their log probabilities, the most likely first.

        There are fewer if fewer than k strings have a probability above 0.
        """
        if k < 1:
            raise UserError(f"k must be at least 1, got {k}")
        arrays, start, length = self._padded(log_probs_LN, **options)
        tokens_kL, value_k = _top_k(self.tables, *arrays, start, length, k=k)
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
        """Raise UserError, with the reason, if no match has this length and these given tokens.

        Without ``possible_LC`` the method returns None if there is a match. With ``possible_LC`` it
        always raises: the caller knows that every match has probability 0, and the error names the
        first position at which the tokens' probabilities rule out all matches.

        Args:
            length: the number of positions.
            fixed: [length] given tokens, -1 where a position is free.
            start: the state before the first position.
            budget: how many tokens may follow.
            possible_LC: whether each class has a token of positive probability at each position,
                bool [L, C]. None checks length and given tokens only.
            first: the position of the span in its sequence, for messages.
            text_of: returns the text of a token, for messages.
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
                    f"position {first + position}: all tokens that {shown(self.pattern)} allows "
                    f"there, in state {', '.join(map(str, states[:5]))}, have probability 0"
                )
            edges_E &= possible_LC[position, self.edge_class]
            reached_S = np.zeros(self.num_states, bool)
            reached_S[self.edge_target[edges_E]] = True
        # Every position has a possible edge, but the product of their probabilities is too small.
        raise UserError(f"no string of {shown(self.pattern)} has a probability above 0")

    def _refuse_span(self, fixed_L, final_S, start, budget, first, text_of) -> NoReturn:
        """Raise UserError about the length, if it is impossible, or about the first wrong token.

        The wrong token is the last one of the shortest impossible prefix of the given tokens. A
        longer prefix is impossible as well, so bisection finds it.
        """
        length = len(fixed_L)
        given = np.flatnonzero(fixed_L >= 0)

        def impossible(count):
            end = given[count - 1] + 1 if count else 0
            upto_L = np.where(np.arange(length) < end, fixed_L, -1)
            return not self._ways(upto_L, final_S)[0, start]

        if impossible(0):
            needs = int(self.distance[start])
            if needs > length + budget:
                more = f" ({budget} more may follow)" if budget else ""
                raise UserError(
                    f"{shown(self.pattern)} needs at least {needs} tokens, but has room for "
                    f"{length}{more}; give more tokens or a shorter pattern"
                )
            after = f" with {budget} more after them" if budget else ""
            raise UserError(
                f"{shown(self.pattern)} matches no string of exactly {length} tokens{after}"
            )
        count = bisect.bisect_left(range(len(given)), True, key=lambda i: impossible(i + 1))
        position = int(given[count])
        token = int(fixed_L[position])
        text = "" if text_of is None else text_of(token)
        text = f", {text!r}," if text else ""
        raise UserError(
            f"the token {token}{text} that is given at position {first + position} contradicts "
            f"{shown(self.pattern)}"
        )

    def final(self, budget: int) -> np.ndarray:
        """The states from which exactly ``budget`` tokens lead to acceptance, bool [S].

        End-of-text tokens count.
        """
        if budget < 0:
            raise UserError(f"budget must be at least 0, got {budget}")
        return self._ways(np.full(budget, -1), self.accepting)[0]

    def _ways(self, fixed_L: np.ndarray, final_S: np.ndarray) -> np.ndarray:
        """Whether the positions from i on can lead from state s into ``final_S``, bool [L + 1, S].

        A free position applies the same map of sets of states as any other free position. Once it
        leaves the set unchanged, the row is copied down to the next given token: a long span costs
        as many passes over the edges as the automaton is deep, not as it has positions.
        """
        ways_LS = np.zeros((len(fixed_L) + 1, self.num_states), bool)
        ways_LS[-1] = final_S
        given = np.flatnonzero(fixed_L >= 0)
        position = len(fixed_L) - 1
        while position >= 0:
            source_E, target_E = self._edges_of(int(fixed_L[position]))
            ways_LS[position, source_E[ways_LS[position + 1][target_E]]] = True
            first = position
            if fixed_L[position] < 0 and (ways_LS[position] == ways_LS[position + 1]).all():
                # A fixed point: copy it to all positions down to the next given token.
                first = int(given[: np.searchsorted(given, position)].max(initial=-1)) + 1
                ways_LS[first:position] = ways_LS[position]
            position = first - 1
        return ways_LS

    @cached_property
    def _by_class(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sources and targets of the edges, sorted by class, and where each class begins."""
        order = np.argsort(self.edge_class, kind="stable")
        begins = np.searchsorted(self.edge_class[order], np.arange(self.num_classes + 1))
        return self.edge_source[order], self.edge_target[order], begins

    def _edges_of(self, token: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources and targets of the edges that a token takes; of all edges if it is -1."""
        if token < 0:
            return self.edge_source, self.edge_target
        source_E, target_E, begins = self._by_class
        cls = self.class_of[token]
        own = slice(begins[cls], begins[cls + 1]) if cls >= 0 else slice(0)
        return source_E[own], target_E[own]

    def _padded(self, log_probs_LN, *, fixed=None, start: int = 0, budget: int = 0):
        """Check the arguments of a decoding method and pad them.

        Returns:
            The padded log probabilities, given tokens and values of the final states; the start;
            and the length before padding.
        """
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
        """Up to five of the states that ``length`` tokens can lead to, as text for a message."""
        reached_S = np.arange(self.num_states) == start
        for _ in range(length):
            reached_S = np.bincount(
                self.edge_target[reached_S[self.edge_source]], minlength=self.num_states
            ).astype(bool)
        states = ", ".join(map(str, np.flatnonzero(reached_S)[:5]))
        return f"state {states} of {shown(self.pattern)}"

    def _possible(self, value_S, log_probs_LN, options) -> float:
        """The suffix value of the start state; raises UserError if no string is possible."""
        value = float(value_S[options.get("start", 0)])
        if value <= IMPOSSIBLE:
            self._refuse(log_probs_LN, **options)
        return value

    def _refuse(self, log_probs_LN, *, fixed=None, start: int = 0, budget: int = 0):
        """Raise UserError with the reason why no string has a positive probability."""
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
