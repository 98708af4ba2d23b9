r"""JSON Schema to a regex: every text that the regex matches validates against the schema.

Schemas of drafts 4, 6, 7, 2019-09 and 2020-12 are read by their keywords. ``$schema`` matters only
where the drafts differ: whether keywords beside ``$ref`` count, and whether ``prefixItems`` exists.
A keyword that is not supported is refused with its path (``#/properties/age/contains``), never
ignored. ``allOf``, ``anyOf``, ``oneOf``, ``not``, ``if``, ``$ref`` and the dependencies may be
combined with each other and with any keywords beside them (``json_reader``). Annotations are
ignored: ``title``, ``examples``, ``nullable``, ``x-…`` and those of editors.

The regex may match fewer texts than validate:

- White space is that of ``json.dumps``: a space after ``:`` and ``,``, or none (``compact``).
- Strings consist of characters from U+0020 up and the escapes ``\" \\ \b \f \n \r \t``. They have
  no ``\/`` and no ``\uXXXX``. An escape counts as one character.
- A string has at most one ``pattern`` or one ``format``. ``minLength`` and ``maxLength`` beside it
  are supported if every string that it matches satisfies them, or if it repeats one character class
  (``^[a-z]+$``).
- A ``pattern`` must be one that ECMAScript and Python read alike (``regex.parse_search``).
- The formats in ``FORMATS`` are enforced. Any other, such as ``int64``, is an annotation.
- Integers have at most 15 digits unless a bound is larger. Other numbers have at most 6 digits
  after the point and no exponent. Bounds are exact. ``multipleOf`` must be a whole number.
- Objects have the named properties in the schema's order and no others, even if
  ``additionalProperties`` allows them. Without named properties, the names are those that
  ``propertyNames`` or ``patternProperties`` allow, or any.
- Of an object with p named properties, r of them required, ``minProperties`` may be 0 to r, or p,
  and ``maxProperties`` may be r, or p and more. Without required properties each may also be 1.
  Without named properties ``minProperties`` is at most 1.
- Arrays have the items of ``prefixItems`` and then those of ``items``; without ``items`` they end
  with ``prefixItems``.
- ``uniqueItems`` is supported for items of an enum. Up to four values of an enum come in any order.
  If there are more, items come in the enum's order, the first ``minItems`` values always occur, and
  values after the first ``maxItems`` never do.
- Where the schema sets no limit, values nest at most ``depth`` deep: in a schema that allows any
  value, and in a recursive ``$ref``.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from sedd.constraints.json_converter import Converter
from sedd.constraints.json_reader import MAX_NESTING
from sedd.constraints.json_text import refuse
from sedd.constraints.regex import RegexError

__all__ = ["DEPTH", "MAX_NESTING", "regex_to_compile", "schema_to_regex"]

DEPTH = 2  # levels of values where the schema sets no limit, by default


def schema_to_regex(schema: Any, *, depth: int = DEPTH, compact: bool = False) -> str:
    """Convert a JSON schema to a regex of ``re.fullmatch`` for JSON texts that validate.

    Args:
        schema: a JSON schema as ``json.loads`` returns it.
        depth: how deep values nest where the schema sets no limit, 0 to ``MAX_NESTING``: in a
            schema that allows any value, and in a recursive reference.
        compact: leave out the spaces after ``:`` and ``,``.

    Raises:
        UserError: the schema is malformed, unsupported or allows no value. The message begins with
            the path of the keyword.
        FieldError: ``depth`` is out of range.
    """
    return Converter(schema, depth, compact).document()


@contextlib.contextmanager
def regex_to_compile(schema: Any, *, depth: int = DEPTH) -> Iterator[str]:
    """Yield the regex of ``schema``; the body of the ``with`` statement compiles it.

    The body may raise RegexError because a part of the regex is too large. The user did not write
    that regex. The error is therefore replaced by a UserError with the path of the smallest
    subschema whose regex contains the part.
    """
    converter = Converter(schema, depth, compact=False)
    pattern = converter.document()
    try:
        yield pattern
    except RegexError as error:
        around = [(len(text), path) for path, text in converter.made if error.piece in text]
        refuse(min(around, default=(0, ()))[1], error.reason)
