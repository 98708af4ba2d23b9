"""A user's scoring function, as the samplers that search with it call it.

A search runs inside one compiled program, which calls the user's function on the host. No exception
can leave such a program. A failure is therefore signalled by scores of nan, which end the search;
the ``TextVerifier`` keeps the error message, and the caller raises it after the program has ended.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sedd.arrays import NAN
from sedd.data.tokenizers import Tokenizer
from sedd.denoiser import Denoiser
from sedd.errors import UserError
from sedd.types import Array, Float, Int

NO_NUMBERS = (
    "the probabilities are nan: check the parameters of the model, and the logit processor if "
    "there is one"
)

Verifier = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(tokens [R, L], real [R, L]) -> scores [R], higher is better; ``real`` is False on padding.

A score that is not finite ends a search, and all scores of that search are then nan.
"""

TextScorer = Callable[[list[str]], Sequence[float]]
"""A function from R texts to R finite scores, higher is better."""


def verify(
    verifier: Verifier, denoiser: Denoiser, tokens_BL: Int[Array, "B L"]
) -> Float[Array, " B"]:
    """Call ``verifier`` on the host; nan for every sequence if one score is not finite.

    Real positions have a segment above 0 in ``denoiser.attend``; without segments all are real.
    """
    attend = denoiser.attend
    segment_BL = None if attend is None else attend.segment_BL
    real_BL = jnp.ones(tokens_BL.shape, bool) if segment_BL is None else segment_BL > 0

    def scores(tokens_RL, real_RL):
        return np.asarray(verifier(np.asarray(tokens_RL), np.asarray(real_RL)), np.float32)

    shape = jax.ShapeDtypeStruct(tokens_BL.shape[:1], jnp.float32)
    score_B = jax.pure_callback(scores, shape, tokens_BL, real_BL, vmap_method="sequential")
    return jnp.where(jnp.isfinite(score_B).all(), score_B, jnp.nan)


class TextVerifier:
    """A ``Verifier`` made of a user's function on texts.

    Each device calls it with its own sequences. The user's function is never called by two devices
    at the same time.

    If the function raises, or returns anything but one finite score a text, the error is kept for
    ``take_error`` and all scores are nan. ``text_verifier`` describes the arguments.
    """

    def __init__(self, function: TextScorer, tokenizer: Tokenizer, name: str):
        self.function, self.tokenizer, self.name = function, tokenizer, name
        self._error: UserError | None = None
        self._lock = threading.Lock()

    def __call__(self, tokens_RL: np.ndarray, real_RL: np.ndarray) -> np.ndarray:
        """Scores [R] of the decoded sequences; nan for all after a failure."""
        with self._lock:
            if (np.asarray(tokens_RL) == NAN).any():
                self._error = UserError(NO_NUMBERS)
            if self._error is None:
                rows = zip(np.asarray(tokens_RL), np.asarray(real_RL), strict=True)
                try:
                    texts = [self.tokenizer.decode(row[real]) for row, real in rows]
                    numbers = text_numbers(self.function, texts, f"verifier {self.name}")
                    return numbers.astype(np.float32)
                except UserError as error:
                    self._error = error
        return np.full(len(tokens_RL), np.nan, np.float32)

    def take_error(self) -> UserError | None:
        """Return the first error since the last call of this method, and forget it."""
        error, self._error = self._error, None
        return error


def text_numbers(
    function: TextScorer, texts: list[str], where: str, what: str = "score"
) -> np.ndarray:
    """Call a user's function on texts, and check what it returns.

    Args:
        function: from a list of R texts to R finite numbers.
        texts: the texts.
        where: the function, for the beginning of a message.
        what: what a number is called in messages.

    Returns:
        The numbers as float64, [R].

    Raises:
        UserError: the function raised, or did not return R finite numbers.
    """
    try:
        numbers = np.asarray(function(texts), float)
    except UserError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise UserError(f"{where} raised {type(error).__name__}: {error}") from error
    if numbers.shape != (len(texts),):
        raise UserError(
            f"{where} must return one {what} a text, {len(texts)} in all, got an array of shape "
            f"{numbers.shape}"
        )
    bad = np.flatnonzero(~(np.abs(numbers) <= np.finfo(np.float32).max))
    if len(bad):
        text = texts[bad[0]]
        raise UserError(
            f"{where}: a {what} must be finite, got {numbers[bad[0]]} for {text[:80]!r}"
        )
    return numbers


def verifier_error(sampler: Any) -> UserError | None:
    """Take the error of the sampler's ``TextVerifier``; None without an error or a verifier."""
    verifier = getattr(sampler, "verifier", None)
    return verifier.take_error() if isinstance(verifier, TextVerifier) else None


def text_verifier(
    function: TextScorer, tokenizer: Tokenizer | None, name: str = ""
) -> TextVerifier:
    """The verifier of a function on texts: one object for each pair of function and tokenizer.

    The verifier is a static part of the compiled program, so a new object would compile anew. An
    object is released when neither a compiled program nor a caller refers to it.

    Args:
        function: scores texts.
        tokenizer: decodes the sequences; None raises UserError.
        name: used in error messages; by default the function's own.
    """
    if tokenizer is None:
        raise UserError("a verifier scores text, and this model has no tokenizer to decode it")
    # The verifier refers to its tokenizer: while the entry exists, the id is not used again.
    key = (function, id(tokenizer))
    verifier = _VERIFIERS.get(key)
    if verifier is None:
        name = name or getattr(function, "__name__", str(function))
        verifier = _VERIFIERS[key] = TextVerifier(function, tokenizer, name)
    return verifier


_VERIFIERS: weakref.WeakValueDictionary[Any, TextVerifier] = weakref.WeakValueDictionary()
