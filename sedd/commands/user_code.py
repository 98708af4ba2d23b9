"""Load functions from a user's file, for ``--verifier`` and ``--logit-processor``.

Loading runs the file, as importing it would. Whatever the user's code raises, when it is loaded or
when it is called, becomes one line of a UserError with the number of the line in the user's file.
"""

import functools
import os
import runpy
import traceback
from collections.abc import Callable
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
        raise UserError(f"{flag} {spec}{_line(error, path)}: {_said(error)}") from error
    if not callable(found):
        raise UserError(f"{flag} {spec}: {path} defines no function {name!r}")
    return found


def path_and_name(spec: str) -> tuple[str, str]:
    """Split ``file.py:function``; ``~`` is the home directory."""
    path, _, name = spec.rpartition(":")
    return os.path.expanduser(path), name


@functools.cache  # the same object for equal arguments, as in ``load_function``
def load_processor(spec: str, flag: str, mask_id: int | None) -> "LogitProcessor":
    """Load a logit processor.

    Args:
        spec: the path and the name of its function.
        flag: the flag with which the message of an error begins.
        mask_id: the mask token of the model, None without one. Only rows of masked positions are
            checked.

    Raises:
        UserError: as ``load_function``.
    """
    return LogitProcessor(load_function(spec, flag), spec, flag, mask_id)


class LogitProcessor:
    """A user's function on log probabilities [B, K, N] whose results are checked.

    It is called inside jit (see ``Reshape.logit_processor``). If the function raises, or returns
    another shape or type, tracing raises a UserError. Bad values (nan, inf, or -inf for every
    token) appear only when the compiled program runs, and a compiled program cannot raise. Such
    rows keep the model's conditional, so that every sampler ends, and ``raise_error`` raises
    afterwards.

    Args:
        function: the user's function.
        spec: its path and name, for messages.
        flag: the flag with which a message begins.
        mask_id: the mask token of the model, or None; only rows of masked positions are checked.
    """

    def __init__(self, function: Callable[..., Any], spec: str, flag: str, mask_id: int | None):
        self.function, self.where, self.mask_id = function, f"{flag} {spec}", mask_id
        self.path, _ = path_and_name(spec)
        self._failed = False

    def __call__(
        self,
        log_probs_BKN: Float[Array, "B K N"],
        tokens_BL: Int[Array, "B L"],
        positions_BK: Int[Array, "B K"],
    ) -> Float[Array, "B K N"]:
        try:
            returned = self.function(log_probs_BKN, tokens_BL, positions_BK)
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            hint = "; it runs inside jit: write jax.numpy for numpy, and jnp.where for if"
            hint = hint if isinstance(error, UNTRACEABLE) else ""
            where = f"{self.where}{_line(error, self.path)}"
            raise UserError(f"{where}: {_said(error)}{hint}") from error
        dtype, shape = getattr(returned, "dtype", None), getattr(returned, "shape", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            kind = f"an array of {dtype}" if dtype is not None else f"{type(returned).__name__}"
            raise UserError(f"{self.where}: it must return an array of floats, got {kind}")
        if shape != log_probs_BKN.shape:
            raise UserError(
                f"{self.where}: it must return log_probs of the shape that it was given, "
                f"{log_probs_BKN.shape}, got {shape}"
            )
        shaped_BKN = jnp.asarray(returned, log_probs_BKN.dtype)
        good_BK = jnp.isfinite(shaped_BKN.max(-1))  # neither nan nor inf, and a token is left
        masked_BK = jnp.take_along_axis(tokens_BL, positions_BK, 1) == self.mask_id
        jax.lax.cond(
            (masked_BK & ~good_BK).any(), lambda: jax.debug.callback(self._fail), lambda: None
        )
        # With nan some samplers would never end, and the error would never be raised.
        return jnp.where(good_BK[..., None], shaped_BKN, log_probs_BKN)

    def raise_error(self) -> None:
        """Raise UserError if the function returned bad values since the last call of this method.

        Waits for the programs that are still running.
        """
        jax.effects_barrier()
        failed, self._failed = self._failed, False
        if failed:
            raise UserError(
                f"{self.where}: it returned nan, inf, or -inf for every token of a masked position;"
                " log_probs must be finite, or -inf for tokens that are excluded"
            )

    def _fail(self) -> None:
        self._failed = True


@functools.cache
def _run_file(path: str) -> dict[str, Any]:
    return runpy.run_path(path)


def _line(error: BaseException, path: str) -> str:
    """``, line N`` for the last line of the user's file in the error's traceback, or nothing."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    return f", line {lines[-1]}" if lines else ""


def _said(error: BaseException) -> str:
    """The type and the message of an error, shortened to the first line if it is JAX's."""
    message = str(error).partition("\n")[0] if isinstance(error, UNTRACEABLE) else str(error)
    return f"{type(error).__name__}: {message}".rstrip(" .:")
