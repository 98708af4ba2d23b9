"""From the requests of ``sample.py`` to tokens, samplers and numbers, checked before drawing."""

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import sedd
from sedd.commands.answers import Asked, Program
from sedd.commands.sample_flags import (
    SampleCommand,
    one_or_each,
    read_schema,
    reshape_numbers,
)
from sedd.commands.sampler_flags import check_integers, sampler_options
from sedd.commands.user_code import load_function, load_processor
from sedd.configuration.build import build_sampler
from sedd.configuration.components import options_type
from sedd.configuration.config import default_cache_dir, fits
from sedd.constraints.clamp import check_prefix
from sedd.constraints.spans import Shape, shape_of, spans_of
from sedd.errors import FieldError, UserError, did_you_mean
from sedd.requests import Request, RequestFile
from sedd.samplers.base import Sampler, SamplerOptions
from sedd.samplers.ordered import Ordered
from sedd.samplers.semi_autoregressive import SemiAutoregressive
from sedd.samplers.verifier import TextVerifier, text_verifier
from sedd.sampling import NUMBERS, reshape_of

TRACED = 64  # sequences on a trace page, which holds every frame of each
REFUSALS = 20  # refused lines that are printed; a file without requests has thousands


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asking:
    """Turns requests into tokens, samplers and numbers, with the flags as defaults.

    ``samplers`` holds what was built, by the options of a request's line as JSON.
    """

    command: SampleCommand
    model: sedd.Model
    processor: Any
    verifier: TextVerifier | None
    samplers: dict[str, Sampler] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, command: SampleCommand, model: sedd.Model) -> "Asking":
        """Load the user's functions and build the sampler of the flags.

        Raises UserError where the sampler does not go with the model, and without a tokenizer.
        """
        processor = verifier = None
        if command.logit_processor is not None:
            flag = "--logit-processor"
            processor = load_processor(command.logit_processor, flag, model.process.mask_id)
        if command.verifier is not None:
            function = load_function(command.verifier, "--verifier")
            verifier = text_verifier(function, model.tokenizer, command.verifier)
        asking = cls(command=command, model=model, processor=processor, verifier=verifier)
        asking.sampler({}, reshape_numbers(command))
        if model.tokenizer is None:
            raise UserError(
                f"checkpoint {command.checkpoint}: it has no tokenizer, so there is no text to "
                "draw; put its tokenizer.json beside its config.json"
            )
        return asking

    def sampler(self, changes: Mapping[str, Any], numbers: Mapping[str, Any]) -> Sampler:
        """The sampler of the flags with a line's changes, checked against the model."""
        spelt = json.dumps(changes, sort_keys=True)
        if spelt not in self.samplers:
            options = sampler_options(self.command.sampler)
            check_changes(changes, options)
            options = options.updated(changes)
            check_integers(options)
            sampler = build_sampler(options, self.model.schedule, verifier=self.verifier)
            self.samplers[spelt] = sampler
        sampler = self.samplers[spelt]
        reshape = reshape_of(1, numbers, self.processor)
        denoiser = dataclasses.replace(self.model.denoiser, reshape=reshape)
        outer, *wrapped = parts(sampler)
        for depth, part in enumerate(wrapped, 1):
            try:
                part.check(denoiser)
            except UserError as error:
                name = type(part).__module__.rpartition(".")[2]
                raise UserError(f"--{'.'.join(['inner'] * depth)} {name}: {error}") from error
        outer.check(denoiser)
        return sampler

    def __call__(self, request: Request) -> Asked:
        """The request in tokens; UserError where something of it does not fit."""
        tokenizer, command = self.model.tokenizer, self.command
        assert tokenizer is not None  # of() has seen to it
        length = self.model.length if command.length is None else command.length
        clamp = request.clamp(tokenizer, length)
        if clamp.fixed_L.all():
            raise UserError(
                f"there is nothing to draw: the given text takes all of the {clamp.length} tokens"
            )
        if self.model.denoiser.causal:
            check_prefix(clamp)
        cache_dir = Path(default_cache_dir()).expanduser()
        constraint = request.constraint(tokenizer, cache_dir)
        spans = spans_of(clamp, constraint, tokenizer)
        own = {name: getattr(request, name) for name in NUMBERS}
        own = {name: value for name, value in own.items() if value is not None}
        reshape_of(1, own)
        numbers = {**reshape_numbers(command), **own}
        sampler = self.sampler(request.sampler or {}, numbers)
        check_order(sampler, clamp.length)
        return Asked(request, clamp, spans, sampler, numbers)

    @contextlib.contextmanager
    def requests(self) -> Iterator[Callable[[], Iterator[Asked | UserError]]]:
        """A function that yields the requests of the file or of the flags, whenever it is called.

        Errors of the flags are raised; those of a line are yielded in its place.
        """
        command = self.command
        if command.requests is not None:
            with RequestFile(command.requests) as file:
                yield lambda: file.read(command.seed, self)
            return
        schemas = [read_schema(given) for given in command.json_schema]
        taken = ("prompt", "suffix", "infill", "length", "json_schema_depth")
        texts = {name: getattr(command, name) for name in taken}
        first = self(
            Request(
                id=0,
                seed=command.seed,
                regex=one_or_each(command.regex),
                json_schema=one_or_each(schemas),
                **texts,
            )
        )
        yield lambda: (
            first._replace(request=dataclasses.replace(first.request, id=i, seed=command.seed + i))
            for i in range(command.num)
        )


def check_changes(changes: Mapping[str, Any], options: SamplerOptions, prefix: str = "") -> None:
    """Raise UserError where a line's sampler options are not those of the picked sampler."""
    kind = options_type("samplers", options.name)
    types = {field.name: field.type for field in dataclasses.fields(kind)}
    for name, value in changes.items():
        inner = options.values.get("inner")
        if name == "inner" and isinstance(inner, SamplerOptions):
            if not isinstance(value, Mapping):
                raise FieldError(f"sampler.{prefix}inner", "must be an object of its options")
            check_changes(value, inner, f"{prefix}inner.")
        elif name not in types:
            raise UserError(
                f"sampler.{prefix}{name}: {options.name} has no such option"
                f"{did_you_mean(name, types)}; it has {', '.join(types) or 'none'}"
            )
        elif not fits(value, types[name]):
            wanted = getattr(types[name], "__name__", types[name])
            raise FieldError(f"sampler.{prefix}{name}", f"must be {wanted}, got {value!r}")


@dataclasses.dataclass(kw_only=True)
class Survey:
    """What a first pass over all requests found, so that a second one can draw them in batches."""

    counts: Counter[Program] = dataclasses.field(default_factory=Counter)
    refused: list[str] = dataclasses.field(default_factory=list)
    """The first messages; a file that holds no requests has thousands."""
    num_refused: int = 0
    given: bool = False
    """Whether any token is given."""
    guided: bool = False
    """Whether a line asks for guidance of its own."""
    reshaped: bool = False
    """Whether a conditional is changed."""
    shape: Shape | None = None
    """The shape that holds every request's constraints."""
    spanned: bool = False
    """Whether one constraint spans several gaps."""
    repeated: str | int | None = None
    """The first id that stands in two lines."""

    @classmethod
    def of(cls, requests: Iterable[Asked | UserError], processor: Any) -> "Survey":
        """Look at every request once, and keep none of them."""
        found, seen = cls(reshaped=processor is not None), set()
        for one in requests:
            if isinstance(one, UserError):
                found.num_refused += 1
                found.refused += [str(one)] if len(found.refused) < REFUSALS else []
                continue
            found.counts[one.program] += 1
            found.given |= bool(one.clamp.fixed_L.any())
            found.guided |= one.request.guidance is not None
            if one.spans:
                shape = shape_of([one.spans])
                found.shape = shape if found.shape is None else found.shape.joined(shape)
                gaps = one.clamp.gaps
                found.spanned |= any((span.start, span.length) not in gaps for span in one.spans)
            found.reshaped |= reshape_of(1, one.numbers) is not None
            name = hash(str(one.request.id))
            if found.repeated is None and name in seen:
                found.repeated = one.request.id
            seen.add(name)
        return found


def parts(sampler: Sampler) -> Iterator[Sampler]:
    """The sampler, the one that it wraps, and so on."""
    part: Sampler | None = sampler
    while part is not None:
        yield part
        part = getattr(part, "inner", None)


def check_order(sampler: Sampler, length: int) -> None:
    """Raise UserError where a listed order names a position beyond the sequence."""
    for depth, part in enumerate(parts(sampler)):
        last = max(part.positions) if isinstance(part, Ordered) and part.order[0].isdigit() else -1
        if last >= length:
            raise UserError(
                f"--{'inner.' * depth}order: there is no position {last} in a length of {length}, "
                "whose positions count from 0"
            )


def check_guidance(command: SampleCommand, survey: Survey) -> None:
    """Raise UserError where ``--guidance`` would do nothing."""
    if command.guidance and not survey.given and not survey.guided:
        raise UserError(
            f"--guidance {command.guidance}: it strengthens what is given, and nothing is; give a "
            "--prompt, --suffix, --infill or --requests with them"
        )


def notes(
    command: SampleCommand, model: sedd.Model, sampler: Sampler, survey: Survey
) -> Iterator[str]:
    """Warnings about the samples to come, each a sentence."""
    if sampler.caveat:
        yield sampler.caveat
    if not model.process.absorbing and survey.given:
        yield (
            "what is given is approximate on a uniform process: the model reads it as noisy, so "
            "that the rest does not tend to its true conditional at any number of steps"
        )
    blocks = any(isinstance(part, SemiAutoregressive) for part in parts(sampler))
    if blocks and not model.time_independent:
        yield (
            "semi_autoregressive is approximate here: this model depends on the noise level, and "
            "is told that of a block as if it were that of the whole"
        )
    if sampler.width > command.batch_size:
        yield (
            f"--batch-size {command.batch_size}: {command.sampler.name} draws {sampler.width} "
            "sequences side by side for each that it returns, and so it does here"
        )
    if survey.spanned:
        yield (
            "one regex or schema for several gaps spans them all and the given text between them; "
            "a list has one for each gap"
        )
    if survey.repeated is not None:
        yield f"--requests {command.requests}: the id {survey.repeated!r} stands in several lines"
    if command.trace is not None and survey.counts.total() > TRACED:
        yield f"--trace shows the first {TRACED} of {survey.counts.total()} sequences"
