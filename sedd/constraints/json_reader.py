"""JSON Schema without combinators: reads a schema as a list of conjunctions of plain keywords.

``Reader.leaves`` brings a schema into disjunctive normal form. ``allOf``, ``$ref`` and sibling
keywords are conjunctions, ``anyOf`` and ``oneOf`` are disjunctions, ``if`` is
``(if and then) or (not if and else)``, and ``not`` is pushed down to the plain keywords. The result
is a list of ``Leaf``: a value validates if it satisfies at least one of the leaves.

The list may allow less than the schema, never more. Two things can be missing: values behind a
recursive reference, which is followed to a limited depth, and the values that violate a keyword
whose negation is not supported. ``Leaves.exact`` states that nothing is missing. Only exact lists
can prove that two branches of a ``oneOf`` have no value in common.

Schemas below a plain keyword (``properties``, ``items``) stay as they are. ``json_converter`` reads
them when it writes the regex of that property or item.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from sedd.constraints.json_keywords import (
    COMBINERS,
    DEPENDENCIES,
    OWNER,
    Part,
    Where,
    asserted,
    opposite,
    read_branches,
    read_constants,
    read_types,
    with_exclusive_bounds,
)
from sedd.constraints.json_leaves import (
    ANYTHING,
    MAX_LEAVES,
    NOTHING,
    Leaf,
    Leaves,
    collected,
    constants_of,
    named,
    tags_differ,
    tags_of,
    union_of,
)
from sedd.constraints.json_references import References
from sedd.constraints.json_text import Path, refuse, show
from sedd.constraints.json_values import ALL_TYPES, TYPES, same, types_of

# Levels of schemas or references within each other: far above any real schema's. Python's own stack
# ends at about three times that.
MAX_NESTING = 64


class Reader:
    """Reads the schemas of one document.

    The target of a recursive reference is read again inside itself, up to ``depth`` times; then
    the reference allows no value. Results therefore depend on the targets that are being read, and
    are cached by path and by these.

    Args:
        root: the document.
        depth: how many times the target of a recursive reference is read inside itself.

    Attributes:
        open: the stack of the targets that are being read. ``json_converter`` extends it while it
            reads the schemas within a leaf.
        conflict: path and reason of the last list without leaves, for the message of a schema that
            allows no value.
        lost: path and reason of the last list that is not exact.
    """

    def __init__(self, root: Any, depth: int):
        self.references, self.depth = References(root), depth
        self.recursive = self.references.recursive
        self.open: list[Path] = [()] if () in self.recursive else []
        self.conflict: tuple[Path, str] | None = None
        self.lost: tuple[Path, str] | None = None
        # The values contain the schemas, so that the ids in the keys stay those of the schemas.
        self._known: dict[tuple[Any, ...], tuple[Any, Leaves]] = {}
        self._apart: dict[tuple[Any, ...], tuple[Any, bool]] = {}

    def _reference(self, reference: Any, path: Path, negated: bool) -> Leaves:
        """The leaves of a reference's target; none if the target is open ``depth`` + 1 times."""
        if not isinstance(reference, str):
            refuse((*path, "$ref"), f"expected a reference (#/$defs/name), got {show(reference)}")
        where = self.references.find(reference, path)
        if where is None:
            refuse((*path, "$ref"), f"{show(reference)} names nothing in the schema")
        target = self.references.at(where)
        if where not in self.recursive:
            return self.leaves(target, where, negated=negated)
        if self.open.count(where) > self.depth:
            problem = (
                f"{show(reference)} is recursive, and no value ends at depth {self.depth}; a "
                "larger depth helps if the recursion can end"
            )
            self.conflict = self.lost = (*path, "$ref"), problem
            return replace(NOTHING, exact=False)
        if len(self.open) > MAX_NESTING:
            refuse((*path, "$ref"), f"references nest more than {MAX_NESTING} deep")
        self.open.append(where)
        found = self.leaves(target, where, negated=negated)
        self.open.pop()
        through = [replace(leaf, references=(*leaf.references, where)) for leaf in found.leaves]
        return replace(found, leaves=tuple(through))

    # ---------------------------------------------------------------------- normal form

    def leaves(self, schema: Any, path: Path, *, negated: bool = False) -> Leaves:
        """The leaves of a schema, or of its negation if ``negated``."""
        if isinstance(schema, bool):
            if schema == negated:
                self.conflict = path, "false allows no value"
            return NOTHING if schema == negated else ANYTHING
        if not isinstance(schema, Mapping):
            refuse(path, f"a schema is an object or a boolean, got {show(schema)}")
        key = (path, negated, id(schema), tuple(sorted(self.open)))
        if key not in self._known:
            found = self._negated(schema, path) if negated else self._read(schema, path)
            self._known[key] = schema, found
        return self._known[key][1]

    def conjunction(self, schemas: Sequence[Where]) -> Leaves:
        """The leaves of the values that validate against every schema."""
        found = ANYTHING
        for schema, path in schemas:
            found = self._both(found, self.leaves(schema, path), path)
        return found

    def _both(self, one: Leaves, other: Leaves, path: Path) -> Leaves:
        """The conjunction of two disjunctions: every pair of leaves that can hold together."""
        if len(one.leaves) * len(other.leaves) > MAX_LEAVES:
            refuse(path, f"more than {MAX_LEAVES} combinations of alternatives")
        merged = (self._merged(a, b, path) for a, b in product(one.leaves, other.leaves))
        leaves = collected(leaf for leaf in merged if leaf)
        exact = one.exact and other.exact
        if not (leaves or exact):
            self.conflict = self.lost
        return Leaves(leaves=leaves, exact=exact)

    def _merged(self, one: Leaf, other: Leaf, path: Path) -> Leaf | None:
        """The conjunction of two leaves; None where types or constants rule out every value."""
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

    def _read(self, schema: Mapping[str, Any], path: Path) -> Leaves:
        """The leaves of a schema: its plain keywords, combined with each of its combinators."""
        said = asserted(schema, path, self.references.draft)
        plain = {key: schema[key] for key in said if key in OWNER}
        if "format" in plain:
            check = plain["format"]
            if not isinstance(check, str):
                refuse((*path, "format"), f"expected the name of a format, got {show(check)}")
        plain = with_exclusive_bounds(plain)
        types = read_types(schema, path) if "type" in said else ALL_TYPES
        leaf = Leaf(types=types, parts=((plain, path),) if plain else ())
        found = Leaves(leaves=(leaf,))
        for key in ("const", "enum"):
            if key in said:
                values = read_constants(schema, key, (*path, key))
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
        """The leaves of the combinator ``key`` of a schema, which allows values of ``types``."""
        where = (*path, key)
        if key == "$ref":
            return self._reference(schema[key], path, negated=False)
        if key == "not":
            return self.leaves(schema[key], where, negated=True)
        if key == "if":
            return self._conditional(schema, path)
        if key in DEPENDENCIES:
            return self._dependent(schema[key], where)
        branches = read_branches(schema[key], where)
        if key == "allOf":
            return self.conjunction(branches)
        if key == "oneOf":
            return self._one_of(branches, where, types)
        return union_of([self.leaves(*branch) for branch in branches], where)

    def _conditional(self, schema: Mapping[str, Any], path: Path) -> Leaves:
        """The leaves of ``if``, ``then`` and ``else``; a missing branch allows any value."""
        at = (*path, "if")
        met, unmet = (self.leaves(schema["if"], at, negated=n) for n in (False, True))
        chosen = [
            self._both(found, self.leaves(schema.get(key, True), (*path, key)), at)
            for found, key in ((met, "then"), (unmet, "else"))
        ]
        return union_of(chosen, at)

    def _dependent(self, said: Any, path: Path) -> Leaves:
        """The leaves of dependencies: if a property is present, others are or a schema holds."""
        if not isinstance(said, Mapping):
            refuse(path, f"expected an object, got {show(said)}")
        found = ANYTHING
        for name, wanted in said.items():
            at = (*path, name)
            if isinstance(wanted, list):
                wanted = {"required": wanted}
            here = self.conjunction([({"required": [name], "type": "object"}, at), (wanted, at)])
            found = self._both(found, union_of([self._without(name, at), here], at), at)
        return found

    def _without(self, name: str, path: Path) -> Leaves:
        """The leaves of values without the property: objects that lack it, and other types."""
        absent: Part = ({"properties": {name: False}}, path)
        others = Leaf(types=ALL_TYPES - {"object"})
        return Leaves(leaves=(others, Leaf(types=frozenset({"object"}), parts=(absent,))))

    def _one_of(self, branches: Sequence[Where], path: Path, types: frozenset[str]) -> Leaves:
        """The leaves of ``oneOf``, for values of some types: exactly one branch may hold.

        A branch contributes its leaves, combined with the negation of every other branch. The
        negation multiplies the leaves and is often not supported, so it is left out where it has
        no effect: for a branch that is certainly disjoint, and between lists of constants, whose
        repeated constants are excluded all at once.
        """
        around = Leaves(leaves=(Leaf(types=types),))
        read = [self._both(self.leaves(*branch), around, path) for branch in branches]
        constant = [constants_of(found) for found in read]
        times: dict[str, int] = {}
        for values in constant:
            for value in values or ():
                times[value] = times.get(value, 0) + 1
        repeated = frozenset(value for value, count in times.items() if count > 1)
        tags = [tags_of(found) for found in read]
        result: list[Leaves] = []
        for index, (branch, found) in enumerate(zip(branches, read, strict=True)):
            if constant[index] is not None and repeated:
                found = self._both(found, Leaves(leaves=(Leaf(excluded=repeated),)), path)
            for other, (rival, against) in enumerate(zip(branches, read, strict=True)):
                both = constant[index] is not None and constant[other] is not None
                if index == other or both or tags_differ(tags[index], tags[other]):
                    continue
                if self._separate(read[index], against):
                    continue
                rest = self.leaves(*rival, negated=True)
                before, found = found, self._both(found, rest, path)
                if before.leaves and not found.leaves and not rest.exact:
                    refuse(
                        path,
                        f"cannot prove that no value validates against both branch {branch[1][-1]} "
                        f"and branch {rival[1][-1]}: give them different types, or a required "
                        "property that differs in its type or const, or use anyOf",
                    )
            result.append(found)
        return union_of(result, path)

    # ------------------------------------------------------------------------- negation

    def _negated(self, schema: Mapping[str, Any], path: Path) -> Leaves:
        """The leaves of the negation of a schema: values that violate at least one keyword."""
        found: list[Leaves] = []
        dropped: list[str] = []
        for key in asserted(schema, path, self.references.draft):
            violated = self._violated(schema, key, path)
            if violated is None:
                dropped.append(key)
            else:
                found.append(violated)
        union = union_of(found, path)
        if dropped:
            self.conflict = self.lost = (*path, dropped[0]), "has no supported negation"
        return replace(union, exact=union.exact and not dropped)

    def _violated(self, schema: Mapping[str, Any], key: str, path: Path) -> Leaves | None:
        """The leaves of the values that violate one keyword; None where not supported."""
        said, at = schema[key], (*path, key)
        if key == "type":
            types = ALL_TYPES - read_types(schema, path)
            return Leaves(leaves=(Leaf(types=types),)) if types else NOTHING
        if key in ("const", "enum"):
            values = frozenset(map(same, read_constants(schema, key, at)))
            return Leaves(leaves=(Leaf(excluded=values),))
        if key == "$ref":
            return self._reference(said, path, negated=True)
        if key == "not":
            return self.leaves(said, at)
        if key == "allOf":
            return union_of([self.leaves(*b, negated=True) for b in read_branches(said, at)], at)
        if key == "anyOf":
            found = ANYTHING
            for branch in read_branches(said, at):
                found = self._both(found, self.leaves(*branch, negated=True), at)
            return found
        if key == "required":
            return union_of([self._is(self._without(name, at), "object", at) for name in said], at)
        if key == "properties":
            parts = [
                {"required": [name], "properties": {name: {"not": each}}}
                for name, each in said.items()
            ]
            made = [Leaf(types=frozenset({"object"}), parts=((part, at),)) for part in parts]
            return Leaves(leaves=tuple(made))
        reverse = opposite(key, said, schema, at)
        if not reverse:
            return None if reverse is None else NOTHING
        part = reverse, at
        return Leaves(leaves=(Leaf(types=frozenset(TYPES[OWNER[key]]), parts=(part,)),))

    def _is(self, found: Leaves, name: str, path: Path) -> Leaves:
        """The leaves restricted to values of one type."""
        return self._both(found, Leaves(leaves=(Leaf(types=frozenset({name})),)), path)

    # --------------------------------------------------------------------- disjointness

    def disjoint(self, one: Sequence[Where], other: Sequence[Where]) -> bool:
        """Whether certainly no value validates against both conjunctions of schemas.

        False means that they overlap or that no proof was found. Results are cached, because
        nested schemas lead to the same pairs again. A pair counts as not disjoint while it is
        being compared, which ends the recursion of schemas that contain themselves.
        """
        key = tuple((path, id(schema)) for schema, path in (*one, (None, ()), *other))
        if key not in self._apart:
            self._apart[key] = (one, other), False
            found = self._separate(self.conjunction(one), self.conjunction(other))
            self._apart[key] = (one, other), found
        return self._apart[key][1]

    def _separate(self, one: Leaves, other: Leaves) -> bool:
        """``disjoint`` for two lists of leaves: every pair of leaves must be disjoint."""
        pairs = product(one.leaves, other.leaves)
        return one.exact and other.exact and all(self._leaves_apart(a, b) for a, b in pairs)

    def _leaves_apart(self, one: Leaf, other: Leaf) -> bool:
        """``disjoint`` for two leaves, by their types, their constants or a property."""
        common = one.types & other.types
        if not common:
            return True
        if one.values is not None and other.values is not None:
            return {same(v) for v in one.values}.isdisjoint(map(same, other.values))
        if common != {"object"}:
            return False
        return self._objects_apart(one, other) or self._objects_apart(other, one)

    def _objects_apart(self, one: Leaf, other: Leaf) -> bool:
        """Whether a property that the first requires has no value that fits both."""
        required = (name for names, _ in one.said("required") for name in names)
        return any(self.disjoint(named(one, name), named(other, name)) for name in required)
