"""Minimisation of deterministic automata (Hopcroft 1971)."""

from itertools import pairwise

import numpy as np


def minimal(moves: np.ndarray, accepting: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Minimise a deterministic automaton (Hopcroft 1971).

    States from which acceptance cannot be reached are removed. The others are partitioned into
    blocks, at first by acceptance; a block is split until its states agree on the block that each
    class leads to. Only states with a move into a block that changed are examined again. The
    largest piece of a split keeps the block's number, and a state changes its number only into a
    block of at most half the size: at most log₂ S times. The work is O(S·K·log S).

    Args:
        moves: the state that each of K classes leads to, int32 [S, K], -1 if nothing matches any
            more. State 0 is the start, from which all others can be reached.
        accepting: bool [S].

    Returns:
        ``moves`` and ``accepting`` of the smallest automaton, with its states in breadth-first
        order. Both have length 0 if nothing matches.
    """
    before = _predecessors(moves)
    live = set(np.flatnonzero(accepting).tolist())
    stack = list(live)
    while stack:
        new = set(before[stack.pop()]) - live
        live |= new
        stack.extend(new)
    if 0 not in live:
        return np.empty((0, moves.shape[1]), np.int32), np.empty(0, bool)
    block = np.full(len(moves) + 1, -1)  # the last entry is for moves to -1
    block[list(live)] = 0
    block[np.flatnonzero(accepting)] = 1
    blocks: list[set[int]] = [
        {state for state in live if not accepting[state]},
        set(np.flatnonzero(accepting).tolist()),
    ]
    dirty = live
    while dirty:
        examined = list(dirty)
        rows = block[moves[examined]]
        pieces: dict[int, dict[bytes, set[int]]] = {}
        for state, home, row in zip(examined, block[examined].tolist(), rows, strict=True):
            pieces.setdefault(home, {}).setdefault(row.tobytes(), set()).add(state)
        changed: list[int] = []
        for home, by_row in pieces.items():
            # The states of a block that were not examined have no move into a changed block. They
            # still agree with each other, and differ from the examined ones, which have one.
            parts = list(by_row.values())
            if rest := blocks[home].difference(*parts):
                parts.append(rest)
            parts.sort(key=len)
            blocks[home] = parts.pop()
            for part in parts:
                block[list(part)] = len(blocks)
                blocks.append(part)
                changed.extend(part)
        dirty = {source for state in changed for source in before[state]} & live
    return _renumbered(block, moves, accepting)


def _predecessors(moves: np.ndarray) -> list[list[int]]:
    """The states with a move into each state, repeated for each such move."""
    source, cls = np.nonzero(moves >= 0)
    target = moves[source, cls]
    order = np.argsort(target, kind="stable")
    bounds = np.searchsorted(target[order], np.arange(len(moves) + 1)).tolist()
    into = source[order].tolist()
    return [into[first:end] for first, end in pairwise(bounds)]


def _renumbered(
    block: np.ndarray, moves: np.ndarray, accepting: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The automaton with one state for each block, in breadth-first order from the start's."""
    representative = np.zeros(block.max() + 1, np.int64)
    representative[block[:-1][block[:-1] >= 0]] = np.flatnonzero(block[:-1] >= 0)
    quotient = block[moves[representative]]
    first = int(block[0])
    number = {first: 0}
    queue = [first]
    for state in queue:  # the loop appends to it
        for target in quotient[state].tolist():
            if target >= 0 and target not in number:
                number[target] = len(queue)
                queue.append(target)
    rename = np.full(len(quotient) + 1, -1, np.int32)
    rename[queue] = np.arange(len(queue))
    return rename[quotient[queue]], accepting[representative[queue]]
