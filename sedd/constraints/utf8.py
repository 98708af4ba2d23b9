"""Automata over code points, rewritten as automata over the bytes of UTF-8.

UTF-8 writes a code point below 0x80 as one byte. Any other is written as a lead byte and one to
three continuation bytes (0x80 to 0xBF), each of which carries six bits of the code point.

The idea. The 64 code points of a block, ``64·k`` to ``64·k + 63``, share all bytes but the last.
Before that last byte is read, the automaton is in an intermediate state, given by where each of
the 64 continuation bytes leads; equal rows of 64 targets are one state. So the last byte is
removed by replacing code points by blocks and targets by intermediate states. The same step on
blocks of blocks removes the byte before, and so on. The intermediate states of a minimal automaton
over code points are distinct by construction, so the result is minimal as well.

An alphabet of a million code points is never held: code points are grouped into classes
(``Steps``), and a block is identified by the classes of its members.
"""

from dataclasses import dataclass

import numpy as np

# For two, three and four bytes: the lead bytes (the last excluded), and the first place that is not
# written in fewer bytes already. Places are code points, blocks and blocks of blocks in turn.
LEADS = ((0xC0, 0xE0, 0x80), (0xE0, 0xF0, 0x20), (0xF0, 0xF5, 0x10))


@dataclass(frozen=True, kw_only=True)
class Steps:
    """A step function: a label for every place from 0 on.

    Attributes:
        edges: ascending places, the first one 0.
        labels: the label from each edge up to the next edge, or without end; -1 for none.
    """

    edges: np.ndarray
    labels: np.ndarray

    def at(self, places: np.ndarray) -> np.ndarray:
        """The labels of some places."""
        return self.labels[np.searchsorted(self.edges, places, side="right") - 1]


def spell(moves: np.ndarray, classes: Steps) -> np.ndarray:
    """Rewrite the moves over classes of code points as transitions over bytes.

    Args:
        moves: the state that each class leads to from each of S states, int32 [S, classes]; -1 if
            nothing matches any more.
        classes: the class of each code point.

    Returns:
        The state that each byte leads to, int32 [S', 256]. The first S states are those of
        ``moves``. The other states lie between two bytes of one code point.
    """
    transitions = np.full((len(moves), 256), -1, np.int32)
    transitions[:, :0x80] = _padded(moves)[:, classes.at(np.arange(0x80))]
    made: list[bytes] = []
    targets, steps = moves, classes
    for lead, end, first in LEADS:
        steps, blocks = _folded(steps, first)
        targets = _intermediate(targets, blocks, made, len(moves))
        transitions[:, lead:end] = _padded(targets)[:, steps.at(np.arange(end - lead))]
    between = np.full((len(made), 256), -1, np.int32)
    between[:, 0x80:0xC0] = np.frombuffer(b"".join(made), np.int32).reshape(-1, 64)
    return np.concatenate([transitions, between])


def _padded(columns: np.ndarray) -> np.ndarray:
    """The columns and a last one of -1, which the label -1 indexes."""
    return np.concatenate([columns, np.full((len(columns), 1), -1, columns.dtype)], axis=1)


def _folded(steps: Steps, first: int) -> tuple[Steps, np.ndarray]:
    """Replace places by blocks of 64 places. Places before ``first`` count as without a label.

    Returns:
        A label for each block, the same for equal blocks and -1 for a block without labels; and the
        64 labels that the members of each labelled block have, [blocks, 64].
    """
    starts = np.unique(np.concatenate([steps.edges // 64, steps.edges // 64 + 1, [first // 64]]))
    places = 64 * starts[:, None] + np.arange(64)
    members = np.where(places < first, -1, steps.at(places))
    known: dict[bytes, int] = {}
    labels = _numbered(members, known)
    blocks = np.frombuffer(b"".join(known), members.dtype).reshape(-1, 64)
    return Steps(edges=starts, labels=labels), blocks


def _numbered(rows: np.ndarray, known: dict[bytes, int]) -> np.ndarray:
    """Number the rows by content: equal rows alike, -1 for a row of nothing but -1.

    ``known`` has the numbers of the rows seen so far, and is extended.
    """
    numbers = np.full(len(rows), -1, np.int32)
    for place in np.flatnonzero((rows >= 0).any(1)).tolist():
        numbers[place] = known.setdefault(rows[place].tobytes(), len(known))
    return numbers


def _intermediate(
    targets: np.ndarray, blocks: np.ndarray, made: list[bytes], offset: int
) -> np.ndarray:
    """The state, for each state and block, from which the block's 64 bytes are read.

    Args:
        targets: where each label leads from each state, int32 [S, labels].
        blocks: the labels of the 64 members of each block.
        made: the targets of the intermediate states made so far, as the bytes of 64 int32 each; it
            is extended by the new ones.
        offset: the number of the first intermediate state.

    Returns:
        Numbers of intermediate states, int32 [S, blocks]; -1 where no byte leads anywhere.
    """
    known: dict[bytes, int] = {}
    found = [_numbered(_padded(targets)[:, block], known) for block in blocks]
    first = offset + len(made)
    made.extend(known)
    numbers = np.array(found, np.int32).reshape(len(blocks), len(targets)).T
    return np.where(numbers < 0, -1, numbers + first)
