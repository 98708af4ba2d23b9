"""Patterns compiled to the minimal deterministic automaton over the bytes of UTF-8.

States are sets of the pattern's positions over classes of code points, minimised there, and only
then spelt out in bytes: a code point takes up to four of them, so minimising bytes would be several
times the work, and the spelling of a minimal automaton is minimal.
"""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from sedd.constraints.regex import (
    Alternate,
    Chars,
    Concat,
    Joined,
    Node,
    Ranges,
    RegexError,
    Repeat,
    parse,
    shown,
)
from sedd.errors import UserError

MAX_STATES = 20_000
MAX_WORK = 2_000_000  # members of sets of positions, and moves between them: some seconds
# What two, three and four bytes of UTF-8 spell: the first lead byte, the one after the last, and
# the first place not spelt in fewer, places being code points / 1, / 64 and / 64² by then.
SPELLINGS = ((0xC0, 0xE0, 0x80), (0xE0, 0xF0, 0x20), (0xF0, 0xF5, 0x10))


@dataclass(frozen=True, kw_only=True, eq=False)
class ByteAutomaton:
    """A minimal deterministic automaton; its start is state 0.

    ``transitions`` is int32 [S, 256], -1 where no continuation matches; ``accepting`` is [S]. Every
    state is reached by some text and reaches acceptance by some text.
    """

    transitions: np.ndarray
    accepting: np.ndarray

    @property
    def num_states(self) -> int:
        return len(self.accepting)

    def accepts(self, text: bytes) -> bool:
        """Whether the pattern matches the whole of ``text``."""
        state = 0
        for byte in text:
            state = int(self.transitions[state, byte])
            if state < 0:
                return False
        return bool(self.accepting[state])

    def overlaps(self, other: "ByteAutomaton") -> bool:
        """Whether both patterns match some common text: a search through the product automaton."""
        seen, stack = {(0, 0)}, [(0, 0)]
        while stack:
            a, b = stack.pop()
            if self.accepting[a] and other.accepting[b]:
                return True
            both = zip(self.transitions[a].tolist(), other.transitions[b].tolist(), strict=True)
            new = {pair for pair in both if min(pair) >= 0} - seen
            seen |= new
            stack.extend(new)
        return False


def compile_bytes(pattern: str, *, max_states: int = MAX_STATES) -> ByteAutomaton:
    """Compile a pattern of ``re.fullmatch(pattern, text, re.ASCII)`` to its minimal automaton.

    Raises:
        RegexError: the pattern is malformed, or a part of it, which the error names, leads to more
            than ``max_states`` states.
        UserError: the pattern matches nothing.
    """
    tree = parse(pattern)
    _check_size(pattern, tree, 5 * max_states)
    positions = _Positions(tree)
    classes, members = _classes(positions.sets)
    moves, held = _subsets(pattern, positions, members, 2 * max_states)  # before minimising
    moves, accepting = minimal(moves, np.array([0 in states for states in held]))
    if not len(accepting):
        raise UserError(f"regex {shown(pattern)} matches nothing")
    transitions = _spelt(moves, classes)
    states = len(transitions)
    if states > max_states:
        raise _blown_up(pattern, positions, held, f"more than {max_states} states")
    accepting = np.concatenate([accepting, np.zeros(states - len(accepting), bool)])
    return ByteAutomaton(transitions=transitions, accepting=accepting)


# ------------------------------------------------------------- positions, with what follows them


def _copies(node: Repeat) -> int:
    """The copies of its node that a repeat is compiled to."""
    return max(node.least, 1) if node.most is None else node.most


def _size(node: Node) -> int:
    """A lower bound of the states that ``_Positions`` makes of a node."""
    if isinstance(node, Repeat):
        return 1 + _copies(node) * (1 + _size(node.node))
    total = 1
    for part in _children(node):
        total += _size(part)
    return total


def _children(node: Node) -> tuple[Node, ...]:
    if isinstance(node, Repeat):
        return (node.node,)
    if isinstance(node, Joined):
        return (node.item, node.separator)
    if isinstance(node, Concat):
        return node.parts
    return node.options if isinstance(node, Alternate) else ()


def _check_size(pattern: str, tree: Node, limit: int) -> None:
    """RegexError where the counts multiply to more than ``limit``, before anything is built."""
    if _size(tree) <= limit:
        return
    node = tree
    while (part := max(_children(node), key=_size, default=None)) and _size(part) > limit:
        node = part
    raise _too_large(pattern, node, f"more than {limit} positions")


def _too_large(pattern: str, node: Node, what: str) -> RegexError:
    times = f", repeated {_copies(node)} times" if isinstance(node, Repeat) else ""
    reason = f"the pattern is too large: this part{times}, leads to {what}"
    return RegexError(pattern, node.start, node.end, reason)


class _Positions:
    """The pattern as a graph of states that either read a set of code points or read nothing.

    Built from the end (Thompson 1968): ``reads`` is the index in ``sets`` of what a state reads, or
    -1, and ``follow`` the states behind it. State 0 is the end of the pattern.
    """

    def __init__(self, tree: Node):
        self.sets: dict[Ranges, int] = {}
        self.reads = [-1]
        self.follow: list[tuple[int, ...]] = [()]
        self.node: list[Node] = [tree]
        self.tree = tree
        self.walked = 0  # states that closures went through
        self.start = self.build(tree, 0)

    def state(self, node: Node, reads: int, follow: tuple[int, ...]) -> int:
        self.reads.append(reads)
        self.follow.append(follow)
        self.node.append(node)
        return len(self.reads) - 1

    def build(self, node: Node, out: int) -> int:
        """The state from which ``node`` is read and then what starts at ``out``."""
        if isinstance(node, Chars):
            return self.state(node, self.sets.setdefault(node.ranges, len(self.sets)), (out,))
        if isinstance(node, Concat):
            for part in reversed(node.parts):
                out = self.build(part, out)
            return out
        if isinstance(node, Alternate):
            starts = []
            for option in node.options:
                starts.append(self.build(option, out))
            return self.state(node, -1, tuple(starts))
        if isinstance(node, Joined):
            after = self.state(node, -1, ())
            first = self.build(node.item, after)
            self.follow[after] = (self.build(node.separator, first), out)
            return first
        assert isinstance(node, Repeat)
        end = out
        if node.most is None:
            out = self.state(node, -1, ())
            body = self.build(node.node, out)
            self.follow[out] = (body, end)
            if node.least:
                out = body
        else:
            for _ in range(node.most - node.least):
                out = self.state(node, -1, (self.build(node.node, out), end))
        for _ in range(node.least - (node.most is None and node.least > 0)):
            out = self.build(node.node, out)
        return out

    def closure(self, state: int) -> frozenset[int]:
        """The states that read, and the end, that are reached from a state by reading nothing."""
        found, seen, stack = [], {state}, [state]
        while stack:
            state = stack.pop()
            if state == 0 or self.reads[state] >= 0:
                found.append(state)
                continue
            for after in self.follow[state]:
                if after not in seen:
                    seen.add(after)
                    stack.append(after)
        self.walked += len(seen)
        return frozenset(found)


@dataclass(frozen=True, kw_only=True)
class _Steps:
    """A label for each place from 0 on: ``labels[i]`` from ``edges[i]`` up to the next edge."""

    edges: np.ndarray
    labels: np.ndarray  # -1 for none

    def at(self, places: np.ndarray) -> np.ndarray:
        return self.labels[np.searchsorted(self.edges, places, side="right") - 1]


def _classes(sets: dict[Ranges, int]) -> tuple[_Steps, list[list[int]]]:
    """Classes of code points that no set tells apart: by code point, and those of each set."""
    edges = sorted(
        {0, *(edge for ranges in sets for low, high in ranges for edge in (low, high + 1))}
    )
    within: list[list[int]] = [[] for _ in edges]  # the sets that hold what an edge begins
    for index, ranges in enumerate(sets):
        for low, high in ranges:
            for place in range(bisect_left(edges, low), bisect_left(edges, high + 1)):
                within[place].append(index)
    members: list[list[int]] = [[] for _ in sets]
    known: dict[tuple[int, ...], int] = {(): -1}
    for held in map(tuple, within):
        if held not in known:
            known[held] = len(known) - 1
            for index in held:
                members[index].append(known[held])
    labels = [known[tuple(held)] for held in within]
    return _Steps(edges=np.array(edges), labels=np.array(labels)), members


# -------------------------------------------------------------- sets of positions, minimised


def _subsets(
    pattern: str, positions: _Positions, members: list[list[int]], limit: int
) -> tuple[np.ndarray, list[frozenset[int]]]:
    """The deterministic automaton over K classes: moves, int32 [S, K], -1 where dead.

    And the positions that each of its states stands for. RegexError beyond ``limit`` states.
    """
    closures: dict[int, frozenset[int]] = {}
    start = positions.closure(positions.start)
    number = {start: 0}
    queue = [start]
    rows: list[dict[int, int]] = []
    work = 0
    for held in queue:  # grows under way
        moves: dict[int, frozenset[int]] = {}
        for state in held:
            if state == 0:
                continue
            (out,) = positions.follow[state]
            if out not in closures:
                closures[out] = positions.closure(out)
                if positions.walked > MAX_WORK:
                    raise _blown_up(pattern, positions, queue, "too many ways to read a text")
            after = closures[out]
            for cls in members[positions.reads[state]]:
                before = moves.get(cls)
                moves[cls] = after if before is None else before | after
        row = {}
        for cls, reached in moves.items():
            target = number.get(reached)
            if target is None:
                target = number[reached] = len(queue)
                queue.append(reached)
            row[cls] = target
        rows.append(row)
        work += len(held) + len(row)
        if len(queue) > limit:
            raise _blown_up(pattern, positions, queue, f"more than {limit} states")
        if work > MAX_WORK:
            raise _blown_up(pattern, positions, queue, "too many ways to read a text")
    table = np.full((len(rows), 1 + max(map(max, filter(None, members)), default=0)), -1, np.int32)
    for state, row in enumerate(rows):
        table[state, list(row)] = list(row.values())
    return table, queue


def _blown_up(
    pattern: str, positions: _Positions, held: list[frozenset[int]], what: str
) -> RegexError:
    """The error that names the part to which most positions in the states belong.

    If that part is within repeats, the one with the largest count is named.
    """
    count: dict[int, int] = {}
    for states in held:
        for state in states:
            count[state] = count.get(state, 0) + 1
    weight: dict[tuple[int, int], int] = {}
    for state, times in count.items():
        leaf = positions.node[state]
        weight[leaf.start, leaf.end] = weight.get((leaf.start, leaf.end), 0) + times

    spans = sorted(weight)
    total = sum(weight.values())
    node = blamed = positions.tree
    while children := _children(node):
        heaviest, largest = 0, children[0]
        for child in children:  # spans of children do not overlap: each weight is summed once
            first, end = bisect_left(spans, (child.start, 0)), bisect_left(spans, (child.end, 0))
            inside = sum(weight[span] for span in spans[first:end] if span[1] <= child.end)
            if inside > heaviest:
                heaviest, largest = inside, child
        if 2 * heaviest < total:
            break
        node = largest
        known = _copies(blamed) if isinstance(blamed, Repeat) else 0
        if isinstance(node, Repeat) and _copies(node) >= known:
            blamed = node
    return _too_large(pattern, blamed, what)


def minimal(moves: np.ndarray, accepting: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest automaton of the same language: states that reach acceptance, none equivalent.

    ``moves`` is int32 [S, K] with -1 where dead, ``accepting`` bool [S], the start state 0, all
    reachable. States are renumbered in the order in which a breadth-first walk meets them. Nothing
    is left of the empty language.

    Blocks of states are split until those of a block agree on where each class leads. The largest
    piece of a split keeps the block's number, so a state is looked at again O(log S) times for each
    of its moves (Hopcroft 1971).
    """
    states = len(moves)
    source, cls = np.nonzero(moves >= 0)
    target = moves[source, cls]
    order = np.argsort(target, kind="stable")
    bounds = np.searchsorted(target[order], np.arange(states + 1)).tolist()
    into = source[order].tolist()
    live = set(np.flatnonzero(accepting).tolist())
    stack = list(live)
    while stack:
        state = stack.pop()
        new = set(into[bounds[state] : bounds[state + 1]]) - live
        live |= new
        stack.extend(new)
    if 0 not in live:
        return np.empty((0, moves.shape[1]), np.int32), np.empty(0, bool)
    block = np.full(states + 1, -1)  # the last is that of the dead state, which moves call -1
    block[list(live)] = 0
    block[np.flatnonzero(accepting)] = 1
    blocks: list[set[int]] = [
        {state for state in live if not accepting[state]},
        set(np.flatnonzero(accepting).tolist()),
    ]
    dirty = live
    while dirty:
        looked_at = list(dirty)
        rows = block[moves[looked_at]]
        pieces: dict[int, dict[bytes, set[int]]] = {}
        for state, home, row in zip(looked_at, block[looked_at].tolist(), rows, strict=True):
            pieces.setdefault(home, {}).setdefault(row.tobytes(), set()).add(state)
        changed: list[int] = []
        for home, by_row in pieces.items():
            # States of a block that were not looked at still agree with each other, and differ from
            # all that were: those move to a block that is new.
            parts = list(by_row.values())
            if rest := blocks[home].difference(*parts):
                parts.append(rest)
            parts.sort(key=len)
            blocks[home] = parts.pop()
            for part in parts:
                block[list(part)] = len(blocks)
                blocks.append(part)
                changed.extend(part)
        dirty = {s for state in changed for s in into[bounds[state] : bounds[state + 1]]} & live
    return _renumbered(block, moves, accepting)


def _renumbered(
    block: np.ndarray, moves: np.ndarray, accepting: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One state for each block, in breadth-first order from that of state 0."""
    representative = np.zeros(block.max() + 1, np.int64)
    representative[block[:-1][block[:-1] >= 0]] = np.flatnonzero(block[:-1] >= 0)
    quotient = block[moves[representative]]
    first = int(block[0])
    number = {first: 0}
    queue = [first]
    for state in queue:  # grows under way
        for target in quotient[state].tolist():
            if target >= 0 and target not in number:
                number[target] = len(queue)
                queue.append(target)
    rename = np.full(len(quotient) + 1, -1, np.int32)
    rename[queue] = np.arange(len(queue))
    return rename[quotient[queue]], accepting[representative[queue]]


# ------------------------------------------------------------------------- the bytes of UTF-8


def _spelt(moves: np.ndarray, classes: _Steps) -> np.ndarray:
    """The moves over classes of code points as transitions over bytes, int32 [S', 256].

    The states between the bytes of a code point come after the others, equal ones being one. They
    are found from the last byte on: 64 code points that share all but that byte go by what each of
    them does, then 64 of those, and so on.
    """
    transitions = np.full((len(moves), 256), -1, np.int32)
    transitions[:, :0x80] = _padded(moves)[:, classes.at(np.arange(0x80))]
    made: list[bytes] = []
    after, steps = moves, classes
    for lead, end, first in SPELLINGS:
        steps, rows = _folded(steps, first)
        after = _instances(after, rows, made, len(moves))
        transitions[:, lead:end] = _padded(after)[:, steps.at(np.arange(end - lead))]
    between = np.full((len(made), 256), -1, np.int32)
    between[:, 0x80:0xC0] = np.frombuffer(b"".join(made), np.int32).reshape(-1, 64)
    return np.concatenate([transitions, between])


def _padded(columns: np.ndarray) -> np.ndarray:
    """A dead column at the end, which is where an index of -1 finds it."""
    return np.concatenate([columns, np.full((len(columns), 1), -1, columns.dtype)], axis=1)


def _folded(steps: _Steps, first: int) -> tuple[_Steps, np.ndarray]:
    """Each stretch of 64 places by a number, -1 where none has a label; and the number's stretch.

    Places before ``first`` count as without a label.
    """
    starts = np.unique(np.concatenate([steps.edges // 64, steps.edges // 64 + 1, [first // 64]]))
    places = 64 * starts[:, None] + np.arange(64)
    stretches = np.where(places < first, -1, steps.at(places))
    known: dict[bytes, int] = {}
    labels = _numbered(stretches, known)
    rows = np.frombuffer(b"".join(known), stretches.dtype).reshape(-1, 64)
    return _Steps(edges=starts, labels=labels), rows


def _numbered(rows: np.ndarray, known: dict[bytes, int]) -> np.ndarray:
    """The number in ``known`` of each row, which it is added to; -1 for one of nothing but -1."""
    numbers = np.full(len(rows), -1, np.int32)
    for place in np.flatnonzero((rows >= 0).any(1)).tolist():
        numbers[place] = known.setdefault(rows[place].tobytes(), len(known))
    return numbers


def _instances(after: np.ndarray, rows: np.ndarray, made: list[bytes], offset: int) -> np.ndarray:
    """For each state and each row of labels, the state that the row's 64 bytes are read from.

    ``after`` [S, labels] is where a label leads from each state. New states go to ``made``, as the
    int32 that follow their bytes, and are numbered from ``offset``. int32 [S, rows], -1 where dead.
    """
    known: dict[bytes, int] = {}
    found = [_numbered(_padded(after)[:, row], known) for row in rows]
    first = offset + len(made)
    made.extend(known)
    numbers = np.array(found, np.int32).reshape(len(rows), len(after)).T
    return np.where(numbers < 0, -1, numbers + first)
