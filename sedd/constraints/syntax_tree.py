"""The syntax tree of a regex: character sets, concatenations, choices and repeats.

Every node records its place in the pattern, for messages. Comparisons ignore the place, so that two
equal nodes describe the same set of texts.
"""

from dataclasses import dataclass, field

from sedd.constraints.code_points import Ranges


@dataclass(frozen=True, kw_only=True)
class Node:
    """A part of a pattern, ``pattern[start:end]``."""

    start: int = field(compare=False)
    end: int = field(compare=False)


@dataclass(frozen=True, kw_only=True)
class Chars(Node):
    """One code point out of ``ranges``; none of them is a surrogate."""

    ranges: Ranges


@dataclass(frozen=True, kw_only=True)
class Concat(Node):
    """The parts one after the other. Without parts it is the empty text."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, kw_only=True)
class Alternate(Node):
    """Any one of the options."""

    options: tuple[Node, ...]


@dataclass(frozen=True, kw_only=True)
class Repeat(Node):
    """``node``, repeated ``least`` to ``most`` times, or without limit if ``most`` is None."""

    node: Node
    least: int
    most: int | None


@dataclass(frozen=True, kw_only=True)
class Joined(Node):
    """A list, ``item(?:separator item)*``: one or more items with separators between them.

    The pattern contains the item twice, so that n nested lists contain the innermost item 2ⁿ times.
    As a node of its own, a list is compiled from one copy of its item.
    """

    item: Node
    separator: Node


@dataclass(frozen=True, kw_only=True)
class Anchor(Node):
    """The start or the end of the text; only present while a pattern is parsed."""

    at_start: bool


def with_lists(parts: list[Node]) -> tuple[Node, ...]:
    """The parts of a concatenation, with every ``item(?:separator item)*`` replaced by a Joined."""
    found: list[Node] = []
    for part in parts:
        joined = None
        if isinstance(part, Repeat) and (part.least, part.most) == (0, None):
            joined = _join(found, part)
        if joined is None:
            found.append(part)
        else:
            found, last = joined
            found.append(last)
    return tuple(found)


def _join(before: list[Node], repeat: Repeat) -> tuple[list[Node], Joined] | None:
    """Recognise a list: ``repeat`` is ``(?:separator item)*``, and ``before`` ends with the item.

    Returns:
        The parts before the list, and the list; None if it is no list.
    """
    body = repeat.node
    inner = body.parts if isinstance(body, Concat) else ()
    size = 0
    while size + 1 < len(inner) and size < len(before) and before[-1 - size] == inner[-1 - size]:
        size += 1
    if not size:
        return None
    first, inside = before[-size:], len(inner) - size
    item = Concat(start=first[0].start, end=first[-1].end, parts=tuple(first))
    separator = Concat(start=body.start, end=inner[inside - 1].end, parts=inner[:inside])
    joined = Joined(start=item.start, end=repeat.end, item=item, separator=separator)
    return before[:-size], joined


def is_empty(node: Node) -> bool:
    """Whether a node consists of anchors and empty groups only."""
    stack = [node]
    while stack:
        node = stack.pop()
        if isinstance(node, Concat):
            stack.extend(node.parts)
        elif not isinstance(node, Anchor):
            return False
    return True
