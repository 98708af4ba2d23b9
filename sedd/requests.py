"""What a user asks of ``sample.py``: one request a line of a JSONL file, or the flags."""

import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sedd.constraints import Automaton, compile_regex
from sedd.constraints.clamp import MAX_LENGTH, Clamp, check_prefix, from_infill, from_prompt
from sedd.constraints.json_schema import regex_to_compile
from sedd.constraints.spans import Given, Span, spans_of
from sedd.data.packing import unigram_entropy
from sedd.data.tokenizers import Tokenizer
from sedd.errors import UserError, did_you_mean
from sedd.model import Model
from sedd.samplers.base import Sampler
from sedd.sampling import sample

FIELD_TYPES = {  # of a line's fields
    "id": ((str, int), "a string or a whole number"),
    "prompt": (str, "a string"),
    "suffix": (str, "a string"),
    "infill": ((str, type(None)), "a string"),
    "length": ((int, type(None)), "a whole number"),
    "seed": (int, "a whole number"),
    "regex": ((str, list, type(None)), "a string, or a list with one or null for each gap"),
    "json_schema": ((dict, list, type(None)), "an object, or a list with one or null for each gap"),
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to draw. ``length`` counts the prompt; ``infill`` excludes prompt and suffix.

    ``regex`` or ``json_schema`` is what the free tokens have to be: one for all of them, with what
    is given in between, or a list with one or None for each gap.
    """

    id: str | int
    prompt: str = ""
    suffix: str = ""
    infill: str | None = None
    length: int | None = None
    seed: int = 0
    regex: str | Sequence[str | None] | None = None
    json_schema: Any = None

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
                raise UserError(f"{name} is not text: it has no UTF-8")
        if self.length is not None and not 1 <= self.length <= MAX_LENGTH:
            raise UserError(f"length must be in 1..{MAX_LENGTH}, got {self.length}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be in [0, 2**32), got {self.seed}")
        if self.infill is not None and (self.prompt or self.suffix):
            raise UserError("infill already holds its context: give no prompt or suffix beside it")
        if self.regex is not None and self.json_schema is not None:
            raise UserError("regex and json_schema: give one of them")

    def clamp(self, tokenizer: Tokenizer, default_length: int) -> Clamp:
        """What is given and what is free, in tokens; UserError when it does not fit."""
        if self.infill is not None:
            return from_infill(tokenizer, self.infill, self.length)
        length = default_length if self.length is None else self.length
        return from_prompt(tokenizer, length, prompt=self.prompt, suffix=self.suffix)

    def constraint(self, clamp: Clamp, tokenizer: Tokenizer, cache_dir: Path | None) -> Given:
        """What its free tokens have to be; UserError on what cannot be compiled or cannot fit."""
        given, compiled = self.regex, _compile_regex
        if given is None:
            given, compiled = self.json_schema, _compile_json_schema
        if given is None:
            return None

        def one(text):
            return None if text is None else compiled(text, tokenizer, cache_dir)

        automata = [one(each) for each in given] if _is_list(given) else one(given)
        spans_of(clamp, automata)
        return automata


def _is_list(given: Any) -> bool:
    return isinstance(given, list | tuple)


def _compile_regex(pattern: Any, tokenizer: Tokenizer, cache_dir: Path | None) -> Automaton:
    if not isinstance(pattern, str):
        raise UserError(f"regex must be {FIELD_TYPES['regex'][1]}, got {json.dumps(pattern)}")
    return _compiled(pattern, tokenizer, cache_dir)


def _compile_json_schema(schema: Any, tokenizer: Tokenizer, cache_dir: Path | None) -> Automaton:
    with regex_to_compile(schema) as pattern:
        return _compiled(pattern, tokenizer, cache_dir)


@functools.lru_cache(maxsize=1024)  # requests with the same one share it in a batch
def _compiled(pattern: str, tokenizer: Tokenizer, cache_dir: Path | None) -> Automaton:
    vocabulary = tokenizer.token_bytes()
    return compile_regex(pattern, vocabulary, eos_id=tokenizer.eos_id, cache_dir=cache_dir)


class Asked(NamedTuple):
    """A request in tokens."""

    request: Request
    clamp: Clamp
    constraint: Given = None


def ask(
    request: Request,
    tokenizer: Tokenizer,
    default_length: int,
    cache_dir: Path | None = None,
    *,
    causal: bool = False,
) -> Asked:
    """The request in tokens; UserError where it does not fit, or not with a ``causal`` model."""
    clamp = request.clamp(tokenizer, default_length)
    if causal:
        check_prefix(clamp)
    return Asked(request, clamp, request.constraint(clamp, tokenizer, cache_dir))


def read_requests(
    path: Path,
    tokenizer: Tokenizer,
    default_length: int,
    seed: int = 0,
    cache_dir: Path | None = None,
    *,
    causal: bool = False,
) -> Iterator[Asked | UserError]:
    """Each line's request, or the error that names the line.

    A bad line does not stop the others. UserError when the file itself cannot be read.
    """
    try:
        # A JSON string may hold the other ends of lines that str.splitlines knows.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"--requests {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--requests {path}: not UTF-8 text") from None
    if not any(line.strip() for line in lines):
        raise UserError(f"--requests {path}: the file is empty")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = _parse(line, number, seed)
            yield ask(request, tokenizer, default_length, cache_dir, causal=causal)
        except UserError as error:
            yield UserError(f"{path}, line {number}: {error}")


def _parse(line: str, number: int, seed: int) -> Request:
    try:
        data: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error})") from None
    if not isinstance(data, dict):
        raise UserError(f"a request must be an object, got {line.strip()[:40]}")
    for key in data:
        if key not in FIELD_TYPES:
            raise UserError(
                f"unknown field {key!r}{did_you_mean(key, FIELD_TYPES)}; "
                f"it has {', '.join(FIELD_TYPES)}"
            )
        kinds, wanted = FIELD_TYPES[key]
        if not isinstance(data[key], kinds) or isinstance(data[key], bool):
            raise UserError(f"{key} must be {wanted}, got {json.dumps(data[key])}")
    return Request(**{"id": number, "seed": seed + number - 1, **data})


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One request's sample."""

    request: Request
    clamp: Clamp
    spans: Sequence[Span]  # what has to match
    tokens: np.ndarray  # [L]
    text: str
    calls: int
    score: float | None  # the verifier's, of a search
    frames: np.ndarray | None  # [T, L], the state at first and after every event
    times: np.ndarray | None  # [T], their diffusion times

    @property
    def entropy(self) -> float:
        """Unigram entropy of the tokens that were drawn, in nats: low where it repeats itself."""
        drawn = self.tokens[~self.clamp.fixed_L]
        return abs(unigram_entropy(np.bincount(drawn))) if len(drawn) else 0.0

    def to_json(self) -> dict[str, Any]:
        """The line of the output file."""
        return {
            "id": self.request.id,
            "text": self.text,
            "tokens": self.tokens.tolist(),
            "calls": self.calls,
            "entropy": round(self.entropy, 6),
            "seed": self.request.seed,
            **({} if self.score is None else {"score": self.score}),
        }


def answer(
    model: Model,
    asked: Sequence[Asked],
    sampler: Sampler,
    *,
    batch_size: int,
    trace: bool = False,
    **options: Any,
) -> Iterator[list[Answer]]:
    """The answers, batch by batch, in the order asked. A request's noise is that of its seed.

    ``batch_size`` counts the sequences held at once; a search holds many for one request.
    ``options`` are those of ``Reshape``, and ``rule``.
    """
    batch_size = min(max(batch_size // sampler.width, 1), len(asked))
    for first in range(0, len(asked), batch_size):
        batch = asked[first : first + batch_size]
        padded = [*batch, *[batch[-1]] * (batch_size - len(batch))]  # compiles nothing new
        result = sample(
            model,
            jax.vmap(jax.random.key)(np.array([one.request.seed for one in padded], np.uint32)),
            sampler=sampler,
            clamp=[one.clamp for one in padded],
            constraint=[one.constraint for one in padded],
            trace=trace,
            **options,
        )
        yield [
            Answer(
                request=request,
                clamp=clamp,
                spans=spans_of(clamp, constraint),
                tokens=result.tokens[row, : clamp.length],
                text=result.text[row] if result.text else "",
                calls=int(result.calls[row]),
                score=None if result.score is None else float(str(result.score[row])),
                frames=None if result.trace is None else result.trace[:, row, : clamp.length],
                times=result.times,
            )
            for row, (request, clamp, constraint) in enumerate(batch)
        ]
