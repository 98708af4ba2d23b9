"""Whether a constant validates, so that ``const`` and ``enum`` combine with other keywords.

A constant is tested against the leaves of the schema (``json_leaves``: its alternatives as
conjunctions of plain keywords), from which the regexes are written too. If ``Leaves.exact`` is
False, some leaves are missing. The test may then reject a constant that validates. It never accepts
a constant that does not validate.
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from sedd.constraints.json_keywords import (
    Where,
    name_matches,
    read_counts,
    read_items,
    read_required,
)
from sedd.constraints.json_leaves import Leaf, named
from sedd.constraints.json_reader import Reader
from sedd.constraints.json_text import FORMATS, Path, refuse, searched, show
from sedd.constraints.json_values import same, types_of


def holds(reader: Reader, value: Any, schema: Where) -> bool:
    """Whether a value satisfies one of the leaves of a schema."""
    return any(
        types_of(value) <= leaf.types
        and (leaf.values is None or same(value) in map(same, leaf.values))
        and same(value) not in leaf.excluded
        and fits(reader, value, leaf)
        for leaf in reader.conjunction([schema]).leaves
    )


def fits(reader: Reader, value: Any, leaf: Leaf) -> bool:
    """Whether a value of the leaf's types satisfies the keywords about its type.

    The constants of the leaf (``values`` and ``excluded``) are not compared.
    """
    (name,) = types_of(value)
    if name in ("integer", "number"):
        return all(_number_fits(value, schema, at) for schema, at in leaf.about("number"))
    if name == "string":
        return all(_string_fits(value, schema, at) for schema, at in leaf.about("string"))
    if name == "object":
        return _object_fits(reader, value, leaf)
    return name != "array" or _array_fits(reader, value, leaf)


def _number_fits(value: float, schema: Mapping[str, Any], path: Path) -> bool:
    """Whether a number satisfies bounds and ``multipleOf``, in exact arithmetic."""
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
    """Whether a string satisfies its lengths, ``pattern`` and ``format``."""
    counts = read_counts([(schema, path)], "minLength", "maxLength")
    if not counts.low <= len(value) <= counts.high:
        return False
    if "pattern" in schema:
        searched(schema["pattern"], (*path, "pattern"))  # refuses an unsupported pattern
        if not name_matches(schema["pattern"], value, (*path, "pattern")):
            return False
    check = FORMATS.get(schema.get("format", ""))
    return check is None or re.fullmatch(check.text, value, re.ASCII) is not None


def _object_fits(reader: Reader, value: Mapping[str, Any], leaf: Leaf) -> bool:
    """Whether an object has an allowed size, the required names, and valid names and values."""
    parts = list(leaf.about("object"))
    counts = read_counts(parts, "minProperties", "maxProperties")
    return (
        counts.low <= len(value) <= counts.high
        and all(name in value for name in read_required(parts))
        and all(holds(reader, name, key) for key in leaf.said("propertyNames") for name in value)
        and all(
            holds(reader, each, schema)
            for name, each in value.items()
            for schema in named(leaf, name)
        )
    )


def _array_fits(reader: Reader, value: list[Any], leaf: Leaf) -> bool:
    """Whether an array has an allowed size, distinct items if they must be, and valid items."""
    parts = list(leaf.about("array"))
    counts = read_counts(parts, "minItems", "maxItems")
    if not counts.low <= len(value) <= counts.high:
        return False
    unique = any(schema.get("uniqueItems") for schema, _ in parts)
    if unique and len(set(map(same, value))) < len(value):
        return False
    for schema, at in parts:
        prefix, rest = read_items(schema, at)
        for place, each in enumerate(value):
            item = prefix[place] if place < len(prefix) else rest
            if item is not None and not holds(reader, each, item):
                return False
    return True
