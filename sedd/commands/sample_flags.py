"""The flags of ``sample.py``, and which of them go with each other."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sedd.commands.cli import check_suffix, parse, take
from sedd.commands.sampler_flags import (
    DEFAULT,
    describe,
    fields_of,
    flags_of,
    pick,
    refuse_flags_of_others,
)
from sedd.commands.user_code import load_function
from sedd.configuration.build import default_sampler_of
from sedd.configuration.components import Options, makers
from sedd.errors import UserError
from sedd.files import check_writable
from sedd.interop.layouts import find_config, read_layout
from sedd.model import read_config
from sedd.sampling import NUMBERS, reshape_of

TITLE = "Draw text from a trained model: from nothing, after a prompt, or into gaps."


def unset(metavar: str) -> Any:
    """The help of a flag that may be left out: its value, and no default."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleCommand:
    """The flags of ``sample.py``; those of the picked sampler (``--steps``) are among them."""

    checkpoint: Annotated[str, unset("DIR|hf://OWNER/NAME")]
    """Directory of a run or of a published checkpoint."""
    step: Annotated[int | Literal["best"] | None, unset("INT|best")] = None
    """Checkpoint of a step, or the best by validation; the newest by default."""
    num: int = 1
    """Number of sequences; the i-th, from 0 on, has seed + i."""
    length: Annotated[int | None, unset("INT")] = None
    """Tokens in a sequence, the prompt included; the training length by default."""
    seed: int = 0
    """Seed of the noise; a sequence depends on its own seed, not on its batch."""
    prompt: Annotated[str, unset("TEXT")] = ""
    """Text at the start."""
    suffix: Annotated[str, unset("TEXT")] = ""
    """Text at the end."""
    infill: Annotated[str | None, unset("TEXT")] = None
    """Text with gaps: "text with {mask:12} gaps" leaves twelve tokens free."""
    requests: Annotated[Path | None, unset("FILE.jsonl")] = None
    """One request a line, an object: id, prompt or infill, suffix, length, seed, regex, or
    json_schema and json_schema_depth, temperature, top_k, top_p, guidance, and sampler, options
    that differ."""
    regex: Annotated[tuple[str, ...], unset("REGEX")] = ()
    """Regex that the free text must match: one for all of it, or one for each gap."""
    json_schema: Annotated[tuple[str, ...], unset("FILE.json|'{…}'")] = ()
    """JSON Schema of the free text, a file or inline: one for all of it, or one for each gap."""
    json_schema_depth: Annotated[int | None, unset("INT")] = None
    """How deep values nest where the JSON Schema sets no limit, as in a recursive $ref; by default
    2."""
    rule: Literal["joint", "dingo"] = "joint"
    """How a step draws under a regex: jointly by the model, or by DINGO's rule."""
    temperature: float = 1.0
    """Below 1 sharpens the distributions, above 1 flattens them; 0 takes the most likely token."""
    top_k: Annotated[int | None, unset("INT")] = None
    """Draw from the k most likely tokens only."""
    top_p: Annotated[float | None, unset("FLOAT")] = None
    """Draw from the most likely tokens whose probabilities sum to p."""
    guidance: float = 0.0
    """Weight of the given text (classifier-free guidance); 0 is off, above 0 doubles the calls."""
    logit_processor: Annotated[str | None, unset("FILE.py:FUNCTION")] = None
    """A function of (log_probs, tokens, positions), in JAX, that returns log_probs."""
    verifier: Annotated[str | None, unset("FILE.py:FUNCTION")] = None
    """A function from a list of texts to a score each, higher is better; for the samplers
    best_of_n and particle."""
    output: Annotated[Path | None, unset("FILE.jsonl")] = None
    """JSON Lines file, or - for standard output; each batch is written when it is done. A line
    has id, text, tokens, calls, entropy, seed and the verifier's score."""
    trace: Annotated[Path | None, unset("FILE.html")] = None
    """Page that plays the denoising of the first 64 sequences."""
    batch_size: int = 32
    """Sequences drawn side by side, the candidates of a search included."""
    sampler: Annotated[Options, tyro.conf.arg(name="")]

    def __post_init__(self):
        for flag, value in (("--num", self.num), ("--batch-size", self.batch_size)):
            if value < 1:
                raise ValueError(f"{flag} must be at least 1, got {value}")
        if self.num > 1 and self.seed + self.num > 2**32:
            raise ValueError(
                f"--seed {self.seed}: with --num {self.num} the last seed is beyond 2**32 - 1"
            )


def read_command(arguments: Sequence[str]) -> SampleCommand:
    """Parse the flags, those of the picked samplers among them.

    Raises UserError on a mistake that shows without the model.
    """
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
    """The default sampler of the model named by --checkpoint, if its configuration can be read."""
    checkpoint, _ = take(arguments, "--checkpoint")
    if checkpoint is None:
        return DEFAULT
    try:
        config = read_config(Path(checkpoint))
        if config is not None:
            return default_sampler_of(config)
    except UserError:  # ``sedd.load`` says what is wrong, unless the checkpoint is published
        pass
    try:
        published = find_config(Path(checkpoint))
        kind = None if published is None else read_layout(published).description.parameterization
    except UserError:
        kind = None
    return "event_jump" if kind == "conditional" else DEFAULT


def check_files(command: SampleCommand) -> None:
    """Raise UserError where an output cannot be written, or flags exclude each other."""
    files = {"--requests": command.requests, "--output": command.output, "--trace": command.trace}
    taken: dict[Path, str] = {}
    for flag, path in files.items():
        if path is None:
            continue
        if path.resolve() in taken:
            raise UserError(f"{flag} {path}: it would replace the file of {taken[path.resolve()]}")
        taken[path.resolve()] = flag
        if flag != "--requests" and str(path) != "-":
            check_writable(path, f"{flag} {path}")
    if command.trace is not None:
        check_suffix("--trace", command.trace, (".html", ".htm"))
    if command.regex and command.json_schema:
        raise UserError("--regex and --json-schema: give one of them")
    for given in command.json_schema:
        read_schema(given)
    depth = command.json_schema_depth
    if command.requests is not None:
        if command.regex or command.json_schema:
            raise UserError("--requests holds the constraints: give no --regex or --json-schema")
        if depth is not None:
            raise UserError(
                f"--json-schema-depth {depth}: --requests holds the constraints; write "
                "json_schema_depth into its lines"
            )
        if command.prompt or command.suffix or command.infill is not None:
            raise UserError("--requests holds the prompts: give no --prompt, --suffix or --infill")
        if command.num != 1:
            raise UserError(f"--num {command.num}: --requests says how many sequences there are")
    elif depth is not None and not command.json_schema:
        raise UserError(
            f"--json-schema-depth {depth}: it limits a JSON schema, and none is given; "
            "give --json-schema as well"
        )


def read_schema(given: str) -> Any:
    """The JSON object of a file, or of the flag itself where it begins with a brace."""
    text, where = given, "--json-schema"
    if not given.lstrip().startswith("{"):
        where = f"--json-schema {given}"
        try:
            text = Path(given).expanduser().read_text(encoding="utf-8-sig")
        except OSError as error:
            raise UserError(f"{where}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"{where}: not UTF-8 text") from None
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(schema, dict):
        said = json.dumps(schema, ensure_ascii=False)[:80]
        raise UserError(f"{where}: a schema is an object, got {said}")
    return schema


def one_or_each(values: Sequence[Any]) -> Any:
    """The values of a flag in the form of a request: one for all gaps, or a list for each gap."""
    return (values[0] if len(values) == 1 else list(values)) if values else None


def check_functions(command: SampleCommand) -> None:
    """Raise UserError where the user's functions cannot be loaded, or a number is out of range."""
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
    """Temperature, top_k, top_p and guidance of the flags; FieldError on a bad one."""
    numbers = {name: getattr(command, name) for name in NUMBERS}
    reshape_of(1, numbers)
    return numbers
