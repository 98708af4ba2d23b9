"""Dynamic programming over a token automaton, on the device: the recursions of one sequence.

The idea. Given the network, the positions are independent: token y has probability p_i(y) at
position i. The constraint keeps the strings that the automaton accepts. Tokens of a class lead to
the same state from every state, so a position enters only by the mass of each class,
m_i(c) = sum of p_i(y) over y in c. The suffix value v_i(s), the probability that draws at positions
i, i+1, … lead from state s to acceptance, satisfies

    v_i(s) = sum over edges (s, c, s') of m_i(c) · v_{i+1}(s'),      v_L(s) = 1 if s accepts, else 0

and v_0(start) is the partition function. An exact joint sample then goes forward: from state s draw
an edge in proportion to m_i(c) · v_{i+1}(s'), then a token y of its class in proportion to p_i(y).
With the maximum in place of the sum, in masses and recursion alike, the same forward pass gives
the most likely string. These are the sum and the max semiring, chosen by ``best``; the latter is
that of arXiv:2505.23061.

Values are logarithms with a finite zero, ``ZERO``. States × vocabulary is never formed, and only
the automaton's own edges are visited. The token of each class is drawn before the forward pass, so
that rows of the vocabulary need not be kept. One class of a position is used in the end, so all
classes of a position may share the noise of that draw.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sedd.constraints.tables import Tables
from sedd.types import Array, Float, Int, Key

ZERO = -1e30  # log of 0: sums of many stay finite in float32
IMPOSSIBLE = -1e29  # values below contain at least one ZERO
NOISE = 8  # numbers of each kind from one key


def collect(
    values_X: Float[Array, " X *l"],
    into_X: Int[Array, " X"],
    size: int,
    *,
    best: bool,
    rising: bool = True,
) -> Float[Array, " Y *l"]:
    """The maximum, or the log of the sum, of the values with each index ``into_X`` < ``size``."""
    options = {"num_segments": size, "indices_are_sorted": rising}
    top_Y = jnp.maximum(jax.ops.segment_max(values_X, into_X, **options), ZERO)
    if best:
        return top_Y
    shifted_X = jnp.exp(values_X - top_Y[jnp.minimum(into_X, size - 1)])
    sum_Y = jax.ops.segment_sum(shifted_X, into_X, **options)
    return jnp.where(top_Y > IMPOSSIBLE, top_Y + jnp.log(jnp.maximum(sum_Y, 1e-30)), ZERO)


class Noise(NamedTuple):
    """Gumbel noise of R positions, or zeros in its place: for classes, groups and members."""

    class_CR: Float[Array, "C R"]
    group_JR: Float[Array, "J R"]
    block_TR: Float[Array, "T R"]
    token_TR: Float[Array, "T R"]


def gumbel(table: Tables, keys_R: Key[Array, " R"]) -> Noise:
    """Noise that resolves probabilities of 1e-14, and depends on a position's key alone.

    A larger padded size only appends to it, so that the other automata of a batch do not matter.
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
    """Zeros, with which a draw is the likeliest."""
    groups, members = table.block_JT.shape
    return Noise(
        *(jnp.zeros((size, rows)) for size in (table.num_classes, groups, members, members))
    )


# ---------------------------------------------------------------- classes of a position


class Masses(NamedTuple):
    """Log probabilities of R rows, and what blocks, groups and classes of tokens have of them."""

    token_NR: Float[Array, "N R"]
    block_KR: Float[Array, "K R"]
    group_JR: Float[Array, "J R"]
    class_CR: Float[Array, "C R"]


def masses(table: Tables, log_probs_RN: Float[Array, "R N"], *, best: bool) -> Masses:
    """The mass of every token class in each row: the sum of its tokens, or with ``best`` the most.

    Tokens are summed in blocks of one class and blocks in groups of one class, which the compiler
    vectorises; groups are scattered to their classes. Each sum subtracts its own maximum: a class
    of which every token is far below the row's largest keeps its mass.
    """
    token_NR = jnp.maximum(log_probs_RN.astype(jnp.float32), ZERO).T  # whole rows move faster

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
    """A token of each class in each row, drawn in proportion to its probability.

    The draw goes from group to block to token, each by the greatest log probability plus noise.
    Without noise, and with the masses of ``best``, it is the likeliest token, the first of several.
    """
    groups, classes = len(table.class_J), table.num_classes
    score_JR = mass.group_JR + noise.group_JR
    top_CR = collect(score_JR, table.class_J, classes, best=True)
    own_JR = top_CR[jnp.minimum(table.class_J, classes - 1)]
    index_JR = jnp.where(score_JR >= own_JR, jnp.arange(groups)[:, None], groups)
    group_CR = jax.ops.segment_min(index_JR, table.class_J, classes, indices_are_sorted=True)
    group_CR = jnp.minimum(group_CR, groups - 1)  # classes of padding have none

    def chosen(values_X, members_CT, noise_T):
        """The first of the members with the greatest score."""
        score_CT = values_X.at[members_CT].get(mode="fill", fill_value=ZERO) + noise_T
        is_top_CT = score_CT == score_CT.max(-1, keepdims=True)
        return jnp.where(is_top_CT, members_CT, len(values_X)).min(-1)

    chosen = jax.vmap(chosen, 1, 1)
    block_CR = chosen(mass.block_KR, table.block_JT[group_CR], noise.block_TR)
    return chosen(mass.token_NR, table.token_KT[block_CR], noise.token_TR)


def given_masses(
    table: Tables, mass_LC: Float[Array, "L C"], fixed_L: Int[Array, " L"]
) -> Float[Array, "L C"]:
    """The masses where a position has one token, ``fixed_L`` >= 0, with probability 1."""
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
    """v_i(s) of the module's docstring, from the last position to the first.

    ``final_S`` are the values behind the last position; positions from ``length`` on are padding,
    and have them too.
    """

    def step(value_S, position):
        mass_C, index = position
        ahead_E = mass_C[table.class_E] + value_S[table.target_E]
        new_S = collect(ahead_E, table.source_E, len(value_S), best=best)
        value_S = jnp.where(index < length, new_S, value_S)
        return value_S, value_S

    positions = (mass_LC, jnp.arange(len(mass_LC)))
    _, value_LS = jax.lax.scan(step, final_S, positions, reverse=True)
    return jnp.concatenate([value_LS, final_S[None]])


def prefix_values(
    table: Tables, mass_LC: Float[Array, "L C"], start: Int[Array, ""], length: Int[Array, ""]
) -> Float[Array, "L S"]:
    """The log probability that the positions before each one lead from ``start`` to each state."""
    states = len(table.accepting_S)
    first_S = jnp.where(jnp.arange(states) == start, 0.0, ZERO)

    def step(value_S, position):
        mass_C, index = position
        reached_E = mass_C[table.class_E] + value_S[table.source_E]
        new_S = collect(reached_E, table.target_E, states, best=False, rising=False)
        return jnp.where(index < length, new_S, value_S), value_S

    return jax.lax.scan(step, first_S, (mass_LC, jnp.arange(len(mass_LC))))[1]


def walk(
    table: Tables,
    mass_LC: Float[Array, "L C"],
    token_LC: Int[Array, "L C"],
    value_LS: Float[Array, "L1 S"],
    start: Int[Array, ""],
    length: Int[Array, ""],
) -> Int[Array, " L"]:
    """Forward pass over the suffix values: the most likely string, or a sample.

    A sample takes suffix values of sums, and masses with Gumbel noise. Ties go to the smallest
    token. Positions from ``length`` on have token 0.
    """
    offset_C = jnp.arange(table.num_classes)  # a state has at most one edge for each class

    def step(state, position):
        index, mass_C, token_C, value_S = position
        edge_C = table.first_S1[state] + offset_C
        class_C, target_C = table.class_E[edge_C], table.target_E[edge_C]
        is_own_C = edge_C < table.first_S1[state + 1]
        score_C = jnp.where(is_own_C, mass_C[class_C] + value_S[target_C], -jnp.inf)
        ranked_C = jnp.where(score_C == score_C.max(), token_C[class_C], len(table.class_of_N))
        taken = ranked_C.argmin()
        return jnp.where(index < length, target_C[taken], state), ranked_C[taken]

    index_L = jnp.arange(len(mass_LC))
    drawn_L = jax.lax.scan(step, start, (index_L, mass_LC, token_LC, value_LS[1:]))[1]
    return jnp.where(index_L < length, drawn_L, 0)
