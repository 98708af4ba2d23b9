r"""JSON Schema to a regex: every text that the regex matches validates against the schema.

Schemas of drafts 4, 6, 7, 2019-09 and 2020-12 are read by their keywords. ``$schema`` decides only
where drafts differ: whether keywords beside ``$ref`` count, and whether ``prefixItems`` is known. A
keyword that is not supported is refused with its path (``#/properties/age/contains``), never
ignored. The regex may match less than the schema allows, never more:

- White space is that of ``json.dumps``: a space after ``:`` and ``,``, or none (``compact``).
- Strings hold characters from U+0020 up and the escapes ``\" \\ \b \f \n \r \t``; no ``\/`` and no
  ``\uXXXX``. An escape counts as one character.
- ``minLength`` and ``maxLength`` beside a ``pattern`` or ``format`` must follow from it, or the
  pattern be one repeated class (``^[a-z]+$``). A string has one pattern or one format.
- ``pattern`` is what ECMAScript and Python agree on (``regex.parse_search``).
- The formats in ``FORMATS`` are enforced. Any other, such as ``int64``, is an annotation.
- Integers have at most 15 digits where no bound says otherwise, numbers also at most 6 after the
  point and no exponent; a bound is exact. ``multipleOf`` takes whole numbers.
- Objects list the named properties in the schema's order and have no others, whatever
  ``additionalProperties`` would allow. An object without named properties is a map, with names of
  ``propertyNames``, or else of ``patternProperties``, or else any names.
- ``minProperties`` and ``maxProperties`` must follow from the named properties, or be 1.
- Arrays are of ``items`` after ``prefixItems``; without ``items`` they end with ``prefixItems``.
  ``uniqueItems`` is supported for items of an enum, which come in the enum's order.
- Where a schema sets no limit, values nest ``depth`` deep: any JSON value, and recursion by
  ``$ref``.
- ``allOf``, ``anyOf``, ``oneOf``, ``not``, ``if``, ``$ref`` and the dependencies combine with each
  other and with keywords beside them (``json_leaves``). Two patterns for one string are refused.
- Annotations are ignored: ``title``, ``examples``, ``nullable``, ``x-…`` and those of editors.
"""

import contextlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from sedd.constraints.automaton import compile_bytes
from sedd.constraints.json_leaves import (
    ANNOTATIONS,
    MAX_NESTING,
    Leaf,
    Part,
    Reader,
    Where,
    name_matches,
    named,
)
from sedd.constraints.json_numbers import number
from sedd.constraints.json_text import (
    FORMATS,
    TEXT,
    Path,
    literal,
    one_of,
    refuse,
    repeat,
    searched,
    show,
)
from sedd.constraints.json_values import ALL_TYPES, TYPES, counted, dumps, names_of, same, types_of
from sedd.constraints.regex import RegexError
from sedd.errors import FieldError

DEPTH = 2  # of values where the schema sets no limit
MAX_CHARACTERS = 2**18  # of a regex: references to references can double it at each step
MAX_PERMUTED = 4  # distinct items in any order up to here, in the enum's order beyond


def schema_to_regex(schema: Any, *, depth: int = DEPTH, compact: bool = False) -> str:
    """The regex, in the dialect of ``re.fullmatch``, of JSON texts that validate.

    Args:
        schema: a JSON schema as ``json.loads`` returns it.
        depth: how deep values nest where the schema sets no limit, 0 to ``MAX_NESTING``: in a
            schema that allows any value, and in a reference within its own target.
        compact: leave out the spaces after ``:`` and ``,``.

    Raises:
        UserError: the schema is malformed, unsupported or allows no value. The message begins with
            the path of the keyword.
    """
    return _Converter(schema, depth, compact).document()


@contextlib.contextmanager
def regex_to_compile(schema: Any, *, depth: int = DEPTH) -> Iterator[str]:
    """The regex of ``schema`` for the body of a ``with`` statement, which compiles it.

    A RegexError of the body becomes a UserError with the path of the smallest subschema whose
    regex contains the part at fault.
    """
    converter = _Converter(schema, depth, compact=False)
    pattern = converter.document()
    try:
        yield pattern
    except RegexError as error:
        around = [(len(text), path) for path, text in converter.made if error.piece in text]
        refuse(min(around, default=(0, ()))[1], error.reason)


class _Converter:
    """The conversion of one document. Methods return None where no value is possible."""

    def __init__(self, root: Any, depth: int, compact: bool):
        whole = isinstance(depth, int) and not isinstance(depth, bool)
        if not (whole and 0 <= depth <= MAX_NESTING):
            wanted = f"must be a whole number in 0..{MAX_NESTING}"
            raise FieldError("depth", f"{wanted}, got {show(depth)}")
        self.root, self.depth = root, depth
        self.separators = (",", ":") if compact else (", ", ": ")
        self.comma, self.colon = self.separators
        self.reader = Reader(root, depth)
        self.level = 0
        self.made: list[tuple[Path, str]] = []  # the regex of each subschema, innermost first
        self.known: dict[tuple[Any, ...], tuple[Any, str | None]] = {}

    def document(self) -> str:
        text = self.value([(self.root, ())])
        if text is None:
            path, problem = self.reader.conflict or ((), "allows no value")
            refuse(path, problem)
        return text

    def value(self, schemas: Sequence[Where]) -> str | None:
        """The regex of the values that validate against every schema. Computed once each."""
        key = (
            tuple((path, id(schema)) for schema, path in schemas),
            tuple(sorted(self.reader.open)),
        )
        if key not in self.known:
            path = schemas[0][1]
            if self.level == MAX_NESTING:
                refuse(path, f"schemas nest more than {MAX_NESTING} deep")
            self.level += 1
            self.known[key] = schemas, self._value(schemas, path)
            self.level -= 1
        return self.known[key][1]

    def _value(self, schemas: Sequence[Where], path: Path) -> str | None:
        if all(_is_free(schema) for schema, _ in schemas):
            return self._anything(self.depth, path)
        texts = [
            text
            for leaf in self.reader.conjunction(schemas).leaves
            if (text := self._leaf(leaf, path)) is not None
        ]
        if not texts:
            return None
        text = one_of(texts)
        self.made.append((path, text))
        self._check_length(text, path, unrolled=bool(self.reader.recursive))
        return text

    def _check_length(self, text: str, path: Path, *, unrolled: bool) -> None:
        """Refuse a regex that is too long; ``unrolled``: a smaller depth makes it shorter."""
        if len(text) > MAX_CHARACTERS:
            advice = f"; a depth below {self.depth} shortens it" if unrolled and self.depth else ""
            refuse(path, f"the regex has more than {MAX_CHARACTERS} characters{advice}")

    def _leaf(self, leaf: Leaf, path: Path) -> str | None:
        """The regex of a leaf, with its recursive references open."""
        self.reader.open += leaf.references
        try:
            if leaf.values is None:
                types = leaf.types
                about = {name for name in ALL_TYPES if TYPES[name] <= types}
                names = names_of(types)
                texts = [self._typed(name, leaf, path, name in about) for name in names]
            else:
                values = [value for value in leaf.values if self._fits(value, leaf)]
                texts = [literal(dumps(value, path, self.separators)) for value in values]
                if not texts:
                    self.reader.conflict = path, "allows no value: no constant fits all keywords"
        finally:
            del self.reader.open[len(self.reader.open) - len(leaf.references) :]
        texts = [text for text in texts if text is not None]
        if not texts:
            return None
        self.made.append((leaf.parts[0][1] if leaf.parts else path, one_of(texts)))
        return one_of(texts)

    def _typed(self, name: str, leaf: Leaf, path: Path, whole: bool) -> str | None:
        if name == "boolean":
            texts = [text for text in ("true", "false") if text not in leaf.excluded]
            return one_of(texts) if texts else None
        if name == "null":
            return None if "null" in leaf.excluded else "null"
        for value in leaf.excluded:
            kind = names_of(types_of(json.loads(value)))[0]
            if kind == name or (name == "number" and kind == "integer"):
                refuse(path, f"cannot exclude the constant {value} from every {name}")
        if name == "string":
            return self._string(list(leaf.about("string")), path)
        if name in ("integer", "number"):
            kind = name if name == "integer" or whole else "fraction"
            found = number(list(leaf.about("number")), path, kind)
            if found is None:
                few = "" if kind == "integer" else " with at most 6 digits after the point"
                kind = "integer" if kind == "integer" else "number"
                self.reader.conflict = path, f"no {kind}{few} lies between the bounds"
            return found
        if name == "object":
            return self._object(leaf, path)
        return self._array(list(leaf.about("array")), path)

    def _anything(self, depth: int, path: Path) -> str:
        """Any value whose arrays and objects nest at most ``depth`` deep."""
        scalars = [
            self._typed(name, Leaf(), (), True)
            for name in names_of(ALL_TYPES - {"object", "array"})
        ]
        texts = [text for text in scalars if text is not None]
        if depth:
            inner = self._anything(depth - 1, path)
            self._check_length(inner, path, unrolled=True)
            texts += [self._map([(f'"{TEXT.text}"', inner)], 0, math.inf)]
            texts += [self._list(inner, 0, math.inf)]
        return one_of(texts)

    def _inside(self, schemas: Sequence[Where]) -> str | None:
        """The items of a list or values of a map: any value is one level less deep there."""
        if all(_is_free(schema) for schema, _ in schemas):
            return self._anything(self.depth - 1, schemas[0][1]) if self.depth else None
        return self.value(schemas)

    # -------------------------------------------------------------------------- strings

    def _string(self, parts: Sequence[Part], path: Path) -> str | None:
        low, high, least, most = _counts(parts, "minLength", "maxLength")
        pieces = [
            (FORMATS[schema["format"]], (*at, "format"))
            for schema, at in parts
            if schema.get("format") in FORMATS
        ]
        pieces += [
            (searched(schema["pattern"], where := (*at, "pattern")), where)
            for schema, at in parts
            if "pattern" in schema
        ]
        sources = {piece.text: (piece, at) for piece, at in pieces if piece.text != TEXT.text}
        if len(sources) > 1:
            (_, first), (_, second) = list(sources.values())[:2]
            refuse(second, f"not supported beside another {first[-1]}")
        piece, at = next(iter(sources.values()), (TEXT, ("",)))
        source = at[-1]
        if low > high:
            self.reader.conflict = least, f"{low} exceeds maxLength {_shown(high)}"
            return None
        if low <= piece.low and piece.high <= high:
            return f'"{piece.text}"'
        at = least if low > piece.low else most
        if low > piece.high or high < piece.low:
            self.reader.conflict = at, f"no string of that {source} has such a length"
            return None
        if piece.atom is None:
            refuse(at, f"not supported beside this {source}, whose lengths differ")
        return f'"{repeat(piece.atom, max(low, piece.low), min(high, piece.high))}"'

    # -------------------------------------------------------------------------- objects

    def _object(self, leaf: Leaf, path: Path) -> str | None:
        parts = list(leaf.about("object"))
        required = _required(parts)
        names = dict.fromkeys((*_properties(parts), *required))
        fewest, most, least, greatest = _counts(parts, "minProperties", "maxProperties")
        keys = [(key, at) for key, at in leaf.said("propertyNames")]
        if not names and not any("properties" in schema for schema, _ in parts):
            return self._free_object(leaf, keys, fewest, most, least, greatest)
        pairs, needed = [], []
        for name in names:
            schemas = named(leaf, name) or [(True, (*path, "properties", name))]
            fits = all(self._holds(name, key) for key in keys)
            text = self.value(schemas) if fits else None
            if text is not None:
                written = dumps(name, (*path, "properties", name), self.separators)
                pairs.append(literal(written + self.colon) + text)
                needed.append(name in required)
            elif name in required:
                if not fits:
                    self.reader.conflict = keys[0][1], f"excludes the required {show(name)}"
                return None
        body = self._counted(pairs, needed, fewest, most, least, greatest)
        return None if body is None else rf"\{{{body}\}}"

    def _counted(
        self,
        pairs: Sequence[str],
        needed: Sequence[bool],
        fewest: int,
        most: float,
        least: Path,
        greatest: Path,
    ) -> str | None:
        """The members of an object with ``fewest`` to ``most`` of the pairs."""
        count = sum(needed)
        if fewest > len(pairs):
            refuse(least, f"supported only up to the {len(pairs)} properties that are written")
        if most < count or fewest > most:
            self.reader.conflict = greatest or least, "conflicts with the number of properties"
            return None
        if fewest == len(pairs):
            needed, count = [True] * len(pairs), len(pairs)
        if most < len(pairs):
            if most == count:
                kept = [pair for pair, need in zip(pairs, needed, strict=True) if need]
                return self._members(kept, [True] * count)
            if count or most != 1:
                refuse(greatest, "supported only from the number of properties up, or as 1")
            return one_of(pairs) + ("" if fewest else "?") if len(pairs) > 1 or fewest else ""
        if fewest <= count:
            return self._members(pairs, needed)
        if count or fewest != 1:
            refuse(least, "supported only up to the number of required properties, or as 1")
        return self._some(pairs)

    def _free_object(
        self,
        leaf: Leaf,
        keys: Sequence[Where],
        fewest: int,
        most: float,
        least: Path,
        greatest: Path,
    ) -> str | None:
        """An object without named properties."""
        if fewest > 1:
            refuse(least, "supported up to 1 for objects without named properties")
        if fewest > most:
            self.reader.conflict = least, f"{fewest} exceeds maxProperties {_shown(most)}"
            return None
        pairs = self._free_pairs(leaf, keys) if most else []
        if not pairs:
            if fewest:
                self.reader.conflict = least, "no property is possible"
            return None if fewest else r"\{\}"
        return self._map(pairs, fewest, most)

    def _free_pairs(self, leaf: Leaf, keys: Sequence[Where]) -> list[tuple[str, str]]:
        """Regexes of names, quotes included, and of the values that go with them."""
        others = [(value, at) for value, at in leaf.said("additionalProperties")]
        patterns = [
            (pattern, (each, (*at, pattern)))
            for said, at in leaf.said("patternProperties")
            for pattern, each in _mapping(said, at).items()
        ]
        if not patterns:
            key = f'"{TEXT.text}"'
            if keys:
                key = self.value([({"type": "string"}, keys[0][1]), *keys])
            value = self._inside(others or [(True, ())])
            return [] if key is None or value is None else [(key, value)]
        if keys:
            refuse(keys[0][1], "not supported beside patternProperties")
        found = []
        names = {p: searched(p, where[1]).text for p, where in patterns}
        for pattern, text in names.items():
            overlap = [other for other in names if _overlap(text, names[other])]
            schemas = [where for other, where in patterns if other in overlap]
            for schema, at in leaf.about("object"):
                own = schema.get("patternProperties", {})
                if pattern not in own and "additionalProperties" in schema:
                    where = (*at, "additionalProperties")
                    schemas.append((schema["additionalProperties"], where))
            value = self._inside(schemas)
            if value is not None:
                found.append((f'"{text}"', value))
        return found

    def _members(self, pairs: Sequence[str], needed: Sequence[bool]) -> str:
        """Some of the pairs in order, with commas between; the needed ones are always there."""
        if not any(needed):
            return f"(?:{self._some(pairs)})?" if pairs else ""
        # The commas belong to the first needed pair.
        first = needed.index(True)
        before = [f"(?:{pair}{self.comma})?" for pair in pairs[:first]]
        after = [
            self.comma + pair if need else f"(?:{self.comma}{pair})?"
            for pair, need in zip(pairs[first + 1 :], needed[first + 1 :], strict=True)
        ]
        return "".join([*before, pairs[first], *after])

    def _some(self, pairs: Sequence[str]) -> str:
        """At least one of n pairs in order. Writes n·log n pairs, not 2ⁿ."""
        if len(pairs) == 1:
            return pairs[0]
        left, right = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
        rest = "".join(f"(?:{self.comma}{pair})?" for pair in right)
        return one_of([self._some(left) + rest, self._some(right)])

    def _map(self, pairs: Sequence[tuple[str, str]], fewest: int, most: float) -> str:
        pair = one_of([f"{key}{self.colon}{value}" for key, value in pairs])
        body = f"{pair}{repeat(f'(?:{self.comma}{pair})', 0, most - 1)}"
        return rf"\{{{body}\}}" if fewest else rf"\{{(?:{body})?\}}"

    # --------------------------------------------------------------------------- arrays

    def _array(self, parts: Sequence[Part], path: Path) -> str | None:
        low, high, least, _ = _counts(parts, "minItems", "maxItems")
        if low > high:
            self.reader.conflict = least, f"{low} exceeds maxItems {_shown(high)}"
            return None
        read = [_items(schema, at) for schema, at in parts]
        unique = any(schema.get("uniqueItems", False) is True for schema, _ in parts)
        for schema, at in parts:
            if not isinstance(schema.get("uniqueItems", False), bool):
                wrong = show(schema["uniqueItems"])
                refuse((*at, "uniqueItems"), f"expected true or false, got {wrong}")
        first: list[str] = []
        for place in range(max((len(prefix) for prefix, _ in read), default=0)):
            schemas = [
                prefix[place] if place < len(prefix) else rest or (True, ())
                for prefix, rest in read
            ]
            text = self.value(schemas) if place < high else None
            if text is None:
                high = min(high, place)
                break
            first.append(text)
        # Without items, an array with prefixItems ends with them.
        rests = [rest or (not prefix, path) for prefix, rest in read] or [(True, path)]
        if unique and high > 1:
            return self._distinct(rests, first, low, high, parts)
        item = self._inside(rests) if high > len(first) else None
        if item is None:
            high = min(high, len(first))
        if low > high:
            self.reader.conflict = (
                least,
                f"more than the {_shown(high)} items that there can be",
            )
            return None
        return self._list(item or "", low, high, first)

    def _distinct(
        self,
        items: Sequence[Where],
        first: Sequence[str],
        low: int,
        high: float,
        parts: Sequence[Part],
    ) -> str | None:
        """An array of distinct constants: in any order if they are few, or else in theirs."""
        at = next((*at, "uniqueItems") for schema, at in parts if schema.get("uniqueItems"))
        leaves = self.reader.conjunction(items).leaves
        if first or any(leaf.values is None for leaf in leaves):
            refuse(at, "supported for items of an enum, or false")
        values = {
            same(value): dumps(value, at, self.separators)
            for leaf in leaves
            for value in leaf.values or ()
            if self._fits(value, leaf)
        }
        texts = [literal(text) for text in values.values()]
        high = int(min(high, len(texts)))
        if low > high:
            self.reader.conflict = at, f"there are only {len(texts)} distinct items"
            return None
        if len(texts) > MAX_PERMUTED:
            needed = [index < low for index in range(len(texts))]
            if high < len(texts):
                texts, needed = texts[:high], needed[:high]
            return rf"\[{self._members(texts, needed)}\]"
        rows = [
            self.comma.join(row)
            for size in range(low, high + 1)
            for row in itertools.permutations(texts, size)
        ]
        return rf"\[{one_of(rows)}\]"

    def _list(self, item: str, low: int, high: float, first: Sequence[str] = ()) -> str:
        """A list of ``low`` to ``high`` values: the ``first`` ones and then items."""
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

    # ------------------------------------------------------------------------ constants

    def _holds(self, value: Any, schema: Where) -> bool:
        """Whether a value validates. May be False for one that does, never True for another."""
        return any(
            types_of(value) <= leaf.types
            and (leaf.values is None or same(value) in map(same, leaf.values))
            and same(value) not in leaf.excluded
            and self._fits(value, leaf)
            for leaf in self.reader.conjunction([schema]).leaves
        )

    def _fits(self, value: Any, leaf: Leaf) -> bool:
        """Whether a value of the leaf's types meets the keywords about its type."""
        (name,) = types_of(value)
        kind = "number" if name == "integer" else name
        if kind not in ("string", "number", "object", "array"):
            return True
        parts = list(leaf.about(kind))
        if kind == "number":
            return all(_number_fits(value, schema, at) for schema, at in parts)
        if kind == "string":
            return all(_string_fits(value, schema, at) for schema, at in parts)
        least, most = {"object": ("minProperties", "maxProperties")}.get(
            kind, ("minItems", "maxItems")
        )
        low, high, _, _ = _counts(parts, least, most)
        if not low <= len(value) <= high:
            return False
        if kind == "object":
            return (
                all(name in value for name in _required(parts))
                and all(
                    self._holds(name, key) for key in leaf.said("propertyNames") for name in value
                )
                and all(
                    self._holds(each, schema)
                    for name, each in value.items()
                    for schema in named(leaf, name)
                )
            )
        unique = any(schema.get("uniqueItems") for schema, _ in parts)
        if unique and len(set(map(same, value))) < len(value):
            return False
        for schema, at in parts:
            prefix, rest = _items(schema, at)
            for place, each in enumerate(value):
                item = prefix[place] if place < len(prefix) else rest
                if item is not None and not self._holds(each, item):
                    return False
        return True


def _is_free(schema: Any) -> bool:
    """Whether a schema allows any value."""
    if isinstance(schema, Mapping):
        return all(key in ANNOTATIONS or key.startswith("x-") for key in schema)
    return schema is True


def _counts(parts: Sequence[Part], least: str, most: str) -> tuple[int, float, Path, Path]:
    """The largest lower and the smallest upper count of the parts, and where those stand."""
    low, high, at_low, at_high = 0, math.inf, (), ()
    for schema, path in parts:
        if least in schema and (count := counted(schema[least], (*path, least))) > low:
            low, at_low = count, (*path, least)
        if most in schema and (count := counted(schema[most], (*path, most))) < high:
            high, at_high = count, (*path, most)
    return low, high, at_low or at_high, at_high or at_low


def _mapping(said: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(said, Mapping):
        refuse(path, f"expected an object, got {show(said)}")
    return said


def _properties(parts: Sequence[Part]) -> Iterator[str]:
    for schema, path in parts:
        yield from _mapping(schema.get("properties", {}), (*path, "properties"))


def _required(parts: Sequence[Part]) -> dict[str, None]:
    found: dict[str, None] = {}
    for schema, path in parts:
        said = schema.get("required", [])
        if not isinstance(said, list) or not all(isinstance(name, str) for name in said):
            refuse((*path, "required"), f"expected a list of names, got {show(said)}")
        found |= dict.fromkeys(said)
    return found


def _items(schema: Mapping[str, Any], path: Path) -> tuple[list[Where], Where | None]:
    """The schemas of the first items and that of the others, in the form of any draft."""
    key, rest = "prefixItems", "items"
    if isinstance(schema.get("items"), list) and "prefixItems" not in schema:
        key, rest = "items", "additionalItems"
    said = schema.get(key, [])
    if not isinstance(said, list) or (key in schema and not said):
        refuse((*path, key), f"expected a list of schemas, got {show(said)}")
    prefix = [(each, (*path, key, str(index))) for index, each in enumerate(said)]
    return prefix, (schema[rest], (*path, rest)) if rest in schema else None


def _number_fits(value: float, schema: Mapping[str, Any], path: Path) -> bool:
    exact = Fraction(value)
    for key, sign, strict in (
        ("minimum", 1, False),
        ("exclusiveMinimum", 1, True),
        ("maximum", -1, False),
        ("exclusiveMaximum", -1, True),
    ):
        if key in schema:
            bound = schema[key]
            if isinstance(bound, bool) or not isinstance(bound, int | float):
                refuse((*path, key), f"expected a number, got {show(bound)}")
            above = sign * (exact - Fraction(bound))
            if above < 0 or (strict and above == 0):
                return False
    step = schema.get("multipleOf", 1)
    if "multipleOf" in schema and (isinstance(step, bool) or step != int(step) or step < 1):
        refuse((*path, "multipleOf"), f"only whole numbers are supported, got {show(step)}")
    return "multipleOf" not in schema or exact % Fraction(step) == 0


def _string_fits(value: str, schema: Mapping[str, Any], path: Path) -> bool:
    low, high, _, _ = _counts([(schema, path)], "minLength", "maxLength")
    if not low <= len(value) <= high:
        return False
    if "pattern" in schema:
        searched(schema["pattern"], (*path, "pattern"))
        if not name_matches(schema["pattern"], value, (*path, "pattern")):
            return False
    check = FORMATS.get(schema.get("format", ""))
    return check is None or re.fullmatch(check.text, value, re.ASCII) is not None


def _overlap(one: str, other: str) -> bool:
    """Whether some text matches both regexes: a walk over pairs of states."""
    if one == other:
        return True
    left, right = compile_bytes(one), compile_bytes(other)
    seen, stack = {(0, 0)}, [(0, 0)]
    while stack:
        a, b = stack.pop()
        if left.accepting[a] and right.accepting[b]:
            return True
        both = zip(left.transitions[a].tolist(), right.transitions[b].tolist(), strict=True)
        new = {pair for pair in both if min(pair) >= 0} - seen
        seen |= new
        stack.extend(new)
    return False


def _shown(count: float) -> str:
    return str(count if count == math.inf else int(count))
