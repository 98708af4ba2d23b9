"""The flags of ``sample.py``, and which of them go with each other and with the model."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import sedd
from sedd.commands.cli import parse, take
from sedd.commands.mistakes import as_flag
from sedd.commands.sampler_flags import (
    DEFAULT,
    check_integers,
    describe,
    fields_of,
    flags_of,
    pick,
    refuse_flags_of_others,
    sampler_options,
)
from sedd.commands.user_code import load_function, load_processor
from sedd.configuration.build import build_sampler, default_sampler
from sedd.configuration.components import Options, maker, makers
from sedd.configuration.config import default_cache_dir
from sedd.errors import FieldError, UserError
from sedd.files import check_writable
from sedd.model import read_config
from sedd.requests import Asked, Request, ask, read_requests
from sedd.samplers.base import Sampler
from sedd.samplers.ordered import Ordered
from sedd.samplers.semi_autoregressive import SemiAutoregressive
from sedd.sampling import DEFAULTS, reshape_of, text_verifier

TITLE = "Draw text from a trained model: from nothing, after a prompt, or into gaps."
MAX_NUM = 2**20  # more is a mistake that would fill the memory


def unset(metavar: str) -> Any:
    """How the help shows a flag that may be left out."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleCommand:
    """The flags of ``sample.py``; the sampler's own (--steps) are among them."""

    checkpoint: Annotated[str, unset("DIR|hf://OWNER/NAME")]
    """A run's directory, or a published checkpoint's."""
    step: Annotated[int | Literal["best"] | None, unset("INT|best")] = None
    """Which checkpoint: of a step, or the best by validation; the newest by default."""
    num: int = 1
    """How many sequences; the i-th has seed + i."""
    length: Annotated[int | None, unset("INT")] = None
    """Tokens in a sequence, the prompt included; the training length by default."""
    seed: int = 0
    """Of the noise; what is drawn depends on its own seed alone."""
    prompt: Annotated[str, unset("TEXT")] = ""
    """What the text begins with."""
    suffix: Annotated[str, unset("TEXT")] = ""
    """What the text ends with."""
    infill: Annotated[str | None, unset("TEXT")] = None
    """Text with gaps: "text with {mask:12} gaps" leaves twelve tokens free."""
    requests: Annotated[Path | None, unset("FILE.jsonl")] = None
    """One request a line: {id, prompt | infill, suffix, length, seed, regex | json_schema}."""
    regex: Annotated[tuple[str, ...], unset("REGEX")] = ()
    """What the free text must match: one for all of it, or one for each gap."""
    json_schema: Annotated[tuple[Path, ...], unset("FILE.json")] = ()
    """What the free text must be JSON of: one for all of it, or one for each gap."""
    rule: Literal["joint", "dingo"] = "joint"
    """How a step draws under a regex: all that matches at once, or DINGO's rule."""
    temperature: float = 1.0
    """Of the drawn tokens: sharper below 1, the likeliest at 0."""
    top_k: Annotated[int | None, unset("INT")] = None
    """Draw from the k likeliest tokens only."""
    top_p: Annotated[float | None, unset("FLOAT")] = None
    """Draw from the likeliest tokens that together have this probability."""
    guidance: float = 0.0
    """Strengthen what is given (classifier-free guidance); 0 is off, else two calls for one."""
    logit_processor: Annotated[str | None, unset("FILE.py:FUNCTION")] = None
    """A function of (log_probs, tokens, positions), in JAX, that returns log_probs."""
    verifier: Annotated[str | None, unset("FILE.py:FUNCTION")] = None
    """From a list of texts to a score each, higher is better; for best_of_n and particle."""
    output: Annotated[Path | None, unset("FILE.jsonl")] = None
    """Write here, a line each: id, text, tokens, calls, entropy, seed, the verifier's score."""
    trace: Annotated[Path | None, unset("FILE.html")] = None
    """Write a page here that plays the denoising."""
    batch_size: int = 32
    """Sequences drawn side by side, a search's candidates included."""
    sampler: Annotated[Options, tyro.conf.arg(name="")]

    def __post_init__(self):
        for flag, value in (("--num", self.num), ("--batch-size", self.batch_size)):
            if value < 1:
                raise ValueError(f"{flag} must be at least 1, got {value}")
        if self.num > MAX_NUM:
            raise ValueError(f"--num must be at most {MAX_NUM}, got {self.num}")
        if self.num > 1 and self.seed + self.num > 2**32:
            raise ValueError(
                f"--seed {self.seed}: with --num {self.num} the last seed is beyond 2**32 - 1"
            )


def read_command(arguments: Sequence[str]) -> SampleCommand:
    """The flags, those of the picked samplers among them, and what is wrong with them alone."""
    name, rest = take(arguments, "--sampler")
    inner, rest = take(rest, "--inner")
    innermost, rest = take(rest, "--inner.inner")
    kinds = pick(sampler_for(rest) if name is None else name, inner, innermost)
    if not {"-h", "--help"} & set(rest):
        refuse_flags_of_others(rest, SampleCommand, kinds)
    command = parse(
        SampleCommand,
        rest,
        default=SampleCommand(checkpoint=tyro.MISSING, sampler=flags_of(kinds)()),
        description=f"{TITLE}\n\n{describe(kinds)}",
    )
    check_files(command)
    check_functions(command)
    return command


def sampler_for(arguments: Sequence[str]) -> str:
    """The default sampler: what the run named by --checkpoint needs, if there is one."""
    checkpoint, _ = take(arguments, "--checkpoint")
    try:
        config = None if checkpoint is None else read_config(Path(checkpoint))
    except UserError:  # a published one; of others ``sedd.load`` says what is wrong
        config = None
    if config is None:
        return DEFAULT
    return default_sampler(maker("parameterizations", config.parameterization.name))


def check_files(command: SampleCommand) -> None:
    """UserError where what is drawn cannot be written, or the flags of --requests are at odds."""
    files = {"--requests": command.requests, "--output": command.output, "--trace": command.trace}
    taken: dict[Path, str] = {}
    for flag, path in files.items():
        if path is None:
            continue
        if path.resolve() in taken:
            raise UserError(f"{flag} {path}: it would replace the file of {taken[path.resolve()]}")
        taken[path.resolve()] = flag
        if flag != "--requests":
            check_writable(path, f"{flag} {path}")
    if command.regex and command.json_schema:
        raise UserError("--regex and --json-schema: give one of them")
    for path in command.json_schema:
        read_schema(path)
    if command.requests is not None:
        if command.regex or command.json_schema:
            raise UserError("--requests holds the constraints: give no --regex or --json-schema")
        if command.prompt or command.suffix or command.infill is not None:
            raise UserError("--requests holds the prompts: give no --prompt, --suffix or --infill")
        if command.num != 1:
            raise UserError(f"--num {command.num}: --requests says how many sequences there are")


def read_schema(path: Path) -> Any:
    """The JSON object of a file; UserError where there is none."""
    try:
        schema = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"--json-schema {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--json-schema {path}: not JSON ({error})") from None
    if not isinstance(schema, dict):
        raise UserError(
            f"--json-schema {path}: a schema is an object, got {json.dumps(schema)[:80]}"
        )
    return schema


def one_or_each(values: Sequence[Any]) -> Any:
    """A flag's values as a request has them: one for all gaps, or a list with one for each."""
    return (values[0] if len(values) == 1 else list(values)) if values else None


def check_functions(command: SampleCommand) -> None:
    """UserError where the user's functions, or the numbers beside them, are wrong."""
    name = command.sampler.name
    takers = [n for n in makers("samplers") if "verifier" in fields_of(n)]
    if command.verifier is not None:
        if name not in takers:
            raise UserError(
                f"--verifier {command.verifier}: sampler {name!r} takes no verifier; "
                f"{' and '.join(takers)} do"
            )
        load_function(command.verifier, "--verifier")
    elif name in takers:
        raise UserError(
            f"--sampler {name} needs --verifier FILE.py:FUNCTION, a function from a list of texts "
            "to a score each"
        )
    if command.logit_processor is not None:
        load_function(command.logit_processor, "--logit-processor")
    reshape_numbers(command)


def reshape_numbers(command: SampleCommand) -> dict[str, Any]:
    """The numbers that change the conditional of clean tokens; UserError on a bad one."""
    options = {name: getattr(command, name) for name in DEFAULTS}
    try:
        reshape_of(1, options)
    except FieldError as error:
        raise UserError(error.named(as_flag(error.field))) from error
    return options


def reshape_options(command: SampleCommand, model: sedd.Model) -> dict[str, Any]:
    """All that changes the conditional of clean tokens."""
    processor = None
    if command.logit_processor is not None:
        processor = load_processor(
            command.logit_processor, "--logit-processor", model.process.mask_id
        )
    return {**reshape_numbers(command), "logit_processor": processor}


def build_command_sampler(
    command: SampleCommand, model: sedd.Model, reshape: dict[str, Any]
) -> Sampler:
    """The sampler of the flags; UserError where it does not go with the model."""
    verifier = None
    if command.verifier is not None:
        function = load_function(command.verifier, "--verifier")
        verifier = text_verifier(model, function, command.verifier)
    options = sampler_options(command.sampler)
    try:
        check_integers(options)
        sampler = build_sampler(options, model.schedule, verifier=verifier)
    except FieldError as error:
        raise UserError(error.named(as_flag(error.field))) from error
    denoiser = dataclasses.replace(model.denoiser, reshape=reshape_of(1, reshape))
    outer, *wrapped = parts(sampler)
    for depth, part in enumerate(wrapped, 1):
        try:
            part.check(denoiser)
        except UserError as error:
            flag = ".".join(["inner"] * depth)
            name = type(part).__module__.rpartition(".")[2]
            raise UserError(f"--{flag} {name}: {error}") from error
    outer.check(denoiser)
    return sampler


def requested(command: SampleCommand, model: sedd.Model) -> tuple[list[Asked], list[UserError]]:
    """The requests of the file or of the flags, and the lines of the file that were refused."""
    if model.tokenizer is None:
        raise UserError(
            f"checkpoint {command.checkpoint}: it has no tokenizer, so there is no text to draw; "
            "put its tokenizer.json beside its config.json"
        )
    cache_dir, causal = Path(default_cache_dir()).expanduser(), model.denoiser.causal
    if command.requests is None:
        requests = [
            Request(
                id=i,
                prompt=command.prompt,
                suffix=command.suffix,
                infill=command.infill,
                length=command.length,
                seed=command.seed + i,
                regex=one_or_each(command.regex),
                json_schema=one_or_each([read_schema(path) for path in command.json_schema]),
            )
            for i in range(command.num)
        ]
        first = ask(requests[0], model.tokenizer, model.length, cache_dir, causal=causal)
        return [first._replace(request=request) for request in requests], []
    length = model.length if command.length is None else command.length
    found = list(
        read_requests(
            command.requests, model.tokenizer, length, command.seed, cache_dir, causal=causal
        )
    )
    refused = [line for line in found if isinstance(line, UserError)]
    return [line for line in found if not isinstance(line, UserError)], refused


def parts(sampler: Sampler) -> Iterator[Sampler]:
    """The sampler, and what it wraps."""
    part: Sampler | None = sampler
    while part is not None:
        yield part
        part = getattr(part, "inner", None)


def check_requests(command: SampleCommand, sampler: Sampler, asked: Sequence[Asked]) -> None:
    """UserError where a flag would do nothing for what is asked."""
    if command.guidance and not any(one.clamp.fixed_L.any() for one in asked):
        raise UserError(
            f"--guidance {command.guidance}: it strengthens what is given, and nothing is; give a "
            "--prompt, --suffix, --infill or --requests with them"
        )
    longest = max(one.clamp.length for one in asked)
    for depth, part in enumerate(parts(sampler)):
        last = max(part.positions) if isinstance(part, Ordered) and part.order[0].isdigit() else -1
        if last >= longest:
            raise UserError(
                f"--{'inner.' * depth}order: there is no position {last} in a length of {longest}, "
                "whose positions count from 0"
            )


def notes(
    command: SampleCommand,
    model: sedd.Model,
    sampler: Sampler,
    asked: Sequence[Asked],
) -> Iterator[str]:
    """What the user should know of the samples beforehand."""
    if sampler.caveat:
        yield sampler.caveat
    if not model.process.absorbing and any(one.clamp.fixed_L.any() for one in asked):
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
