r"""Regexes of the content of JSON strings, from formats and patterns; and refusals with a path.

JSON writes some characters of a string as escapes: a quotation mark as ``\"``. A ``pattern``
describes the characters of the string, but the constraint sees their JSON spelling. The syntax tree
of the pattern is therefore rewritten character by character. A ``Piece`` is the resulting regex.
"""

import math
import re
import reprlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from sedd.constraints.code_points import SURROGATES, Ranges, complement, union, without
from sedd.constraints.regex import RegexError, parse_search
from sedd.constraints.syntax_tree import Alternate, Chars, Concat, Joined, Node, Repeat
from sedd.errors import UserError

Path = tuple[str, ...]  # keys and indices that lead from the document to a part of it

_LARGEST = sys.maxunicode
_ESCAPES = {0x22: '"', 0x5C: "\\", 0x08: "b", 0x0C: "f", 0x0A: "n", 0x0D: "r", 0x09: "t"}
_NOT_RAW = ((0, 0x1F), (0x22, 0x22), (0x5C, 0x5C))  # must be escaped (RFC 8259, section 7)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A regex of the content of a JSON string, without the quotation marks.

    Attributes:
        text: the regex.
        low: the fewest characters of a match; an escape counts as one.
        high: the most characters, infinite without a limit.
        atom: the regex of one character, if ``text`` repeats it ``low`` to ``high`` times: such a
            piece can be rewritten for other lengths. None for all other pieces.
    """

    text: str
    low: int
    high: float
    atom: str | None = None


def searched(source: Any, path: Path) -> Piece:
    """The content of all strings in which a ``pattern`` is found.

    Args:
        source: the value of the keyword ``pattern``.
        path: the path of the keyword; a UserError about the pattern begins with it.
    """
    if not isinstance(source, str):
        refuse(path, f"expected a regular expression, got {show(source)}")
    try:
        tree = parse_search(source)
    except RegexError as error:
        where = f"{show(source)} at position {error.position}"
        refuse(path, f"{where}: {error.reason}: {show(error.piece)}")
    return _piece(tree, source, path)


def _piece(node: Node, source: str, path: Path) -> Piece:
    """The content of the strings that a syntax tree describes."""
    if isinstance(node, Chars):
        text = json_character(_with_surrogates(node.ranges))
        if not text:
            where = f"{show(source)} at position {node.start}"
            refuse(
                path,
                f"{where}: JSON can write this character only as a \\u escape, which is not "
                "supported",
            )
        return Piece(text=text, low=1, high=1, atom=text)
    if isinstance(node, Concat):
        return _joined([_piece(part, source, path) for part in node.parts])
    if isinstance(node, Alternate):
        return _either([_piece(option, source, path) for option in node.options])
    if isinstance(node, Joined):
        # Written with two items; the parser recognises the list again.
        item, separator = (_piece(part, source, path) for part in (node.item, node.separator))
        text = f"{item.text}(?:{separator.text}{item.text})*"
        return Piece(text=text, low=item.low, high=math.inf)
    assert isinstance(node, Repeat)
    piece = _piece(node.node, source, path)
    low, high = node.least, math.inf if node.most is None else node.most
    once = piece.low == piece.high == 1
    return Piece(
        text=repeat(piece.text if piece.atom and once else f"(?:{piece.text})", low, high),
        low=piece.low * low,
        high=piece.high * high if piece.high and high else 0,
        atom=piece.atom if once else None,
    )


def _with_surrogates(ranges: Ranges) -> Ranges:
    """Add the surrogates, which no text contains, if they join two ranges: the class is shorter."""
    (low, high) = SURROGATES[0]
    edges = {edge for pair in ranges for edge in pair}
    return union([*ranges, *SURROGATES]) if {low - 1, high + 1} <= edges else ranges


def _joined(pieces: Iterable[Piece]) -> Piece:
    """The pieces one after the other."""
    pieces = [piece for piece in pieces if piece.text]
    if len(pieces) == 1:
        return pieces[0]
    return Piece(
        text="".join(piece.text for piece in pieces),
        low=sum(piece.low for piece in pieces),
        high=sum(piece.high for piece in pieces),
    )


def _either(pieces: Sequence[Piece]) -> Piece:
    """Any one of the pieces."""
    if len(pieces) == 1:
        return pieces[0]
    return Piece(
        text=one_of([piece.text for piece in pieces]),
        low=min(piece.low for piece in pieces),
        high=max(piece.high for piece in pieces),
    )


def one_of(texts: Iterable[str]) -> str:
    """A regex for any one of some regexes, without repetitions."""
    texts = list(dict.fromkeys(texts))
    return texts[0] if len(texts) == 1 else f"(?:{'|'.join(texts)})"


def repeat(atom: str, low: int, high: float) -> str:
    """A regex for ``low`` to ``high`` repetitions of an atom (a group, a class or a character)."""
    if low == high:
        return {0: "", 1: atom}.get(low, f"{atom}{{{low}}}")
    if high == math.inf:
        return atom + {0: "*", 1: "+"}.get(low, f"{{{low},}}")
    return atom + ("?" if (low, high) == (0, 1) else f"{{{low},{int(high)}}}")


def literal(text: str) -> str:
    """A regex that matches ``text`` only."""
    return re.sub(r"[\\.^$*+?{}\[\]|()]", r"\\\g<0>", text)


def json_character(ranges: Ranges) -> str:
    """A regex for one character of a JSON string out of ``ranges``.

    It is empty if all of them are control characters without a short escape.
    """
    raw = without(ranges, _NOT_RAW)
    letters = [
        letter
        for code, letter in _ESCAPES.items()
        if any(low <= code <= high for low, high in ranges)
    ]
    escapes = union((ord(letter), ord(letter)) for letter in letters)
    if not escapes:
        return _written(raw) if raw else ""
    escaped = r"\\" + _written(escapes)
    return f"(?:{_written(raw)}|{escaped})" if raw else f"(?:{escaped})"


def _written(ranges: Ranges) -> str:
    """A character class; negated if it extends to the last code point, which is shorter."""
    if ranges[-1][1] == _LARGEST:
        return f"[^{_class_members(complement(ranges))}]"
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return literal(chr(ranges[0][0]))
    return f"[{_class_members(ranges)}]"


def _class_members(ranges: Ranges) -> str:
    """The inside of a character class."""

    def written(code: int) -> str:
        if code < 0x20 or code == 0x7F:
            return f"\\x{code:02x}"
        return ("\\" if chr(code) in r"\]^-[" else "") + chr(code)

    return "".join(
        written(low) if low == high else f"{written(low)}-{written(high)}" for low, high in ranges
    )


def show(value: Any) -> str:
    """A value for a message, shortened."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python does not write integers of thousands of digits
        return "a number of too many digits"


def refuse(path: Path, problem: str) -> NoReturn:
    """Raise UserError about the part of a schema at ``path``.

    The message begins with the path as a JSON pointer in the fragment of a URI, such as
    ``#/properties/age``; nothing is percent-encoded.
    """
    tokens = [str(token).replace("~", "~0").replace("/", "~1") for token in path]
    shown = (c if c.isprintable() else repr(c)[1:-1] for c in "/".join(["#", *tokens]))
    raise UserError(f"{''.join(shown)}: {problem}")


CHARACTER = json_character(((0, _LARGEST),))
TEXT = Piece(text=CHARACTER + "*", low=0, high=math.inf, atom=CHARACTER)

_YEAR = "(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_FOURS = "(?:0[48]|[2468][048]|[13579][26])"  # the multiples of 4 from 04 to 96
_LEAP_YEAR = f"(?:[0-9]{{2}}{_FOURS}|{_FOURS}00)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    f"|{_LEAP_YEAR}-02-29)"
)
_CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_CLOCK}:[0-5][0-9](?:\.[0-9]{{1,6}})?(?:Z|[+\-]{_CLOCK})"
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?\^_`{|}~\-]+"  # RFC 5322's atext
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9\-]*[A-Za-z0-9])?"  # its limit of 63 would cost 250 states
_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_HEX = "[0-9a-fA-F]"
# The formats that are enforced; any other is an annotation. A piece may match fewer strings than
# the specification of its format allows: no leap seconds, no quoted local part of an address.
FORMATS = {
    "date": Piece(text=_DATE, low=10, high=10),
    "time": Piece(text=_TIME, low=9, high=21),
    "date-time": Piece(text=f"{_DATE}T{_TIME}", low=20, high=32),
    "email": Piece(
        text=rf"{_ATOM}(?:\.{_ATOM})*@{_LABEL}(?:\.{_LABEL})*\.[A-Za-z]+", low=5, high=math.inf
    ),
    "uuid": Piece(
        text=f"{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}", low=36, high=36
    ),
    "ipv4": Piece(text=rf"{_OCTET}(?:\.{_OCTET}){{3}}", low=7, high=15),
}
