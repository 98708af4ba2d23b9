"""The one exception that a user's mistake raises, and what others' errors say."""


class UserError(ValueError):
    """A mistake of the user's; the message is one line: the value, and what would be right.

    The commands print it as ``error: …`` and exit with code 2; the Python interface raises it.
    """


def first_line(error: Exception) -> str:
    """What an error says, without what follows."""
    return str(error).partition("\n")[0][:200]
