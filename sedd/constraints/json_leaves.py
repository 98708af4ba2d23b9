"""JSON Schema without combinators: a schema as a list of conjunctions of plain keywords.

``Reader.leaves`` brings a schema into disjunctive normal form. ``allOf``, ``$ref`` and sibling
keywords are conjunctions, ``anyOf`` and ``oneOf`` disjunctions, ``if`` is
``(if and then) or (not if and else)``, and ``not`` is pushed down to the keywords. The result is a
list of ``Leaf``: a value validates if it validates against one of the leaves.

The list may allow less than the schema, never more: a recursive reference is cut at a depth, and
the negation of a keyword without a negated form is left out. ``Leaves.exact`` says that neither
happened. Only exact lists prove that two branches of a ``oneOf`` have no common value.
"""

import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sedd.constraints.json_text import Path, refuse, show
from sedd.constraints.json_values import ALL_TYPES, TYPES, counted, dumps, same, types_of

ANNOTATIONS = frozenset(
    """
    title description default examples example deprecated readOnly writeOnly discriminator xml
    externalDocs nullable optional propertyOrder order enumNames contentEncoding contentMediaType
    contentSchema $comment $defs definitions $schema $id id $anchor $vocabulary then else
    markdownDescription enumDescriptions markdownEnumDescriptions defaultSnippets errorMessage
    patternErrorMessage deprecationMessage doNotSuggest suggestSortText tsType tsEnumNames
    javaType allowTrailingCommas allowComments fileMatch version meta:enum
    """.split()  # noqa: SIM905
)
KEYWORDS = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "object": (
        "properties",
        "required",
        "additionalProperties",
        "patternProperties",
        "propertyNames",
        "minProperties",
        "maxProperties",
    ),
    "array": ("prefixItems", "items", "additionalItems", "minItems", "maxItems", "uniqueItems"),
}
OWNER = {keyword: owner for owner, keywords in KEYWORDS.items() for keyword in keywords}
DEPENDENCIES = ("dependencies", "dependentRequired", "dependentSchemas")
COMBINERS = ("$ref", "allOf", "anyOf", "oneOf", "not", "if", *DEPENDENCIES)
NOT_SCHEMAS = ("enum", "const", "default", "examples", "example")  # values, whatever they look like
LATEST = 2020
MAX_LEAVES = 2_000  # of one schema: conjunctions of disjunctions multiply
# Far above any real schema's; Python's own stack ends at about three times that.
MAX_NESTING = 64

Part = tuple[Mapping[str, Any], Path]  # a schema, read for its plain keywords, and where it stands
Where = tuple[Any, Path]  # a schema and where it stands


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """A conjunction of plain keywords.

    Attributes:
        types: types of the values; "number" stands for numbers with a fraction.
        values: the values of ``const`` or ``enum`` with their path, or None.
        excluded: values that a negated ``const`` or ``enum`` rules out, as ``same`` writes them.
        parts: the schemas whose other keywords all hold.
        references: targets of recursive references on the way to the leaf.
    """

    types: frozenset[str] = ALL_TYPES
    values: tuple[Any, ...] | None = None
    excluded: frozenset[str] = frozenset()
    parts: tuple[Part, ...] = ()
    references: tuple[Path, ...] = ()

    def about(self, kind: str) -> Iterator[Part]:
        """The parts with a keyword about a type: "string", "number", "object" or "array"."""
        return (part for part in self.parts if not part[0].keys().isdisjoint(KEYWORDS[kind]))

    def said(self, *keywords: str) -> Iterator[tuple[Any, Path]]:
        """Every value of some keywords in the parts, with the path of the keyword."""
        for schema, path in self.parts:
            for keyword in keywords:
                if keyword in schema:
                    yield schema[keyword], (*path, keyword)


@dataclass(frozen=True, kw_only=True)
class Leaves:
    """A disjunction of leaves. ``exact``: nothing that the schema allows was left out."""

    leaves: tuple[Leaf, ...]
    exact: bool = True


ANYTHING = Leaves(leaves=(Leaf(),))
NOTHING = Leaves(leaves=())


class Reader:
    """Reads the schemas of one document. ``depth`` bounds how often a reference is in itself."""

    def __init__(self, root: Any, depth: int):
        self.root, self.depth = root, depth
        self.draft = _draft(root)
        self.identified: dict[str, Path] = {}  # URI of each $id and $anchor
        self.bases: dict[Path, str] = {}  # URI of each schema with an $id
        self.recursive: frozenset[Path] = frozenset()
        self.known: dict[tuple[Any, ...], tuple[Any, Leaves]] = {}
        self.apart: dict[tuple[Any, ...], tuple[Any, bool]] = {}
        self.conflict: tuple[Path, str] | None = None  # the last reason for a list without leaves
        self.lost: tuple[Path, str] | None = None  # the last reason for a list that is not exact
        references = list(self._walk(root, (), ""))
        self.recursive = _in_cycles(self._edges(references))
        # The targets of recursive references around the schema at hand.
        self.open: list[Path] = [()] if () in self.recursive else []

    # ------------------------------------------------------------------------ references

    def _walk(self, schema: Any, path: Path, base: str) -> Iterator[tuple[Any, Path]]:
        """The references of a document; notes the URIs that schemas give themselves."""
        stack = [(schema, path, base)]
        while stack:
            schema, path, base = stack.pop()
            if isinstance(schema, list):
                stack += [(each, (*path, str(i)), base) for i, each in enumerate(schema)]
            if not isinstance(schema, Mapping):
                continue
            reference = schema.get("$ref")
            for key in ("$id", "id"):
                name = schema.get(key)
                if isinstance(name, str) and not (isinstance(reference, str) and self.draft < 2019):
                    base = urllib.parse.urljoin(base, name)
                    self.identified.setdefault(base.removesuffix("#"), path)
                    if not name.startswith("#"):
                        self.bases[path] = base.removesuffix("#")
            if isinstance(name := schema.get("$anchor"), str):
                self.identified.setdefault(f"{base.partition('#')[0]}#{name}", path)
            if isinstance(reference, str):
                yield reference, path
            for key, each in schema.items():
                if key not in NOT_SCHEMAS and isinstance(each, Mapping | list):
                    stack.append((each, (*path, str(key)), base))

    def _edges(self, references: Iterable[tuple[Any, Path]]) -> Iterator[tuple[Path, Path]]:
        """Pairs of targets, of which the first contains a reference to the second."""
        found = [(path, self._find(reference, path)) for reference, path in references]
        targets = {where for _, where in found if where is not None}
        for path, where in found:
            if where is not None:
                prefixes = (path[:end] for end in range(len(path) + 1))
                yield from ((prefix, where) for prefix in prefixes if prefix in targets)

    def _find(self, reference: str, path: Path) -> Path | None:
        """Where the target of a reference stands, or None (RFC 6901, section 6)."""
        base = next(
            (self.bases[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.bases), ""
        )
        resource, _, fragment = urllib.parse.urljoin(base, reference).partition("#")
        if fragment and not fragment.startswith("/"):
            return self.identified.get(f"{resource}#{fragment}")
        start = self.identified.get(resource, () if resource == base == "" else None)
        if start is None:
            return None
        target, where = self._at(start), start
        for token in urllib.parse.unquote(fragment).split("/")[1:]:
            key = token.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list):
                target = {str(index): each for index, each in enumerate(target)}
            if not isinstance(target, Mapping) or key not in target:
                return None
            target, where = target[key], (*where, key)
        return where

    def _at(self, path: Path) -> Any:
        target = self.root
        for key in path:
            target = target[int(key)] if isinstance(target, list) else target[key]
        return target

    def _reference(self, reference: Any, path: Path, negated: bool) -> Leaves:
        """The leaves of a reference's target; none where it is in itself too often."""
        if not isinstance(reference, str):
            refuse((*path, "$ref"), f"expected a reference (#/$defs/name), got {show(reference)}")
        where = self._find(reference, path)
        if where is None:
            refuse((*path, "$ref"), f"{show(reference)} names nothing in the schema")
        if where not in self.recursive:
            return self.leaves(self._at(where), where, negated=negated)
        if self.open.count(where) > self.depth:
            around = f"{show(reference)} refers to a schema around it"
            problem = f"{around}, and no value ends at depth {self.depth}"
            self.conflict = self.lost = (*path, "$ref"), problem
            return replace(NOTHING, exact=False)
        if len(self.open) > MAX_NESTING:
            refuse((*path, "$ref"), f"references nest more than {MAX_NESTING} deep")
        self.open.append(where)
        found = self.leaves(self._at(where), where, negated=negated)
        self.open.pop()
        return replace(
            found,
            leaves=tuple(replace(x, references=(*x.references, where)) for x in found.leaves),
        )

    # ---------------------------------------------------------------------- normal form

    def leaves(self, schema: Any, path: Path, *, negated: bool = False) -> Leaves:
        """The leaves of a schema, or of its negation. Computed once for each path."""
        if isinstance(schema, bool):
            if schema == negated:
                self.conflict = path, "false allows no value"
            return NOTHING if schema == negated else ANYTHING
        if not isinstance(schema, Mapping):
            refuse(path, f"a schema is an object or a boolean, got {show(schema)}")
        key = (path, negated, id(schema), tuple(sorted(self.open)))
        if key not in self.known:
            found = self._negated(schema, path) if negated else self._read(schema, path)
            self.known[key] = schema, found  # the schema too: its id stays its own
        return self.known[key][1]

    def conjunction(self, schemas: Sequence[Where]) -> Leaves:
        """The leaves of the values that validate against every schema."""
        found = ANYTHING
        for schema, path in schemas:
            found = self._both(found, self.leaves(schema, path), path)
        return found

    def _both(self, one: Leaves, other: Leaves, path: Path) -> Leaves:
        if len(one.leaves) * len(other.leaves) > MAX_LEAVES:
            refuse(path, f"more than {MAX_LEAVES} combinations of alternatives")
        merged = (self._merged(a, b, path) for a, b in product(one.leaves, other.leaves))
        leaves = _collected(leaf for leaf in merged if leaf)
        exact = one.exact and other.exact
        if not (leaves or exact):
            self.conflict = self.lost
        return Leaves(leaves=leaves, exact=exact)

    def _merged(self, one: Leaf, other: Leaf, path: Path) -> Leaf | None:
        types = one.types & other.types
        if not types:
            names = (" or ".join(sorted(leaf.types)) for leaf in (one, other))
            self.conflict = path, f"allows no value: {' is not '.join(names)}"
            return None
        values = one.values if other.values is None else other.values
        if one.values is not None and other.values is not None:
            common = {same(value) for value in other.values}
            values = tuple(value for value in one.values if same(value) in common)
        excluded = one.excluded | other.excluded
        if values is not None:
            values = tuple(v for v in values if types_of(v) & types and same(v) not in excluded)
            if not values:
                self.conflict = path, "allows no value: no constant fits all of the schema"
                return None
        return Leaf(
            types=types,
            values=values,
            excluded=excluded,
            parts=(*one.parts, *(part for part in other.parts if part not in one.parts)),
            references=tuple(dict.fromkeys((*one.references, *other.references))),
        )

    def _keywords(self, schema: Mapping[str, Any], path: Path) -> list[str]:
        """The keywords that assert something. Refuses what is not supported."""
        if "$ref" in schema and self.draft < 2019:
            return ["$ref"]
        said = [key for key in schema if key not in ANNOTATIONS and not key.startswith("x-")]
        for key in said:
            if key not in ("type", "const", "enum", *OWNER, *COMBINERS):
                refuse((*path, key), "outside the supported subset of JSON Schema")
        if "prefixItems" in said and self.draft < LATEST:
            refuse((*path, "prefixItems"), f"unknown to draft {self.draft}, which $schema names")
        return said

    def _read(self, schema: Mapping[str, Any], path: Path) -> Leaves:
        said = self._keywords(schema, path)
        plain = {key: schema[key] for key in said if key in OWNER}
        if "format" in plain:
            check = plain["format"]
            if not isinstance(check, str):
                refuse((*path, "format"), f"expected the name of a format, got {show(check)}")
        plain = _with_exclusive_bounds(plain)
        types = _types(schema, path) if "type" in said else ALL_TYPES
        leaf = Leaf(types=types, parts=((plain, path),) if plain else ())
        found = Leaves(leaves=(leaf,))
        for key in ("const", "enum"):
            if key in said:
                values = listed(schema, key, (*path, key))
                found = self._both(
                    found, Leaves(leaves=(Leaf(values=tuple(values)),)), (*path, key)
                )
        for key in said:
            if key in COMBINERS:
                combined = self._combined(schema, key, path, types)
                where = path if key == "$ref" else (*path, key)
                found = self._both(found, combined, where)
        return found

    def _combined(
        self, schema: Mapping[str, Any], key: str, path: Path, types: frozenset[str]
    ) -> Leaves:
        where = (*path, key)
        if key == "$ref":
            return self._reference(schema[key], path, negated=False)
        if key == "not":
            return self.leaves(schema[key], where, negated=True)
        if key == "if":
            return self._conditional(schema, path)
        if key in DEPENDENCIES:
            return self._dependent(schema[key], where)
        branches = _branches(schema[key], where)
        if key == "allOf":
            return self.conjunction(branches)
        if key == "oneOf":
            return self._one_of(branches, where, types)
        return _union([self.leaves(*branch) for branch in branches], where)

    def _conditional(self, schema: Mapping[str, Any], path: Path) -> Leaves:
        at = (*path, "if")
        met, unmet = (self.leaves(schema["if"], at, negated=n) for n in (False, True))
        chosen = [
            self._both(found, self.leaves(schema.get(key, True), (*path, key)), at)
            for found, key in ((met, "then"), (unmet, "else"))
        ]
        return _union(chosen, at)

    def _dependent(self, said: Any, path: Path) -> Leaves:
        """What names of properties entail: more names, or a schema."""
        if not isinstance(said, Mapping):
            refuse(path, f"expected an object, got {show(said)}")
        found = ANYTHING
        for name, wanted in said.items():
            at = (*path, name)
            if isinstance(wanted, list):
                wanted = {"required": wanted}
            here = self.conjunction([({"required": [name], "type": "object"}, at), (wanted, at)])
            found = self._both(found, _union([self._without(name, at), here], at), at)
        return found

    def _without(self, name: str, path: Path) -> Leaves:
        """Every value that has no such property."""
        absent: Part = ({"properties": {name: False}}, path)
        others = Leaf(types=ALL_TYPES - {"object"})
        return Leaves(leaves=(others, Leaf(types=frozenset({"object"}), parts=(absent,))))

    def _one_of(self, branches: Sequence[Where], path: Path, types: frozenset[str]) -> Leaves:
        """Each branch, of some types, without the values of the others that may overlap with it."""
        around = Leaves(leaves=(Leaf(types=types),))
        read = [self._both(self.leaves(*branch), around, path) for branch in branches]
        constant = [_constants(found) for found in read]
        times: dict[str, int] = {}
        for values in constant:
            for value in values or ():
                times[value] = times.get(value, 0) + 1
        repeated = frozenset(value for value, count in times.items() if count > 1)
        result: list[Leaves] = []
        for index, (branch, found) in enumerate(zip(branches, read, strict=True)):
            if constant[index] is not None and repeated:
                found = self._both(found, Leaves(leaves=(Leaf(excluded=repeated),)), path)
            for other, (rival, against) in enumerate(zip(branches, read, strict=True)):
                both = constant[index] is not None and constant[other] is not None
                if index == other or both or self._separate(read[index], against):
                    continue
                rest = self.leaves(*rival, negated=True)
                before, found = found, self._both(found, rest, path)
                if before.leaves and not found.leaves and not rest.exact:
                    names = f"{branch[1][-1]} and {rival[1][-1]}"
                    refuse(
                        path,
                        f"cannot tell that no value fits both {names}: give them different types, "
                        "or a required property that differs in its type or const, or use anyOf",
                    )
            result.append(found)
        return _union(result, path)

    # ------------------------------------------------------------------------- negation

    def _negated(self, schema: Mapping[str, Any], path: Path) -> Leaves:
        """Leaves of the values that violate a keyword: the union over the keywords."""
        found: list[Leaves] = []
        dropped: list[str] = []
        for key in self._keywords(schema, path):
            violated = self._violated(schema, key, path)
            if violated is None:
                dropped.append(key)
            else:
                found.append(violated)
        union = _union(found, path)
        if dropped:
            self.conflict = self.lost = (*path, dropped[0]), "has no supported negation"
        return replace(union, exact=union.exact and not dropped)

    def _violated(self, schema: Mapping[str, Any], key: str, path: Path) -> Leaves | None:
        """Leaves of the values that violate one keyword; None where that is not supported."""
        said, at = schema[key], (*path, key)
        if key == "type":
            types = ALL_TYPES - _types(schema, path)
            return Leaves(leaves=(Leaf(types=types),)) if types else NOTHING
        if key in ("const", "enum"):
            values = frozenset(map(same, listed(schema, key, at)))
            return Leaves(leaves=(Leaf(excluded=values),))
        if key == "$ref":
            return self._reference(said, path, negated=True)
        if key == "not":
            return self.leaves(said, at)
        if key == "allOf":
            return _union([self.leaves(*b, negated=True) for b in _branches(said, at)], at)
        if key == "anyOf":
            found = ANYTHING
            for branch in _branches(said, at):
                found = self._both(found, self.leaves(*branch, negated=True), at)
            return found
        if key == "required":
            return _union([self._is(self._without(name, at), "object", at) for name in said], at)
        if key == "properties":
            parts = [
                {"required": [name], "properties": {name: {"not": each}}}
                for name, each in said.items()
            ]
            made = [Leaf(types=frozenset({"object"}), parts=((part, at),)) for part in parts]
            return Leaves(leaves=tuple(made))
        opposite = _opposite(key, said, schema, at)
        if not opposite:
            return None if opposite is None else NOTHING
        part = opposite, at
        return Leaves(leaves=(Leaf(types=frozenset(TYPES[OWNER[key]]), parts=(part,)),))

    def _is(self, found: Leaves, name: str, path: Path) -> Leaves:
        return self._both(found, Leaves(leaves=(Leaf(types=frozenset({name})),)), path)

    # --------------------------------------------------------------------- disjointness

    def disjoint(self, one: Sequence[Where], other: Sequence[Where]) -> bool:
        """Whether it is certain that no value validates against both conjunctions.

        Pairs are remembered, since nested schemas ask for the same pairs again. A pair that is
        being compared counts as not disjoint, which ends recursion.
        """
        key = tuple((path, id(schema)) for schema, path in (*one, (None, ()), *other))
        if key not in self.apart:
            self.apart[key] = (one, other), False
            found = self._separate(self.conjunction(one), self.conjunction(other))
            self.apart[key] = (one, other), found
        return self.apart[key][1]

    def _separate(self, one: Leaves, other: Leaves) -> bool:
        pairs = product(one.leaves, other.leaves)
        return one.exact and other.exact and all(self._apart(a, b) for a, b in pairs)

    def _apart(self, one: Leaf, other: Leaf) -> bool:
        common = one.types & other.types
        if not common:
            return True
        if one.values is not None and other.values is not None:
            return {same(v) for v in one.values}.isdisjoint(map(same, other.values))
        if common != {"object"}:
            return False
        return self._objects_apart(one, other) or self._objects_apart(other, one)

    def _objects_apart(self, one: Leaf, other: Leaf) -> bool:
        """Whether a property that the first requires cannot be in the second."""
        required = (name for names, _ in one.said("required") for name in names)
        return any(self.disjoint(named(one, name), named(other, name)) for name in required)


def named(leaf: Leaf, name: str) -> list[Where]:
    """The schemas that the value of a property has to validate against."""
    found: list[Where] = []
    for schema, path in leaf.about("object"):
        own = schema.get("properties", {})
        applies: list[Where] = []
        if name in own:
            applies.append((own[name], (*path, "properties", name)))
        for pattern, each in schema.get("patternProperties", {}).items():
            where = (*path, "patternProperties", pattern)
            if name_matches(pattern, name, where):
                applies.append((each, where))
        if not applies and "additionalProperties" in schema:
            applies.append((schema["additionalProperties"], (*path, "additionalProperties")))
        found += applies
    return found


def name_matches(pattern: str, text: str, path: Path) -> bool:
    """Whether a pattern is found in a text, for which all validators have to agree."""
    try:
        found = [bool(re.search(pattern, text, flags)) for flags in (0, re.ASCII)]
    except re.error as error:
        refuse(path, f"no regular expression: {error}")
    if found[0] != found[1] or (found[0] and text.endswith("\n")):
        refuse(path, f"validators disagree whether it matches {show(text)}")
    return found[0]


def listed(schema: Mapping[str, Any], key: str, path: Path) -> list[Any]:
    """The values of a ``const`` or an ``enum``."""
    said = schema[key]
    values = [said] if key == "const" else said
    if not isinstance(values, list) or not values:
        refuse(path, f"expected a list of values, got {show(said)}")
    for value in values:
        dumps(value, path)
    return values


def _branches(said: Any, path: Path) -> list[Where]:
    if not isinstance(said, list) or not said:
        refuse(path, f"expected a list of schemas, got {show(said)}")
    return [(branch, (*path, str(index))) for index, branch in enumerate(said)]


def _types(schema: Mapping[str, Any], path: Path) -> frozenset[str]:
    said = schema["type"]
    names: list[Any] = said if isinstance(said, list) and said else [said]
    for name in names:
        if not isinstance(name, str) or name not in TYPES:
            known = ", ".join(TYPES)
            refuse((*path, "type"), f"expected one of {known} or a list, got {show(said)}")
    return frozenset().union(*(TYPES[name] for name in names))


def _with_exclusive_bounds(plain: dict[str, Any]) -> dict[str, Any]:
    """The bounds of draft 4, ``"exclusiveMinimum": true`` beside ``minimum``, as later drafts'."""
    for exclusive, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(plain.get(exclusive), bool):
            plain = dict(plain)
            if plain.pop(exclusive) and bound in plain:
                plain[exclusive] = plain.pop(bound)
    return plain


def _opposite(key: str, said: Any, schema: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """The keywords of the values that violate a bound; {} for no value, None if unsupported."""
    bounds = {
        "minimum": "exclusiveMaximum",
        "maximum": "exclusiveMinimum",
        "exclusiveMinimum": "maximum",
        "exclusiveMaximum": "minimum",
    }
    if key in bounds:
        flags = [schema.get(name) for name in ("exclusiveMinimum", "exclusiveMaximum")]
        return None if any(isinstance(flag, bool) for flag in flags) else {bounds[key]: said}
    name = key[3:]
    if key in ("minLength", "minItems", "minProperties"):
        return {f"max{name}": counted(said, path) - 1} if counted(said, path) else {}
    if key in ("maxLength", "maxItems", "maxProperties"):
        return {f"min{name}": counted(said, path) + 1}
    return None


def _union(found: Sequence[Leaves], path: Path) -> Leaves:
    leaves = _collected(leaf for each in found for leaf in each.leaves)
    if len(leaves) > MAX_LEAVES:
        refuse(path, f"more than {MAX_LEAVES} alternatives")
    return Leaves(leaves=leaves, exact=all(each.exact for each in found))


def _collected(leaves: Iterable[Leaf]) -> tuple[Leaf, ...]:
    """Each leaf once, and those that are constants alone as one."""
    kept: dict[Any, Leaf] = {}
    values: dict[str, Any] = {}
    for leaf in leaves:
        if leaf.values is not None and not leaf.parts and not leaf.references:
            for value in leaf.values:
                values.setdefault(same(value), value)
        else:
            parts = tuple((id(schema), path) for schema, path in leaf.parts)
            listed = leaf.values and tuple(map(same, leaf.values))
            kept.setdefault((leaf.types, listed, leaf.excluded, parts, leaf.references), leaf)
    if not values:
        return tuple(kept.values())
    types = frozenset().union(*map(types_of, values.values()))
    return (Leaf(types=types, values=tuple(values.values())), *kept.values())


def _constants(found: Leaves) -> frozenset[str] | None:
    """The values of leaves that are all constants, as ``same`` writes them; None for others."""
    if any(leaf.values is None or leaf.parts for leaf in found.leaves):
        return None
    return frozenset(same(value) for leaf in found.leaves for value in leaf.values or ())


def _draft(root: Any) -> int:
    """The draft that ``$schema`` names, as 4, 6, 7, 2019 or 2020; without a known name the last."""
    name = root.get("$schema", "") if isinstance(root, Mapping) else ""
    if not isinstance(name, str):
        refuse(("$schema",), f"expected the URI of a draft, got {show(name)}")
    found = re.search(r"json-schema\.org/draft(?:-0|/)([0-9]+)", name)
    return int(found[1]) if found else LATEST


def _in_cycles(edges: Iterable[tuple[Path, Path]]) -> frozenset[Path]:
    """The nodes of a graph that a path leads back to."""
    pairs = list(edges)
    number: dict[Path, int] = {}
    for pair in pairs:
        for node in pair:
            number.setdefault(node, len(number))
    if not pairs:
        return frozenset()
    source, target = np.array([[number[node] for node in pair] for pair in pairs]).T
    graph = coo_array((np.ones(len(pairs)), (source, target)), shape=(len(number),) * 2)
    _, label = connected_components(graph, connection="strong")
    cyclic = set(label[source[label[source] == label[target]]].tolist())
    return frozenset(node for node, index in number.items() if int(label[index]) in cyclic)
