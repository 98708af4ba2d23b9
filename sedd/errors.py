"""The exception for a user's mistake, and helpers for its message and for other lines."""

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager

# Control characters except newline and tab, on which a terminal acts; separators of lines and
# paragraphs; marks that reorder text; halves of surrogate pairs, which have no encoding.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


class UserError(ValueError):
    """A user's mistake. The message is one line: the wrong value, and what would be right.

    The commands print the message as ``error: …`` and exit with code 2. The Python interface raises
    it. A ``FieldError``, of one argument or option, is a ``UserError`` too.
    """


class FieldError(UserError):
    """A field or option has a wrong value. The message is ``FIELD PROBLEM``.

    Args:
        field: the name of the field in Python; command lines show the flag instead.
        problem: the rest of the sentence, such as "must be at least 1, got 0". A colon or comma at
            its start follows the name without a space: ": no such file".
        where: the component that has the field, for the beginning of the message; may be empty.
    """

    def __init__(self, field: str, problem: str, where: str = ""):
        self.field, self.problem, self.where = field, problem, where
        super().__init__(self.named(field))

    def named(self, name: str) -> str:
        """The message with another name in place of the field's, such as a flag."""
        space = "" if self.problem.startswith((":", ",")) else " "
        return f"{self.where}{': ' if self.where else ''}{name}{space}{self.problem}"


@contextmanager
def fields_within(path: str) -> Iterator[None]:
    """Prefix the field of a FieldError that the block raises.

    Within ``fields_within("training")`` the field ``steps`` becomes ``training.steps``.
    """
    try:
        yield
    except FieldError as error:
        field = f"{path}.{error.field}" if path else error.field
        raise FieldError(field, error.problem, error.where) from error


@contextmanager
def mistakes_in(field: str) -> Iterator[None]:
    """Turn a UserError of the block into a FieldError, so that the message begins with the field.

    A message that begins with the field's name already is not given it twice. A FieldError is left
    as it is.
    """
    try:
        yield
    except FieldError:
        raise
    except UserError as error:
        message = str(error)
        named = message.startswith(tuple(f"{field}{end}" for end in " :,"))
        problem = message.removeprefix(field).lstrip() if named else f": {message}"
        raise FieldError(field, problem) from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters."""
    return str(error).partition("\n")[0][:200]


def did_you_mean(word: str, known) -> str:
    """A suggestion to end a message, ``; did you mean 'x'?``; empty if no known word is close.

    Args:
        word: the unknown word.
        known: the words that are right.
    """
    close = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def printable(text: str) -> str:
    r"""Replace characters that a terminal would act on by escapes, such as ``\x1b``."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
