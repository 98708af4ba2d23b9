"""Values of JSON: their types, their equality, and how they are written."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sedd.constraints.json_text import Path, refuse, show

# Types of values that each name of a type stands for: "number" alone means a fraction.
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
MAX_COUNT = 2**32 - 2  # the largest count of Python's re


def types_of(value: Any) -> frozenset[str]:
    """The type of a JSON value, as a set of one name."""
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
    """A text that is equal for values that JSON Schema calls equal: 1 and 1.0, not 1 and true."""

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
    """The JSON text of a value. Refuses what is no JSON or no Unicode."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=separators)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        refuse(path, f"{show(value)} is not JSON ({error})")
    return text


def counted(value: Any, path: Path) -> int:
    """A count, such as a ``minLength``. Refuses what is none."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 0 <= value <= MAX_COUNT and value == int(value)):
        refuse(path, f"expected a count up to {MAX_COUNT}, got {show(value)}")
    return int(value)


def names_of(types: Sequence[str] | frozenset[str]) -> list[str]:
    """The shortest list of type names for some types, in the order of ``TYPES``."""
    return [
        name for name in TYPES if name in types and not (name == "integer" and "number" in types)
    ]
