"""Verifiers: what the samplers that search score texts by.

Users give a function on texts, or the model itself (``SelfLikelihood``), or several of these, an
ensemble. Samplers hold a ``Verifier``, a function on tokens, which ``text_verifier`` makes of a
function on texts.

A search runs inside one compiled program, which calls the user's function on the host. No exception
can leave such a program. A failure is therefore signalled by scores of nan, which end the search;
the ``TextVerifier`` keeps the error message, and the caller raises it after the program has ended.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sedd.arrays import NAN
from sedd.data.tokenizers import Tokenizer
from sedd.denoiser import Denoiser
from sedd.errors import FieldError, UserError
from sedd.samplers.self_likelihood import SelfLikelihood
from sedd.types import Array, Bool, Float, Int, Key

NO_NUMBERS = (
    "the probabilities are nan: check the parameters of the model, and the logit processor if "
    "there is one"
)

Verifier = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(tokens [R, L], real [R, L]) -> scores [R], higher is better; ``real`` is False on padding.

A score that is not finite ends a search, and all scores of that search are then nan.
"""

Verifiers = Verifier | SelfLikelihood | tuple[Verifier | SelfLikelihood, ...]
"""One verifier, or an ensemble of several."""

TextScorer = Callable[[list[str]], Sequence[float]]
"""A function from R texts to R finite scores, higher is better."""

SELF = "self"  # the name of ``SelfLikelihood`` for users; "self:16" sets its draws


class Scores(NamedTuple):
    """The scores of some texts, and the network calls of the verifiers for each of them."""

    score_RE: Float[Array, "R E"]  # a column for each verifier
    calls_R: Int[Array, " R"]


def verifiers_of(verifiers: Verifiers) -> tuple[Verifier | SelfLikelihood, ...]:
    """The verifiers of an ensemble, or the single one."""
    return verifiers if isinstance(verifiers, tuple) else (verifiers,)


def verify(
    verifiers: Verifiers,
    denoiser: Denoiser,
    keys_R: Key[Array, " R"],
    tokens_RL: Int[Array, "R L"],
    free_RL: Bool[Array, "R L"],
) -> Scores:
    """Score texts by every verifier; all scores are nan if one is not finite.

    Args:
        verifiers: one or several.
        denoiser: the model, which ``SelfLikelihood`` calls.
        keys_R: keys for the random numbers of ``SelfLikelihood``.
        tokens_RL: the texts.
        free_RL: the positions that were drawn, which ``SelfLikelihood`` scores.
    """
    columns, calls_R = [], jnp.zeros(len(tokens_RL), jnp.int32)
    for verifier in verifiers_of(verifiers):
        if isinstance(verifier, SelfLikelihood):
            score_R, own_R = verifier(denoiser, keys_R, tokens_RL, free_RL)
            calls_R = calls_R + own_R
        else:
            score_R = _on_host(verifier, denoiser, tokens_RL)
        columns.append(score_R)
    score_RE = jnp.stack(columns, 1)
    return Scores(jnp.where(jnp.isfinite(score_RE).all(), score_RE, jnp.nan), calls_R)


def _on_host(
    verifier: Verifier, denoiser: Denoiser, tokens_BL: Int[Array, "B L"]
) -> Float[Array, " B"]:
    """Call ``verifier`` on the host.

    Real positions have a segment above 0 in ``denoiser.attend``; without segments all are real.
    """
    attend = denoiser.attend
    segment_BL = None if attend is None else attend.segment_BL
    real_BL = jnp.ones(tokens_BL.shape, bool) if segment_BL is None else segment_BL > 0

    def scores(tokens_RL, real_RL):
        return np.asarray(verifier(np.asarray(tokens_RL), np.asarray(real_RL)), np.float32)

    shape = jax.ShapeDtypeStruct(tokens_BL.shape[:1], jnp.float32)
    return jax.pure_callback(scores, shape, tokens_BL, real_BL, vmap_method="sequential")


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
    """Take the errors of the sampler's ``TextVerifier``s, and return the first of them, if any."""
    each = verifiers_of(getattr(sampler, "verifier", ()))
    errors = [one.take_error() for one in each if isinstance(one, TextVerifier)]
    return next((error for error in errors if error is not None), None)


def as_verifiers(given: Any, tokenizer: Tokenizer | None, names: Sequence[str] = ()) -> Verifiers:
    """The verifiers that a user names: a function on texts, "self", or a list of these.

    Args:
        given: a function from texts to scores; ``"self"`` or ``"self:DRAWS"`` for the
            ``SelfLikelihood``; or a list of such, an ensemble.
        tokenizer: decodes the sequences for functions.
        names: of the entries of a list, for error messages; by default those of the functions.

    Raises:
        UserError: a function is given, and the model has no tokenizer.
        FieldError: a value is none of these.
    """
    if not isinstance(given, list | tuple):
        return _as_verifier(given, tokenizer, "")
    if not given:
        raise FieldError("verifier", "must be a verifier, or a list of at least one")
    named = zip(given, names or [""] * len(given), strict=True)
    each = [_as_verifier(one, tokenizer, name) for one, name in named]
    return each[0] if len(each) == 1 else tuple(each)


def _as_verifier(given: Any, tokenizer: Tokenizer | None, name: str) -> Verifier | SelfLikelihood:
    """One verifier as a user names it."""
    if isinstance(given, SelfLikelihood):
        return given
    if isinstance(given, str):
        return self_likelihood(given)
    if not callable(given):
        raise FieldError("verifier", f'must be a function of texts or "self", got {given!r}')
    function: Any = given
    return text_verifier(function, tokenizer, name)


def self_likelihood(spelt: str) -> SelfLikelihood:
    """The verifier that ``self`` or ``self:DRAWS`` names; FieldError if it is neither."""
    name, _, draws = spelt.partition(":")
    if name != SELF or (spelt != SELF and not draws.isdecimal()):
        raise FieldError("verifier", f'must be a function, "self" or "self:DRAWS", got {spelt!r}')
    return SelfLikelihood(draws=int(draws)) if draws else SelfLikelihood()


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
