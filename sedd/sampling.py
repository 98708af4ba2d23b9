"""Draw samples from a model: ``sedd.sample``.

``sample`` turns texts into given tokens (``Clamp``), constraints (``Span``), a sampler and a
``Reshape``. ``draw`` makes one padded batch of them, runs the compiled sampler and cuts the padding
off. The ``sample`` command calls ``draw`` with batches of requests from a file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from sedd.arrays import NAN, bucket
from sedd.configuration.build import build_sampler, default_sampler
from sedd.configuration.config import default_cache_dir
from sedd.constraints.clamp import Clamp, free
from sedd.constraints.spans import Given, Rule, Shape, Span, batch_spans, spans_of
from sedd.denoiser import Denoiser
from sedd.errors import FieldError, UserError
from sedd.model import Model
from sedd.networks.base import Attend
from sedd.networks.mesh import BOTH, SEQUENCES, Placement, on_host
from sedd.requests import Request
from sedd.reshape import Reshape
from sedd.samplers.base import Sampler, SamplerOptions, Samples
from sedd.samplers.noise import fold
from sedd.samplers.self_likelihood import SelfLikelihood
from sedd.samplers.semi_autoregressive import SemiAutoregressive
from sedd.samplers.verifier import NO_NUMBERS, TextScorer, as_verifiers, verifier_error
from sedd.types import Array, Bool, Int, Key
from sedd.watermark.scheme import Scheme, drawn_positions, scored_positions

Scoring = TextScorer | str | SelfLikelihood
"""A verifier as users name it."""

# Options of ``Reshape`` that are numbers, with the default of each.
NUMBERS = {"temperature": 1.0, "top_k": None, "top_p": None, "guidance": 0.0}
NONCE = 2**31 - 3  # folded into a key for the nonce of its watermark; larger than any position


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """The drawn sequences, in the order of the keys."""

    tokens: np.ndarray
    """Token ids [B, L]; a shorter sequence is filled up with 0s to the longest, L."""
    calls: np.ndarray
    """Network calls for each sequence, [B]. They include the second calls of guidance, and with a
    search the calls of all candidates for the sequence that is returned, and of the verifier
    self."""
    rows: np.ndarray
    """How many entries each sequence had on the batch axis, summed over these calls, [B]: one a
    call, except where a sampler calls the network with several versions of a sequence."""
    text: list[str] | None
    """The decoded sequences; with ``messages`` the answers, each up to its end. None without a
    tokenizer."""
    trace: np.ndarray | None
    """Token ids at the start and after every round, [T, B, L]; None unless ``trace`` was set."""
    times: np.ndarray | None
    """Diffusion time of each frame of the trace, [T]; None without a trace, or if sequences differ
    in their times."""
    score: np.ndarray | None
    """The verifier's scores, [B]; of several verifiers [B, E]; None without a verifier."""
    verifier_calls: np.ndarray | None
    """Texts that were scored for each sequence, once for each verifier, [B]; None without one."""
    log_partition: np.ndarray | None
    """With particle: an estimate of the logarithm of the mean of exp(tilt·score) under the inner
    sampler's law, [B]. Its exponential is unbiased with one sweep."""
    log_prob: np.ndarray | None
    """Log probability in nats of the tokens drawn for each sequence, [B]. Each token is conditioned
    on the given tokens and on those drawn before it. Temperature and the like are applied. None if
    the sampler does not compute it."""
    nonces: np.ndarray | None = None
    """The nonce of each sequence's watermark, [B], for ``sedd.watermark.detect``; None without."""
    scored: np.ndarray | None = None
    """Which tokens carry the watermark, [B, L]: drawn, and not under a constraint; None without."""


class Marking(NamedTuple):
    """A watermark of a batch: the scheme, and a nonce for each sequence."""

    scheme: Scheme
    nonce_B: np.ndarray


PARTITION = {  # of the fields of ``Samples`` whose first axis is not that of the sequences
    "trace_TBL": PartitionSpec(None, BOTH),
    "rounds": PartitionSpec(),
    "times_T": PartitionSpec(),
}


@partial(jax.jit, static_argnames=("sampler", "placement", "trace"))
def run_sampler(
    sampler: Sampler, params, rows, *, placement: Placement | None, trace: bool
) -> Samples:
    """The compiled program: one for each sampler, set of shapes and static part of the denoiser.

    ``rows`` has the denoiser without its parameters, the keys, the given tokens and where they are
    fixed: all arrays with a row for each sequence.
    """
    if placement is None:
        denoiser, *given = rows
        return sampler(replace(denoiser, params=params), *given, trace=trace)

    def on_device(params, _, rows):
        denoiser, *given = rows
        samples = sampler(replace(denoiser, params=params), *given, trace=trace)
        rounds = samples.rounds if samples.rounds is None else jax.lax.pmax(samples.rounds, BOTH)
        return {**vars(samples), "rounds": rounds}

    out = {field.name: PARTITION.get(field.name, SEQUENCES) for field in fields(Samples)}
    return Samples(**placement.run(on_device, params, None, rows, out))


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
    messages: Sequence[Any] | None = None,
    regex: str | Sequence[Any] | None = None,
    json_schema: Mapping[str, Any] | Sequence[Any] | None = None,
    json_schema_depth: int | Sequence[int | None] | None = None,
    clamp: Clamp | Sequence[Clamp] | None = None,
    constraint: Given | Sequence[Given] = None,
    rule: Rule = "joint",
    verifier: Scoring | Sequence[Scoring] | None = None,
    trace: bool = False,
    watermark: Scheme | None = None,
    nonces: Sequence[int] | None = None,
    **options: Any,
) -> SampleResult:
    """Draw sequences from a model.

    The arguments from ``prompt`` to ``constraint`` are one value for all sequences, or a list with
    one for each. Sequences of different lengths share a batch; attention excludes the padding. The
    number of sequences and the length are rounded up to a few sizes (``sedd.arrays.bucket``). Calls
    of equal rounded sizes share a compiled program, whatever their texts, seeds, temperatures,
    top-k and top-p. Calls that set temperature, top-k or top-p have one program, and calls that set
    none of them another; likewise calls with and without padding, and with and without guidance.

    Args:
        model: from ``sedd.load``.
        key: an integer seed or one key, from which each sequence derives its own, or a key for each
            sequence. ``jax.random.key`` and ``jax.random.PRNGKey`` make keys.
        num: number of sequences; by default the number of keys, the length of the lists, or 1.
        length: tokens in a sequence, the given ones included; by default the training length, or
            with ``infill`` the length of the text. Not with ``clamp``, which has its own length.
        sampler: a name, ``sedd.samplers.options(name, …)`` or a sampler. Default: event_jump;
            tweedie for a time-dependent model; ordered for an autoregressive or any-subset one;
            semi_autoregressive for a block model.
        prompt: text at the start.
        suffix: text at the end.
        infill: text with gaps: ``{mask:12}`` leaves 12 tokens free, ``{mask}`` one.
        messages: a conversation to answer, as a list of objects with ``role`` and ``content``, or a
            list of such lists. The model's tokenizer must have a chat template.
        regex: regex that everything from the first free token to the last must match, given text in
            between included. The value for a sequence may also be a list with a regex or None for
            each gap; for one sequence of two gaps: ``regex=[["a+", None]]``.
        json_schema: a JSON Schema in place of ``regex``, for the same stretch of text: one value,
            or a list with one for each sequence. The value for a sequence may also be a list with a
            schema or None for each gap.
        json_schema_depth: how deep values nest where the schema sets no limit, 0 to 64: in a
            schema that allows any value, and in recursion by ``$ref``; by default 2.
        clamp: the given tokens as a ``sedd.constraints.clamp.Clamp``, instead of texts.
        constraint: compiled ``Automaton`` objects in place of ``regex``, single or in such lists.
        rule: how a step draws under a constraint: ``"joint"`` (a sample restricted to matches),
            ``"most_likely"`` (the most likely match) or ``"dingo"`` (arXiv:2505.23061); see
            ``sedd.constraints.spans.Spans``. At temperature 0, ``joint`` becomes ``most_likely``.
        verifier: for searches (best_of_n, particle, zero_order, search_paths): a function from a
            list of texts to one finite score each, higher is better; ``"self"`` for the likelihood
            of the text under the model itself (``sedd.samplers.SelfLikelihood``); or a list of
            such, whose mean ranks count.
        trace: also return the tokens after every round.
        watermark: how the texts are watermarked, and by which secret.
        nonces: a number in [0, 2**32) for each sequence. Texts of equal nonces share the noise of
            their watermark; by default the nonces are random numbers of the keys.
        options: options of the sampler (``steps=128``; for planned, ``profile`` is the result of
            ``sedd.price`` or a file of it), and of ``sedd.reshape.Reshape``: ``temperature``,
            ``top_k``, ``top_p``, ``guidance`` (one number, or one a sequence) and
            ``logit_processor``.

    Raises:
        UserError: for an unknown option, lists of different lengths, a text that does not fit, a
            sampler that the model does not support, a verifier that fails, or probabilities that
            are nan.
        FieldError: for a bad value; ``field`` is the name of the argument.

    Example:
        >>> import sedd
        >>> model = sedd.load("runs/quickstart")
        >>> result = sedd.sample(model, 0, num=2, prompt="the ", sampler="event_jump", top_p=0.9)
        >>> [text.startswith("the ") for text in result.text]
        [True, True]
    """
    texts = {"prompt": prompt, "suffix": suffix, "infill": infill, "regex": regex}
    texts |= {"messages": messages, "json_schema": json_schema}
    texts |= {"json_schema_depth": json_schema_depth}
    asked = ask(
        model,
        key,
        texts,
        options,
        num=num,
        length=length,
        sampler=sampler,
        clamp=clamp,
        constraint=constraint,
        verifier=verifier,
    )
    if rule not in get_args(Rule):
        raise FieldError("rule", f"must be one of {', '.join(get_args(Rule))}, got {rule!r}")
    keys_B, built, clamps, spans, reshape = asked
    return draw(
        model,
        keys_B,
        built,
        clamps,
        spans,
        reshape=reshape,
        rule=rule,
        trace=trace,
        marking=_marking(watermark, nonces, keys_B),
    )


class Asked(NamedTuple):
    """Sequences to draw, in the order of the keys; the arguments of ``draw``."""

    keys_B: Key[Array, " B"]
    sampler: Sampler
    clamps: list[Clamp]
    spans: list[list[Span]]
    reshape: Reshape | None


def ask(
    model: Model,
    key: Key[Array, "..."] | int,
    texts: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    num: int | None,
    length: int | None,
    sampler: str | SamplerOptions | Sampler | None,
    clamp: Clamp | Sequence[Clamp] | None = None,
    constraint: Given | Sequence[Given] = None,
    verifier: Scoring | Sequence[Scoring] | None = None,
) -> Asked:
    """Turn the arguments of ``sample`` into those of ``draw``.

    Args:
        model: as for ``sample``, like the other arguments.
        key: a seed, or keys.
        texts: the arguments that are texts, ``messages`` and schemas, by their names; None for an
            argument that is not given.
        options: of the sampler and of the ``Reshape``.
        num: number of sequences.
        length: tokens in a sequence.
        sampler: the sampler.
        clamp: given tokens.
        constraint: compiled constraints.
        verifier: of a search.

    Raises:
        UserError: as ``sample`` does.
        FieldError: as ``sample`` does.
    """
    texts = {name: value for name, value in texts.items() if value is not None}
    messages = texts.pop("messages", None)
    single = bool(messages) and not _is_list(messages[0])
    several = {"clamp": clamp, "constraint": constraint, "messages": None if single else messages}
    num, keys_B = _keys(key, num, {**several, **texts})
    if messages is not None:
        texts["messages"] = [messages] * num if single else messages
    clamps, spans = _given(model, num, length, texts, clamp, constraint)
    options = dict(options)
    numbers = {name: options.pop(name) for name in NUMBERS if name in options}
    reshape = reshape_of(num, numbers, options.pop("logit_processor", None))
    built = _sampler(model, sampler, verifier, options)
    return Asked(keys_B, stopping(built, clamps), clamps, spans, reshape)


def _marking(
    scheme: Scheme | None, nonces: Sequence[int] | None, keys_B: Key[Array, " B"]
) -> Marking | None:
    """The watermark of a batch, with random numbers of the keys if no nonces are given."""
    if scheme is None:
        if nonces is not None:
            raise FieldError("nonces", "are for a watermark: give one, or no nonces")
        return None
    if nonces is None:
        bits = partial(jax.random.bits, dtype=jnp.uint32)
        return Marking(scheme, np.asarray(jax.vmap(bits)(fold(keys_B, NONCE))))
    if len(nonces) != len(keys_B) or not all(0 <= nonce < 2**32 for nonce in nonces):
        raise FieldError("nonces", f"must be {len(keys_B)} numbers in [0, 2**32), one a sequence")
    return Marking(scheme, np.asarray(nonces, np.uint32))


def stopping(sampler: Sampler, clamps: Sequence[Clamp]) -> Sampler:
    """A sampler of blocks with the ends of answers as its ``stop``; any other one unchanged.

    Unchanged as well if it has a ``stop`` already, or if not all sequences are answers with the
    same ends.
    """
    ends = {clamp.end_ids for clamp in clamps}
    if not isinstance(sampler, SemiAutoregressive) or sampler.stop is not None:
        return sampler
    if len(ends) != 1 or ends == {()}:
        return sampler
    return replace(sampler, stop=",".join(map(str, ends.pop())))


def _sampler(
    model: Model,
    sampler: str | SamplerOptions | Sampler | None,
    verifier: Scoring | Sequence[Scoring] | None,
    options: Mapping[str, Any],
) -> Sampler:
    """Build the sampler from its name and options; UserError on options for a built one."""
    if sampler is None:
        sampler = default_sampler(model.parts.parameterization)
    if not isinstance(sampler, str | SamplerOptions | Sampler):
        raise FieldError("sampler", f"must be a name, options or a sampler, got {sampler!r}")
    if not isinstance(sampler, Sampler):
        scorer = None if verifier is None else as_verifiers(verifier, model.tokenizer)
        return build_sampler(sampler, model.schedule, verifier=scorer, **options)
    if options or verifier is not None:
        given = [*options, *(["verifier"] if verifier else [])]
        raise UserError(
            f"sampler is an object whose options are fixed: {', '.join(given)} cannot change it; "
            "give the sampler's name with the options, or set them when building the object"
        )
    return sampler


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _keys(key: Any, num: int | None, given: Mapping[str, Any]) -> tuple[int, Array]:
    """The number of sequences, and a key for each.

    ``num``, the keys and the lists among the values of ``given`` must agree in their number;
    UserError otherwise. One key is folded with the number of each sequence.
    """
    try:
        key = jax.random.key(key) if isinstance(key, int | np.integer) else jnp.asarray(key)
    except (TypeError, ValueError, OverflowError):
        wanted = "must be an integer below 2**63 or keys of jax.random"
        raise FieldError("key", f"{wanted}, got {key!r}") from None
    if num is not None and (isinstance(num, bool) or not isinstance(num, Integral)):
        raise FieldError("num", f"must be a whole number, got {num!r}")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.dtype != jnp.uint32 or key.shape[-1:] != (2,):
            raise FieldError("key", f"must be an integer or keys of jax.random, got {key.dtype}")
        key = jax.random.wrap_key_data(key)
    counts = {name: len(values) for name, values in given.items() if _is_list(values)}
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
    """For each sequence, its given tokens and its spans under a constraint."""
    if clamp is not None:
        for name in ("length", "prompt", "suffix", "infill", "messages"):
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
        if "json_schema" in own and own["json_schema"] is None:  # the depth is that of the others
            own.pop("json_schema_depth", None)
        request = Request(id=row, length=length, **own)
        if clamp is not None:
            tokens = clamp[row] if isinstance(clamp, Sequence) else clamp
        elif own.keys() & {"prompt", "suffix", "infill", "messages"}:
            tokens = request.clamp(model.tokenizer, model.length)
        else:
            tokens = free(model.length if length is None else length)
        if own.keys() & {"regex", "json_schema"}:
            return tokens, request.spans(tokens, model.tokenizer, cache_dir)
        compiled = constraint[row] if isinstance(constraint, Sequence) else constraint
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
    marking: Marking | None = None,
) -> SampleResult:
    """Draw one sequence for each key as one padded batch.

    Args:
        model: from ``sedd.load``.
        keys_B: a key for each sequence.
        sampler: a built sampler.
        clamps: the given tokens of each sequence.
        spans: the spans of each sequence that are under a constraint.
        reshape: changes to the conditionals, with one number for each sequence in every field.
        rule: how a step draws under a constraint.
        shape: sizes to which the spans are padded: batches of one shape share a program.
        trace: also return the tokens after every round.
        marking: a watermark.

    Raises:
        UserError: if the model does not support the sampler, an id is out of range, probabilities
            are nan, or the verifier fails.
    """
    denoiser, given, placement = prepare(
        model,
        keys_B,
        sampler,
        clamps,
        spans,
        reshape=reshape,
        rule=rule,
        shape=shape,
        marking=marking,
    )
    samples = _drawn(denoiser, sampler, given, placement, trace)
    check_drawn(np.asarray(samples.tokens_BL)[: len(clamps)], spans)
    result = _result(model, sampler, samples, clamps)
    _check_matches(result.tokens, spans)
    if marking is None:
        return result
    scored = np.zeros(result.tokens.shape, bool)
    for row, clamp, its_spans, tokens in zip(scored, clamps, spans, result.tokens, strict=True):
        length = clamp.length
        row[:length] = scored_positions(tokens[:length], clamp, its_spans, _stop_ids(sampler))
    return replace(result, nonces=marking.nonce_B, scored=scored)


class Prepared(NamedTuple):
    """A padded batch: the model with what the requests set, and the arguments of a sampler."""

    denoiser: Denoiser
    given: tuple[Key[Array, " B"], Int[Array, "B L"], Bool[Array, "B L"]]
    placement: Placement | None


def prepare(
    model: Model,
    keys_B: Key[Array, " B"],
    sampler: Sampler,
    clamps: Sequence[Clamp],
    spans: Sequence[Sequence[Span]],
    *,
    reshape: Reshape | None = None,
    rule: Rule = "joint",
    shape: Shape | None = None,
    marking: Marking | None = None,
) -> Prepared:
    """Make one padded batch, and check that the sampler can draw it; see ``draw``.

    Its rows are a bucket of sequences (``sedd.arrays.bucket``): those of the requests, and then
    copies of the last one.
    """
    for c in clamps:
        model.check_given(c)
    lengths = [c.length for c in clamps]
    placement = Placement.of(model.denoiser.params, model.denoiser.network.stacked)
    row_of_B, tokens_BL, fixed_BL, real_BL = _padded(clamps, placement)
    given_BL = fixed_BL & real_BL
    model.check_ids(tokens_BL[given_BL])
    guided = False
    if reshape is not None:
        rule = _rule(rule, reshape, any(spans))
        guided = (given_BL.any(1) & (reshape.guidance_B[row_of_B] > 0)).any()
        reshape = jax.tree.map(lambda values: values[row_of_B], reshape)
    watermark = None
    if marking is not None:
        check_temperature(reshape)
        drawn_BL = np.zeros(fixed_BL.shape, bool)
        for row, sequence in zip(drawn_BL, row_of_B, strict=True):
            row[: lengths[sequence]] = drawn_positions(clamps[sequence], spans[sequence])
        watermark = marking.scheme.batch(marking.nonce_B[row_of_B], drawn_BL)
    denoiser = replace(
        model.denoiser,
        attend=None if real_BL.all() else Attend(segment_BL=jnp.asarray(real_BL, jnp.int32)),
        reshape=reshape,
        given_BL=jnp.asarray(given_BL) if guided else None,
        constraint=batch_spans([spans[row] for row in row_of_B], rule, shape)
        if any(spans)
        else None,
        watermark=watermark,
    )
    sampler.check(denoiser)
    for length in set(lengths):
        check_profile(sampler, model, length)
    verifier_error(sampler)  # forget the error of an earlier call
    given = (keys_B[row_of_B], jnp.asarray(tokens_BL), jnp.asarray(fixed_BL))
    return Prepared(denoiser, given, placement)


def _drawn(
    denoiser: Denoiser,
    sampler: Sampler,
    given: tuple[Array, Array, Array],
    placement: Placement | None,
    trace: bool,
) -> Samples:
    """Run the sampler on all devices; the result is numpy arrays.

    ``given`` are the arguments of a sampler after the denoiser: keys, tokens, where they are fixed.
    """
    rows = (replace(denoiser, params={}), *given)
    rows = rows if placement is None else placement.spread(rows)
    params = denoiser.params
    return on_host(run_sampler(sampler, params, rows, placement=placement, trace=trace))


def check_temperature(reshape: Reshape | None) -> None:
    """Raise FieldError if a sequence with a watermark has the temperature 0."""
    if reshape is not None and (np.asarray(reshape.temperature_B) == 0).any():
        raise FieldError(
            "temperature",
            "must be above 0 with a watermark: at 0 nothing is drawn that could carry it",
        )


def _stop_ids(sampler: Sampler) -> tuple[int, ...]:
    """The tokens at which the sampler, or one that it wraps, ends a text."""
    part: Sampler | None = sampler
    while part is not None:
        if isinstance(part, SemiAutoregressive):
            return part.stop_ids
        part = getattr(part, "inner", None)
    return ()


def check_profile(sampler: Sampler | None, model: Model, length: int | None = None) -> None:
    """Check the price profile of ``planned``, also as an inner sampler.

    Args:
        sampler: the sampler.
        model: the model that will draw.
        length: tokens in the sequence; None checks the model alone.

    Raises:
        FieldError: the profile was measured with another model, or on sequences of another length.
    """
    while sampler is not None:
        profile = getattr(sampler, "profile", None)
        if profile is not None and profile.model != model.digest:
            raise FieldError("profile", f": it was measured with another model than {model.source}")
        if profile is not None and length not in (None, profile.length):
            raise FieldError(
                "profile",
                f": it was measured on sequences of {profile.length} tokens, and this one has "
                f"{length}: draw {profile.length} tokens, or measure with rows of {length}",
            )
        sampler = getattr(sampler, "inner", None)


def _padded(
    clamps: Sequence[Clamp], placement: Placement | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pad the given tokens to a bucket of positions, and of sequences on each device.

    Returns:
        The sequence of each row [B] (rows beyond the last sequence repeat it), the tokens [B, L],
        where they are fixed [B, L] (padding is fixed, so that it is never drawn), and which
        positions are real [B, L].
    """
    num, longest = len(clamps), bucket(max(c.length for c in clamps))
    devices = 1 if placement is None else placement.num_devices
    row_of_B = np.minimum(np.arange(devices * bucket(-(-num // devices))), num - 1)
    shape = (len(row_of_B), longest)
    tokens_BL, fixed_BL = np.zeros(shape, np.int32), np.ones(shape, bool)
    real_BL = np.zeros(shape, bool)
    for row, sequence in enumerate(row_of_B):
        c = clamps[sequence]
        tokens_BL[row, : c.length], fixed_BL[row, : c.length] = c.tokens_L, c.fixed_L
        real_BL[row, : c.length] = True
    return row_of_B, tokens_BL, fixed_BL, real_BL


def check_drawn(tokens_BL: np.ndarray, spans: Sequence[Sequence[Span]]) -> None:
    """Raise UserError if a token was drawn from nan, naming its position.

    Under a constraint the message also names the automaton's states after the tokens before it.
    """
    bad = np.argwhere(tokens_BL == NAN)
    if not len(bad):
        return
    sequence, position = bad[0].tolist()
    where = f"sequence {sequence}, position {position}"
    for span in spans[sequence]:
        if span.start <= position < span.start + span.length:
            where += f", {span.automaton.states_after(position - span.start)}"
    raise UserError(f"{where}: {NO_NUMBERS}")


def _check_matches(tokens_BL: np.ndarray, spans: Sequence[Sequence[Span]]) -> None:
    """Raise RuntimeError, which would be our bug, if a drawn span does not match."""
    for tokens_L, row in zip(tokens_BL, spans, strict=True):
        for span in row:
            if not span.automaton.accepts(tokens_L[span.start : span.start + span.length]):
                raise RuntimeError(f"drawn, but no match of {span.automaton.pattern!r}")


def _result(
    model: Model, sampler: Sampler, samples: Samples, clamps: Sequence[Clamp]
) -> SampleResult:
    """Copy the samples to the host and cut the padding off; UserError if the verifier failed."""
    num, longest = len(clamps), max(clamp.length for clamp in clamps)
    tokens, calls = np.asarray(samples.tokens_BL), np.asarray(samples.calls_B)
    score = None if samples.score_B is None else np.asarray(samples.score_B)
    if score is not None and not np.isfinite(score).all():
        raise verifier_error(sampler) or UserError("the verifier's scores must be finite")
    text = None
    if model.tokenizer is not None:
        rows = zip(tokens[:num], clamps, strict=True)
        text = [clamp.text(row[: clamp.length], model.tokenizer) for row, clamp in rows]

    def of_each(values_B):
        return None if values_B is None else np.asarray(values_B)[:num]

    trace = times = None
    if samples.trace_TBL is not None and samples.rounds is not None:
        frames = int(samples.rounds) + 1
        trace = np.asarray(samples.trace_TBL[:frames])[:, :num, :longest]
        if samples.times_T is not None and len(samples.times_T) == frames:
            times = np.asarray(samples.times_T)
    return SampleResult(
        tokens=tokens[:num, :longest],
        calls=calls[:num],
        rows=np.asarray(samples.rows_B)[:num],
        text=text,
        trace=trace,
        times=times,
        score=None if score is None else score[:num],
        verifier_calls=of_each(samples.verifier_calls_B),
        log_partition=of_each(samples.log_partition_B),
        log_prob=of_each(samples.log_prob_B),
    )


def _rule(rule: Rule, reshape: Reshape, constrained: bool) -> Rule:
    """``rule``, but ``most_likely`` instead of ``joint`` at temperature 0.

    A batch has one rule. UserError if only some of its constrained sequences have temperature 0.
    """
    zero_B = reshape.temperature_B == 0
    if rule != "joint" or not constrained or not zero_B.any():
        return rule
    if not zero_B.all():
        raise UserError(
            "temperature 0 takes the most likely string under a constraint, which needs another "
            "program: draw sequences at temperature 0 and the others in separate calls"
        )
    return "most_likely"


def reshape_of(
    num: int, numbers: Mapping[str, Any], processor: Callable[..., Any] | None = None
) -> Reshape | None:
    """Build the ``Reshape`` of ``num`` sequences; None if nothing changes.

    Args:
        num: number of sequences.
        numbers: values for names in ``NUMBERS``: one for all sequences, or a list with one each. A
            list always makes a Reshape, even of defaults, so that batches share a program.
        processor: the logit processor.

    Raises:
        FieldError: if a value is out of its range, or a list has another length than ``num``.
    """
    for name, value in numbers.items():
        if any(isinstance(each, str) for each in (value if _is_list(value) else [value])):
            raise FieldError(name, f"must be a number, got {value!r}")
        if np.ndim(value) and np.shape(value) != (num,):
            raise FieldError(name, f"must be a number or {num} numbers, got {len(value)}")
    unchanged = all(np.ndim(v) == 0 and v == NUMBERS[name] for name, v in numbers.items())
    if unchanged and processor is None:
        return None
    reshape = Reshape.of(**numbers, logit_processor=processor)
    return jax.tree.map(lambda values: np.broadcast_to(values, num), reshape)
