"""The help of flags: the strings below the fields of dataclasses, read from their source."""

import dataclasses
import inspect
from typing import Any

import docstring_parser

from sedd.configuration.components import Options, maker


def document(kind: type, default: Any) -> None:
    """Prepare the help of a dataclass and of the dataclasses that its default holds."""
    document_fields(kind)
    for field in dataclasses.fields(kind):
        value = getattr(default, field.name, None)
        if dataclasses.is_dataclass(value):
            document(type(value), value)


def document_fields(kind: type) -> None:
    """Copy the strings below the fields of a dataclass into its docstring, as "Attributes".

    tyro reads the help of flags from that section, and sets it without the line breaks of the
    source. For the options of a component, the strings below the component's fields are copied. The
    source files are read, so call this function only for ``--help``.
    """
    make = maker(kind.family, kind.name) if issubclass(kind, Options) else kind
    said = field_docstrings(make)
    known = {param.arg_name for param in docstring_parser.parse(kind.__doc__ or "").params}
    if said.keys() - known:
        lines = "".join(f"\n    {name}: {text}" for name, text in said.items())
        kind.__doc__ = f"{inspect.getdoc(kind) or ''}\n\nAttributes:{lines}"


def field_docstrings(make: type) -> dict[str, str]:
    """Read the strings below the fields of a dataclass from its source, inherited ones included."""
    return {
        param.arg_name: " ".join(param.description.split())
        for part in reversed(make.__mro__[:-1])
        for param in docstring_parser.parse_from_object(part).params
        if param.description
    }
