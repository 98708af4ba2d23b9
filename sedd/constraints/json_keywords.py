"""The keywords of JSON Schema: which ones are supported, and how their values are read.

The functions check one keyword of one schema at a time and refuse a malformed value with its path.
How keywords combine is the subject of ``json_leaves``.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sedd.constraints.json_text import Path, refuse, show
from sedd.constraints.json_values import TYPES, counted, dumps

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
# Plain keywords by the type that they constrain; a value of another type always satisfies them.
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
LATEST = 2020  # the newest draft, assumed where ``$schema`` names none

Part = tuple[Mapping[str, Any], Path]  # a schema, read for its plain keywords, and its path
Where = tuple[Any, Path]  # a schema and its path


class Counts(NamedTuple):
    """The allowed sizes of a string, array or object: ``low`` to ``high``, both included.

    Attributes:
        low: the smallest size.
        high: the largest size, infinite without an upper limit.
        at_low: the path of the keyword that sets ``low``; without one, that of the keyword that
            sets ``high``; empty without both.
        at_high: likewise for ``high``.
    """

    low: int
    high: float
    at_low: Path
    at_high: Path


def draft_of(root: Any) -> int:
    """The draft that ``$schema`` names: 4, 6, 7, 2019 or 2020. ``LATEST`` without a known name."""
    name = root.get("$schema", "") if isinstance(root, Mapping) else ""
    if not isinstance(name, str):
        refuse(("$schema",), f"expected the URI of a draft, got {show(name)}")
    found = re.search(r"json-schema\.org/draft(?:-0|/)([0-9]+)", name)
    return int(found[1]) if found else LATEST


def asserted(schema: Mapping[str, Any], path: Path, draft: int) -> list[str]:
    """The keywords of a schema that constrain values; annotations are left out.

    Up to draft 7 keywords beside ``$ref`` are ignored. Refuses keywords that are not supported.
    """
    if "$ref" in schema and draft < 2019:
        return ["$ref"]
    said = [key for key in schema if not _is_annotation(key)]
    for key in said:
        if key not in ("type", "const", "enum", *OWNER, *COMBINERS):
            refuse((*path, key), "outside the supported subset of JSON Schema")
    if "prefixItems" in said and draft < LATEST:
        refuse((*path, "prefixItems"), f"unknown to draft {draft}, which $schema names")
    return said


def is_free(schema: Any) -> bool:
    """Whether a schema allows any value: it is ``true`` or has annotations only."""
    return all(map(_is_annotation, schema)) if isinstance(schema, Mapping) else schema is True


def _is_annotation(key: str) -> bool:
    """Whether a keyword constrains nothing; vendors' keywords begin with "x-"."""
    return key in ANNOTATIONS or key.startswith("x-")


def read_types(schema: Mapping[str, Any], path: Path) -> frozenset[str]:
    """The types of the values that ``type`` allows."""
    said = schema["type"]
    names: list[Any] = said if isinstance(said, list) and said else [said]
    for name in names:
        if not isinstance(name, str) or name not in TYPES:
            known = ", ".join(TYPES)
            refuse((*path, "type"), f"expected one of {known} or a list, got {show(said)}")
    return frozenset().union(*(TYPES[name] for name in names))


def read_constants(schema: Mapping[str, Any], key: str, path: Path) -> list[Any]:
    """The values of ``const`` or ``enum``, whichever ``key`` is."""
    said = schema[key]
    values = [said] if key == "const" else said
    if not isinstance(values, list) or not values:
        refuse(path, f"expected a list of values, got {show(said)}")
    for value in values:
        dumps(value, path)
    return values


def read_branches(said: Any, path: Path) -> list[Where]:
    """The schemas of an ``allOf``, ``anyOf`` or ``oneOf``."""
    if not isinstance(said, list) or not said:
        refuse(path, f"expected a list of schemas, got {show(said)}")
    return [(branch, (*path, str(index))) for index, branch in enumerate(said)]


def read_mapping(said: Any, path: Path) -> Mapping[str, Any]:
    """The schemas by name of ``properties`` or ``patternProperties``."""
    if not isinstance(said, Mapping):
        refuse(path, f"expected an object, got {show(said)}")
    return said


def read_properties(parts: Sequence[Part]) -> Iterator[str]:
    """The property names in the ``properties`` of some schemas."""
    for schema, path in parts:
        yield from read_mapping(schema.get("properties", {}), (*path, "properties"))


def read_required(parts: Sequence[Part]) -> dict[str, None]:
    """The names in the ``required`` of some schemas, as an ordered set."""
    found: dict[str, None] = {}
    for schema, path in parts:
        said = schema.get("required", [])
        if not isinstance(said, list) or not all(isinstance(name, str) for name in said):
            refuse((*path, "required"), f"expected a list of names, got {show(said)}")
        found |= dict.fromkeys(said)
    return found


def read_items(schema: Mapping[str, Any], path: Path) -> tuple[list[Where], Where | None]:
    """The schemas of the first items of an array, and the schema of all later items or None.

    Draft 2020-12 writes them as ``prefixItems`` and ``items``. Earlier drafts write a list in
    ``items``, and ``additionalItems``.
    """
    key, rest = "prefixItems", "items"
    if isinstance(schema.get("items"), list) and "prefixItems" not in schema:
        key, rest = "items", "additionalItems"
    said = schema.get(key, [])
    if not isinstance(said, list) or (key in schema and not said):
        refuse((*path, key), f"expected a list of schemas, got {show(said)}")
    prefix = [(each, (*path, key, str(index))) for index, each in enumerate(said)]
    return prefix, (schema[rest], (*path, rest)) if rest in schema else None


def read_unique(schema: Mapping[str, Any], path: Path) -> bool:
    """The value of ``uniqueItems``, False without it."""
    said = schema.get("uniqueItems", False)
    if not isinstance(said, bool):
        refuse((*path, "uniqueItems"), f"expected true or false, got {show(said)}")
    return said


def read_counts(parts: Sequence[Part], least: str, most: str) -> Counts:
    """The sizes that satisfy the keywords ``least`` and ``most``, such as minLength and maxLength.

    The largest lower and the smallest upper limit of all parts apply.
    """
    low, high, at_low, at_high = 0, math.inf, (), ()
    for schema, path in parts:
        if least in schema and (count := counted(schema[least], (*path, least))) > low:
            low, at_low = count, (*path, least)
        if most in schema and (count := counted(schema[most], (*path, most))) < high:
            high, at_high = count, (*path, most)
    return Counts(low, high, at_low or at_high, at_high or at_low)


def with_exclusive_bounds(plain: dict[str, Any]) -> dict[str, Any]:
    """Rewrite draft 4's ``"exclusiveMinimum": true`` beside ``minimum`` as later drafts do."""
    for exclusive, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(plain.get(exclusive), bool):
            plain = dict(plain)
            if plain.pop(exclusive) and bound in plain:
                plain[exclusive] = plain.pop(bound)
    return plain


def opposite(key: str, said: Any, schema: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """Keywords satisfied by exactly those values of the keyword's type that violate ``key: said``.

    Returns:
        ``{}`` if no value violates it, None if the negation is not supported.
    """
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


def name_matches(pattern: str, text: str, path: Path) -> bool:
    """Whether a ``pattern``, or a name in ``patternProperties``, is found in a text.

    Raises UserError if the answer depends on the validator: if it differs between ASCII and Unicode
    character classes, or if a match is found in a text that ends with a newline, before which "$"
    matches in Python only.
    """
    try:
        found = [bool(re.search(pattern, text, flags)) for flags in (0, re.ASCII)]
    except re.error as error:
        refuse(path, f"no regular expression: {error}")
    if found[0] != found[1] or (found[0] and text.endswith("\n")):
        refuse(path, f"validators disagree whether it matches {show(text)}")
    return found[0]
