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

import contextlib
import json
import math
import re
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from sedd.constraints.json_text import (
    BOUNDS,
    FORMATS,
    TEXT,
    Path,
    literal,
    number,
    one_of,
    refuse,
    repeat,
    searched,
    show,
)
from sedd.constraints.regex import RegexError

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
    "number": (*BOUNDS, "multipleOf"),
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
MAX_CHARACTERS = 2**18  # of a regex: references to references can double it at each step
MAX_COUNT = 2**32 - 2  # the most that Python's re counts to


def schema_to_regex(schema: Any, *, compact: bool = False) -> str:
    """The regex of JSON texts that validate against ``schema``, a value as ``json.loads`` gives it.

    In the dialect of ``re.fullmatch``. The module says what the subset is and how texts are
    written. ``compact`` leaves out the spaces. ``UserError``, in one line that begins with the
    path, for what is outside the subset, is no schema, or allows no value.
    """
    return _Converter(schema, compact).value(schema, ())


@contextlib.contextmanager
def regex_to_compile(schema: Any) -> Iterator[str]:
    """``schema``'s regex; a RegexError about it becomes a UserError that names the subschema.

    Of those whose regex holds the piece at fault, that is the one of the shortest regex.
    """
    converter = _Converter(schema, compact=False)
    pattern = converter.value(schema, ())
    try:
        yield pattern
    except RegexError as error:
        around = [(len(text), path) for path, text in converter.made if error.piece in text]
        refuse(min(around, default=(0, ()))[1], str(error))


class _Converter:
    """One schema's conversion; ``path`` is where a subschema stands in the document."""

    def __init__(self, root: Any, compact: bool):
        self.root = root
        self.comma, self.colon = (",", ":") if compact else (", ", ": ")
        self.open: list[Path] = []  # the schemas around the one at hand, references followed
        self.made: list[tuple[Path, str]] = []  # what each was converted to, the innermost first
        draft = root.get("$schema", DRAFTS[0]) if isinstance(root, Mapping) else DRAFTS[0]
        if not isinstance(draft, str) or draft.rstrip("#") not in DRAFTS:
            refuse(("$schema",), f"expected {' or '.join(DRAFTS)}, got {draft!r}")
        self.older = draft.rstrip("#") != DRAFTS[0]

    def value(self, schema: Any, path: Path, within: frozenset[str] = ALL_TYPES) -> str:
        """The regex, an atom or a sequence, of the values of some types."""
        if schema is True:
            schema = {}
        if schema is False:
            refuse(path, "false allows no value")
        if not isinstance(schema, Mapping):
            refuse(path, f"a schema is an object or a boolean, got {show(schema)}")
        if len(self.open) == MAX_NESTING:
            refuse(path, f"schemas nest more than {MAX_NESTING} deep")
        self.open.append(path)
        text = self._keywords(schema, path, within)
        self.open.pop()
        self.made.append((path, text))
        if len(text) > MAX_CHARACTERS:
            refuse(path, f"the regex has more than {MAX_CHARACTERS} characters")
        return text

    def _keywords(self, schema: Mapping[str, Any], path: Path, within: frozenset[str]) -> str:
        unsaid = ANNOTATIONS if path else (*ANNOTATIONS, *AT_ROOT)
        said = [key for key in schema if key not in unsaid]
        for key in said:
            if key not in ("type", *OWNER, *VALUES, *COMBINERS):
                refuse((*path, key), "outside the supported subset of JSON Schema")
            # Draft 7 overlooks both: the first wherever it is, the second beside $ref.
            if self.older and (key == "prefixItems" or (key == "type" and "$ref" in schema)):
                refuse((*path, key), "not as draft 7 has it, which $schema names")
        types = self._types(schema, path, within)
        for key in said:
            if key in COMBINERS or key in VALUES:
                for other in said:
                    if other not in (key, "type"):
                        refuse((*path, other), f"not supported beside {key}")
                convert = self._values if key in VALUES else self._combined
                return convert(schema, key, path, types)
        about = {OWNER[key] for key in said if key != "type"}
        for key in said:
            if key != "type" and not TYPES[OWNER[key]] & types:
                refuse((*path, key), f"does not apply to {' or '.join(_names(types))}")
        if about and "type" not in schema:
            types &= frozenset().union(*(TYPES[owner] for owner in about))
        return one_of([self._typed(name, schema, path) for name in _names(types)])

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
                refuse(path, f"expected one of {', '.join(TYPES)} or a list, got {show(said)}")
        types = within & frozenset().union(*(TYPES[name] for name in names))
        if not types:
            refuse(path, f"allows no value, where {' or '.join(_names(within))} is expected")
        return types

    def _typed(self, name: str, schema: Mapping[str, Any], path: Path) -> str:
        if name == "string":
            return self._string(schema, path)
        if name in ("integer", "number"):
            return number(schema, path, whole=name == "integer")
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
            literal(self._dumps(value, path))
            for value in _listed(schema, key, path)
            if _types_of(value) & types
        ]
        if not texts:
            refuse(path, f"holds no {' or '.join(_names(types))}")
        return one_of(texts)

    def _dumps(self, value: Any, path: Path) -> str:
        """A value's text, which has to be JSON and Unicode."""
        try:
            text = json.dumps(
                value, ensure_ascii=False, allow_nan=False, separators=(self.comma, self.colon)
            )
            text.encode()
        except (TypeError, ValueError, RecursionError) as error:
            refuse(path, f"{show(value)} is not JSON ({error})")
        return text

    def _combined(
        self, schema: Mapping[str, Any], key: str, path: Path, types: frozenset[str]
    ) -> str:
        path = (*path, key)
        branches = self._branches(schema, key, path)
        text = one_of([self.value(branch, where, types) for branch, where in branches])
        if key == "oneOf":
            for (first, at_first), (second, at_second) in combinations(branches, 2):
                if not self._disjoint(first, second, types):
                    refuse(
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
            refuse(path, f"expected a list of schemas, got {show(said)}")
        if key == "allOf" and len(said) > 1:
            refuse(path, f"supported for one schema only, got {len(said)}")
        return [(branch, (*path, str(index))) for index, branch in enumerate(said)]

    def _target(self, reference: Any, path: Path) -> tuple[Any, Path]:
        """The schema that a JSON pointer names (RFC 6901, section 6)."""
        if not isinstance(reference, str) or not re.fullmatch("#(?:/.*)?", reference, re.DOTALL):
            refuse(path, f"expected a JSON pointer (#/$defs/name), got {show(reference)}")
        target, where = self.root, ()
        for token in urllib.parse.unquote(reference).split("/")[1:]:
            key = token.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list):
                target = {str(index): each for index, each in enumerate(target)}
            if not isinstance(target, Mapping) or key not in target:
                refuse(path, f"{show(reference)} names nothing in the schema")
            target, where = target[key], (*where, key)
        if where in self.open:
            refuse(path, f"{show(reference)} refers to a schema around it; recursion is refused")
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
        return one_of(
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
            refuse((*path, "properties"), f"expected an object, got {show(properties)}")
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            refuse((*path, "required"), f"expected a list of names, got {show(required)}")
        for name in required:
            if name not in properties:
                refuse((*path, "required"), f"{show(name)} is not among the properties")
        others = schema.get("additionalProperties", True)
        if not isinstance(others, bool | Mapping):
            where = (*path, "additionalProperties")
            refuse(where, f"a schema is an object or a boolean, got {show(others)}")
        free = "properties" not in schema and others is not False
        fewest, most = _counts(schema, path, "minProperties", "maxProperties")
        if fewest > len(set(required)):
            refuse((*path, "minProperties"), "supported only up to the number of required ones")
        if most < (math.inf if free else len(properties)):
            refuse((*path, "maxProperties"), "supported only from the number of properties up")
        if free:
            return self._map(self._inside(others, (*path, "additionalProperties")))
        pairs = []
        for name, subschema in properties.items():
            where = (*path, "properties", name)
            text = self.value(subschema, where)
            pairs.append(literal(self._dumps(name, where) + self.colon) + text)
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
        return one_of([self._some(left) + rest, self._some(right)])

    def _map(self, value: str) -> str:
        pair = f'"{TEXT.text}"{self.colon}{value}'
        return rf"\{{(?:{pair}(?:{self.comma}{pair})*)?\}}"

    def _array(self, schema: Mapping[str, Any], path: Path) -> str:
        low, high = _counts(schema, path, "minItems", "maxItems")
        unique = schema.get("uniqueItems", False)
        if unique is not False:
            refuse((*path, "uniqueItems"), f"only false is supported, got {show(unique)}")
        where = (*path, "prefixItems")
        prefix = schema.get("prefixItems", [])
        if not isinstance(prefix, list) or ("prefixItems" in schema and not prefix):
            refuse(where, f"expected a list of schemas, got {show(prefix)}")
        first = [self.value(each, (*where, str(i))) for i, each in enumerate(prefix)]
        items = schema.get("items", not prefix)
        if items is False:
            if low > len(prefix):
                refuse((*path, "minItems"), f"more than the {len(prefix)} items that there can be")
            return self._list("", low, min(high, len(prefix)), first)
        return self._list(self._inside(items, (*path, "items")), low, high, first)

    def _list(self, item: str, low: int, high: float, first: Sequence[str] = ()) -> str:
        """A list of ``low`` to ``high``: the ``first`` ones and then items."""
        first = first[: int(min(high, len(first)))]
        taken = max(len(first), 1)  # the items after these all follow a comma
        rest = ""
        if high > taken:
            rest = repeat(f"(?:{self.comma}{item})", max(low - taken, 0), high - taken)
        elements = [*first, item][:taken] if high else []
        for index, element in reversed(list(enumerate(elements))):
            rest = f"{self.comma if index else ''}{element}{rest}"
            rest = rest if index < low else f"(?:{rest})?"
        return rf"\[{rest}\]"

    def _string(self, schema: Mapping[str, Any], path: Path) -> str:
        low, high = _counts(schema, path, "minLength", "maxLength")
        piece, source = TEXT, ""
        if "format" in schema:
            name = schema["format"]
            if not isinstance(name, str) or name not in FORMATS:
                given = f"expected one of {', '.join(FORMATS)}, got {show(name)}"
                refuse((*path, "format"), given)
            if "pattern" in schema:
                refuse((*path, "pattern"), "not supported beside format")
            piece, source = FORMATS[name], "format"
        elif "pattern" in schema:
            piece, source = searched(schema["pattern"], (*path, "pattern")), "pattern"
        if low <= piece.low and piece.high <= high:
            return f'"{piece.text}"'
        key = "minLength" if low > piece.low else "maxLength"
        if low > piece.high or high < piece.low:
            refuse((*path, key), f"no string of that {source} has such a length")
        if piece.atom is None:
            refuse((*path, key), f"not supported beside this {source}, whose lengths differ")
        return f'"{repeat(piece.atom, max(low, piece.low), min(high, piece.high))}"'


def _counts(schema: Mapping[str, Any], path: Path, least: str, most: str) -> tuple[int, float]:
    """The two ends of a length, 0 and infinity where they are not given."""
    ends = []
    for key, default in ((least, 0), (most, math.inf)):
        value = schema.get(key, default)
        if key in schema:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and 0 <= value <= MAX_COUNT and value == int(value)):
                refuse((*path, key), f"expected a count up to {MAX_COUNT}, got {show(value)}")
            value = int(value)
        ends.append(value)
    low, high = ends
    if low > high:
        refuse((*path, least), f"{low} exceeds {most} {high}")
    return low, high


def _listed(schema: Mapping[str, Any], key: str, path: Path) -> list[Any]:
    """The values of a ``const`` or an ``enum``."""
    said = schema[key]
    if key == "const":
        return [said]
    if not isinstance(said, list) or not said:
        refuse(path, f"expected a list of values, got {show(said)}")
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
