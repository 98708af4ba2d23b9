"""The normal form of a JSON Schema: alternatives, each of which is a conjunction of plain keywords.

A conjunction is a ``Leaf``, the disjunction of them ``Leaves``. ``json_reader`` finds the leaves of
a schema, ``json_converter`` writes a regex for each, and ``json_check`` tests constants.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sedd.constraints.json_keywords import KEYWORDS, Part, Where, name_matches
from sedd.constraints.json_text import Path, refuse
from sedd.constraints.json_values import ALL_TYPES, same, types_of

MAX_LEAVES = 2_000  # of one schema: conjunctions of disjunctions multiply


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """A conjunction of plain keywords: one alternative of a schema.

    Attributes:
        types: the types that a value may have; "number" stands for numbers with a fraction.
        values: the constants of ``const`` or ``enum``, one of which the value must equal. None
            without these keywords.
        excluded: constants that the value must not equal (a negated ``const`` or ``enum``), in the
            text form of ``same``.
        parts: the schemas whose other plain keywords must all hold.
        references: targets of the recursive references that were followed to reach this leaf. They
            count as open while the schemas within the leaf are read.
    """

    types: frozenset[str] = ALL_TYPES
    values: tuple[Any, ...] | None = None
    excluded: frozenset[str] = frozenset()
    parts: tuple[Part, ...] = ()
    references: tuple[Path, ...] = ()

    def about(self, kind: str) -> Iterator[Part]:
        """The parts with a keyword about ``kind``: "string", "number", "object" or "array"."""
        return (part for part in self.parts if not part[0].keys().isdisjoint(KEYWORDS[kind]))

    def said(self, keyword: str) -> Iterator[tuple[Any, Path]]:
        """The value of a keyword in each part that has it, with the path of the keyword."""
        for schema, path in self.parts:
            if keyword in schema:
                yield schema[keyword], (*path, keyword)


@dataclass(frozen=True, kw_only=True)
class Leaves:
    """A disjunction of leaves; without leaves, it allows no value.

    Attributes:
        leaves: the alternatives.
        exact: whether the leaves allow every value that the schema allows. If False, some values of
            the schema are missing.
    """

    leaves: tuple[Leaf, ...]
    exact: bool = True


ANYTHING = Leaves(leaves=(Leaf(),))
NOTHING = Leaves(leaves=())


def named(leaf: Leaf, name: str) -> list[Where]:
    """The schemas that the value of the property ``name`` must validate against.

    In each part they are the schema in ``properties`` and those of all patterns that match the
    name. ``additionalProperties`` applies only where there is none of them.
    """
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


def union_of(found: Sequence[Leaves], path: Path) -> Leaves:
    """The disjunction of several disjunctions; ``path`` is for the message of too many leaves."""
    leaves = collected(leaf for each in found for leaf in each.leaves)
    if len(leaves) > MAX_LEAVES:
        refuse(path, f"more than {MAX_LEAVES} alternatives")
    return Leaves(leaves=leaves, exact=all(each.exact for each in found))


def collected(leaves: Iterable[Leaf]) -> tuple[Leaf, ...]:
    """The leaves without repetitions; leaves that are only constants are merged into one."""
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


def tags_of(found: Leaves) -> dict[str, frozenset[str]]:
    """The values that a property may have in the leaves, by its name, in the text form of ``same``.

    Such properties tell the variants of a tagged union apart without a comparison of their leaves.
    Included are those that each leaf, an object, requires and restricts by ``const`` or ``enum`` to
    strings or whole numbers; none if the leaves are not exact.
    """
    if not found.exact or any(leaf.types != {"object"} for leaf in found.leaves):
        return {}
    each: list[dict[str, frozenset[str]]] = []
    for leaf in found.leaves:
        required = (name for names, _ in leaf.said("required") for name in names)
        each.append({})
        for name in filter(lambda name: isinstance(name, str), required):
            for schema, _ in named(leaf, name):
                # Drafts differ in whether keywords beside a reference count.
                if isinstance(schema, Mapping) and "$ref" not in schema:
                    values = [schema["const"]] if "const" in schema else schema.get("enum")
                    if isinstance(values, list) and all(map(_is_tag, values)):
                        each[-1][name] = frozenset(map(same, values))
    shared = set(each[0]).intersection(*each) if each else set()
    return {name: frozenset().union(*(tags[name] for tags in each)) for name in shared}


def _is_tag(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, int) and abs(value) < 2**63)


def tags_differ(one: Mapping[str, frozenset[str]], other: Mapping[str, frozenset[str]]) -> bool:
    """Whether a property of ``tags_of`` two disjunctions has no constant of both."""
    return any(name in other and one[name].isdisjoint(other[name]) for name in one)


def constants_of(found: Leaves) -> frozenset[str] | None:
    """The values of leaves that are only constants, in the text form of ``same``.

    None if some leaf is not only constants.
    """
    if any(leaf.values is None or leaf.parts for leaf in found.leaves):
        return None
    return frozenset(same(value) for leaf in found.leaves for value in leaf.values or ())
