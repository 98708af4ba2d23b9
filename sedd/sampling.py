"""Draw samples from a model: ``sedd.sample``, and the batch that it is made of."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sedd.arrays import NAN, bucket
from sedd.configuration.build import build_sampler, default_sampler
from sedd.configuration.config import default_cache_dir
from sedd.constraints.clamp import Clamp, check_prefix, free
from sedd.constraints.spans import Given, Rule, Shape, Span, batch_spans, spans_of
from sedd.data.tokenizers import Tokenizer
from sedd.errors import FieldError, UserError
from sedd.model import Model
from sedd.networks.base import Attend
from sedd.requests import Request
from sedd.reshape import Reshape
from sedd.samplers.base import Sampler, SamplerOptions, Samples
from sedd.types import Array, Key

TextScorer = Callable[[list[str]], Sequence[float]]
NUMBERS = {"temperature": 1.0, "top_k": None, "top_p": None, "guidance": 0.0}  # and their defaults
TEXTS = ("prompt", "suffix", "infill", "regex", "json_schema")
NO_NUMBERS = "the model's probabilities are nan, or the logit processor's"


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """The sequences that a call drew, in the order of its requests."""

    tokens: np.ndarray
    """Token ids [B, L]; what lies behind the end of a shorter sequence is padding."""
    calls: np.ndarray
    """Network calls of each sequence, [B]; candidates of a search and guidance included."""
    text: list[str] | None
    """The decoded sequences; None without a tokenizer."""
    trace: np.ndarray | None
    """Token ids at the start and after every round, [T, B, L]; None unless asked for."""
    times: np.ndarray | None
    """Diffusion time of each frame of the trace, [T], where all sequences share them."""
    score: np.ndarray | None
    """The verifier's scores, [B]; None without a verifier."""


class TextVerifier:
    """A verifier of tokens made from a user's function on texts.

    The function is called from inside a compiled search, where no exception gets out. On a failure
    the scores are nan, which ends the search, and the error is kept for ``take_error``.
    """

    def __init__(self, function: TextScorer, tokenizer: Tokenizer, name: str):
        self.function, self.tokenizer, self.name = function, tokenizer, name
        self._error: UserError | None = None

    def __call__(self, tokens_RL: np.ndarray, real_RL: np.ndarray) -> np.ndarray:
        """Scores [R] of the texts; nan for all once something has failed."""
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
        """The error since the last call of this method, or None."""
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
    """The error of the sampler's verifier since the last call of this function, or None."""
    verifier = getattr(sampler, "verifier", None)
    return verifier.take_error() if isinstance(verifier, TextVerifier) else None


def text_verifier(model: Model, function: TextScorer, name: str = "") -> TextVerifier:
    """The verifier of a function on texts; the same object for the same function and tokenizer.

    A new object would compile a new program. Verifiers live as long as a compiled program or the
    caller holds them.
    """
    if model.tokenizer is None:
        raise UserError("a verifier reads text, and this model has no tokenizer to make it")
    key = (function, id(model.tokenizer))  # a verifier holds its tokenizer: no id is used again
    verifier = _VERIFIERS.get(key)
    if verifier is None:
        name = name or getattr(function, "__name__", str(function))
        verifier = _VERIFIERS[key] = TextVerifier(function, model.tokenizer, name)
    return verifier


_VERIFIERS: weakref.WeakValueDictionary[Any, TextVerifier] = weakref.WeakValueDictionary()


@partial(jax.jit, static_argnames=("sampler", "trace"))
def _run(sampler: Sampler, denoiser, keys_B, tokens_BL, fixed_BL, *, trace) -> Samples:
    return sampler(denoiser, keys_B, tokens_BL, fixed_BL, trace=trace)


def sample(
    model: Model,
    key: Key[Array, "..."] | int,
    *,
    num: int | None = None,
    length: int | None = None,
    sampler: str | SamplerOptions | Sampler | None = None,
    prompt: str | Sequence[str] | None = None,
    suffix: str | Sequence[str] | None = None,
    infill: str | Sequence[str] | None = None,
    regex: str | Sequence[Any] | None = None,
    json_schema: Mapping[str, Any] | Sequence[Any] | None = None,
    clamp: Clamp | Sequence[Clamp] | None = None,
    constraint: Given | Sequence[Given] = None,
    rule: Rule = "joint",
    verifier: TextScorer | None = None,
    trace: bool = False,
    **options: Any,
) -> SampleResult:
    """Draw sequences from a model.

    Sequences of different lengths share a batch, padded and masked. The number of sequences and
    the length are rounded up to a few sizes (``sedd.arrays.bucket``), so that nearby ones share a
    compiled program, as do different texts, seeds, temperatures, top-k and top-p.

    Args:
        model: what ``sedd.load`` returned.
        key: an integer seed or one key, from which each sequence derives its own, or one key a
            sequence. Both ``jax.random.key`` and ``jax.random.PRNGKey`` will do.
        num: sequences to draw; by default as many as there are keys or texts, or 1.
        length: tokens in a sequence, the given ones included; the training length by default.
        sampler: a name, ``sedd.samplers.options(name, …)`` or a sampler. By default
            event_jump, tweedie for a model that depends on the noise level, or ordered for an
            autoregressive one.
        prompt: text at the start; one for all sequences, or one each.
        suffix: text at the end; one for all sequences, or one each.
        infill: text with gaps such as ``{mask:12}``; one for all sequences, or one each.
        regex: what the free text must match; one for all sequences, or one each, of which each
            may be None, or a list with one or None for each gap.
        json_schema: a JSON Schema of the free text, in the same form.
        clamp: the given tokens as a ``Clamp``, instead of texts; one for all, or one each.
        constraint: compiled automata, instead of ``regex`` or ``json_schema``, of the same form.
        rule: how a step draws under a constraint, see ``sedd.constraints.spans.Spans``. At
            temperature 0 the most likely matching string is taken.
        verifier: a function from a list of texts to a finite score each, higher is better; for
            the searches best_of_n and particle.
        trace: keep the tokens after every round.
        options: those of the sampler (``steps=128``; ``inner=`` a name or options for samplers
            that wrap another one), the numbers ``temperature``, ``top_k``, ``top_p`` and
            ``guidance``, one for all sequences or one each, and ``logit_processor``, see
            ``sedd.reshape.Reshape``.

    Raises:
        UserError: an unknown or bad option, numbers of keys and texts that differ, a text that
            does not fit, a sampler that does not go with the model, or a verifier that fails.
            A ``FieldError`` names the option in its ``field``.

    Example:
        >>> import sedd
        >>> model = sedd.load("runs/quickstart")
        >>> result = sedd.sample(model, 0, num=2, prompt="the ", sampler="event_jump", top_p=0.9)
        >>> [text.startswith("the ") for text in result.text]
        [True, True]
    """
    texts = {"prompt": prompt, "suffix": suffix, "infill": infill, "regex": regex}
    texts["json_schema"] = json_schema
    texts = {name: value for name, value in texts.items() if value is not None}
    each = {"clamp": clamp, "constraint": constraint, **texts}
    num, keys_B = _keys(key, num, {name: value for name, value in each.items() if _is_list(value)})
    clamps, spans = _given(model, num, length, texts, clamp, constraint)
    numbers = {name: options.pop(name) for name in NUMBERS if name in options}
    processor = options.pop("logit_processor", None)
    reshape = reshape_of(num, numbers, processor)
    if sampler is None:
        sampler = default_sampler(model.parts.parameterization)
    if not isinstance(sampler, Sampler):
        scorer = None if verifier is None else text_verifier(model, verifier)
        sampler = build_sampler(sampler, model.schedule, verifier=scorer, **options)
    elif options or verifier is not None:
        given = [*options, *(["verifier"] if verifier else [])]
        raise UserError(f"the sampler is built already: it takes no {', '.join(given)}")
    return draw(model, keys_B, sampler, clamps, spans, reshape=reshape, rule=rule, trace=trace)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _keys(key: Any, num: int | None, lists: Mapping[str, Sequence[Any]]) -> tuple[int, Array]:
    """How many sequences there are, and one key for each of them."""
    if isinstance(key, int | np.integer):
        key = jax.random.key(key)
    key = jnp.asarray(key)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.dtype != jnp.uint32 or key.shape[-1:] != (2,):
            raise FieldError("key", f"must be an integer or keys of jax.random, got {key.dtype}")
        key = jax.random.wrap_key_data(key)
    counts = {name: len(values) for name, values in lists.items()}
    counts |= {} if num is None else {"num": num}
    counts |= {"key": len(key)} if key.ndim else {}
    num = next(iter(counts.values()), 1)
    if num < 1:
        raise FieldError(next(iter(counts)), f"must be at least 1, got {num}")
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise UserError(f"the numbers of sequences differ: {said}")
    if not key.ndim:
        key = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(num))
    return num, key


def _given(model, num, length, texts, clamp, constraint) -> tuple[list[Clamp], list[list[Span]]]:
    """The given tokens and the spans that must match of each sequence."""
    if clamp is not None:
        for name in ("length", "prompt", "suffix", "infill"):
            if name in texts or (name == "length" and length is not None):
                raise FieldError(
                    name, "does not go with clamp, which has its own tokens and length"
                )
    if constraint is not None and texts.keys() & {"regex", "json_schema"}:
        raise UserError("regex, json_schema and constraint: give one of them")
    if texts and model.tokenizer is None:
        raise UserError(f"{', '.join(texts)}: this model has no tokenizer to read text with")
    cache_dir = Path(default_cache_dir()).expanduser()

    def one(row: int) -> tuple[Clamp, list[Span]]:
        own = {name: v[row] if _is_list(v) else v for name, v in texts.items()}
        request = Request(id=row, length=length, **own)
        if clamp is not None:
            tokens = clamp[row] if isinstance(clamp, Sequence) else clamp
        elif own.keys() & {"prompt", "suffix", "infill"}:
            tokens = request.clamp(model.tokenizer, model.length)
        else:
            tokens = free(model.length if length is None else length)
        compiled = constraint[row] if isinstance(constraint, Sequence) else constraint
        if own.keys() & {"regex", "json_schema"}:
            compiled = request.constraint(model.tokenizer, cache_dir)
        return tokens, spans_of(tokens, compiled, model.tokenizer)

    same = not any(map(_is_list, (clamp, constraint, *texts.values())))
    rows = [one(0)] * num if same else [one(row) for row in range(num)]
    return [tokens for tokens, _ in rows], [spans for _, spans in rows]


def draw(
    model: Model,
    keys_B: Key[Array, " B"],
    sampler: Sampler,
    clamps: Sequence[Clamp],
    spans: Sequence[Sequence[Span]],
    *,
    reshape: Reshape | None = None,
    rule: Rule = "joint",
    shape: Shape | None = None,
    trace: bool = False,
) -> SampleResult:
    """Draw one sequence for each key, with its clamp and its spans, as one padded batch.

    See ``sample``, which builds the arguments. Batches of one ``shape``, to which the spans are
    padded, share a program. Raises UserError where the sampler does not go with
    the model, an id is out of range, probabilities are nan, or the verifier fails.
    """
    for c in clamps if model.denoiser.causal else ():
        check_prefix(c)
    num, lengths = len(clamps), [c.length for c in clamps]
    rows, longest = bucket(num), bucket(max(lengths))
    row_of_B = np.minimum(np.arange(rows), num - 1)  # padding repeats the last sequence
    tokens_BL = np.zeros((rows, longest), np.int32)
    fixed_BL = np.ones((rows, longest), bool)  # padded positions are fixed: never drawn
    real_BL = np.zeros((rows, longest), bool)
    for row in range(rows):
        c = clamps[row_of_B[row]]
        tokens_BL[row, : c.length], fixed_BL[row, : c.length] = c.tokens_L, c.fixed_L
        real_BL[row, : c.length] = True
    given_BL = fixed_BL & real_BL
    model.check_ids(tokens_BL[given_BL])
    guided = False
    if reshape is not None:
        rule = _rule(rule, reshape, any(spans))
        guided = (given_BL.any(1) & (reshape.guidance_B[row_of_B] > 0)).any()
        reshape = jax.tree.map(lambda values: values[row_of_B], reshape)
    denoiser = replace(
        model.denoiser,
        attend=None if real_BL.all() else Attend(segment_BL=jnp.asarray(real_BL, jnp.int32)),
        reshape=reshape,
        given_BL=jnp.asarray(given_BL) if guided else None,
        constraint=batch_spans([spans[row] for row in row_of_B], rule, shape)
        if any(spans)
        else None,
    )
    sampler.check(denoiser)
    verifier_error(sampler)  # forget an earlier call's
    tokens_BL, fixed_BL = jnp.asarray(tokens_BL), jnp.asarray(fixed_BL)
    samples = _run(sampler, denoiser, keys_B[row_of_B], tokens_BL, fixed_BL, trace=trace)
    _check_drawn(np.asarray(samples.tokens_BL)[:num], spans)
    result = _result(model, sampler, samples, lengths)
    for tokens_L, row in zip(result.tokens, spans, strict=True):
        for span in row:
            if not span.automaton.accepts(tokens_L[span.start : span.start + span.length]):
                raise RuntimeError(f"drawn, but no match of {span.automaton.pattern!r}")  # our bug
    return result


def _check_drawn(tokens_BL: np.ndarray, spans: Sequence[Sequence[Span]]) -> None:
    """Raise UserError on a token drawn from nan, with its position and the state of its span."""
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
    """The samples on the host, without padding."""
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
    """``rule``, or most_likely for constrained sequences at temperature 0."""
    zero_B = reshape.temperature_B == 0
    if rule != "joint" or not constrained or not zero_B.any():
        return rule
    if not zero_B.all():
        raise UserError(
            "temperature 0 takes the most likely string under a constraint, which is another "
            "program: draw those sequences in a call of their own"
        )
    return "most_likely"


def reshape_of(
    num: int, numbers: Mapping[str, Any], processor: Callable[..., Any] | None = None
) -> Reshape | None:
    """The changes to the conditionals of ``num`` sequences, or None where there are none.

    ``numbers`` are values of ``NUMBERS``: one for all sequences, or a sequence with one each, which
    makes a Reshape whatever its values are. Raises FieldError on a bad value.
    """
    for name, value in numbers.items():
        if np.ndim(value) and np.shape(value) != (num,):
            raise FieldError(name, f"must be a number or {num} numbers, got {len(value)}")
    unchanged = all(np.ndim(v) == 0 and v == NUMBERS[name] for name, v in numbers.items())
    if unchanged and processor is None:
        return None
    reshape = Reshape.of(**numbers, logit_processor=processor)
    return jax.tree.map(lambda values: np.broadcast_to(values, num), reshape)
