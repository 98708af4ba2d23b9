r"""JSON Schema to a regex: every text that the regex matches validates against the schema.

The subset is one of draft 2020-12, or of draft 7 where ``$schema`` says so. What lies outside it is
refused with the path of the keyword (``#/properties/age/multipleOf``), never ignored. Inside it the
regex may match less than the schema allows, never more, and what it matches is written one way:

- White space is what ``json.dumps`` writes: a space after ``:`` and ``,``, or none (``compact``).
- Strings hold any character from U+0020 up, and the escapes ``\" \\ \b \f \n \r \t`` where JSON
  needs them; no ``\/`` and no ``\uXXXX``. An escape counts as one character.
- ``minLength`` and ``maxLength`` beside a ``pattern`` or ``format`` must follow from it, or the
  pattern be one repeated class (``^[a-z]+$``).
- ``pattern`` matches anywhere unless anchored. ``^`` begins it or one of its outermost
  alternatives, ``$`` ends it. It keeps to what ECMAScript and Python agree on: ``\d \w \s`` and
  their complements stand for ASCII characters, ``.`` for none that ends a line in either.
- ``format`` is date, time, date-time (RFC 3339: real dates of the years 0001 to 9999, an offset, no
  leap second), email (unquoted, a domain with a dot, no part limited in length), uuid or ipv4.
- Integers have up to 15 digits where no bound says otherwise, numbers also up to 6 after the point
  and no exponent; a bound is exact.
- Objects list their properties in the schema's order and have no others, whatever
  ``additionalProperties`` would allow. One without ``properties`` is a map: any names, with values
  of ``additionalProperties``.
- Arrays are of ``items`` after ``prefixItems``; without ``items`` they end with ``prefixItems``.
- A schema that says nothing (``true``, ``{}``, a map or an array of anything) is any JSON value, in
  which arrays and objects nest at most two deep.
- ``const`` and ``enum`` are what ``json.dumps`` writes, without the values that a ``type`` beside
  them excludes.
- ``anyOf``, ``oneOf``, ``allOf`` of one and ``$ref`` inside the document stand alone or beside
  ``type``; ``oneOf`` only where its branches cannot overlap, ``$ref`` only where nothing recurs.
- Keywords without ``type`` stand for the types that they are about.
"""

import json
import math
import re
import reprlib
import sys
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, groupby
from typing import Any, NoReturn

from sedd.constraints.regex import CATEGORIES, Ranges, complement, union
from sedd.errors import UserError

Path = tuple[str, ...]
Span = tuple[tuple[str, str], ...]  # the least and the greatest digit of each position

ANNOTATIONS = (
    "title",
    "description",
    "default",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
    "discriminator",
    "$comment",
    "$defs",
    "definitions",
)
AT_ROOT = ("$schema", "$id")
DRAFTS = ("https://json-schema.org/draft/2020-12/schema", "http://json-schema.org/draft-07/schema")
KEYWORDS = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "object": (
        "properties",
        "required",
        "additionalProperties",
        "minProperties",
        "maxProperties",
    ),
    "array": ("prefixItems", "items", "minItems", "maxItems", "uniqueItems"),
}
OWNER = {keyword: owner for owner, keywords in KEYWORDS.items() for keyword in keywords}
VALUES = ("const", "enum")
COMBINERS = ("$ref", "anyOf", "oneOf", "allOf")
# What each type's name stands for: an integer is a number too.
TYPES = {
    "string": {"string"},
    "integer": {"integer"},
    "number": {"number", "integer"},
    "boolean": {"boolean"},
    "null": {"null"},
    "object": {"object"},
    "array": {"array"},
}
ALL_TYPES = frozenset(TYPES)

ANY_DEPTH = 2
MAX_NESTING = 64  # far above any real schema's; Python's own stack ends at about four times that
MAX_CHARACTERS = 2**20  # of a regex: references to references can double it at each step
INTEGER_DIGITS = 15  # every integer of so many digits is a double, whoever reads it
FRACTION_DIGITS = 6
MAX_COUNT = 2**32 - 2  # the most that Python's re counts to
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


def schema_to_regex(schema: Any, *, compact: bool = False) -> str:
    """The regex of JSON texts that validate against ``schema``, a value as ``json.loads`` gives it.

    In the dialect of ``re.fullmatch``. The module says what the subset is and how texts are
    written. ``compact`` leaves out the spaces. ``UserError``, in one line that begins with the
    path, for what is outside the subset, is no schema, or allows no value.
    """
    return _Converter(schema, compact).value(schema, ())


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A regex of JSON string content, and how many characters it stands for.

    ``atom`` is set where it is nothing but that character, ``low`` to ``high`` times.
    """

    text: str
    low: int
    high: float
    atom: str | None = None


class _Converter:
    """One schema's conversion; ``path`` is where a subschema stands in the document."""

    def __init__(self, root: Any, compact: bool):
        self.root = root
        self.comma, self.colon = (",", ":") if compact else (", ", ": ")
        self.open: list[Path] = []  # the schemas around the one at hand, references followed
        draft = root.get("$schema", DRAFTS[0]) if isinstance(root, Mapping) else DRAFTS[0]
        if not isinstance(draft, str) or draft.rstrip("#") not in DRAFTS:
            _refuse(("$schema",), f"expected {' or '.join(DRAFTS)}, got {draft!r}")
        self.older = draft.rstrip("#") != DRAFTS[0]

    def value(self, schema: Any, path: Path, within: frozenset[str] = ALL_TYPES) -> str:
        """The regex, an atom or a sequence, of the values of some types."""
        if schema is True:
            schema = {}
        if schema is False:
            _refuse(path, "false allows no value")
        if not isinstance(schema, Mapping):
            _refuse(path, f"a schema is an object or a boolean, got {_show(schema)}")
        if len(self.open) == MAX_NESTING:
            _refuse(path, f"schemas nest more than {MAX_NESTING} deep")
        self.open.append(path)
        text = self._keywords(schema, path, within)
        self.open.pop()
        if len(text) > MAX_CHARACTERS:
            _refuse(path, f"the regex has more than {MAX_CHARACTERS} characters")
        return text

    def _keywords(self, schema: Mapping[str, Any], path: Path, within: frozenset[str]) -> str:
        unsaid = ANNOTATIONS if path else (*ANNOTATIONS, *AT_ROOT)
        said = [key for key in schema if key not in unsaid]
        for key in said:
            if key not in ("type", *OWNER, *VALUES, *COMBINERS):
                _refuse((*path, key), "outside the supported subset of JSON Schema")
            # Draft 7 overlooks both: the first wherever it is, the second beside $ref.
            if self.older and (key == "prefixItems" or (key == "type" and "$ref" in schema)):
                _refuse((*path, key), "not as draft 7 has it, which $schema names")
        types = self._types(schema, path, within)
        for key in said:
            if key in COMBINERS or key in VALUES:
                for other in said:
                    if other not in (key, "type"):
                        _refuse((*path, other), f"not supported beside {key}")
                convert = self._values if key in VALUES else self._combined
                return convert(schema, key, path, types)
        about = {OWNER[key] for key in said if key != "type"}
        for key in said:
            if key != "type" and not TYPES[OWNER[key]] & types:
                _refuse((*path, key), f"does not apply to {' or '.join(_names(types))}")
        if about and "type" not in schema:
            types &= frozenset().union(*(TYPES[owner] for owner in about))
        return _union([self._typed(name, schema, path) for name in _names(types)])

    def _types(
        self, schema: Mapping[str, Any], path: Path, within: frozenset[str]
    ) -> frozenset[str]:
        """The types that a schema's values may have, of some."""
        if "type" not in schema:
            return within
        path = (*path, "type")
        said = schema["type"]
        names: list[Any] = said if isinstance(said, list) and said else [said]
        for name in names:
            if not isinstance(name, str) or name not in TYPES:
                _refuse(path, f"expected one of {', '.join(TYPES)} or a list, got {_show(said)}")
        types = within & frozenset().union(*(TYPES[name] for name in names))
        if not types:
            _refuse(path, f"allows no value, where {' or '.join(_names(within))} is expected")
        return types

    def _typed(self, name: str, schema: Mapping[str, Any], path: Path) -> str:
        if name == "string":
            return self._string(schema, path)
        if name in ("integer", "number"):
            return _number(schema, path, whole=name == "integer")
        if name == "object":
            return self._object(schema, path)
        if name == "array":
            return self._array(schema, path)
        return "(?:true|false)" if name == "boolean" else "null"

    def _values(
        self, schema: Mapping[str, Any], key: str, path: Path, types: frozenset[str]
    ) -> str:
        path = (*path, key)
        texts = [
            _literal(self._dumps(value, path))
            for value in _listed(schema, key, path)
            if _types_of(value) & types
        ]
        if not texts:
            _refuse(path, f"holds no {' or '.join(_names(types))}")
        return _union(texts)

    def _dumps(self, value: Any, path: Path) -> str:
        """A value's text, which has to be JSON and Unicode."""
        try:
            text = json.dumps(
                value, ensure_ascii=False, allow_nan=False, separators=(self.comma, self.colon)
            )
            text.encode()
        except (TypeError, ValueError, RecursionError) as error:
            _refuse(path, f"{_show(value)} is not JSON ({error})")
        return text

    def _combined(
        self, schema: Mapping[str, Any], key: str, path: Path, types: frozenset[str]
    ) -> str:
        path = (*path, key)
        branches = self._branches(schema, key, path)
        text = _union([self.value(branch, where, types) for branch, where in branches])
        if key == "oneOf":
            for (first, at_first), (second, at_second) in combinations(branches, 2):
                if not self._disjoint(first, second, types):
                    _refuse(
                        path,
                        f"cannot tell that no value fits both {at_first[-1]} and {at_second[-1]}: "
                        "give them different types, or a required property that differs "
                        "in its type or const, or use anyOf",
                    )
        return text

    def _branches(self, schema: Mapping[str, Any], key: str, path: Path) -> list[tuple[Any, Path]]:
        """What a combiner is made of, and where that stands."""
        said = schema[key]
        if key == "$ref":
            return [self._target(said, path)]
        if not isinstance(said, list) or not said:
            _refuse(path, f"expected a list of schemas, got {_show(said)}")
        if key == "allOf" and len(said) > 1:
            _refuse(path, f"supported for one schema only, got {len(said)}")
        return [(branch, (*path, str(index))) for index, branch in enumerate(said)]

    def _target(self, reference: Any, path: Path) -> tuple[Any, Path]:
        """The schema that a JSON pointer names (RFC 6901, section 6)."""
        if not isinstance(reference, str) or not re.fullmatch("#(?:/.*)?", reference, re.DOTALL):
            _refuse(path, f"expected a JSON pointer (#/$defs/name), got {_show(reference)}")
        target, where = self.root, ()
        for token in urllib.parse.unquote(reference).split("/")[1:]:
            key = token.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list):
                target = {str(index): each for index, each in enumerate(target)}
            if not isinstance(target, Mapping) or key not in target:
                _refuse(path, f"{_show(reference)} names nothing in the schema")
            target, where = target[key], (*where, key)
        if where in self.open:
            _refuse(path, f"{_show(reference)} refers to a schema around it; recursion is refused")
        return target, where

    def _disjoint(self, first: Any, second: Any, types: frozenset[str]) -> bool:
        """Whether it is certain that no value validates against both."""
        return all(
            self._apart(*one, *other)
            for one in self._leaves(first, types)
            for other in self._leaves(second, types)
        )

    def _leaves(
        self, schema: Any, types: frozenset[str]
    ) -> Iterator[tuple[Mapping[str, Any], frozenset[str]]]:
        """A converted schema's parts without combiners, and the types that their values have."""
        schema = {} if schema is True else schema
        types = self._types(schema, (), types)
        for key in COMBINERS:
            if key in schema:
                for branch, _ in self._branches(schema, key, ()):
                    yield from self._leaves(branch, types)
                return
        for key in VALUES:
            if key in schema:
                types &= frozenset().union(*map(_types_of, _listed(schema, key, ())))
        yield schema, types

    def _apart(
        self,
        first: Mapping[str, Any],
        first_types: frozenset[str],
        second: Mapping[str, Any],
        second_types: frozenset[str],
    ) -> bool:
        common = first_types & second_types
        if not common:
            return True
        listed = [
            {_same(value) for key in VALUES if key in leaf for value in _listed(leaf, key, ())}
            for leaf in (first, second)
        ]
        if all(listed):
            return not listed[0] & listed[1]
        if common != {"object"}:
            return False
        return self._objects_apart(first, second) or self._objects_apart(second, first)

    def _objects_apart(self, first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
        """Whether a property that the first requires cannot be in the second."""
        here, there = first.get("properties", {}), second.get("properties", {})
        return any(
            self._disjoint(here[name], there[name], ALL_TYPES)
            if name in there
            else second.get("additionalProperties") is False
            for name in first.get("required", [])
        )

    def _anything(self, depth: int) -> str:
        """Any value whose arrays and objects nest at most ``depth`` deep."""
        names = _names(ALL_TYPES if depth else ALL_TYPES - {"object", "array"})
        return _union(
            [
                self._map(self._anything(depth - 1))
                if name == "object"
                else self._list(self._anything(depth - 1), 0, math.inf)
                if name == "array"
                else self._typed(name, {}, ())
                for name in names
            ]
        )

    def _inside(self, schema: Any, path: Path) -> str:
        """The values of a list or map, which is itself a level where they may be anything."""
        if schema is True or (isinstance(schema, Mapping) and not set(schema) - set(ANNOTATIONS)):
            return self._anything(ANY_DEPTH - 1)
        return self.value(schema, path)

    def _object(self, schema: Mapping[str, Any], path: Path) -> str:
        properties = schema.get("properties", {})
        if not isinstance(properties, Mapping):
            _refuse((*path, "properties"), f"expected an object, got {_show(properties)}")
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            _refuse((*path, "required"), f"expected a list of names, got {_show(required)}")
        for name in required:
            if name not in properties:
                _refuse((*path, "required"), f"{_show(name)} is not among the properties")
        others = schema.get("additionalProperties", True)
        if not isinstance(others, bool | Mapping):
            where = (*path, "additionalProperties")
            _refuse(where, f"a schema is an object or a boolean, got {_show(others)}")
        free = "properties" not in schema and others is not False
        fewest, most = _counts(schema, path, "minProperties", "maxProperties")
        if fewest > len(set(required)):
            _refuse((*path, "minProperties"), "supported only up to the number of required ones")
        if most < (math.inf if free else len(properties)):
            _refuse((*path, "maxProperties"), "supported only from the number of properties up")
        if free:
            return self._map(self._inside(others, (*path, "additionalProperties")))
        pairs = []
        for name, subschema in properties.items():
            where = (*path, "properties", name)
            text = self.value(subschema, where)
            pairs.append(_literal(self._dumps(name, where) + self.colon) + text)
        return rf"\{{{self._members(pairs, [name in required for name in properties])}\}}"

    def _members(self, pairs: Sequence[str], needed: Sequence[bool]) -> str:
        """Some of the pairs in order, the needed ones among them, with commas between."""
        if not any(needed):
            return f"(?:{self._some(pairs)})?" if pairs else ""
        # The commas hang on the first that must be there.
        first = needed.index(True)
        before = [f"(?:{pair}{self.comma})?" for pair in pairs[:first]]
        after = [
            self.comma + pair if need else f"(?:{self.comma}{pair})?"
            for pair, need in zip(pairs[first + 1 :], needed[first + 1 :], strict=True)
        ]
        return "".join([*before, pairs[first], *after])

    def _some(self, pairs: Sequence[str]) -> str:
        """At least one of the pairs: n·log n of them are written out, not 2ⁿ."""
        if len(pairs) == 1:
            return pairs[0]
        left, right = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
        rest = "".join(f"(?:{self.comma}{pair})?" for pair in right)
        return _union([self._some(left) + rest, self._some(right)])

    def _map(self, value: str) -> str:
        pair = f'"{_TEXT.text}"{self.colon}{value}'
        return rf"\{{(?:{pair}(?:{self.comma}{pair})*)?\}}"

    def _array(self, schema: Mapping[str, Any], path: Path) -> str:
        low, high = _counts(schema, path, "minItems", "maxItems")
        unique = schema.get("uniqueItems", False)
        if unique is not False:
            _refuse((*path, "uniqueItems"), f"only false is supported, got {_show(unique)}")
        where = (*path, "prefixItems")
        prefix = schema.get("prefixItems", [])
        if not isinstance(prefix, list) or ("prefixItems" in schema and not prefix):
            _refuse(where, f"expected a list of schemas, got {_show(prefix)}")
        first = [self.value(each, (*where, str(i))) for i, each in enumerate(prefix)]
        items = schema.get("items", not prefix)
        if items is False:
            if low > len(prefix):
                _refuse((*path, "minItems"), f"more than the {len(prefix)} items that there can be")
            return self._list("", low, min(high, len(prefix)), first)
        return self._list(self._inside(items, (*path, "items")), low, high, first)

    def _list(self, item: str, low: int, high: float, first: Sequence[str] = ()) -> str:
        """A list of ``low`` to ``high``: the ``first`` ones and then items."""
        first = first[: int(min(high, len(first)))]
        taken = max(len(first), 1)  # the items after these all follow a comma
        rest = ""
        if high > taken:
            rest = _repeat(f"(?:{self.comma}{item})", max(low - taken, 0), high - taken)
        elements = [*first, item][:taken] if high else []
        for index, element in reversed(list(enumerate(elements))):
            rest = f"{self.comma if index else ''}{element}{rest}"
            rest = rest if index < low else f"(?:{rest})?"
        return rf"\[{rest}\]"

    def _string(self, schema: Mapping[str, Any], path: Path) -> str:
        low, high = _counts(schema, path, "minLength", "maxLength")
        piece, source = _TEXT, ""
        if "format" in schema:
            name = schema["format"]
            if not isinstance(name, str) or name not in FORMATS:
                given = f"expected one of {', '.join(FORMATS)}, got {_show(name)}"
                _refuse((*path, "format"), given)
            if "pattern" in schema:
                _refuse((*path, "pattern"), "not supported beside format")
            piece, source = FORMATS[name], "format"
        elif "pattern" in schema:
            piece, source = _Pattern(schema["pattern"], (*path, "pattern")).search(), "pattern"
        if low <= piece.low and piece.high <= high:
            return f'"{piece.text}"'
        key = "minLength" if low > piece.low else "maxLength"
        if low > piece.high or high < piece.low:
            _refuse((*path, key), f"no string of that {source} has such a length")
        if piece.atom is None:
            _refuse((*path, key), f"not supported beside this {source}, whose lengths differ")
        return f'"{_repeat(piece.atom, max(low, piece.low), min(high, piece.high))}"'


class _Pattern:
    """A ``pattern``, read as a regex of characters and written as one of JSON string content."""

    def __init__(self, source: Any, path: Path):
        if not isinstance(source, str):
            _refuse(path, f"expected a regular expression, got {_show(source)}")
        self.source, self.path, self.at = source, path, 0

    def search(self) -> _Piece:
        """The strings in which the pattern is found."""
        branches = []
        while True:
            start = self._take("^")
            branch = self._sequence()
            end = self._take("$")
            if not start:
                branch = _joined([_TEXT, branch])
            if not end:
                branch = _joined([branch, _TEXT])
            branches.append(branch)
            if not self._next():
                return _either(branches)
            if not self._take("|"):
                self._refuse("an anchor or a bracket out of place")

    def _refuse(self, problem: str) -> NoReturn:
        _refuse(self.path, f"{_show(self.source)} at position {self.at}: {problem}")

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

    def _sequence(self) -> _Piece:
        pieces = []
        while self._next() not in ("", "|", ")", "$"):
            pieces.append(self._quantified(self._atom()))
        return _joined(pieces)

    def _atom(self) -> _Piece:
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

    def _character(self, ranges: Ranges) -> _Piece:
        text = _json_character(ranges)
        if not text:
            self._refuse("a character before this stands only in \\u escapes, which are not used")
        return _Piece(text=text, low=1, high=1, atom=text)

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

    def _quantified(self, piece: _Piece) -> _Piece:
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
        return _Piece(
            text=_repeat(piece.text if piece.atom and once else f"(?:{piece.text})", low, high),
            low=piece.low * low,
            high=piece.high * high if piece.high and high else 0,
            atom=piece.atom if once else None,
        )


def _joined(pieces: Sequence[_Piece]) -> _Piece:
    if len(pieces) == 1:
        return pieces[0]
    return _Piece(
        text="".join(piece.text for piece in pieces),
        low=sum(piece.low for piece in pieces),
        high=sum(piece.high for piece in pieces),
    )


def _either(pieces: Sequence[_Piece]) -> _Piece:
    if len(pieces) == 1:
        return pieces[0]
    return _Piece(
        text=_union([piece.text for piece in pieces]),
        low=min(piece.low for piece in pieces),
        high=max(piece.high for piece in pieces),
    )


def _number(schema: Mapping[str, Any], path: Path, *, whole: bool) -> str:
    """The decimals between the bounds."""
    step = schema.get("multipleOf", 1)
    if "multipleOf" in schema and (isinstance(step, bool) or step != 1 or not whole):
        _refuse((*path, "multipleOf"), f"only 1 is supported, for integers, got {_show(step)}")
    unit = 1 if whole else 10**FRACTION_DIGITS
    bounds = {
        key: _bound(schema[key], (*path, key), whole)
        for key in KEYWORDS["number"]
        if key in schema and key != "multipleOf"
    }
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
        _refuse(path, f"no {'integer' if whole else 'number'} lies between the bounds")
    magnitudes = _naturals if whole else _decimals
    negative = magnitudes(max(-high, 1), -low) if low < 0 else []  # never -0
    positive = magnitudes(max(low, 0), high) if high >= 0 else []
    return _union([*(["-" + _union(negative)] if negative else []), *positive])


def _bound(value: Any, path: Path, whole: bool) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(path, f"expected a number, got {_show(value)}")
    largest = 10**BOUND_DIGITS if whole else 10**INTEGER_DIGITS
    if not whole and path[-1].startswith("exclusive"):
        largest = EXACT + 1
    if not abs(value) < largest:
        _refuse(path, f"expected a magnitude below {largest}, got {_show(value)}")
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
        texts.append("[1-9]" + _repeat("[0-9]", full[0] - 1, full[-1] - 1))
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
        texts.append(_union(_naturals(first, last)) + _fraction(0, unit - 1))
    return texts


def _fraction(low: int, high: int) -> str:
    """The point and the digits after it; trailing zeros, or all of it, may be left out."""
    texts = []
    for span in _spans(*(f"{bound:0{FRACTION_DIGITS}}" for bound in (low, high))):
        kept = len(span)
        while kept > 1 and span[kept - 1][0] == "0":
            kept -= 1
        if len(set(span[kept:])) == 1:
            tail = _repeat(_digits(span[kept : kept + 1]), 0, len(span) - kept)
        else:
            tail = ""
            for position in reversed(span[kept:]):
                tail = f"(?:{_digits((position,))}{tail})?"
        texts.append(_digits(span[:kept]) + tail)
    return rf"(?:\.{_union(texts)})" + ("" if low else "?")


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
        _repeat(low if low == high else f"[{low}-{high}]", count, count)
        for (low, high), count in ((pair, len(list(run))) for pair, run in groupby(span))
    )


def _counts(schema: Mapping[str, Any], path: Path, least: str, most: str) -> tuple[int, float]:
    """The two ends of a length, 0 and infinity where they are not given."""
    ends = []
    for key, default in ((least, 0), (most, math.inf)):
        value = schema.get(key, default)
        if key in schema:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and 0 <= value <= MAX_COUNT and value == int(value)):
                _refuse((*path, key), f"expected a count up to {MAX_COUNT}, got {_show(value)}")
            value = int(value)
        ends.append(value)
    low, high = ends
    if low > high:
        _refuse((*path, least), f"{low} exceeds {most} {high}")
    return low, high


def _listed(schema: Mapping[str, Any], key: str, path: Path) -> list[Any]:
    """The values of a ``const`` or an ``enum``."""
    said = schema[key]
    if key == "const":
        return [said]
    if not isinstance(said, list) or not said:
        _refuse(path, f"expected a list of values, got {_show(said)}")
    return said


def _types_of(value: Any) -> frozenset[str]:
    if isinstance(value, bool):
        return frozenset({"boolean"})
    if isinstance(value, int | float):
        whole = isinstance(value, int) or value.is_integer()
        return frozenset({"integer"} if whole else {"number"})
    for name, kind in (("string", str), ("array", list), ("object", Mapping)):
        if isinstance(value, kind):
            return frozenset({name})
    return frozenset({"null"})


def _same(value: Any) -> str:
    """Equal for values that are equal in JSON Schema: 1 and 1.0 are, 1 and true are not."""

    def plain(value: Any) -> Any:
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, list):
            return [plain(each) for each in value]
        if isinstance(value, Mapping):
            return {key: plain(each) for key, each in value.items()}
        return value

    return json.dumps(plain(value), sort_keys=True)


def _names(types: frozenset[str]) -> list[str]:
    """The names that stand for some types, in the order of ``TYPES``."""
    return [
        name for name in TYPES if name in types and not (name == "integer" and "number" in types)
    ]


def _union(texts: Iterable[str]) -> str:
    """One of some texts, each of them once."""
    texts = list(dict.fromkeys(texts))
    return texts[0] if len(texts) == 1 else f"(?:{'|'.join(texts)})"


def _repeat(atom: str, low: int, high: float) -> str:
    if low == high:
        return {0: "", 1: atom}.get(low, f"{atom}{{{low}}}")
    if high == math.inf:
        return atom + {0: "*", 1: "+"}.get(low, f"{{{low},}}")
    return atom + ("?" if (low, high) == (0, 1) else f"{{{low},{int(high)}}}")


def _literal(text: str) -> str:
    return re.sub(r"[\\.^$*+?{}\[\]|()]", r"\\\g<0>", text)


def _without(ranges: Ranges, others: Ranges) -> Ranges:
    return complement(union([*complement(ranges), *others]))


def _json_character(ranges: Ranges) -> str:
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
        return _literal(chr(ranges[0][0]))
    return f"[{_class_members(ranges)}]"


def _class_members(ranges: Ranges) -> str:
    def written(code: int) -> str:
        if code < 0x20 or code == 0x7F:
            return f"\\x{code:02x}"
        return ("\\" if chr(code) in r"\]^-[" else "") + chr(code)

    return "".join(
        written(low) if low == high else f"{written(low)}-{written(high)}" for low, high in ranges
    )


def _show(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # Python does not write integers of thousands of digits
        return "a number of too many digits"


def _refuse(path: Path, problem: str) -> NoReturn:
    """The path is a JSON pointer in a URI's fragment, without percent signs."""
    tokens = [str(token).replace("~", "~0").replace("/", "~1") for token in path]
    shown = (c if c.isprintable() else repr(c)[1:-1] for c in "/".join(["#", *tokens]))
    raise UserError(f"{''.join(shown)}: {problem}")


_CHARACTER = _json_character(_ANY)
_TEXT = _Piece(text=_CHARACTER + "*", low=0, high=math.inf, atom=_CHARACTER)

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
    "date": _Piece(text=_DATE, low=10, high=10),
    "time": _Piece(text=_TIME, low=9, high=21),
    "date-time": _Piece(text=f"{_DATE}T{_TIME}", low=20, high=32),
    "email": _Piece(text=rf"{_ATOM}(?:\.{_ATOM})*@{_LABEL}(?:\.{_LABEL})+", low=5, high=math.inf),
    "uuid": _Piece(
        text=f"{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}", low=36, high=36
    ),
    "ipv4": _Piece(text=rf"{_OCTET}(?:\.{_OCTET}){{3}}", low=7, high=15),
}
