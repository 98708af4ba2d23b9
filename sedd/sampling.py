"""Samples from a model: requests of any kind into one batch, and what comes back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sedd.arrays import NAN, bucket
from sedd.configuration.build import build_sampler, default_sampler
from sedd.constraints.clamp import Clamp, check_prefix, free
from sedd.constraints.spans import Given, Rule, Span, batch_spans, spans_of
from sedd.data.tokenizers import Tokenizer
from sedd.errors import FieldError, UserError
from sedd.model import Model
from sedd.networks.base import Attend
from sedd.reshape import Reshape
from sedd.samplers.base import Sampler, SamplerOptions, Samples
from sedd.types import Array, Key

TextScorer = Callable[[list[str]], Sequence[float]]
DEFAULTS = {"temperature": 1.0, "top_k": None, "top_p": None, "guidance": 0.0}
RESHAPES = {*DEFAULTS, "logit_processor"}
NO_NUMBERS = "the model's probabilities are nan, or the logit processor's"


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """Samples, the network calls each needed, and their text where there is a tokenizer."""

    tokens: np.ndarray  # [B, L]
    calls: np.ndarray  # [B]
    text: list[str] | None
    trace: np.ndarray | None  # [T, B, L]
    times: np.ndarray | None  # [T], diffusion times of the trace's frames, where they share them
    score: np.ndarray | None  # [B], the verifier's, where there is one


class TextVerifier:
    """A user's function on texts as a verifier of tokens; what goes wrong in it is kept.

    A failure scores nan, which ends a search.
    """

    def __init__(self, function: TextScorer, tokenizer: Tokenizer, name: str):
        self.function, self.tokenizer, self.name = function, tokenizer, name
        self._error: UserError | None = None

    def __call__(self, tokens_RL: np.ndarray, real_RL: np.ndarray) -> np.ndarray:
        """Scores of the texts, or nan for all."""
        if (np.asarray(tokens_RL) == NAN).any():
            self._error = UserError(NO_NUMBERS)
        if self._error is None:
            rows = zip(np.asarray(tokens_RL), np.asarray(real_RL), strict=True)
            try:
                return self._scores([self.tokenizer.decode(row[real]) for row, real in rows])
            except UserError as error:
                self._error = error
        return np.full(len(tokens_RL), np.nan, np.float32)

    def take_error(self) -> UserError | None:
        """What went wrong since the last time, if anything."""
        error, self._error = self._error, None
        return error

    def _scores(self, texts: list[str]) -> np.ndarray:
        where = f"verifier {self.name}"
        try:
            scores = np.asarray(self.function(texts), np.float32)
        except Exception as error:  # the user's code may raise anything
            raise UserError(f"{where} raised {type(error).__name__}: {error}") from error
        if scores.shape != (len(texts),):
            raise UserError(
                f"{where} must return one score a text, {len(texts)} in all, got an array of shape "
                f"{scores.shape}"
            )
        bad = np.flatnonzero(~np.isfinite(scores))
        if len(bad):
            text = texts[bad[0]]
            raise UserError(
                f"{where}: a score must be finite, got {scores[bad[0]]} for {text[:80]!r}"
            )
        return scores


def verifier_error(sampler: Sampler) -> UserError | None:
    """What went wrong in the sampler's verifier since the last time, if anything."""
    verifier = getattr(sampler, "verifier", None)
    return verifier.take_error() if isinstance(verifier, TextVerifier) else None


def text_verifier(model: Model, function: TextScorer, name: str = "") -> TextVerifier:
    """The verifier of a function on texts: the same one for the same function and model."""
    if model.tokenizer is None:
        raise UserError("a verifier reads text, and this model has no tokenizer to make it")
    key = (function, id(model.tokenizer))
    if key not in _VERIFIERS:  # another object would compile another program
        name = name or getattr(function, "__name__", str(function))
        _VERIFIERS[key] = TextVerifier(function, model.tokenizer, name)
    return _VERIFIERS[key]


_VERIFIERS: dict[Any, TextVerifier] = {}  # which keep their tokenizers, so that no id is reused


@partial(jax.jit, static_argnames=("sampler", "trace"))
def _run(sampler: Sampler, denoiser, keys_B, tokens_BL, fixed_BL, *, trace) -> Samples:
    return sampler(denoiser, keys_B, tokens_BL, fixed_BL, trace=trace)


def sample(
    model: Model,
    key: Key[Array, "..."],
    *,
    num: int = 1,
    length: int | None = None,
    sampler: str | SamplerOptions | Sampler | None = None,
    clamp: Clamp | Sequence[Clamp] | None = None,
    constraint: Given | Sequence[Given] = None,
    rule: Rule = "joint",
    verifier: TextScorer | None = None,
    trace: bool = False,
    **options: Any,
) -> SampleResult:
    """Draw ``num`` sequences of ``length`` tokens (default: the training length).

    ``key`` is one key, from which each sequence gets its own, or one key a sequence. ``clamp`` is
    one for all or one a sequence; sequences of different lengths share a batch, padded and masked.
    ``constraint`` is an automaton for all, or one a sequence: each None, an automaton for all from
    the first free position to the last, or a list with one or None for each gap. ``rule`` says how
    a step draws under it, see ``Spans``; temperature 0 takes the likeliest string. What comes back
    always matches.
    ``sampler`` is tweedie by default, and ordered for an autoregressive model, which takes no other
    and no tokens after free ones.
    ``options`` are the sampler's, such as ``steps=128``, and those of ``Reshape``, such as
    ``temperature=0.9`` or ``top_p=0.95``. A sampler that wraps another one takes ``inner``, a
    name or ``sedd.samplers.options(name, …)``; a search takes a ``verifier``, a function from a
    list of texts to a score each, higher is better.

    The number of sequences and the length are rounded up by ``bucket``: nothing is compiled twice
    for the same ones. UserError on an unknown sampler or option, a sampler that does not go with
    the model, and a verifier that fails.

    Example:
        >>> import jax, sedd
        >>> model = sedd.load("runs/quickstart")
        >>> result = sedd.sample(model, jax.random.key(0), num=2, sampler="event_jump")
        >>> result.tokens.shape, len(result.text)
        ((2, 12), 2)
    """
    if num < 1:
        raise UserError(f"num must be at least 1, got {num}")
    if clamp is None:
        clamp = free(model.length if length is None else length)
    elif length is not None:
        raise UserError("a clamp has a length of its own: give no length beside it")
    clamps = list(clamp) if isinstance(clamp, Sequence) else [clamp]
    keys_B = key if key.ndim else jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(num))
    num = len(keys_B)
    if len(clamps) == 1:
        clamps = clamps * num
    if len(clamps) != num:
        raise UserError(f"{len(clamps)} clamps for {num} sequences")
    one_each = isinstance(constraint, Sequence)
    constraints = list(constraint) if one_each else [constraint] * num
    if len(constraints) != num:
        raise UserError(f"{len(constraints)} constraints for {num} sequences")
    if model.denoiser.causal:
        for c in clamps:
            check_prefix(c)
    spans = [spans_of(c, given) for c, given in zip(clamps, constraints, strict=True)]
    reshape = reshape_of(num, {name: options.pop(name) for name in RESHAPES & options.keys()})
    if sampler is None:
        sampler = default_sampler(model.parts.parameterization)
    if not isinstance(sampler, Sampler):
        scorer = None if verifier is None else text_verifier(model, verifier)
        sampler = build_sampler(sampler, model.schedule, verifier=scorer, **options)
    elif options or verifier is not None:
        given = [*options, *(["verifier"] if verifier else [])]
        raise UserError(f"the sampler is built already: it takes no {', '.join(given)}")

    lengths = [c.length for c in clamps]
    rows, longest = bucket(num), bucket(max(lengths))
    row_of_B = np.minimum(np.arange(rows), num - 1)  # the last one again: it costs no call more
    tokens_BL = np.zeros((rows, longest), np.int32)
    fixed_BL = np.ones((rows, longest), bool)  # padding is fixed: it is never drawn
    real_BL = np.zeros((rows, longest), bool)
    for row in range(rows):
        c = clamps[row_of_B[row]]
        tokens_BL[row, : c.length], fixed_BL[row, : c.length] = c.tokens_L, c.fixed_L
        real_BL[row, : c.length] = True
    if reshape is not None:
        rule = _rule(rule, reshape, any(spans))
        reshape = jax.tree.map(lambda values: values[row_of_B], reshape)
    padded = [spans[row] for row in row_of_B]
    given_BL = fixed_BL & real_BL
    guided = reshape is not None and (given_BL.any(1) & (reshape.guidance_B > 0)).any()
    segments = None if real_BL.all() else Attend(segment_BL=jnp.asarray(real_BL, jnp.int32))
    denoiser = replace(
        model.denoiser,
        attend=segments,
        reshape=reshape,
        given_BL=jnp.asarray(given_BL) if guided else None,
        constraint=batch_spans(padded, rule) if any(spans) else None,
    )
    sampler.check(denoiser)
    verifier_error(sampler)  # what an earlier call may have left
    samples = _run(
        sampler,
        denoiser,
        keys_B[row_of_B],
        jnp.asarray(tokens_BL),
        jnp.asarray(fixed_BL),
        trace=trace,
    )
    _check_drawn(np.asarray(samples.tokens_BL)[:num], spans)
    result = _result(model, sampler, samples, lengths)
    for tokens_L, row in zip(result.tokens, spans, strict=True):
        for span in row:
            if not span.automaton.accepts(tokens_L[span.start : span.start + span.length]):
                raise RuntimeError(f"drawn, but no match of {span.automaton.pattern!r}")  # ours
    return result


def _check_drawn(tokens_BL: np.ndarray, spans: Sequence[Sequence[Span]]) -> None:
    """UserError where there was nan in place of probabilities: position, and state of a span."""
    bad = np.argwhere(tokens_BL == NAN)
    if not len(bad):
        return
    sequence, position = bad[0].tolist()
    where = f"sequence {sequence}, position {position}"
    for span in spans[sequence]:
        if span.start <= position < span.start + span.length:
            where += f", {span.automaton.states_after(position - span.start)}"
    raise UserError(f"{where}: {NO_NUMBERS}")


def _result(model: Model, sampler: Sampler, samples: Samples, lengths: list[int]) -> SampleResult:
    """On the host, without what was padded."""
    num, longest = len(lengths), max(lengths)
    tokens, calls = np.asarray(samples.tokens_BL), np.asarray(samples.calls_B)
    score = None if samples.score_B is None else np.asarray(samples.score_B)
    if score is not None and not np.isfinite(score).all():
        raise verifier_error(sampler) or UserError("the verifier's scores must be finite")
    text = None
    if model.tokenizer is not None:
        rows = zip(tokens[:num], lengths, strict=True)
        text = [model.tokenizer.decode(row[:n]) for row, n in rows]
    trace = times = None
    if samples.trace_TBL is not None and samples.rounds is not None:
        frames = int(samples.rounds) + 1
        trace = np.asarray(samples.trace_TBL[:frames])[:, :num, :longest]
        if samples.times_T is not None and len(samples.times_T) == frames:
            times = np.asarray(samples.times_T)
    return SampleResult(
        tokens=tokens[:num, :longest],
        calls=calls[:num],
        text=text,
        trace=trace,
        times=times,
        score=None if score is None else score[:num],
    )


def _rule(rule: Rule, reshape: Reshape, constrained: bool) -> Rule:
    """The rule of a step under a constraint: the most likely string at temperature 0."""
    zero_B = reshape.temperature_B == 0
    if rule != "joint" or not constrained or not zero_B.any():
        return rule
    if not zero_B.all():
        raise UserError(
            "temperature 0 takes the most likely string under a constraint, which is another "
            "program: draw those sequences in a call of their own"
        )
    return "most_likely"


def reshape_of(num: int, options: dict[str, Any]) -> Reshape | None:
    """The changes to the conditionals of ``num`` sequences; FieldError on a bad value.

    Values are numbers, or sequences with one each. None where every value is the default number.
    """
    for name, value in options.items():
        if name in DEFAULTS and np.ndim(value) and np.shape(value) != (num,):
            raise FieldError(name, f"must be a number or {num} numbers, got {len(value)}")
    if all(np.ndim(value) == 0 and value == DEFAULTS.get(name) for name, value in options.items()):
        return None
    reshape = Reshape.of(**options)
    return jax.tree.map(lambda values: np.broadcast_to(values, num), reshape)
