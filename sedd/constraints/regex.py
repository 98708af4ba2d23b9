"""A parser of regular expressions.

It has two entry points. ``parse`` reads the dialect of ``re.fullmatch(pattern, text, re.ASCII)``.
``parse_search`` reads the ``pattern`` keyword of JSON Schema: a pattern that is searched for
anywhere in the text, in the dialect on which ECMAScript and Python agree. Both return a tree
(``syntax_tree``), which ``automaton`` compiles.

A construct that no finite automaton can express (look-around, back-references) raises
``RegexError`` with its position. So does every construct that Python warns about, such as the
nested set in ``[[:alpha:]]``, because it rarely means what its author intended.
"""

import re
import sys
from dataclasses import dataclass, replace

from sedd.constraints.code_points import (
    ANY,
    CATEGORIES,
    EVERYTHING,
    PORTABLE_ANY,
    SURROGATES,
    Ranges,
    complement,
    disputed,
    portable_complement,
    union,
    without_surrogates,
)
from sedd.constraints.syntax_tree import (
    Alternate,
    Anchor,
    Chars,
    Concat,
    Joined,
    Node,
    Repeat,
    is_empty,
    with_lists,
)
from sedd.errors import UserError

MAX_DEPTH = 100  # of nested groups: functions on the tree recurse, and Python's stack is limited
SHOWN = 40  # characters of a pattern that a message shows

CONTROLS = {"a": 0x07, "f": 0x0C, "n": 0x0A, "r": 0x0D, "t": 0x09, "v": 0x0B}
COUNT = re.compile(r"\{([0-9]*)(?:(,)([0-9]*))?\}")  # {2}, {2,}, {,3} or {2,3}
SPACED_COUNT = re.compile(r"\{ *[0-9]+ *(?:, *(?:[0-9]+ *)?)?\}")
HEXADECIMAL = {"x": 2, "u": 4, "U": 8}  # digits that must follow
# Why a group is refused, by what follows its "(?". Longer beginnings come first.
GROUPS = {
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
    """A pattern that cannot be read or compiled.

    Args:
        pattern: the whole pattern.
        start: the index at which the part at fault begins.
        end: the index after that part.
        reason: what is wrong with it.

    Attributes:
        position: ``start``.
        piece: the text of the part at fault.
        reason: as given; the message begins with the position and ends with the piece.
    """

    def __init__(self, pattern: str, start: int, end: int, reason: str):
        self.position, self.piece, self.reason = start, pattern[start:end], reason
        super().__init__(f"regex, position {start}: {reason}: {shown(self.piece)}")


def shown(piece: str) -> str:
    """A piece of a pattern as one quoted line, cut after ``SHOWN`` characters."""
    return repr(piece if len(piece) <= SHOWN else piece[:SHOWN] + "…")


@dataclass
class _Group:
    """A group that is being parsed: its finished options, and the parts of the current one."""

    start: int
    options: list[Node]
    parts: list[Node]
    option_start: int

    def close_option(self, end: int) -> None:
        """Finish the current option, which ends at index ``end``."""
        parts = with_lists(self.parts)
        single = len(parts) == 1
        self.options.append(
            parts[0] if single else Concat(start=self.option_start, end=end, parts=parts)
        )
        self.parts, self.option_start = [], end + 1


def parse(pattern: str) -> Node:
    """Parse ``pattern`` in the dialect of ``re.fullmatch(pattern, text, re.ASCII)``.

    Raises:
        RegexError: the pattern is malformed or uses an unsupported construct.
    """
    parser = _Parser(pattern)
    return parser.without_anchors(parser.parse(), at_start=True, at_end=True)


def parse_search(pattern: str) -> Node:
    r"""Parse the ``pattern`` of a JSON schema: the tree matches every text that contains a match.

    Accepts the constructs that ECMAScript and Python read alike. A character on which they
    disagree, such as a non-ASCII digit for ``\D``, matches neither a category nor its complement.

    Raises:
        RegexError: as for ``parse``, and for constructs that differ between the two languages.
    """
    parser = _Parser(pattern, portable=True)
    branches = tuple(map(parser.found, _branches(parser.parse())))
    end = len(pattern)
    return branches[0] if len(branches) == 1 else Alternate(start=0, end=end, options=branches)


def _branches(node: Node) -> list[Node]:
    """The alternatives of a whole pattern, also of one inside groups, as ``(^a|b$)``.

    Each alternative is searched for by itself, with its own anchors.
    """
    if isinstance(node, Alternate):
        return [branch for option in node.options for branch in _branches(option)]
    if isinstance(node, Concat) and len(node.parts) == 1:
        return _branches(node.parts[0])
    return [node]


class _Parser:
    """A cursor in a pattern. With ``portable`` it refuses what ECMAScript reads differently.

    ``index`` is the cursor, the place of the next character to read. Methods take ``start``, the
    index at which the construct begins that they read, for its node and for messages.
    """

    def __init__(self, pattern: str, *, portable: bool = False):
        self.pattern, self.portable = pattern, portable
        self.index = 0
        self.names: set[str] = set()

    def parse(self) -> Node:
        """The tree of the pattern, anchors included.

        Open groups are on a stack here, and not on Python's, so that too deep a nesting is refused
        with a message and never raises RecursionError.
        """
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
                group.parts.append(Anchor(start=start, end=self.index, at_start=character == "^"))
            elif character == "\\":
                group.parts.append(self.escaped(start))
            else:
                ranges = self.character_set(start) if character == "[" else self.literal(start)
                if character == ".":
                    ranges = PORTABLE_ANY if self.portable else ANY
                group.parts.append(Chars(start=start, end=self.index, ranges=ranges))
        if len(groups) > 1:
            raise self.error(groups[-1].start, "missing ), unterminated subpattern")
        return self.close(groups[0], len(pattern), 0, len(pattern))

    def found(self, branch: Node) -> Node:
        """The tree of the texts that contain a match of ``branch``.

        Any text may stand before and after the match, unless there is an anchor.
        """
        parts = branch.parts if isinstance(branch, Concat) else (branch,)
        at_start = bool(parts) and isinstance(parts[0], Anchor) and parts[0].at_start
        at_end = bool(parts) and isinstance(parts[-1], Anchor) and not parts[-1].at_start
        start, end = branch.start, branch.end
        whole = self.without_anchors(branch, at_start=at_start, at_end=at_end)
        anything = Chars(start=start, end=end, ranges=EVERYTHING)
        free = Repeat(start=start, end=end, node=anything, least=0, most=None)
        around = (() if at_start else (free,), () if at_end else (free,))
        return Concat(start=start, end=end, parts=(*around[0], whole, *around[1]))

    def error(self, start: int, reason: str, end: int | None = None) -> RegexError:
        """The error about the part from ``start`` to ``end``, by default to the cursor."""
        return RegexError(self.pattern, start, self.index if end is None else end, reason)

    def close(self, group: _Group, option_end: int, start: int, end: int) -> Node:
        """The node of a finished group, which spans the parentheses.

        It is never a bare repeat or anchor, since a quantifier may follow the group: ``(a*)+``.
        """
        group.close_option(option_end)
        if len(group.options) > 1:
            return Alternate(start=start, end=end, options=tuple(group.options))
        option = group.options[0]
        if isinstance(option, Repeat | Anchor):
            return Concat(start=start, end=end, parts=(option,))
        return replace(option, start=start, end=end)

    def open_group(self, start: int) -> None:
        """Move the cursor behind the opening of a group, such as ``(?P<name>``."""
        pattern = self.pattern
        if not pattern.startswith("?", self.index):
            return
        self.index += 1
        if pattern.startswith(":", self.index):
            self.index += 1
        elif pattern.startswith("P<", self.index) and self.portable:
            self.index += 2
            raise self.error(start, "ECMAScript names groups differently: write (?:…)")
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
        """The match of a count at ``start``, such as ``{2,}``; None for a literal brace."""
        found = COUNT.match(self.pattern, start)
        if found is None and (spaced := SPACED_COUNT.match(self.pattern, start)):
            right = spaced.group().replace(" ", "")
            reason = f"a count has no spaces: write {right}, or \\{{ for the character"
            raise self.error(start, reason, spaced.end())
        if self.portable and found and found.group()[1] == ",":
            raise self.error(start, "ECMAScript needs the least count: write {0,…}", found.end())
        return None if found is None or found.group() == "{}" else found

    def repeat(self, group: _Group, start: int, character: str) -> Node:
        """Remove the last part of the group and return it repeated by the quantifier at ``start``.

        ``character`` is the first character of the quantifier.
        """
        if character == "{":
            least, most = self.bounds(start)
        else:
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[character]
        if not group.parts or isinstance(group.parts[-1], Anchor):
            raise self.error(start, "nothing to repeat")
        if isinstance(group.parts[-1], Repeat):
            raise self.error(start, "multiple repeat")
        if self.pattern.startswith("+", self.index):
            self.index += 1
            raise self.error(start, "possessive quantifiers are not supported")
        if self.pattern.startswith("?", self.index):
            self.index += 1  # a lazy quantifier matches the same texts
        node = group.parts.pop()
        return Repeat(start=node.start, end=self.index, node=node, least=least, most=most)

    def bounds(self, start: int) -> tuple[int, int | None]:
        """The bounds of the count at ``start``. Moves the cursor behind it."""
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
        """The set of the character at ``start`` alone."""
        return self.single(start, ord(self.pattern[start]))

    def single(self, start: int, code: int) -> Ranges:
        """The set of one code point; refuses surrogates."""
        if SURROGATES[0][0] <= code <= SURROGATES[0][1]:
            raise self.error(start, "a surrogate is no character of UTF-8")
        return ((code, code),)

    def escaped(self, start: int) -> Node:
        """The node of the escape at ``start``, outside a character set."""
        letter = self.pattern[self.index : self.index + 1]
        if self.portable and letter and letter in "AZ":
            self.index += 1
            anchor = "^" if letter == "A" else "$"
            raise self.error(start, f"no anchor in ECMAScript: write {anchor}")
        if letter in ("A", "Z"):
            self.index += 1
            return Anchor(start=start, end=self.index, at_start=letter == "A")
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
        """The octal digits at ``index``, at most ``digits`` of them."""
        run = self.pattern[index : index + digits]
        return run[: len(run) - len(run.lstrip("01234567"))]

    def escape(self, start: int) -> int | Ranges:
        """The code point of the escape at ``start``, or the ranges of a category."""
        pattern, index = self.pattern, self.index
        if index == len(pattern):
            raise self.error(start, "bad escape (end of pattern)")
        letter = pattern[index]
        self.index += 1
        if letter.lower() in CATEGORIES:
            if self.portable and letter.isupper():
                return portable_complement(letter.lower())
            ranges = CATEGORIES[letter.lower()]
            return ranges if letter.islower() else complement(ranges)
        if letter in "pP" and pattern.startswith("{", self.index):
            name = pattern[start:].partition("}")[0] + "}"
            reason = f"Unicode properties (\\{letter}{{…}}) are not supported: list the characters"
            raise self.error(start, reason, start + len(name))
        null = letter == "0" and not self.octal(index + 1, 1)  # "\0" alone means the same in both
        if self.portable and letter in "aUN01234567" and not null:
            raise self.error(start, "ECMAScript reads this escape differently")
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
        if self.pattern.startswith("[", self.index):
            reason = "a set within a set is not supported: write \\[ for the character"
            if self.pattern.startswith("[:", self.index):
                reason = "POSIX classes are not supported: write a-zA-Z for [:alpha:]"
            raise self.error(start, reason, self.index + 1)
        negated = self.pattern.startswith("^", self.index)
        self.index += negated
        first = self.index
        if self.portable and self.pattern.startswith("]", first):
            raise self.error(start, "ECMAScript ends the set here: write \\] for the character")
        ranges: list[tuple[int, int]] = []
        differing: list[tuple[int, int]] = []  # in a category in one language only: never matched
        while not (self.pattern.startswith("]", self.index) and self.index > first):
            here = self.index
            self.check_operator(here, first)
            low = self.member(start)
            if self.pattern.startswith("-", self.index) and not self.pattern.startswith(
                "-]", self.index
            ):
                self.index += 1
                if self.pattern.startswith("-", self.index):
                    raise self.error(here, "write \\- for the character", self.index + 1)
                high = self.member(start)
                if not (isinstance(low, int) and isinstance(high, int) and low <= high):
                    raise self.error(here, "bad character range")
                ranges.append((low, high))
            else:
                ranges.extend([(low, low)] if isinstance(low, int) else low)
                if self.portable and not isinstance(low, int):
                    differing.extend(disputed(self.pattern[here + 1].lower()))
        self.index += 1
        found = union(ranges)
        if negated:
            found = complement(union([*found, *differing]))
        return without_surrogates(found)

    def check_operator(self, index: int, first: int) -> None:
        """Refuse ``--``, ``&&``, ``~~`` and ``||`` in a set, which Python warns about."""
        pair = self.pattern[index : index + 2]
        if index > first and pair in ("--", "&&", "~~", "||"):
            reason = f"set operators are not supported: write \\{pair[0]} for the character"
            raise self.error(index, reason, index + 2)

    def member(self, start: int) -> int | Ranges:
        """The next code point, or the ranges of a category, in the set that opens at ``start``."""
        if self.index == len(self.pattern):
            raise self.error(start, "unterminated character set")
        here, character = self.index, self.pattern[self.index]
        self.index += 1
        if character != "\\":
            return ord(character)
        if self.pattern.startswith("b", self.index):  # only in a set, "\b" is a backspace
            self.index += 1
            return 0x08
        return self.escape(here)

    def without_anchors(self, node: Node, *, at_start: bool, at_end: bool) -> Node:
        """The tree without its anchors. Raises RegexError for an anchor inside the text.

        The tree describes whole texts, in which an anchor at the edge is redundant.

        Args:
            node: the tree.
            at_start: whether the node begins at the start of the text.
            at_end: whether the node ends at the end of the text.
        """
        if isinstance(node, Anchor):
            if not (at_start if node.at_start else at_end):
                where = "start" if node.at_start else "end"
                reason = f"an anchor is supported only at the {where} of the pattern"
                raise self.error(node.start, reason, node.end)
            return Concat(start=node.start, end=node.end, parts=())
        if isinstance(node, Repeat):
            inner = self.without_anchors(node.node, at_start=False, at_end=False)
            return replace(node, node=inner)
        if isinstance(node, Joined):
            item = self.without_anchors(node.item, at_start=False, at_end=False)
            separator = self.without_anchors(node.separator, at_start=False, at_end=False)
            return replace(node, item=item, separator=separator)
        changed = []  # loops, since each comprehension would take another frame of the stack
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
