"""Functions from a user's file, named ``file.py:function``.

Loading runs the file, as importing it would. Whatever the user's code raises, when it is loaded or
when it is called, becomes one line of a UserError with the number of the line in the user's file.
"""

import functools
import os
import runpy
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sedd.errors import UserError
from sedd.types import Array, Float, Int

# Raised by numpy functions and Python's ``if`` on values that JAX is only tracing.
UNTRACEABLE = (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError)


def load_function(spec: str, flag: str) -> Callable[..., Any]:
    """Load the function that ``file.py:function`` names.

    The file runs once, so that an equal ``spec`` gives the same object: a function is part of the
    key of a compiled program.

    Args:
        spec: the path and the name, such as "verifier.py:short_words".
        flag: the flag with which the message of an error begins.

    Raises:
        UserError: the file is missing, fails while it runs, or does not define the function.
    """
    path, name = path_and_name(spec)
    if not path or not name.isidentifier():
        raise UserError(f"{flag} {spec}: it must be file.py:function")
    if not Path(path).is_file():
        raise UserError(f"{flag} {spec}: {path}: no such file")
    try:
        found = _run_file(path).get(name)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise UserError(f"{flag} {spec}{line_of(error, path)}: {said_by(error)}") from error
    if not callable(found):
        raise UserError(f"{flag} {spec}: {path} defines no function {name!r}")
    return found


def path_and_name(spec: str) -> tuple[str, str]:
    """Split ``file.py:function``; ``~`` is the home directory."""
    path, _, name = spec.rpartition(":")
    return os.path.expanduser(path), name


@dataclass(frozen=True)
class UserLogProb:
    """A user's unnormalised log probability of tokens, for the objective ``energy``.

    The file is loaded at the first call, so that a trained model can be read without it.

    Args:
        spec: the path and the name of the function.
        flag: the flag with which a message begins.
    """

    spec: str
    flag: str = "--objective.function"

    def load(self) -> Callable[..., Any]:
        """Load the function; UserError as ``load_function``."""
        if not self.spec:
            raise UserError(
                f"{self.flag} is missing: the unnormalised log probability, as file.py:function"
            )
        return load_function(self.spec, self.flag)

    def __call__(self, tokens_BL: Int[Array, "B L"]) -> Float[Array, " B"]:
        where, path = f"{self.flag} {self.spec}", path_and_name(self.spec)[0]
        function = self.load()
        try:
            returned = jnp.asarray(function(tokens_BL))
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise raised(error, where, path) from error
        if returned.shape != tokens_BL.shape[:1] or not jnp.issubdtype(
            returned.dtype, jnp.floating
        ):
            raise UserError(
                f"{where}: it must return one float for each of {len(tokens_BL)} sequences, got an "
                f"array of {returned.dtype} of the shape {returned.shape}"
            )
        return returned.astype(jnp.float32)


def raised(error: BaseException, where: str, path: str) -> UserError:
    """The UserError of an error that a user's function raised inside jit."""
    hint = "; it runs inside jit: write jax.numpy for numpy, and jnp.where for if"
    hint = hint if isinstance(error, UNTRACEABLE) else ""
    return UserError(f"{where}{line_of(error, path)}: {said_by(error)}{hint}")


@functools.cache
def _run_file(path: str) -> dict[str, Any]:
    """The names that a file defines; it runs once."""
    return runpy.run_path(path)


def line_of(error: BaseException, path: str) -> str:
    """``, line N`` for the last line of the user's file in the error's traceback, or nothing."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    return f", line {lines[-1]}" if lines else ""


def said_by(error: BaseException) -> str:
    """The type and the message of an error, shortened to the first line if it is JAX's."""
    message = str(error).partition("\n")[0] if isinstance(error, UNTRACEABLE) else str(error)
    return f"{type(error).__name__}: {message}".rstrip(" .:")
