"""The one exception that a user's mistake raises, and what others' errors say."""

import difflib


class UserError(ValueError):
    """A mistake of the user's; the message is one line: the value, and what would be right.

    The commands print it as ``error: …`` and exit with code 2; the Python interface raises it.
    """


def first_line(error: Exception) -> str:
    """What an error says, without what follows."""
    return str(error).partition("\n")[0][:200]


def did_you_mean(word: str, known) -> str:
    """``; did you mean 'x'?``, or nothing where no known word is close."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""
