"""Patterns compiled to minimal deterministic automata over the bytes of UTF-8.

The steps, in the order of this file:

1. The tree of a pattern becomes a nondeterministic automaton, whose states are positions in the
   pattern (Thompson 1968). Code points that no part of the pattern distinguishes form a class.
2. Sets of positions become the states of a deterministic automaton over these classes.
3. ``minimize`` merges its equivalent states (Hopcroft 1971).
4. ``utf8`` rewrites it over bytes. This comes last because a code point takes up to four bytes:
   minimising an automaton over bytes would be several times the work for the same result.

Each step has a limit. A pattern that exceeds one is refused with the part that causes it.
"""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from sedd.constraints.code_points import Ranges
from sedd.constraints.minimize import minimal
from sedd.constraints.regex import RegexError, parse, shown
from sedd.constraints.syntax_tree import Alternate, Chars, Concat, Joined, Node, Repeat
from sedd.constraints.utf8 import Steps, spell
from sedd.errors import UserError

MAX_STATES = 20_000
MAX_WORK = 2_000_000  # positions in all sets, and moves between sets: some seconds


@dataclass(frozen=True, kw_only=True, eq=False)
class ByteAutomaton:
    """A minimal deterministic automaton over bytes. It starts in state 0.

    Every state can be reached from the start, and acceptance can be reached from every state.

    Attributes:
        transitions: the state that each byte leads to, int32 [S, 256]; -1 if no text that begins so
            matches.
        accepting: whether the text read so far matches, bool [S].
    """

    transitions: np.ndarray
    accepting: np.ndarray

    @property
    def num_states(self) -> int:
        """The number of states, S."""
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

    Args:
        pattern: the regex.
        max_states: the largest number of states over bytes.

    Raises:
        RegexError: the pattern is malformed, or a part of it, which the error names, leads to more
            than ``max_states`` states.
        UserError: the pattern matches nothing.
    """
    tree = parse(pattern)
    _check_size(pattern, tree, 5 * max_states)
    positions = _Positions(tree)
    classes, members = _classes(positions.sets)
    # The limit is larger here, because minimisation still merges states.
    moves, subsets = _subsets(pattern, positions, members, 2 * max_states)
    moves, accepting = minimal(moves, np.array([0 in subset for subset in subsets]))
    if not len(accepting):
        raise UserError(f"regex {shown(pattern)} matches nothing")
    transitions = spell(moves, classes)
    states = len(transitions)
    if states > max_states:
        raise _blown_up(pattern, positions, subsets, f"more than {max_states} states")
    accepting = np.concatenate([accepting, np.zeros(states - len(accepting), bool)])
    return ByteAutomaton(transitions=transitions, accepting=accepting)


# ------------------------------------------------------------- the nondeterministic automaton


def _copies(node: Repeat) -> int:
    """How many copies of the repeated part the automaton contains."""
    return max(node.least, 1) if node.most is None else node.most


def _size(node: Node) -> int:
    """A lower bound on the number of states that ``_Positions`` makes of a node."""
    if isinstance(node, Repeat):
        return 1 + _copies(node) * (1 + _size(node.node))
    total = 1
    for part in _children(node):
        total += _size(part)
    return total


def _children(node: Node) -> tuple[Node, ...]:
    """The parts of a node."""
    if isinstance(node, Repeat):
        return (node.node,)
    if isinstance(node, Joined):
        return (node.item, node.separator)
    if isinstance(node, Concat):
        return node.parts
    return node.options if isinstance(node, Alternate) else ()


def _check_size(pattern: str, tree: Node, limit: int) -> None:
    """Raise RegexError if repeats multiply to more than ``limit`` states, before any is built.

    The error names the smallest part that exceeds the limit.
    """
    if _size(tree) <= limit:
        return
    node = tree
    while (part := max(_children(node), key=_size, default=None)) and _size(part) > limit:
        node = part
    raise _too_large(pattern, node, f"more than {limit} positions")


def _too_large(pattern: str, node: Node, what: str) -> RegexError:
    """The error that blames a node; ``what`` is the exceeded limit in words."""
    times = f", repeated {_copies(node)} times" if isinstance(node, Repeat) else ""
    reason = f"the pattern is too large: this part{times}, leads to {what}"
    return RegexError(pattern, node.start, node.end, reason)


class _Positions:
    """The nondeterministic automaton of a pattern (Thompson 1968), built from the end.

    A state either reads one code point out of a set, or reads nothing and branches. State 0 is the
    end of the pattern.

    Attributes:
        sets: the number of each set of code points that some state reads.
        reads: the number of the set that each state reads, -1 for a state that reads nothing.
        follow: the states that come after each state.
        node: the node of the tree that each state was made for, for messages.
        walked: the number of states visited by ``closure``, a measure of the work.
        start: the first state.
    """

    def __init__(self, tree: Node):
        self.sets: dict[Ranges, int] = {}
        self.reads = [-1]
        self.follow: list[tuple[int, ...]] = [()]
        self.node: list[Node] = [tree]
        self.tree = tree
        self.walked = 0
        self.start = self.build(tree, 0)

    def state(self, node: Node, reads: int, follow: tuple[int, ...]) -> int:
        """Add a state and return its number."""
        self.reads.append(reads)
        self.follow.append(follow)
        self.node.append(node)
        return len(self.reads) - 1

    def build(self, node: Node, out: int) -> int:
        """Add the states of ``node`` in front of the state ``out``; returns the first of them."""
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
        if isinstance(node, Joined):  # after an item: the separator and the same item, or the end
            after = self.state(node, -1, ())
            first = self.build(node.item, after)
            self.follow[after] = (self.build(node.separator, first), out)
            return first
        assert isinstance(node, Repeat)
        end = out
        if node.most is None:  # a loop: one copy that may be read again or left
            out = self.state(node, -1, ())
            body = self.build(node.node, out)
            self.follow[out] = (body, end)
            if node.least:
                out = body
        else:  # optional copies, each of which may skip all that follow it
            for _ in range(node.most - node.least):
                out = self.state(node, -1, (self.build(node.node, out), end))
        for _ in range(node.least - (node.most is None and node.least > 0)):
            out = self.build(node.node, out)
        return out

    def closure(self, state: int) -> frozenset[int]:
        """All states that read, or are the end, and can be reached without reading anything."""
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


def _classes(sets: dict[Ranges, int]) -> tuple[Steps, list[list[int]]]:
    """Group the code points into classes: two belong together if they are in the same sets.

    Returns:
        The class of each code point, -1 for those in no set; and the classes that make up each set.
    """
    edges = sorted(
        {0, *(edge for ranges in sets for low, high in ranges for edge in (low, high + 1))}
    )
    within: list[list[int]] = [[] for _ in edges]  # the sets of the code points from each edge on
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
    return Steps(edges=np.array(edges), labels=np.array(labels)), members


# -------------------------------------------------------------- the deterministic automaton


def _subsets(
    pattern: str, positions: _Positions, members: list[list[int]], limit: int
) -> tuple[np.ndarray, list[frozenset[int]]]:
    """Determinise: a state of the new automaton is the set of states that the old one may be in.

    Args:
        pattern: the regex, for messages.
        positions: the nondeterministic automaton.
        members: the classes that make up each set of code points.
        limit: the largest number of states.

    Returns:
        The state that each of K classes leads to, int32 [S, K], -1 if nothing matches any more; and
        the set of each state.
    """
    closures: dict[int, frozenset[int]] = {}
    start = positions.closure(positions.start)
    number = {start: 0}
    queue = [start]
    rows: list[dict[int, int]] = []
    work = 0
    for subset in queue:  # the loop appends to it
        moves: dict[int, list[frozenset[int]]] = {}  # of each class, to be united in one pass
        for state in subset:
            if state == 0:
                continue
            (out,) = positions.follow[state]
            if out not in closures:
                closures[out] = positions.closure(out)
                if positions.walked > MAX_WORK:
                    raise _blown_up(pattern, positions, queue, "too many ways to read a text")
            for cls in members[positions.reads[state]]:
                moves.setdefault(cls, []).append(closures[out])
        row = {}
        for cls, afters in moves.items():
            reached = afters[0] if len(afters) == 1 else frozenset().union(*afters)
            target = number.get(reached)
            if target is None:
                target = number[reached] = len(queue)
                queue.append(reached)
            row[cls] = target
        rows.append(row)
        work += len(subset) + len(row)
        if len(queue) > limit:
            raise _blown_up(pattern, positions, queue, f"more than {limit} states")
        if work > MAX_WORK:
            raise _blown_up(pattern, positions, queue, "too many ways to read a text")
    table = np.full((len(rows), 1 + max(map(max, filter(None, members)), default=0)), -1, np.int32)
    for state, row in enumerate(rows):
        table[state, list(row)] = list(row.values())
    return table, queue


def _blown_up(
    pattern: str, positions: _Positions, subsets: list[frozenset[int]], what: str
) -> RegexError:
    """The error that blames the part of the pattern to which most positions in the sets belong.

    The search descends from the whole pattern into the child with the most positions, as long as
    that child has at least half of them. If there are repeats on the way, the one with the largest
    count is blamed, since a smaller count helps most.
    """
    count: dict[int, int] = {}
    for subset in subsets:
        for state in subset:
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
        for child in children:  # children do not overlap, so that each weight is summed once
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
