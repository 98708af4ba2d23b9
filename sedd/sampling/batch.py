"""One padded batch of sequences: prepared, drawn by a compiled program, and cut to size.

``draw`` serves ``sedd.sample`` and the ``sample`` command, which has batches of requests of a file;
``prepare`` is its first half, for ``sedd.stream``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from sedd.arrays import NAN, bucket, fold
from sedd.constraints.clamp import Clamp
from sedd.constraints.spans import Rule, Shape, Span, batch_spans
from sedd.constraints.windows import Joint, check_window
from sedd.denoiser import Denoiser
from sedd.errors import FieldError, UserError
from sedd.model import Model
from sedd.networks.base import Attend
from sedd.networks.mesh import BOTH, SEQUENCES, Placement, on_host
from sedd.reshape import Reshape
from sedd.samplers.base import Sampler, Samples, layers
from sedd.samplers.semi_autoregressive import SemiAutoregressive
from sedd.samplers.verifier import NO_NUMBERS, verifier_error
from sedd.types import Array, Bool, Int, Key
from sedd.watermark.scheme import Scheme, drawn_positions, scored_positions

LATENT = 2**31 - 7  # folded into a key for the latents of its calls; larger than any position


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """The drawn sequences, in the order of the keys."""

    tokens: np.ndarray
    """Token ids [B, L]; a shorter sequence is filled up with 0s to the longest, L."""
    calls: np.ndarray
    """Network calls for each sequence, [B], with the second calls of guidance. With a search they
    are those of all candidates for the returned sequence, and of the verifier "self"."""
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


PARTITION = {  # of the fields of ``Samples`` whose first axis is not that of the sequences
    "trace_TBL": PartitionSpec(None, BOTH),
    "rounds": PartitionSpec(),
    "times_T": PartitionSpec(),
}


class Marking(NamedTuple):
    """A watermark of a batch: the scheme, and a nonce for each sequence."""

    scheme: Scheme
    nonce_B: np.ndarray


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
    joint: Joint | None = None,
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
        joint: the windows in which tokens are drawn jointly.

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
        joint=joint,
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
    joint: Joint | None = None,
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
    windows, network = None, model.denoiser.network
    if joint is not None:
        joint.check(network, model.source)
        check_window(joint.window, min(lengths))
        windows = joint.windows(len(row_of_B))
    denoiser = replace(
        model.denoiser,
        attend=None if real_BL.all() else Attend(segment_BL=jnp.asarray(real_BL, jnp.int32)),
        reshape=reshape,
        given_BL=jnp.asarray(given_BL) if guided else None,
        constraint=batch_spans([spans[row] for row in row_of_B], rule, shape)
        if any(spans)
        else None,
        windows=windows,
        latent_keys_B=fold(keys_B[row_of_B], LATENT) if network.has_latent else None,
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


def check_profile(sampler: Sampler, model: Model, length: int | None = None) -> None:
    """Check the price profile of ``planned``, also as an inner sampler.

    Args:
        sampler: the sampler.
        model: the model that will draw.
        length: tokens in the sequence; None checks the model alone.

    Raises:
        FieldError: the profile was measured with another model, or on sequences of another length.
    """
    for part in layers(sampler):
        profile = getattr(part, "profile", None)
        if profile is not None and profile.model != model.digest:
            raise FieldError("profile", f": it was measured with another model than {model.source}")
        if profile is not None and length not in (None, profile.length):
            raise FieldError(
                "profile",
                f": it was measured on sequences of {profile.length} tokens, and this one has "
                f"{length}: draw {profile.length} tokens, or measure with rows of {length}",
            )


def _stop_ids(sampler: Sampler) -> tuple[int, ...]:
    """The tokens at which the sampler, or one that it wraps, ends a text."""
    blocks = (part for part in layers(sampler) if isinstance(part, SemiAutoregressive))
    return next((part.stop_ids for part in blocks), ())


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
