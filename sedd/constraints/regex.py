"""Regular expressions, parsed to sets of code points, concatenation, alternation and repetition.

The language is that of ``re.fullmatch(pattern, text, re.ASCII)``. What cannot be an automaton over
the text alone, and what Python spells but few use, is refused with its position, never ignored.
"""

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from sedd.errors import UserError

Ranges = tuple[tuple[int, int], ...]  # code points, both ends included, rising and apart

MAX_DEPTH = 100  # of nested groups: what walks the tree is recursive, and Python's stack is short
SHOWN = 40  # characters of a piece that a message shows
SURROGATES = ((0xD800, 0xDFFF),)  # no text in UTF-8 holds them

CATEGORIES: dict[str, Ranges] = {  # of re.ASCII
    "d": ((0x30, 0x39),),
    "s": ((0x09, 0x0D), (0x20, 0x20)),
    "w": ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)),
}
CONTROLS = {"a": 0x07, "f": 0x0C, "n": 0x0A, "r": 0x0D, "t": 0x09, "v": 0x0B}
COUNT = re.compile(r"\{([0-9]*)(?:(,)([0-9]*))?\}")
HEXADECIMAL = {"x": 2, "u": 4, "U": 8}  # digits that must follow
GROUPS = {  # what may follow "(?", and why it is refused; longer ones first
    "<=": "look-behind is not supported",
    "<!": "look-behind is not supported",
    "=": "look-ahead is not supported",
    "!": "look-ahead is not supported",
    ">": "atomic groups are not supported",
    "(": "conditional groups are not supported",
    "#": "comments are not supported",
    "P=": "back-references are not supported",
    "<": "unknown extension; a named group is written (?P<name>…)",
} | dict.fromkeys("aiLmsux-", "inline flags are not supported")


class RegexError(UserError):
    """A pattern that cannot be read or compiled, for a piece of it that begins at ``position``.

    ``position`` counts the pattern's characters from 0.
    """

    def __init__(self, pattern: str, start: int, end: int, reason: str):
        self.position, self.piece = start, pattern[start:end]
        super().__init__(f"regex, position {start}: {reason}: {shown(self.piece)}")


def shown(piece: str) -> str:
    """A piece of a pattern on one line, cut where it is long."""
    return repr(piece if len(piece) <= SHOWN else piece[:SHOWN] + "…")


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
    """The parts one after the other; without parts, the empty text."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, kw_only=True)
class Alternate(Node):
    """Any one of the options."""

    options: tuple[Node, ...]


@dataclass(frozen=True, kw_only=True)
class Repeat(Node):
    """``node`` from ``least`` to ``most`` times; ``most`` of None is without end."""

    node: Node
    least: int
    most: int | None


@dataclass(frozen=True, kw_only=True)
class _Anchor(Node):
    """The start or the end of the text; none is left in a parsed pattern."""

    at_start: bool


@dataclass
class _Group:
    """A group that is being read: the options so far, and the parts of the one under way."""

    start: int
    options: list[Node]
    parts: list[Node]
    option_start: int

    def close_option(self, end: int) -> None:
        parts = tuple(self.parts)
        single = len(parts) == 1
        self.options.append(
            parts[0] if single else Concat(start=self.option_start, end=end, parts=parts)
        )
        self.parts, self.option_start = [], end + 1


def parse(pattern: str) -> Node:
    """The tree of a pattern. RegexError, with the position, on what is wrong or not supported."""
    return _Parser(pattern).parse()


def union(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The same code points as rising ranges that do not touch."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(high, merged[-1][1])
        else:
            merged.append((low, high))
    return tuple(merged)


def complement(ranges: Ranges) -> Ranges:
    """Every other code point."""
    edges = [-1, *(edge for pair in ranges for edge in pair), sys.maxunicode + 1]
    gaps = zip(edges[::2], edges[1::2], strict=True)
    return tuple((low + 1, high - 1) for low, high in gaps if low + 1 < high)


def without_surrogates(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The code points of ``ranges`` that UTF-8 can hold."""
    return complement(union([*complement(union(ranges)), *SURROGATES]))


ANY = without_surrogates(complement(((0x0A, 0x0A),)))  # what "." stands for


class _Parser:
    """A cursor in a pattern, and the groups open at it: a list, since Python's stack is short."""

    def __init__(self, pattern: str):
        self.pattern = pattern
        self.index = 0
        self.names: set[str] = set()

    def parse(self) -> Node:
        pattern = self.pattern
        groups = [_Group(0, [], [], 0)]
        while self.index < len(pattern):
            start, character = self.index, pattern[self.index]
            self.index += 1
            group = groups[-1]
            if character == "(":
                self.open_group(start)
                if len(groups) > MAX_DEPTH:
                    raise self.error(start, f"groups are nested deeper than {MAX_DEPTH}")
                groups.append(_Group(start, [], [], self.index))
            elif character == ")":
                if len(groups) == 1:
                    raise self.error(start, "unbalanced parenthesis")
                groups.pop()
                groups[-1].parts.append(self.close(group, start, group.start, self.index))
            elif character == "|":
                group.close_option(start)
            elif character in "*+?" or (character == "{" and self.count(start)):
                group.parts.append(self.repeat(group, start, character))
            elif character in "^$":
                group.parts.append(_Anchor(start=start, end=self.index, at_start=character == "^"))
            elif character == "\\":
                group.parts.append(self.escaped(start))
            else:
                ranges = self.character_set(start) if character == "[" else self.literal(start)
                ranges = ANY if character == "." else ranges
                group.parts.append(Chars(start=start, end=self.index, ranges=ranges))
        if len(groups) > 1:
            raise self.error(groups[-1].start, "missing ), unterminated subpattern")
        root = self.close(groups[0], len(pattern), 0, len(pattern))
        return self.without_anchors(root, at_start=True, at_end=True)

    def error(self, start: int, reason: str, end: int | None = None) -> RegexError:
        return RegexError(self.pattern, start, self.index if end is None else end, reason)

    def close(self, group: _Group, option_end: int, start: int, end: int) -> Node:
        """What a group has read. Its node spans the parentheses, and is never an open repeat."""
        group.close_option(option_end)
        if len(group.options) > 1:
            return Alternate(start=start, end=end, options=tuple(group.options))
        option = group.options[0]
        if isinstance(option, Repeat | _Anchor):  # wrapped: a group of them may be repeated
            return Concat(start=start, end=end, parts=(option,))
        return replace(option, start=start, end=end)

    def open_group(self, start: int) -> None:
        """Moves behind what opens a group, such as ``(?P<name>``."""
        pattern = self.pattern
        if not pattern.startswith("?", self.index):
            return
        self.index += 1
        if pattern.startswith(":", self.index):
            self.index += 1
        elif pattern.startswith("P<", self.index):
            name, closed, _ = pattern[self.index + 2 :].partition(">")
            self.index += 2 + len(name) + len(closed)
            if not (closed and name.isidentifier()):
                raise self.error(start, "bad group name")
            if name in self.names:
                raise self.error(start, "redefinition of a group name")
            self.names.add(name)
        else:
            for opening, reason in GROUPS.items():
                if pattern.startswith(opening, self.index):
                    self.index += len(opening)
                    raise self.error(start, reason)
            end = self.index + 1
            at_end = self.index == len(pattern)
            reason = "unexpected end of pattern" if at_end else "unknown extension"
            raise self.error(start, reason, end)

    def count(self, start: int) -> re.Match[str] | None:
        """The count at ``start``, such as ``{2,}``; any other brace stands for itself."""
        found = COUNT.match(self.pattern, start)
        return None if found is None or found.group() == "{}" else found

    def repeat(self, group: _Group, start: int, character: str) -> Node:
        """The group's last part, repeated by the quantifier at ``start``."""
        if character == "{":
            least, most = self.bounds(start)
        else:
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[character]
        if not group.parts or isinstance(group.parts[-1], _Anchor):
            raise self.error(start, "nothing to repeat")
        if isinstance(group.parts[-1], Repeat):
            raise self.error(start, "multiple repeat")
        if self.pattern.startswith("+", self.index):
            self.index += 1
            raise self.error(start, "possessive quantifiers are not supported")
        if self.pattern.startswith("?", self.index):
            self.index += 1  # lazy: the same language
        node = group.parts.pop()
        return Repeat(start=node.start, end=self.index, node=node, least=least, most=most)

    def bounds(self, start: int) -> tuple[int, int | None]:
        """The least and the most that the count at ``start`` allows; moves behind it."""
        found = self.count(start)
        assert found is not None
        self.index = found.end()
        low, comma, high = (group or "" for group in found.groups())
        if max(len(low), len(high)) > 9:
            raise self.error(start, "the repetition number is too large")
        least = int(low or 0)
        most = (int(high) if high else None) if comma else least
        if most is not None and most < least:
            raise self.error(start, "min repeat greater than max repeat")
        return least, most

    def literal(self, start: int) -> Ranges:
        return self.single(start, ord(self.pattern[start]))

    def single(self, start: int, code: int) -> Ranges:
        if SURROGATES[0][0] <= code <= SURROGATES[0][1]:
            raise self.error(start, "a surrogate is no character of UTF-8")
        return ((code, code),)

    def escaped(self, start: int) -> Node:
        """What the escape at ``start`` stands for outside a character set."""
        letter = self.pattern[self.index : self.index + 1]
        if letter in ("A", "Z"):
            self.index += 1
            return _Anchor(start=start, end=self.index, at_start=letter == "A")
        if letter in ("b", "B"):
            self.index += 1
            raise self.error(start, "word boundaries are not supported")
        if letter and letter in "123456789":
            octal = self.octal(self.index, 3)
            if letter > "7" or len(octal) < 3:
                self.index += 1
                raise self.error(start, "back-references are not supported")
        read = self.escape(start)
        ranges = self.single(start, read) if isinstance(read, int) else without_surrogates(read)
        return Chars(start=start, end=self.index, ranges=ranges)

    def octal(self, index: int, digits: int) -> str:
        """The run of at most ``digits`` octal digits at ``index``."""
        run = self.pattern[index : index + digits]
        return run[: len(run) - len(run.lstrip("01234567"))]

    def escape(self, start: int) -> int | Ranges:
        """The code point, or the category's ranges, of the escape at ``start``."""
        pattern, index = self.pattern, self.index
        if index == len(pattern):
            raise self.error(start, "bad escape (end of pattern)")
        letter = pattern[index]
        self.index += 1
        if letter.lower() in CATEGORIES:
            ranges = CATEGORIES[letter.lower()]
            return ranges if letter.islower() else complement(ranges)
        if letter in CONTROLS:
            return CONTROLS[letter]
        if letter in HEXADECIMAL:
            size = HEXADECIMAL[letter]
            digits = pattern[index + 1 : index + 1 + size]
            if not (len(digits) == size and all(x in "0123456789abcdefABCDEF" for x in digits)):
                reason = f"incomplete escape, {size} hexadecimal digits must follow"
                raise self.error(start, reason, self.index + len(digits))
            self.index += size
            if int(digits, 16) > sys.maxunicode:
                raise self.error(start, "bad escape, there is no such code point")
            return int(digits, 16)
        if octal := self.octal(index, 3):
            self.index = index + len(octal)
            if int(octal, 8) > 0o377:
                raise self.error(start, "octal escape outside of range 0-0o377")
            return int(octal, 8)
        if letter == "N":
            raise self.error(start, "named characters are not supported, write \\uXXXX")
        if letter.isascii() and letter.isalnum():
            raise self.error(start, "bad escape")
        return ord(letter)

    def character_set(self, start: int) -> Ranges:
        """The code points of the set that opens at ``start``."""
        negated = self.pattern.startswith("^", self.index)
        self.index += negated
        first = self.index
        ranges: list[tuple[int, int]] = []
        while not (self.pattern.startswith("]", self.index) and self.index > first):
            here = self.index
            low = self.member(start)
            if self.pattern.startswith("-", self.index) and not self.pattern.startswith(
                "-]", self.index
            ):
                self.index += 1
                high = self.member(start)
                if not (isinstance(low, int) and isinstance(high, int) and low <= high):
                    raise self.error(here, "bad character range")
                ranges.append((low, high))
            else:
                ranges.extend([(low, low)] if isinstance(low, int) else low)
        self.index += 1
        found = union(ranges)
        return without_surrogates(complement(found) if negated else found)

    def member(self, start: int) -> int | Ranges:
        """The next member of the set that opens at ``start``."""
        if self.index == len(self.pattern):
            raise self.error(start, "unterminated character set")
        here, character = self.index, self.pattern[self.index]
        self.index += 1
        if character != "\\":
            return ord(character)
        if self.pattern.startswith("b", self.index):  # a backspace, in a set alone
            self.index += 1
            return 0x08
        return self.escape(here)

    def without_anchors(self, node: Node, *, at_start: bool, at_end: bool) -> Node:
        """The tree without its anchors, which hold at the edges of the whole match anyway.

        RegexError where an anchor stands anywhere else.
        """
        if isinstance(node, _Anchor):
            if not (at_start if node.at_start else at_end):
                where = "start" if node.at_start else "end"
                reason = f"an anchor is supported only at the {where} of the pattern"
                raise self.error(node.start, reason, node.end)
            return Concat(start=node.start, end=node.end, parts=())
        if isinstance(node, Repeat):
            inner = self.without_anchors(node.node, at_start=False, at_end=False)
            return replace(node, node=inner)
        changed = []  # loops, not comprehensions: those would take a second frame of the stack
        if isinstance(node, Alternate):
            for option in node.options:
                changed.append(self.without_anchors(option, at_start=at_start, at_end=at_end))
            return replace(node, options=tuple(changed))
        if isinstance(node, Concat):
            filled = [place for place, part in enumerate(node.parts) if not is_empty(part)]
            first, last = (filled[0], filled[-1]) if filled else (len(node.parts), -1)
            for place, part in enumerate(node.parts):
                start, end = at_start and place <= first, at_end and place >= last
                changed.append(self.without_anchors(part, at_start=start, at_end=end))
            return replace(node, parts=tuple(changed))
        return node


def is_empty(node: Node) -> bool:
    """Whether a node is nothing but anchors and empty groups."""
    stack = [node]
    while stack:
        node = stack.pop()
        if isinstance(node, Concat):
            stack.extend(node.parts)
        elif not isinstance(node, _Anchor):
            return False
    return True
