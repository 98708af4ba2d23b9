"""Values of JSON: their types, their equality, and how they are written."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sedd.constraints.json_text import Path, refuse, show

# The types of values that each name in a schema stands for. As the type of a value, "number" means
# a number with a fraction, so that the types of values are disjoint.
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
MAX_COUNT = 2**32 - 2  # the largest count in a pattern of Python's re


def types_of(value: Any) -> frozenset[str]:
    """The type of a JSON value, as a set of one name of ``TYPES``.

    Numbers are "integer" if they are whole (also 1.0, as JSON Schema has it), else "number".
    """
    if isinstance(value, bool):
        return frozenset({"boolean"})
    if isinstance(value, int | float):
        whole = isinstance(value, int) or value.is_integer()
        return frozenset({"integer"} if whole else {"number"})
    for name, kind in (("string", str), ("array", list), ("object", Mapping)):
        if isinstance(value, kind):
            return frozenset({name})
    return frozenset({"null"})


def same(value: Any) -> str:
    """A key for the equality of JSON Schema: 1 and 1.0 have the same key, 1 and true do not."""

    def plain(value: Any) -> Any:
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, list):
            return [plain(each) for each in value]
        if isinstance(value, Mapping):
            return {key: plain(each) for key, each in value.items()}
        return value

    return json.dumps(plain(value), sort_keys=True)


def dumps(value: Any, path: Path, separators: tuple[str, str] = (", ", ": ")) -> str:
    """The JSON text of a value; refuses values that JSON or UTF-8 cannot write."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=separators)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        refuse(path, f"{show(value)} is not JSON ({error})")
    return text


def counted(value: Any, path: Path) -> int:
    """The value of a count such as ``minLength``; refuses anything but a whole number from 0 up."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 0 <= value <= MAX_COUNT and value == int(value)):
        refuse(path, f"expected a count up to {MAX_COUNT}, got {show(value)}")
    return int(value)


def names_of(types: Sequence[str] | frozenset[str]) -> list[str]:
    """The names of ``TYPES`` under which some value types are written, in the order of ``TYPES``.

    "number" and "integer" together become "number". The result "number" for a set without "integer"
    stands for numbers with a fraction only.
    """
    return [
        name for name in TYPES if name in types and not (name == "integer" and "number" in types)
    ]
