"""The arguments of ``sedd.sample`` and ``sedd.stream`` as sequences to draw.

Texts become given tokens (``Clamp``) and constraints (``Span``), options a sampler and a
``Reshape``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sedd.arrays import fold
from sedd.configuration.build import build_sampler, default_sampler
from sedd.configuration.config import default_cache_dir
from sedd.constraints.clamp import Clamp, free
from sedd.constraints.spans import Given, Span, spans_of
from sedd.errors import FieldError, UserError
from sedd.model import Model
from sedd.requests import Request
from sedd.reshape import Reshape
from sedd.samplers.base import Sampler, SamplerOptions
from sedd.samplers.self_likelihood import SelfLikelihood
from sedd.samplers.semi_autoregressive import SemiAutoregressive
from sedd.samplers.verifier import TextScorer, as_verifiers
from sedd.sampling.batch import Marking
from sedd.types import Array, Key
from sedd.watermark.scheme import Scheme

# Options of ``Reshape`` that are numbers, with the default of each.
NUMBERS = {"temperature": 1.0, "top_k": None, "top_p": None, "guidance": 0.0}
NONCE = 2**31 - 3  # folded into a key for the nonce of its watermark; larger than any position
Scoring = TextScorer | str | SelfLikelihood


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


def marking_of(
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
