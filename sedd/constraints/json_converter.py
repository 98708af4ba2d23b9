"""The conversion of a JSON Schema to a regex, type by type.

``json_reader`` turns a schema into alternatives of plain keywords (leaves). ``Converter`` writes a
regex for each alternative and type: strings here, numbers in ``json_numbers``, and arrays and
objects by converting the schemas inside them and joining the results (``json_containers``).
``json_schema`` states which subset of JSON Schema that covers.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

from sedd.constraints.automaton import compile_bytes
from sedd.constraints.json_check import fits, holds
from sedd.constraints.json_containers import Containers
from sedd.constraints.json_keywords import (
    Counts,
    Part,
    Where,
    is_free,
    read_counts,
    read_items,
    read_mapping,
    read_properties,
    read_required,
    read_unique,
)
from sedd.constraints.json_leaves import Leaf, named
from sedd.constraints.json_numbers import number
from sedd.constraints.json_reader import MAX_NESTING, Reader
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
from sedd.constraints.json_values import ALL_TYPES, TYPES, dumps, names_of, same, types_of
from sedd.errors import FieldError

MAX_CHARACTERS = 2**18  # of a regex: references to references can double it at each step


class Converter:
    """The conversion of one document.

    The methods that convert a schema return None if no value is possible, and record path and
    reason in ``reader.conflict``. An alternative without values is dropped. If nothing is left of
    the whole document, the recorded reason is the error message.

    Args:
        root: the document, as ``json.loads`` returns it.
        depth: how deep values nest where the schema sets no limit, 0 to ``MAX_NESTING``.
        compact: whether to write no spaces after ``:`` and ``,``.

    Raises:
        FieldError: ``depth`` is out of range.

    Attributes:
        level: the number of calls of ``value`` that are running, one inside the other.
        made: path and regex of each finished subschema, innermost first. ``regex_to_compile`` looks
            up in it which subschema a too large part of the regex comes from.
    """

    def __init__(self, root: Any, depth: int, compact: bool):
        whole = isinstance(depth, int) and not isinstance(depth, bool)
        if not (whole and 0 <= depth <= MAX_NESTING):
            wanted = f"must be a whole number in 0..{MAX_NESTING}"
            raise FieldError("depth", f"{wanted}, got {show(depth)}")
        self.root, self.depth = root, depth
        self.separators = comma, colon = (",", ":") if compact else (", ", ": ")
        self.write = Containers(comma=comma, colon=colon)
        self.reader = Reader(root, depth)
        self.level = 0
        self.made: list[tuple[Path, str]] = []
        # The values contain the schemas, so that the ids in the keys stay those of the schemas.
        self.known: dict[tuple[Any, ...], tuple[Any, str | None]] = {}

    def document(self) -> str:
        """The regex of the whole document; UserError if it allows no value."""
        try:
            text = self.value([(self.root, ())])
        except RecursionError:  # alternatives and conjunctions within each other, with no limit
            refuse((), "its schemas nest too deep to be read")
        if text is None:
            path, problem = self.reader.conflict or ((), "allows no value")
            refuse(path, problem)
        return text

    def value(self, schemas: Sequence[Where]) -> str | None:
        """The regex of the values that validate against every one of the schemas.

        It is cached by the schemas and by the recursive references that are open around them.
        """
        key = (
            tuple((path, id(schema)) for schema, path in schemas),
            tuple(sorted(self.reader.open)),
        )
        if key not in self.known:
            path = schemas[0][1]
            if self.level == MAX_NESTING:
                refuse(path, f"schemas nest more than {MAX_NESTING} deep{self._advice()}")
            self.level += 1
            self.known[key] = schemas, self._value(schemas, path)
            self.level -= 1
        return self.known[key][1]

    def _value(self, schemas: Sequence[Where], path: Path) -> str | None:
        """``value`` without the cache."""
        if all(is_free(schema) for schema, _ in schemas):
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
        if len(text) > MAX_CHARACTERS:
            refuse(path, f"the regex has more than {MAX_CHARACTERS} characters{self._advice()}")
        return text

    def _advice(self) -> str:
        """The end of a message that a regex is too large: to lower the depth, if it matters."""
        return f"; try a depth below {self.depth}" if self.reader.recursive and self.depth else ""

    def _leaf(self, leaf: Leaf, path: Path) -> str | None:
        """The regex of a leaf: of its constants, or else one alternative for each of its types.

        The recursive references that led to the leaf count as open while it is converted.
        """
        self.reader.open += leaf.references
        try:
            if leaf.values is None:
                types = leaf.types
                texts = [
                    self._typed(name, leaf, path, TYPES[name] <= types) for name in names_of(types)
                ]
            else:
                values = [value for value in leaf.values if fits(self.reader, value, leaf)]
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
        """The regex of the values of one type that satisfy a leaf.

        ``whole`` is False where "number" stands for numbers with a fraction alone.
        """
        if name == "boolean":
            texts = [text for text in ("true", "false") if text not in leaf.excluded]
            return one_of(texts) if texts else None
        if name == "null":
            return None if "null" in leaf.excluded else "null"
        for value in leaf.excluded:
            kind = names_of(types_of(json.loads(value)))[0]
            if kind == name or (name == "number" and kind == "integer"):
                refuse(
                    path,
                    f"excluding the constant {value} is not supported: the remaining values of "
                    f"type {name} are not an enum",
                )
        if name == "string":
            return self._string(list(leaf.about("string")))
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
        """The regex of any value whose arrays and objects nest at most ``depth`` deep."""
        scalars = [
            self._typed(name, Leaf(), (), True)
            for name in names_of(ALL_TYPES - {"object", "array"})
        ]
        texts = [text for text in scalars if text is not None]
        if depth:
            inner = self._anything(depth - 1, path)
            if len(inner) > MAX_CHARACTERS:
                problem = f"any value has a regex of more than {MAX_CHARACTERS} characters"
                refuse(path, f"{problem}; try a depth below {self.depth}")
            texts += [self.write.free_object([(f'"{TEXT.text}"', inner)], 0, math.inf)]
            texts += [self.write.array(inner, 0, math.inf)]
        return one_of(texts)

    def _inside(self, schemas: Sequence[Where]) -> str | None:
        """The regex of the items of an array or the values of an object without named properties.

        As ``value``, but a schema that allows any value is one level less deep here.
        """
        if all(is_free(schema) for schema, _ in schemas):
            return self._anything(self.depth - 1, schemas[0][1]) if self.depth else None
        return self.value(schemas)

    # -------------------------------------------------------------------------- strings

    def _string(self, parts: Sequence[Part]) -> str | None:
        """The regex of strings: of one pattern or format, or of any text, with their lengths."""
        low, high, least, most = read_counts(parts, "minLength", "maxLength")
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
            self.reader.conflict = least, f"{low} exceeds maxLength {int(high)}"
            return None
        if low <= piece.low and piece.high <= high:
            return f'"{piece.text}"'
        at = least if low > piece.low else most
        if low > piece.high or high < piece.low:
            self.reader.conflict = at, f"no string of that {source} has such a length"
            return None
        if piece.atom is None:
            refuse(
                at,
                f"not supported beside this {source}: it matches strings shorter or longer than "
                "that, and does not repeat one character class",
            )
        return f'"{repeat(piece.atom, max(low, piece.low), min(high, piece.high))}"'

    # -------------------------------------------------------------------------- objects

    def _object(self, leaf: Leaf, path: Path) -> str | None:
        """The regex of objects: the named properties in order, or a map if there are none."""
        parts = list(leaf.about("object"))
        required = read_required(parts)
        names = dict.fromkeys((*read_properties(parts), *required))
        counts = read_counts(parts, "minProperties", "maxProperties")
        keys = list(leaf.said("propertyNames"))
        if not names and not any("properties" in schema for schema, _ in parts):
            return self._free_object(leaf, keys, counts)
        pairs, needed = [], []
        for name in names:
            schemas = named(leaf, name) or [(True, (*path, "properties", name))]
            allowed = all(holds(self.reader, name, key) for key in keys)
            text = self.value(schemas) if allowed else None
            if text is not None:
                written = dumps(name, (*path, "properties", name), self.separators)
                pairs.append(literal(written + self.write.colon) + text)
                needed.append(name in required)
            elif name in required:
                if not allowed:
                    self.reader.conflict = keys[0][1], f"excludes the required {show(name)}"
                return None
        body = self._counted(pairs, needed, counts)
        return None if body is None else rf"\{{{body}\}}"

    def _counted(self, pairs: Sequence[str], needed: Sequence[bool], counts: Counts) -> str | None:
        """The members of an object with as many of the pairs as ``counts`` allows.

        Args:
            pairs: the regexes of the named properties, each with its name.
            needed: whether each property is required.
            counts: of ``minProperties`` and ``maxProperties``. Selections of an exact size would
                need a regex that counts; only the sizes that need none are supported.
        """
        fewest, most, least, greatest = counts
        count = sum(needed)
        if fewest > len(pairs):
            refuse(
                least,
                f"must be at most {len(pairs)}, the number of named properties that are possible: "
                "no other properties are generated",
            )
        if most < count or fewest > most:
            self.reader.conflict = greatest or least, "conflicts with the number of properties"
            return None
        if fewest == len(pairs):
            needed, count = [True] * len(pairs), len(pairs)
        if most < len(pairs):
            if most == count:
                kept = [pair for pair, need in zip(pairs, needed, strict=True) if need]
                return self.write.members(kept, [True] * count)
            if count or most != 1:
                refuse(
                    greatest,
                    f"supported are {count} (the required properties) and {len(pairs)} (all "
                    f"properties) or more; also 1 if no property is required; got {int(most)}",
                )
            return one_of(pairs) + ("" if fewest else "?") if len(pairs) > 1 or fewest else ""
        if fewest <= count:
            return self.write.members(pairs, needed)
        if count or fewest != 1:
            refuse(
                least,
                f"supported are 0 to {count} (the required properties) and {len(pairs)} (all "
                f"properties); also 1 if no property is required; got {fewest}",
            )
        return self.write.some(pairs)

    def _free_object(self, leaf: Leaf, keys: Sequence[Where], counts: Counts) -> str | None:
        """The regex of objects without named properties; ``keys`` are schemas of the names."""
        fewest, most, least, _ = counts
        if fewest > 1:
            refuse(least, "supported up to 1 for objects without named properties")
        if fewest > most:
            self.reader.conflict = least, f"{fewest} exceeds maxProperties {int(most)}"
            return None
        pairs = self._free_pairs(leaf, keys) if most else []
        if not pairs:
            if fewest:
                self.reader.conflict = least, "no property is possible"
            return None if fewest else r"\{\}"
        return self.write.free_object(pairs, fewest, most)

    def _free_pairs(self, leaf: Leaf, keys: Sequence[Where]) -> list[tuple[str, str]]:
        """Regexes of the names, quotes included, and values of an object without named properties.

        A name may match several patterns, and its value must then validate against all of their
        schemas. The regex of one pattern does not say which others a name matches, so the value
        also validates against the schema of every pattern that overlaps with it.
        """
        others = list(leaf.said("additionalProperties"))
        patterns = [
            (pattern, (each, (*at, pattern)))
            for said, at in leaf.said("patternProperties")
            for pattern, each in read_mapping(said, at).items()
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
        automata = {p: compile_bytes(text) for p, text in names.items() if len(names) > 1}
        for pattern, text in names.items():
            overlap = [o for o in names if o == pattern or automata[o].overlaps(automata[pattern])]
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

    # --------------------------------------------------------------------------- arrays

    def _array(self, parts: Sequence[Part], path: Path) -> str | None:
        """The regex of arrays: the items of ``prefixItems``, then those of ``items``."""
        low, high, least, _ = read_counts(parts, "minItems", "maxItems")
        if low > high:
            self.reader.conflict = least, f"{low} exceeds maxItems {int(high)}"
            return None
        read = [read_items(schema, at) for schema, at in parts]
        unique = any([read_unique(schema, at) for schema, at in parts])  # a list: check them all
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
        # Without ``items``, an array with ``prefixItems`` ends after these.
        rests = [rest or (not prefix, path) for prefix, rest in read] or [(True, path)]
        if unique and high > 1:
            at = next((*at, "uniqueItems") for schema, at in parts if schema.get("uniqueItems"))
            return self._distinct(rests, first, low, high, at)
        item = self._inside(rests) if high > len(first) else None
        if item is None:
            high = min(high, len(first))
        if low > high:
            self.reader.conflict = least, f"more than the {int(high)} items that there can be"
            return None
        return self.write.array(item or "", low, high, first)

    def _distinct(
        self, items: Sequence[Where], first: Sequence[str], low: int, high: float, at: Path
    ) -> str | None:
        """The regex of arrays of distinct constants; ``at`` is the path of ``uniqueItems``."""
        leaves = self.reader.conjunction(items).leaves
        if first or any(leaf.values is None for leaf in leaves):
            refuse(at, "true is supported only for items of an enum, without prefixItems")
        values = {
            same(value): dumps(value, at, self.separators)
            for leaf in leaves
            for value in leaf.values or ()
            if fits(self.reader, value, leaf)
        }
        texts = [literal(text) for text in values.values()]
        high = int(min(high, len(texts)))
        if low > high:
            self.reader.conflict = at, f"there are only {len(texts)} distinct items"
            return None
        return self.write.distinct_array(texts, low, high)
