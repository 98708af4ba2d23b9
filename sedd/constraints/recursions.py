"""Dynamic programs over a token automaton, for one sequence, on the device.

The idea. The network makes the positions independent: token y has probability p_i(y) at position i.
The constraint keeps the strings that the automaton accepts. All tokens of a class lead from any
state to the same next state, so only the mass of each class matters,
m_i(c) = sum of p_i(y) over y in c. The suffix value v_i(s) is the probability that tokens drawn at
positions i, i+1, …, L-1 lead from state s to acceptance. It satisfies

    v_i(s) = sum over edges (s, c, s') of m_i(c) · v_{i+1}(s'),      v_L(s) = 1 if s accepts, else 0

and v_0(start) is the partition function. A forward pass then draws an exact joint sample: in state
s it draws an edge in proportion to m_i(c) · v_{i+1}(s'), and a token y of the edge's class in
proportion to p_i(y). With the maximum in place of the sum, in masses and recursion alike, the same
forward pass returns the most likely string (arXiv:2505.23061). These are the sum semiring and the
max semiring; the argument ``best`` chooses the latter.

How it is computed. Values are logarithms, and log 0 is the finite ``ZERO``. The work is that of the
automaton's edges: no array of states × vocabulary is formed. A token of each class is drawn before
the forward pass, so that rows of the vocabulary can be dropped after their masses are taken. The
forward pass uses one class of each position, so the classes of a position may share the noise of
that draw.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sedd.arrays import backward, forward
from sedd.constraints.tables import Tables
from sedd.types import Array, Float, Int, Key

ZERO = -1e30  # log 0: finite, so that neither a sum of many nor a difference is nan in float32
IMPOSSIBLE = -1e29  # a value below this contains at least one ZERO
NOISE = 8  # numbers of each kind of noise that are drawn from one key


def collect(
    values_X: Float[Array, " X *l"],
    into_X: Int[Array, " X"],
    size: int,
    *,
    best: bool,
    rising: bool = True,
) -> Float[Array, " Y *l"]:
    """Reduce the values of each segment: by log-sum-exp, or by the maximum if ``best``.

    Args:
        values_X: log values.
        into_X: the segment of each value, 0 to ``size`` - 1; ``size`` drops the value.
        size: the number of segments.
        best: whether to take the maximum.
        rising: whether ``into_X`` ascends.

    Returns:
        A log value for each segment, ``ZERO`` for an empty one.
    """
    options = {"num_segments": size, "indices_are_sorted": rising}
    top_Y = jnp.maximum(jax.ops.segment_max(values_X, into_X, **options), ZERO)
    if best:
        return top_Y
    shifted_X = jnp.exp(values_X - top_Y[jnp.minimum(into_X, size - 1)])
    sum_Y = jax.ops.segment_sum(shifted_X, into_X, **options)
    return jnp.where(top_Y > IMPOSSIBLE, top_Y + jnp.log(jnp.maximum(sum_Y, 1e-30)), ZERO)


class Noise(NamedTuple):
    """Gumbel noise of R positions, or zeros: for classes, groups, blocks and tokens.

    A block is chosen within a group and a token within a block, so that these two share the noise
    of T members over all groups and blocks.
    """

    class_CR: Float[Array, "C R"]
    group_JR: Float[Array, "J R"]
    block_TR: Float[Array, "T R"]
    token_TR: Float[Array, "T R"]


def gumbel(table: Tables, keys_R: Key[Array, " R"]) -> Noise:
    """Gumbel noise that resolves probabilities of 1e-14 and depends only on a position's key.

    Numbers are drawn ``NOISE`` at a time from keys folded with their index. A larger padded size
    therefore only appends numbers, and a sample does not depend on the other automata of the batch.
    """
    groups, members = table.block_JT.shape
    size = max(table.num_classes, groups, 2 * members)
    keys_RI = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(
        keys_R, jnp.arange(-(-size // NOISE))
    )
    draw = partial(jax.random.gumbel, shape=(NOISE, 3), mode="high")
    noise_RX3 = jax.vmap(jax.vmap(draw))(keys_RI).reshape(len(keys_R), -1, 3)
    class_XR, group_XR, member_XR = noise_RX3.transpose(2, 1, 0)
    return Noise(
        class_XR[: table.num_classes],
        group_XR[:groups],
        member_XR[:members],
        member_XR[members : 2 * members],
    )


def no_noise(table: Tables, rows: int) -> Noise:
    """Zeros for ``rows`` positions: draws then return the most likely value."""
    groups, members = table.block_JT.shape
    return Noise(
        *(jnp.zeros((size, rows)) for size in (table.num_classes, groups, members, members))
    )


# ---------------------------------------------------------------- classes of a position


class Masses(NamedTuple):
    """Log probabilities in R rows, of tokens and in total of blocks, groups and classes of tokens.

    With ``best`` the totals are maxima.
    """

    token_NR: Float[Array, "N R"]
    block_KR: Float[Array, "K R"]
    group_JR: Float[Array, "J R"]
    class_CR: Float[Array, "C R"]


def masses(table: Tables, log_probs_RN: Float[Array, "R N"], *, best: bool) -> Masses:
    """The mass of each token class in each row: the sum over its tokens; the maximum if ``best``.

    Tokens are summed in blocks of T, and blocks in groups of T, which the compiler vectorises. Only
    the groups are scattered to their classes, which is slow. Every sum subtracts its own maximum:
    a class keeps its mass even if all its tokens are far below the row's largest.
    """
    token_NR = jnp.maximum(log_probs_RN.astype(jnp.float32), ZERO).T  # gathers copy whole rows

    def reduced(values_XR, members_YT):
        values_YTR = values_XR.at[members_YT].get(mode="fill", fill_value=ZERO)
        top_YR = values_YTR.max(1)
        if best:
            return top_YR
        return top_YR + jnp.log(jnp.exp(values_YTR - top_YR[:, None]).sum(1))

    block_KR = reduced(token_NR, table.token_KT)
    group_JR = reduced(block_KR, table.block_JT)
    class_CR = collect(group_JR, table.class_J, table.num_classes, best=best)
    return Masses(token_NR, block_KR, group_JR, class_CR)


def class_tokens(table: Tables, mass: Masses, noise: Noise) -> Int[Array, "C R"]:
    """Draw a token of each class in each row, in proportion to its probability.

    A group of the class is drawn, then a block of the group, then a token of the block, each as the
    argument of the maximum of log mass plus Gumbel noise. With ``no_noise`` and masses of ``best``
    the result is the most likely token, the smallest one of several.
    """
    groups, classes = len(table.class_J), table.num_classes
    score_JR = mass.group_JR + noise.group_JR
    top_CR = collect(score_JR, table.class_J, classes, best=True)
    own_JR = top_CR[jnp.minimum(table.class_J, classes - 1)]
    index_JR = jnp.where(score_JR >= own_JR, jnp.arange(groups)[:, None], groups)
    group_CR = jax.ops.segment_min(index_JR, table.class_J, classes, indices_are_sorted=True)
    group_CR = jnp.minimum(group_CR, groups - 1)  # a class of padding has no group

    def chosen(values_X, members_CT, noise_T):
        """The member with the greatest score, the first one of several."""
        score_CT = values_X.at[members_CT].get(mode="fill", fill_value=ZERO) + noise_T
        is_top_CT = score_CT == score_CT.max(-1, keepdims=True)
        return jnp.where(is_top_CT, members_CT, len(values_X)).min(-1)

    chosen = jax.vmap(chosen, 1, 1)
    block_CR = chosen(mass.block_KR, table.block_JT[group_CR], noise.block_TR)
    return chosen(mass.token_NR, table.token_KT[block_CR], noise.token_TR)


def given_masses(
    table: Tables, mass_LC: Float[Array, "L C"], fixed_L: Int[Array, " L"]
) -> Float[Array, "L C"]:
    """The class masses, given tokens: where ``fixed_L`` >= 0, that token has probability 1."""
    own_L1 = table.class_of_N[fixed_L][:, None]
    alone_LC = jnp.where(jnp.arange(table.num_classes) == own_L1, 0.0, ZERO)
    return jnp.where(fixed_L[:, None] >= 0, alone_LC, mass_LC)


# ---------------------------------------------------------------- along the positions


def suffix_values(
    table: Tables,
    mass_LC: Float[Array, "L C"],
    final_S: Float[Array, " S"],
    length: Int[Array, ""],
    *,
    best: bool,
) -> Float[Array, "L1 S"]:
    """The suffix values v_i(s) of the module's docstring, by a backward pass over the positions.

    Args:
        table: the automaton.
        mass_LC: log masses of the classes at each position, of the semiring that ``best`` chooses.
        final_S: log values of the states after the last position, v_L.
        length: the number of positions before padding.
        best: whether to use the max semiring.

    Returns:
        Values [L + 1, S]; at positions from ``length`` on they are ``final_S``.
    """

    def step(value_S, mass_C):
        ahead_E = mass_C[table.class_E] + value_S[table.target_E]
        return collect(ahead_E, table.source_E, len(value_S), best=best)

    return backward(step, final_S, mass_LC, length)


def prefix_values(
    table: Tables, mass_LC: Float[Array, "L C"], start: Int[Array, ""], length: Int[Array, ""]
) -> Float[Array, "L S"]:
    """The log probability that the tokens before position i lead from ``start`` to state s, [L, S].

    It is the forward counterpart of ``suffix_values``, in the sum semiring.
    """
    states = len(table.accepting_S)
    first_S = jnp.where(jnp.arange(states) == start, 0.0, ZERO)

    def step(value_S, mass_C):
        reached_E = mass_C[table.class_E] + value_S[table.source_E]
        return collect(reached_E, table.target_E, states, best=False, rising=False), value_S

    return forward(step, first_S, mass_LC, length)


def walk(
    table: Tables,
    mass_LC: Float[Array, "L C"],
    token_LC: Int[Array, "L C"],
    value_LS: Float[Array, "L1 S"],
    start: Int[Array, ""],
    length: Int[Array, ""],
) -> Int[Array, " L"]:
    """Forward pass over the suffix values: the most likely string, or a sample.

    Each position takes the edge with the largest log mass plus suffix value. For the most likely
    string both are of the max semiring; for a sample both are of the sum semiring and the masses
    contain Gumbel noise.

    Args:
        table: the automaton.
        mass_LC: log masses of the classes, with noise for a sample.
        token_LC: the token that stands for each class, from ``class_tokens``.
        value_LS: suffix values.
        start: the state before the first position.
        length: the number of positions before padding.

    Returns:
        Token ids [L], 0 at positions from ``length`` on. Among equal edges the one with the
        smallest token is taken.
    """
    offset_C = jnp.arange(table.num_classes)  # a state has at most one edge for each class

    def step(state, position):
        mass_C, token_C, value_S = position
        edge_C = table.first_S1[state] + offset_C
        class_C, target_C = table.class_E[edge_C], table.target_E[edge_C]
        is_own_C = edge_C < table.first_S1[state + 1]
        score_C = jnp.where(is_own_C, mass_C[class_C] + value_S[target_C], -jnp.inf)
        ranked_C = jnp.where(score_C == score_C.max(), token_C[class_C], len(table.class_of_N))
        taken = ranked_C.argmin()
        return target_C[taken], ranked_C[taken]

    drawn_L = forward(step, start, (mass_LC, token_LC, value_LS[1:]), length)
    return jnp.where(jnp.arange(len(drawn_L)) < length, drawn_L, 0)


def given_log_probs(
    log_probs_LN: Float[Array, "L N"], fixed_L: Int[Array, " L"]
) -> Float[Array, "L N"]:
    """Log probabilities in float32, at least ``ZERO``; a given token (``fixed_L`` >= 0) has 0."""
    log_probs_LN = jnp.maximum(log_probs_LN.astype(jnp.float32), ZERO)
    is_own_LN = jnp.arange(log_probs_LN.shape[1]) == fixed_L[:, None]
    return jnp.where(fixed_L[:, None] >= 0, jnp.where(is_own_LN, 0.0, ZERO), log_probs_LN)


def token_marginals(
    table: Tables,
    log_probs_LN: Float[Array, "L N"],
    mass_LC: Float[Array, "L C"],
    value_LS: Float[Array, "L1 S"],
    start: Int[Array, ""],
    length: Int[Array, ""],
) -> Float[Array, "L N"]:
    """The probability of each token at each position, given that the string matches.

    It is p_i(y) times the probability of everything around position i, summed over the edges of the
    class of y, and divided by the partition function. Everything around an edge (s, c, s') is the
    prefix value of s and the suffix value of s'.

    Args:
        table: the automaton.
        log_probs_LN: log probabilities after ``given_log_probs``.
        mass_LC: log masses of the classes.
        value_LS: suffix values in the sum semiring.
        start: the state before the first position.
        length: the number of positions before padding.
    """
    before_LS = prefix_values(table, mass_LC, start, length)

    def around(before_S, after_S):
        both_E = before_S[table.source_E] + after_S[table.target_E]
        return collect(both_E, table.class_E, table.num_classes, best=False, rising=False)

    around_LC = jax.vmap(around)(before_LS, value_LS[1:])
    around_LC1 = jnp.pad(around_LC, ((0, 0), (0, 1)), constant_values=ZERO)
    return jnp.exp(log_probs_LN + around_LC1[:, table.class_of_N] - value_LS[0, start])
