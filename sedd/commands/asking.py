"""From requests to tokens, samplers and numbers, everything checked before drawing.

A request (``sedd.requests.Request``) holds text and numbers as a user writes them. ``Asking`` turns
it into an ``Asked``: the given tokens, the constraints as automata, the sampler, and the numbers
with the flags as defaults.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import sedd
from sedd.commands.answers import Asked
from sedd.commands.sample_flags import (
    SampleCommand,
    joint_of,
    load_verifier,
    one_or_each,
    read_profile,
    read_schema,
    reshape_numbers,
)
from sedd.commands.sampler_flags import check_integers, sampler_options
from sedd.commands.user_code import load_processor
from sedd.configuration.build import build_sampler
from sedd.configuration.components import options_type
from sedd.configuration.config import default_cache_dir, fits
from sedd.constraints.windows import check_window
from sedd.errors import FieldError, UserError, did_you_mean
from sedd.requests import Request, RequestFile
from sedd.samplers.base import Sampler, SamplerOptions, layers
from sedd.samplers.ordered import Ordered
from sedd.samplers.orders import listed
from sedd.samplers.planned import Profile
from sedd.samplers.speculative import Speculative
from sedd.samplers.verifier import Verifiers, as_verifiers, text_verifier
from sedd.sampling.arguments import NUMBERS, reshape_of, stopping
from sedd.sampling.batch import check_profile, check_temperature
from sedd.watermark.scheme import Scheme


class Steering:
    """The score of ``--method particle``, which exists only once its weights are known."""

    score: Callable[[list[str]], Any]

    def __call__(self, texts: list[str]) -> Any:
        return self.score(texts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asking:
    """Turns requests into tokens, samplers and numbers, with the flags as defaults.

    Calling an instance with a ``Request`` gives the ``Asked``.

    Args:
        command: the flags.
        model: the model that will draw.
        processor: the user's logit processor, or None.
        verifier: the user's verifiers, or None.
        profile: the price profile for the sampler planned, or None.
        scheme: the watermarking scheme, or None.
        samplers: the samplers built so far, by the ``sampler`` object of a request's line as JSON.
            Lines with equal objects must get the same sampler, because a compiled program is looked
            up by its sampler.
    """

    command: SampleCommand
    model: sedd.Model
    processor: Any
    verifier: Verifiers | None
    profile: Profile | None
    scheme: Scheme | None
    samplers: dict[str, Sampler] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, command: SampleCommand, model: sedd.Model) -> "Asking":
        """Load the user's functions and the price profile, and build the sampler of the flags.

        Raises:
            UserError: a function or the profile cannot be loaded, the sampler or the profile does
                not go with the model, or the model has no tokenizer.
        """
        processor = verifier = None
        if command.logit_processor is not None:
            flag = "--logit-processor"
            processor = load_processor(command.logit_processor, flag, model.process.mask_id)
        if command.verifier:
            given = [load_verifier(spec) for spec in command.verifier]
            verifier = as_verifiers(given, model.tokenizer, command.verifier)
        if command.control.method == "particle":
            verifier = text_verifier(Steering(), model.tokenizer, "--features")
        asking = cls(
            command=command,
            model=model,
            processor=processor,
            verifier=verifier,
            profile=read_profile(command),
            scheme=command.mark.scheme,
        )
        asking.sampler({}, reshape_numbers(command))
        if model.tokenizer is None:
            raise UserError(
                f"checkpoint {command.checkpoint}: it has no tokenizer, so there is no text to "
                "draw; put its tokenizer.json beside its config.json"
            )
        return asking

    def sampler(self, changes: Mapping[str, Any], numbers: Mapping[str, Any]) -> Sampler:
        """Build the sampler of the flags with the changes of one line, and check it.

        Args:
            changes: the options that the line's ``sampler`` object sets.
            numbers: temperature, top_k, top_p and guidance, with which the sampler has to go.

        Raises:
            UserError: an option is unknown or out of range, or the sampler does not go with the
                model; the message names the flag of the inner sampler that is wrong.
        """
        spelt = json.dumps(changes, sort_keys=True)
        if spelt not in self.samplers:
            options = sampler_options(self.command.sampler)
            check_changes(changes, options)
            options = options.updated(changes)
            check_integers(options)
            sampler = build_sampler(
                options, self.model.schedule, verifier=self.verifier, profile=self.profile
            )
            check_profile(sampler, self.model)
            self.samplers[spelt] = sampler
        sampler = self.samplers[spelt]
        reshape = reshape_of(1, numbers, self.processor)
        watermark = None
        if self.scheme is not None:
            check_temperature(reshape)
            watermark = self.scheme.batch(np.zeros(1), np.zeros((1, 1), bool))
        windows = None
        if (joint := joint_of(self.command)) is not None:
            joint.check(self.model.denoiser.network, self.model.source)
            windows = joint.windows(1)
        denoiser = dataclasses.replace(
            self.model.denoiser, reshape=reshape, watermark=watermark, windows=windows
        )
        outer, *wrapped = layers(sampler)
        within = outer.within(denoiser)
        for depth, part in enumerate(wrapped, 1):
            try:
                part.check(within)
                within = part.within(within)
            except UserError as error:
                name = type(part).__module__.rpartition(".")[2]
                raise UserError(f"--{'.'.join(['inner'] * depth)} {name}: {error}") from error
        outer.check(denoiser)
        return sampler

    def __call__(self, request: Request) -> Asked:
        """Turn one request into tokens, constraints, a sampler and numbers.

        Raises:
            UserError: a field does not fit the model, the tokenizer or another field, or no token
                is left to draw.
        """
        tokenizer, command = self.model.tokenizer, self.command
        assert tokenizer is not None  # ``of`` refuses a model without one
        length = self.model.length if command.length is None else command.length
        clamp = request.clamp(tokenizer, length)
        if clamp.fixed_L.all():
            raise UserError(
                f"there is nothing to draw: the given text takes all of the {clamp.length} tokens"
            )
        self.model.check_given(clamp)
        cache_dir = Path(default_cache_dir()).expanduser()
        spans = request.spans(clamp, tokenizer, cache_dir)
        own = {name: getattr(request, name) for name in NUMBERS}
        own = {name: value for name, value in own.items() if value is not None}
        reshape_of(1, own)
        numbers = {**reshape_numbers(command), **own}
        sampler = self.sampler(request.sampler or {}, numbers)
        if command.window is not None:
            check_window(command.window, clamp.length)
            if spans:
                raise UserError(
                    f"--window {command.window}: windows take no regex or json_schema; leave one "
                    "of them out"
                )
        check_order(sampler, clamp.length)
        check_profile(sampler, self.model, clamp.length)
        return Asked(request, clamp, spans, stopping(sampler, [clamp]), numbers)

    @contextlib.contextmanager
    def requests(self) -> Iterator[Callable[[], Iterator[Asked | UserError]]]:
        """Open the requests: those of ``--requests``, or ``--num`` equal ones of the flags.

        The context gives a function that yields all of them from the start each time it is called.
        An error of a line is yielded in its place, so that the other lines are answered.

        Raises:
            UserError: the flags make no valid request, or the file cannot be read.
        """
        command = self.command
        if command.requests is not None:
            with RequestFile(command.requests) as file:
                yield lambda: file.read(command.seed, self)
            return
        schemas = [read_schema(given) for given in command.json_schema]
        taken = ("prompt", "suffix", "infill", "length", "json_schema_depth")
        texts = {name: getattr(command, name) for name in taken}
        if command.chat is not None:
            texts["messages"] = [{"role": "user", "content": command.chat}]
        # The requests differ in id and seed only, so the text is tokenised and the constraints are
        # compiled once.
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
    """Check the ``sampler`` object of a request's line against the picked sampler.

    Args:
        changes: the object; ``inner`` in it is an object of the inner sampler's options.
        options: the sampler of the flags.
        prefix: path of the object, such as ``inner.``, for the message.

    Raises:
        UserError: the sampler has no such option.
        FieldError: a value has the wrong type.
    """
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


def check_order(sampler: Sampler, length: int) -> None:
    """Check ``--order 3,0,2`` of a sampler that has an order, also as an inner sampler.

    Raises:
        UserError: the order names a position beyond ``length`` tokens.
    """
    for depth, part in enumerate(layers(sampler)):
        has_order = isinstance(part, Ordered | Speculative)
        last = max(listed(part.order), default=-1) if has_order else -1
        if last >= length:
            raise UserError(
                f"--{'inner.' * depth}order: there is no position {last} in a length of {length}, "
                "whose positions count from 0"
            )
