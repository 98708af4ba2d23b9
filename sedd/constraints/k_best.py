"""The k most likely strings of a token automaton, by dynamic programming with k values a state."""

import jax
import jax.numpy as jnp

from sedd.constraints.recursions import ZERO
from sedd.constraints.tables import Tables
from sedd.types import Array, Float, Int


def k_best(
    table: Tables,
    log_probs_LN: Float[Array, "L N"],
    final_S: Float[Array, " S"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    *,
    k: int,
) -> tuple[Int[Array, "k L"], Float[Array, " k"]]:
    """The k most likely strings from ``start``.

    In place of one suffix value, every state keeps the values of its k best suffixes, the best
    first. A suffix is an edge, a token of its class and a suffix of its target; only the k best
    tokens of a class and the k suffixes of the target can be part of a k best one, so each edge has
    k² candidates. The backward pass records for each suffix its token, its target and the rank of
    the target's suffix; the forward pass follows these records from ``start``.

    Args:
        table: the automaton.
        log_probs_LN: log probabilities after ``given_log_probs``.
        final_S: log values of the states after the last position.
        start: the state before the first position.
        length: the number of positions before padding.
        k: the number of strings.

    Returns:
        Token ids [k, L], and log probabilities [k] in descending order. If only n < k strings are
        possible, the log probabilities from index n on are at most ``IMPOSSIBLE``, and their tokens
        have no meaning.
    """
    states, classes = len(table.accepting_S), table.num_classes
    token_M = table.token_KT.ravel()
    class_M = table.class_of_N.at[token_M].get(mode="fill", fill_value=classes)
    live_LM = log_probs_LN[:, token_M]  # the entries of padding are dropped by their class

    def step(value_kS, position):
        live_M, index = position
        top_kC, place_kC = _k_largest(live_M, class_M, classes, k)
        # The candidates of an edge: the i-th token of its class and the j-th suffix of its target.
        ways_Ekk = top_kC.T[table.class_E][:, :, None] + value_kS.T[table.target_E][:, None, :]
        ways_Ekk = jnp.where((table.source_E < states)[:, None, None], ways_Ekk, ZERO)
        into = jnp.repeat(table.source_E, k * k)
        new_kS, place_kS = _k_largest(ways_Ekk.ravel(), into, states, k)
        edge_kS, i_kS, j_kS = jnp.unravel_index(place_kS, ways_Ekk.shape)
        token_kS = token_M[place_kC[i_kS, table.class_E[edge_kS]]]
        back = (token_kS, table.target_E[edge_kS], j_kS)
        return jnp.where(index < length, new_kS, value_kS), back

    only_first = jnp.where(jnp.arange(k)[:, None] == 0, final_S[None], ZERO)
    value_kS, back_LkS = jax.lax.scan(
        step, only_first, (live_LM, jnp.arange(len(live_LM))), reverse=True
    )

    return _followed(back_LkS, start, length, k).T, value_kS[:, start]


def _followed(back_LkS, start: Int[Array, ""], length: Int[Array, ""], k: int) -> Array:
    """The tokens [L, k] of the k best suffixes of ``start``, from the records of ``k_best``."""

    def step(carry, position):
        (token_kS, target_kS, suffix_kS), index = position
        state_k, rank_k = carry
        go = index < length
        token_k = jnp.where(go, token_kS[rank_k, state_k], 0)
        state_after = jnp.where(go, target_kS[rank_k, state_k], state_k)
        return (state_after, jnp.where(go, suffix_kS[rank_k, state_k], rank_k)), token_k

    first = (jnp.full(k, start), jnp.arange(k))
    return jax.lax.scan(step, first, (back_LkS, jnp.arange(len(back_LkS[0]))))[1]


def _k_largest(
    values_X: Float[Array, " X"], into_X: Int[Array, " X"], size: int, k: int
) -> tuple[Float[Array, "k Y"], Int[Array, "k Y"]]:
    """The k largest values of each of ``size`` segments and their indices in ``values_X``.

    Equal values come in the order of their indices. Missing ones have ``ZERO``.
    """

    def one(values_X, _):
        top_Y = jnp.maximum(jax.ops.segment_max(values_X, into_X, size), ZERO)
        is_top = values_X >= top_Y[jnp.minimum(into_X, size - 1)]
        places_X = jnp.where(is_top, jnp.arange(len(values_X)), len(values_X))
        place_Y = jnp.minimum(jax.ops.segment_min(places_X, into_X, size), len(values_X) - 1)
        taken_X = jnp.arange(len(values_X)) == place_Y[jnp.minimum(into_X, size - 1)]
        return jnp.where(taken_X, 2 * ZERO, values_X), (top_Y, place_Y)

    return jax.lax.scan(one, values_X, length=k)[1]
