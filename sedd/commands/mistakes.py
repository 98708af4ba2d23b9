"""Describe a rejected command line in one line: which flag is wrong, and what would be right.

Tyro itself prints such errors as boxes. Its hook for parse errors gets an event, whose class is the
kind of the error and whose fields are its details. This module writes the line from the event. The
hook's module ``tyro._errors`` is not public, so pyproject.toml bounds tyro's version; an event of
an unknown class still gives an error of one line.
"""

import dataclasses
import difflib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, get_type_hints

import tyro
from tyro import _errors as events

from sedd.errors import FieldError, UserError, fields_within

SUGGESTIONS = 3  # the most flags that "did you mean" names


def as_flag(field: str) -> str:
    """The flag of a field: ``--inner.block`` for ``inner.block``."""
    return f"--{field.replace('_', '-')}"


def reject(event: events.ParseErrorEvent, arguments: Sequence[str], flags: Sequence[str]) -> None:
    """Raise the error of a command line that tyro rejected. Tyro calls this function as its hook.

    Args:
        event: tyro's description of the error.
        arguments: the command line.
        flags: all flags of the command, for suggestions.

    Raises:
        FieldError: a dataclass refused the value of one field; its path names the flag.
        UserError: every other error.
    """
    if isinstance(event, events.InstantiationFailure):
        if event.argument is None:
            _raise_cause(sys.exc_info()[1])
        raise UserError(_wrong_value(event.argument, arguments)) from None
    raise UserError(_describe(event, flags)) from None


def _raise_cause(error: BaseException | None) -> NoReturn:
    """Raise the error of the dataclass that refused its values, which tyro's exceptions wrap."""
    place = getattr(error, "arg", "")  # where the dataclass is, such as "config.optimizer"
    path = place.removeprefix("config").lstrip(".") if isinstance(place, str) else ""
    path = path.replace("-", "_")  # tyro writes names as flags
    while error is not None and error.__context__ is not None:
        error = error.__context__
    if not isinstance(error, FieldError):
        raise UserError(f"{path}{': ' if path else ''}{error}") from None
    with fields_within(path):
        raise error


def _describe(event: events.ParseErrorEvent, flags: Sequence[str]) -> str:
    """Write the line for an event: an unknown or missing flag, a missing value, a wrong choice."""
    help_ = "; see --help"
    if isinstance(event, events.UnrecognizedArgs):
        return _unrecognized(event.tokens[0], flags)
    if isinstance(event, events.MissingArgs):
        missing = ", ".join(_usage(each.arg) for each in event.missing_arguments)
        unknown = event.unrecognized_tokens
        return f"missing {missing}" + (
            f"; {_unrecognized(unknown[0], flags)}" if unknown else help_
        )
    if isinstance(event, events.BadValue):
        flag = event.argument.display_name()
        return f"{flag} needs a value ({flag}=VALUE){help_}"
    if isinstance(event, events.InvalidChoice):
        flag, choices = event.argument.display_name(), ", ".join(event.choices)
        return f"{flag} must be one of {choices}, got {event.value!r}{help_}"
    return f"the command line could not be read{help_}"


def _wrong_value(argument: Any, arguments: Sequence[str]) -> str:
    """Write the line for a value that the type of its flag does not accept.

    The event does not hold the value, so that it is looked up in the command line.
    """
    flag = argument.display_name()
    words = [word.partition("=") for word in arguments]
    value = ""
    for i, (name, equals, given) in enumerate(words):
        if as_flag(name.removeprefix("--")) == flag:
            value = given if equals else " ".join(arguments[i + 1 : i + 2])
    types = {word.strip("{}") for word in _metavar(argument).split("|")} - {"None"}
    kinds = {"INT": "not a whole number", "FLOAT": "not a number"}
    problem = kinds.get("|".join(types), "invalid value")
    return f"{flag}: {problem}: {value!r}; expected {_usage(argument)}; see --help"


def _metavar(argument: Any) -> str:
    return str(argument.lowered.metavar or "")


def _usage(argument: Any) -> str:
    """The flag with its placeholder, such as ``--count INT``."""
    return f"{argument.display_name()} {_metavar(argument)}".strip()


def _unrecognized(word: str, flags: Sequence[str]) -> str:
    """Write the line for a word that is no flag, with the flags that may have been meant."""
    word = word.partition("=")[0]
    if not word.startswith("--"):
        switch = word.lower() in ("true", "false")
        hint = "; a switch is written --name or --no-name" if switch else ""
        return f"unrecognized option {word}{hint}; see --help"
    close = suggestions(word, flags)
    if not close:
        return f"unrecognized option {word}; see --help"
    return f"unrecognized option {word}; did you mean {' or '.join(close)}?"


def suggestions(word: str, flags: Sequence[str]) -> list[str]:
    """Find the flags that a mistyped one may stand for, at most ``SUGGESTIONS``.

    These rules are tried in turn until one finds a flag: flags with the same last part
    (``--training.batch-size`` for ``--batch-size``), flags with these initials
    (``--optimizer.learning-rate`` for ``--optimizer.lr``), the flag with the most similar spelling.
    """
    word = word.removeprefix("--").replace("_", "-").lower()
    path, _, leaf = word.rpartition(".")
    names = [flag.removeprefix("--") for flag in flags]
    same = [name for name in names if name.rpartition(".")[2] == leaf]
    within = [name for name in names if not path or name.rpartition(".")[0] == path]
    short = [name for name in within if _abbreviates(leaf, name.rpartition(".")[2])]
    close = difflib.get_close_matches(word, names, 1)
    return [f"--{name}" for name in (same or short or close)[:SUGGESTIONS]]


def _abbreviates(word: str, name: str) -> bool:
    """Whether a word consists of the initials of a name's parts, as lr of learning-rate."""
    parts = name.split("-")
    return len(parts) > 1 and word == "".join(part[:1] for part in parts)


def flags_of(kind: type[Any], default: Any) -> Iterator[str]:
    """Yield every flag that tyro makes of a dataclass.

    The flags of a nested dataclass have the name of its field as prefix, unless the field is marked
    to have none.

    Args:
        kind: the dataclass.
        default: an instance, whose nested dataclasses may be of other classes than the field's; or
            None.
    """
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        value = getattr(default, field.name, field.default)
        if not dataclasses.is_dataclass(value):
            yield as_flag(field.name)
            continue
        marks = getattr(hints[field.name], "__metadata__", ())
        bare = any(
            mark is tyro.conf.OmitArgPrefixes or getattr(mark, "name", None) == "" for mark in marks
        )
        for flag in flags_of(type(value), value):
            yield flag if bare else f"{as_flag(field.name)}.{flag.removeprefix('--')}"
