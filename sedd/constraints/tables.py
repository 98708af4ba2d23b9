"""A token automaton as arrays of static sizes, so that one compiled program serves many automata.

To sum the probabilities of each token class fast, tokens are laid out in two levels of fixed width:
blocks of up to T tokens of one class, and groups of up to T blocks of one class. Sums along a fixed
width vectorise, where a scatter of every token to its class does not.

Shape suffixes of this package: S states, E edges (transitions), C token classes, N tokens of the
vocabulary, L positions, R rows of log probabilities, K blocks, J groups, T members.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from sedd.arrays import bucket
from sedd.constraints.token_automaton import TokenAutomaton
from sedd.types import Array, Bool, Int

MEMBERS = 32  # T: the tokens in a block, and the blocks in a group
LEAST = 32  # the smallest padded size of every axis


class Sizes(NamedTuple):
    """The padded sizes of ``Tables``; each combination needs its own compiled program."""

    classes: int
    blocks: int
    groups: int
    edges: int
    states: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Tables:
    """An automaton on the device, padded to ``Sizes``.

    A padding entry is the first index out of range (class C, state S, token N, block K). Gathers
    clip it or fill in a value, and scatters drop it.

    Attributes:
        num_classes: C, the padded number of classes.
        class_of_N: the class of each token.
        token_KT: the tokens of each block, ascending within a class.
        block_JT: the blocks of each group, ascending within a class.
        class_J: the class of each group, ascending.
        first_S1: the edges of state s are those from first_S1[s] to first_S1[s + 1], excluded.
        source_E: the state before each edge, ascending.
        class_E: the class of each edge, ascending among the edges of a state.
        target_E: the state after each edge.
        accepting_S: whether each state accepts.
    """

    num_classes: int = field(metadata={"static": True})
    class_of_N: Int[Array, " N"]
    token_KT: Int[Array, "K T"]
    block_JT: Int[Array, "J T"]
    class_J: Int[Array, " J"]
    first_S1: Int[Array, " S1"]
    source_E: Int[Array, " E"]
    class_E: Int[Array, " E"]
    target_E: Int[Array, " E"]
    accepting_S: Bool[Array, " S"]


def sizes_of(automata: Iterable[TokenAutomaton]) -> Sizes:
    """The smallest padded sizes into which all of the automata fit."""
    exact = []
    for automaton in automata:
        tokens_C = np.bincount(automaton.class_of[automaton.class_of >= 0])
        blocks_C = -(-tokens_C // MEMBERS)
        groups_C = -(-blocks_C // MEMBERS)
        edges, states = len(automaton.edge_source), automaton.num_states
        exact.append(
            (automaton.num_classes, int(blocks_C.sum()), int(groups_C.sum()), edges, states)
        )
    return Sizes(*(bucket(max(*each, LEAST)) for each in zip(*exact, strict=True)))


def tables(automaton: TokenAutomaton, sizes: Sizes) -> Tables:
    """The arrays of an automaton, padded to ``sizes``; in NumPy, to be stacked for a batch."""
    num_tokens = len(automaton.class_of)
    live = np.flatnonzero(automaton.class_of >= 0)
    token = live[np.argsort(automaton.class_of[live], kind="stable")]
    token_KT, class_K = _chunks(token, automaton.class_of[token])
    block_JT, class_J = _chunks(np.arange(len(class_K)), class_K)

    def padded(values, size, fill) -> Any:
        rows = np.full((size, *values.shape[1:]), fill, np.int32)
        rows[: len(values)] = np.where(values < 0, fill, values)
        return rows

    first: Any = np.searchsorted(automaton.edge_source, np.arange(sizes.states + 1))
    return Tables(
        num_classes=sizes.classes,
        class_of_N=padded(automaton.class_of, num_tokens, sizes.classes),
        token_KT=padded(token_KT, sizes.blocks, num_tokens),
        block_JT=padded(block_JT, sizes.groups, sizes.blocks),
        class_J=padded(class_J, sizes.groups, sizes.classes),
        first_S1=first.astype(np.int32),
        source_E=padded(automaton.edge_source, sizes.edges, sizes.states),
        class_E=padded(automaton.edge_class, sizes.edges, sizes.classes),
        target_E=padded(automaton.edge_target, sizes.edges, sizes.states),
        accepting_S=padded(automaton.accepting, sizes.states, 0) > 0,
    )


def _chunks(item_X: np.ndarray, class_X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Arrange items in rows of T that do not mix classes.

    Args:
        item_X: the items, in the order of their classes.
        class_X: the class of each, ascending; every class has an item.

    Returns:
        The rows, int [rows, T], filled up with -1; and the class of each row.
    """
    count_C = np.bincount(class_X)
    rows_C = -(-count_C // MEMBERS)
    rank_X = np.arange(len(item_X)) - np.repeat(np.cumsum(count_C) - count_C, count_C)
    row_X = np.repeat(np.cumsum(rows_C) - rows_C, count_C) + rank_X // MEMBERS
    rows = np.full((rows_C.sum(), MEMBERS), -1)
    rows[row_X, rank_X % MEMBERS] = item_X
    return rows, np.repeat(np.arange(len(rows_C)), rows_C)
