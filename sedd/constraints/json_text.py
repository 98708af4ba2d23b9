"""The strings and numbers of JSON as regexes: formats, patterns, and decimals between bounds."""

import math
import re
import reprlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from typing import Any, NoReturn

from sedd.constraints.regex import CATEGORIES, Ranges, complement, union
from sedd.errors import UserError

Path = tuple[str, ...]
Span = tuple[tuple[str, str], ...]  # the least and the greatest digit of each position

BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
INTEGER_DIGITS = 15  # every integer of so many digits is a double, whoever reads it
FRACTION_DIGITS = 6
BOUND_DIGITS = 19  # the greatest bound of an integer, 64 bits
# Up to here neighbours of FRACTION_DIGITS after the point are different doubles, so that a number
# that is written as less than a bound is read as less than it.
EXACT = 10**9

_LARGEST = sys.maxunicode
_ASCII = ((0, 0x7F),)
_ANY = ((0, _LARGEST),)
_LINE_ENDS = ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))
_CONTROLS = {"t": 0x09, "n": 0x0A, "v": 0x0B, "f": 0x0C, "r": 0x0D}
_HEX_DIGITS = {"x": 2, "u": 4}
_ESCAPES = {0x22: '"', 0x5C: "\\", 0x08: "b", 0x0C: "f", 0x0A: "n", 0x0D: "r", 0x09: "t"}
_NOT_RAW = ((0, 0x1F), (0x22, 0x22), (0x5C, 0x5C))


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A regex of JSON string content, and how many characters it stands for.

    ``atom`` is set where it is nothing but that character, ``low`` to ``high`` times.
    """

    text: str
    low: int
    high: float
    atom: str | None = None


class Pattern:
    """A ``pattern``, read as a regex of characters and written as one of JSON string content."""

    def __init__(self, source: Any, path: Path):
        if not isinstance(source, str):
            refuse(path, f"expected a regular expression, got {show(source)}")
        self.source, self.path, self.at = source, path, 0

    def search(self) -> Piece:
        """The strings in which the pattern is found."""
        branches = []
        while True:
            start = self._take("^")
            branch = self._sequence()
            end = self._take("$")
            if not start:
                branch = _joined([TEXT, branch])
            if not end:
                branch = _joined([branch, TEXT])
            branches.append(branch)
            if not self._next():
                return _either(branches)
            if not self._take("|"):
                self._refuse("an anchor or a bracket out of place")

    def _refuse(self, problem: str) -> NoReturn:
        refuse(self.path, f"{show(self.source)} at position {self.at}: {problem}")

    def _next(self) -> str:
        return self.source[self.at : self.at + 1]

    def _take(self, text: str) -> bool:
        found = self.source.startswith(text, self.at)
        self.at += len(text) * found
        return found

    def _read(self, regex: str) -> str:
        """What a regex matches here; nothing where it does not."""
        match = re.compile(regex, re.ASCII).match(self.source, self.at)
        self.at += len(match[0]) if match else 0
        return match[0] if match else ""

    def _sequence(self) -> Piece:
        pieces = []
        while self._next() not in ("", "|", ")", "$"):
            pieces.append(self._quantified(self._atom()))
        return _joined(pieces)

    def _atom(self) -> Piece:
        if self._take("("):
            if not self._take("?:") and self._next() == "?":
                self._refuse("only (…) and (?:…) are supported, no look-around, names or flags")
            branches = [self._sequence()]
            while self._take("|"):
                branches.append(self._sequence())
            if not self._take(")"):
                self._refuse("expected )")
            return _either(branches)
        if self._take("["):
            return self._character(self._class())
        if self._take("."):
            return self._character(_without(_ANY, _LINE_ENDS))
        if self._next() in "^*+?{}]":
            self._refuse(f"{self._next()!r} out of place; write \\{self._next()} for the character")
        return self._character(self._member()[0])

    def _character(self, ranges: Ranges) -> Piece:
        text = json_character(ranges)
        if not text:
            self._refuse("a character before this stands only in \\u escapes, which are not used")
        return Piece(text=text, low=1, high=1, atom=text)

    def _class(self) -> Ranges:
        negated = self._take("^")
        if self._next() == "]":
            self._refuse("']' out of place; write \\] for the character")
        ranges, disputed = [], False
        while not self._take("]"):
            if not self._next():
                self._refuse("expected ]")
            low, shorthand = self._member()
            disputed |= shorthand
            if self._next() == "-" and self.source[self.at + 1 : self.at + 2] not in ("", "]"):
                self.at += 1
                high, also = self._member()
                if shorthand or also or high[0][0] < low[0][0]:
                    self._refuse("a range without order")
                low = ((low[0][0], high[0][0]),)
            ranges += low
        if not negated:
            return union(ranges)
        # Outside ASCII, Python's \d, \w and \s hold more than ECMAScript's.
        return _without(_ASCII if disputed else _ANY, union(ranges))

    def _member(self) -> tuple[Ranges, bool]:
        """A character or a shorthand, such as the one for digits, and whether it is the latter."""
        character = self._read(r"(?s:.)")
        code = ord(character)
        if character == "\\":
            letter = self._read(r"(?s:.)")
            if letter.lower() in CATEGORIES:
                ranges = CATEGORIES[letter.lower()]
                return (ranges if letter.islower() else _without(_ASCII, ranges)), True
            if letter in _HEX_DIGITS:
                digits = self._read(f"[0-9a-fA-F]{{{_HEX_DIGITS[letter]}}}")
                if not digits:
                    self._refuse(f"expected {_HEX_DIGITS[letter]} hexadecimal digits")
                code = int(digits, 16)
            elif letter in _CONTROLS:
                code = _CONTROLS[letter]
            elif not letter or letter.isalnum() or not letter.isascii():
                self._refuse(f"\\{letter} before this is not supported")
            else:
                code = ord(letter)
        if 0xD800 <= code <= 0xDFFF:
            self._refuse("half of a surrogate pair before this; write the character itself")
        return ((code, code),), False

    def _quantified(self, piece: Piece) -> Piece:
        mark = self._read(r"[*+?]|\{[0-9]{1,9}(?:,(?:[0-9]{1,9})?)?\}")
        if not mark:
            return piece
        if mark[0] == "{":
            least, comma, most = mark[1:-1].partition(",")
            low, high = int(least), int(most) if most else math.inf if comma else int(least)
        else:
            low, high = {"*": (0, math.inf), "+": (1, math.inf), "?": (0, 1)}[mark]
        if low > high:
            self._refuse("the least count before this exceeds the greatest")
        self._take("?")  # a lazy quantifier matches the same strings
        if self._next() and self._next() in "*+?{":
            self._refuse("a quantifier of a quantifier, or a possessive one")
        once = piece.low == piece.high == 1
        return Piece(
            text=repeat(piece.text if piece.atom and once else f"(?:{piece.text})", low, high),
            low=piece.low * low,
            high=piece.high * high if piece.high and high else 0,
            atom=piece.atom if once else None,
        )


def _joined(pieces: Sequence[Piece]) -> Piece:
    if len(pieces) == 1:
        return pieces[0]
    return Piece(
        text="".join(piece.text for piece in pieces),
        low=sum(piece.low for piece in pieces),
        high=sum(piece.high for piece in pieces),
    )


def _either(pieces: Sequence[Piece]) -> Piece:
    if len(pieces) == 1:
        return pieces[0]
    return Piece(
        text=one_of([piece.text for piece in pieces]),
        low=min(piece.low for piece in pieces),
        high=max(piece.high for piece in pieces),
    )


def number(schema: Mapping[str, Any], path: Path, *, whole: bool) -> str:
    """The decimals between the bounds."""
    step = schema.get("multipleOf", 1)
    if "multipleOf" in schema and (isinstance(step, bool) or step != 1 or not whole):
        refuse((*path, "multipleOf"), f"only 1 is supported, for integers, got {show(step)}")
    unit = 1 if whole else 10**FRACTION_DIGITS
    bounds = {key: _bound(schema[key], (*path, key), whole) for key in BOUNDS if key in schema}
    digits = INTEGER_DIGITS
    if any(abs(bound) >= 10**digits for bound in bounds.values()):
        digits = BOUND_DIGITS
    low, high = 1 - unit * 10**digits, unit * 10**digits - 1
    for key, bound in bounds.items():
        scaled = bound * unit
        if key == "minimum":
            low = max(low, math.ceil(scaled))
        elif key == "exclusiveMinimum":
            low = max(low, math.floor(scaled) + 1)
        elif key == "maximum":
            high = min(high, math.floor(scaled))
        else:
            high = min(high, math.ceil(scaled) - 1)
    if low > high:
        refuse(path, f"no {'integer' if whole else 'number'} lies between the bounds")
    magnitudes = _naturals if whole else _decimals
    negative = magnitudes(max(-high, 1), -low) if low < 0 else []  # never -0
    positive = magnitudes(max(low, 0), high) if high >= 0 else []
    return one_of([*(["-" + one_of(negative)] if negative else []), *positive])


def _bound(value: Any, path: Path, whole: bool) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, int | float):
        refuse(path, f"expected a number, got {show(value)}")
    largest = 10**BOUND_DIGITS if whole else 10**INTEGER_DIGITS
    if not whole and path[-1].startswith("exclusive"):
        largest = EXACT + 1
    if not abs(value) < largest:
        refuse(path, f"expected a magnitude below {largest}, got {show(value)}")
    # A fraction is what it is written as: "0.1" reads as the double that 0.1 is.
    return Fraction(value) if value == int(value) else Fraction(repr(value))


def _naturals(low: int, high: int) -> list[str]:
    """Alternatives for the integers from ``low`` >= 0 to ``high``."""
    texts, full = ["0"] if low == 0 else [], []
    low = max(low, 1)
    for width in range(len(str(low)), len(str(high)) + 1):
        least, most = max(low, 10 ** (width - 1)), min(high, 10**width - 1)
        if least == 10 ** (width - 1) and most == 10**width - 1:
            full.append(width)
        elif least <= most:
            texts += [_digits(span) for span in _spans(str(least), str(most))]
    if full:
        texts.append("[1-9]" + repeat("[0-9]", full[0] - 1, full[-1] - 1))
    return texts


def _decimals(low: int, high: int) -> list[str]:
    """Alternatives for the decimals from ``low`` >= 0 to ``high``, in the last digit's units."""
    unit = 10**FRACTION_DIGITS
    (first, above), (last, below) = divmod(low, unit), divmod(high, unit)
    if first == last:
        return [str(first) + _fraction(above, below)]
    texts = []
    if above:
        texts.append(str(first) + _fraction(above, unit - 1))
        first += 1
    if below != unit - 1:
        texts.append(str(last) + _fraction(0, below))
        last -= 1
    if first <= last:
        texts.append(one_of(_naturals(first, last)) + _fraction(0, unit - 1))
    return texts


def _fraction(low: int, high: int) -> str:
    """The point and the digits after it; trailing zeros, or all of it, may be left out."""
    texts = []
    for span in _spans(*(f"{bound:0{FRACTION_DIGITS}}" for bound in (low, high))):
        kept = len(span)
        while kept > 1 and span[kept - 1][0] == "0":
            kept -= 1
        if len(set(span[kept:])) == 1:
            tail = repeat(_digits(span[kept : kept + 1]), 0, len(span) - kept)
        else:
            tail = ""
            for position in reversed(span[kept:]):
                tail = f"(?:{_digits((position,))}{tail})?"
        texts.append(_digits(span[:kept]) + tail)
    return rf"(?:\.{one_of(texts)})" + ("" if low else "?")


def _spans(low: str, high: str) -> Iterator[Span]:
    """The numbers between two of equal width, as products of digit ranges."""
    width = len(low)
    if set(low) <= {"0"} and set(high) <= {"9"}:
        yield (("0", "9"),) * width
        return
    first, last, rest = int(low[0]), int(high[0]), width - 1
    if first == last:
        yield from (((low[0], low[0]), *span) for span in _spans(low[1:], high[1:]))
        return
    if low[1:] != "0" * rest:
        yield from (((low[0], low[0]), *span) for span in _spans(low[1:], "9" * rest))
        first += 1
    if high[1:] != "9" * rest:
        yield from (((high[0], high[0]), *span) for span in _spans("0" * rest, high[1:]))
        last -= 1
    if first <= last:
        yield ((str(first), str(last)), *(("0", "9"),) * rest)


def _digits(span: Span) -> str:
    return "".join(
        repeat(low if low == high else f"[{low}-{high}]", count, count)
        for (low, high), count in ((pair, len(list(run))) for pair, run in groupby(span))
    )


def one_of(texts: Iterable[str]) -> str:
    """One of some texts, each of them once."""
    texts = list(dict.fromkeys(texts))
    return texts[0] if len(texts) == 1 else f"(?:{'|'.join(texts)})"


def repeat(atom: str, low: int, high: float) -> str:
    if low == high:
        return {0: "", 1: atom}.get(low, f"{atom}{{{low}}}")
    if high == math.inf:
        return atom + {0: "*", 1: "+"}.get(low, f"{{{low},}}")
    return atom + ("?" if (low, high) == (0, 1) else f"{{{low},{int(high)}}}")


def literal(text: str) -> str:
    return re.sub(r"[\\.^$*+?{}\[\]|()]", r"\\\g<0>", text)


def _without(ranges: Ranges, others: Ranges) -> Ranges:
    return complement(union([*complement(ranges), *others]))


def json_character(ranges: Ranges) -> str:
    """An atom for one character of a JSON string; nothing where none can be written."""
    raw = _without(ranges, _NOT_RAW)
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
    """A class of characters, negated where that is shorter: where it goes on to the last one."""
    if ranges[-1][1] == _LARGEST:
        return f"[^{_class_members(complement(ranges))}]"
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return literal(chr(ranges[0][0]))
    return f"[{_class_members(ranges)}]"


def _class_members(ranges: Ranges) -> str:
    def written(code: int) -> str:
        if code < 0x20 or code == 0x7F:
            return f"\\x{code:02x}"
        return ("\\" if chr(code) in r"\]^-[" else "") + chr(code)

    return "".join(
        written(low) if low == high else f"{written(low)}-{written(high)}" for low, high in ranges
    )


def show(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # Python does not write integers of thousands of digits
        return "a number of too many digits"


def refuse(path: Path, problem: str) -> NoReturn:
    """The path is a JSON pointer in a URI's fragment, without percent signs."""
    tokens = [str(token).replace("~", "~0").replace("/", "~1") for token in path]
    shown = (c if c.isprintable() else repr(c)[1:-1] for c in "/".join(["#", *tokens]))
    raise UserError(f"{''.join(shown)}: {problem}")


CHARACTER = json_character(_ANY)
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
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9\-]*[A-Za-z0-9])?"  # at most 63 would cost 250 states
_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_HEX = "[0-9a-fA-F]"
FORMATS = {
    "date": Piece(text=_DATE, low=10, high=10),
    "time": Piece(text=_TIME, low=9, high=21),
    "date-time": Piece(text=f"{_DATE}T{_TIME}", low=20, high=32),
    "email": Piece(text=rf"{_ATOM}(?:\.{_ATOM})*@{_LABEL}(?:\.{_LABEL})+", low=5, high=math.inf),
    "uuid": Piece(
        text=f"{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}", low=36, high=36
    ),
    "ipv4": Piece(text=rf"{_OCTET}(?:\.{_OCTET}){{3}}", low=7, high=15),
}
