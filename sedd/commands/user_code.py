"""A user's logit processor, for ``--logit-processor``."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sedd.configuration.user_function import load_function, path_and_name, raised
from sedd.errors import UserError
from sedd.types import Array, Float, Int


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
            raise raised(error, self.where, self.path) from error
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
