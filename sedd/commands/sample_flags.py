"""The flags of ``sedd sample``, and the checks that need no model.

The options of samplers are flags too, and which ones there are depends on the sampler. Parsing has
two stages: ``--sampler``, ``--inner`` and ``--inner.inner`` pick the samplers, by default the one
that goes with the model of ``--checkpoint``; then all other flags are parsed with the options of
these samplers among them.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sedd.commands.cli import Command, check_suffix, parse, take, unset
from sedd.commands.control_flags import ControlFlags, check_control
from sedd.commands.devices import DeviceFlags
from sedd.commands.load_flags import LoadFlags
from sedd.commands.sampler_flags import (
    DEFAULT,
    describe,
    fields_of,
    nested_type,
    pick,
    refuse_flags_of_others,
    sampler_options,
)
from sedd.commands.watermark_flags import WatermarkFlags
from sedd.configuration.build import default_sampler_of, takers
from sedd.configuration.components import Options
from sedd.configuration.user_function import load_function
from sedd.constraints.windows import BELOW, Joint
from sedd.errors import UserError
from sedd.evaluation.price import Price
from sedd.files import check_writable
from sedd.interop.layouts import find_config, read_layout
from sedd.model import published_config, read_config
from sedd.samplers.base import SamplerOptions
from sedd.samplers.planned import Profile
from sedd.samplers.self_likelihood import SelfLikelihood
from sedd.samplers.verifier import SELF, self_likelihood
from sedd.sampling.arguments import NUMBERS, reshape_of

TITLE = "Draw text from a trained model: after a prompt, into gaps, or as an answer."


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleCommand:
    """The flags of ``sedd sample``; the options of the sampler, such as ``--steps``, are flags too.

    Raises:
        ValueError: a number is out of range.
    """

    checkpoint: Annotated[str, unset("DIR|hf://OWNER/NAME")]
    """Directory of a run or of a published checkpoint."""
    step: Annotated[int | Literal["best"] | None, unset("INT|best")] = None
    """Checkpoint of a run: the one of this step, or the best by validation; by default the newest.
    """
    num: int = 1
    """Number of sequences to draw. The i-th, counted from 0, has the seed --seed + i."""
    length: Annotated[int | None, unset("INT")] = None
    """Tokens in a sequence, given text included; by default the training length, and with --infill
    the length of the text."""
    seed: int = 0
    """Seed of the noise. A sequence depends on its own seed alone, not on the rest of its batch."""
    prompt: Annotated[str, unset("TEXT")] = ""
    """Given text at the start of the sequence."""
    suffix: Annotated[str, unset("TEXT")] = ""
    """Given text at the end of the sequence."""
    infill: Annotated[str | None, unset("TEXT")] = None
    """Given text with gaps to fill: "The {mask:12} said no." leaves twelve tokens free."""
    chat: Annotated[str | None, unset("TEXT")] = None
    """A user's message to answer. It is written by the chat template of the model's tokenizer, and
    the answer ends where the model ends its turn."""
    requests: Annotated[Path | None, unset("FILE.jsonl")] = None
    """Draw one sequence for each line, a JSON object with any of the fields id, prompt, suffix,
    infill, messages (a conversation to answer), length, seed, regex, json_schema,
    json_schema_depth, temperature, top_k, top_p, guidance, and sampler (an object of the sampler's
    options). The flags are the defaults, except that a line with infill and without length has the
    length of its text."""
    regex: Annotated[tuple[str, ...], unset("REGEX")] = ()
    """Regular expression that the text must match: one for everything from the first free token to
    the last, given text in between included, or one for each gap."""
    json_schema: Annotated[tuple[str, ...], unset("FILE.json|'{…}'")] = ()
    """JSON Schema of the text, a file or inline: one for everything from the first free token to
    the last, or one for each gap."""
    json_schema_depth: Annotated[int | None, unset("INT")] = None
    """How deep values nest where the JSON Schema sets no limit, as in a recursive $ref; by default
    2."""
    rule: Literal["joint", "dingo"] = "joint"
    """How a step draws under a regex or schema. joint samples from the model's probabilities,
    restricted to matching strings. dingo takes the most likely match, and ignores the probabilities
    of positions that the step does not reveal."""
    temperature: float = 1.0
    """Divides the log probabilities: below 1 sharpens the distributions, above 1 flattens them;
    0 takes the most likely token."""
    top_k: Annotated[int | None, unset("INT")] = None
    """Draw only from the k most likely tokens of each position."""
    top_p: Annotated[float | None, unset("FLOAT")] = None
    """Draw only from the most likely tokens of each position whose probabilities sum to p."""
    guidance: float = 0.0
    """Weight w of classifier-free guidance by the given text: p(with)^(1+w) / p(without)^w. 0 is
    off; above 0 the network calls double."""
    logit_processor: Annotated[str | None, unset("FILE.py:FUNCTION")] = None
    """A JAX function of the log probabilities [B, K, N] at K positions of each sequence, the tokens
    [B, L] and these positions [B, K]; it returns changed log probabilities."""
    verifier: Annotated[tuple[str, ...], unset("FILE.py:FUNCTION|self")] = ()
    """What a search (best_of_n, particle, zero_order, search_paths) scores texts by: a function
    from a list of texts to one score each, higher is better; or self, the likelihood of the text
    under the model itself, with 8 network calls for each text (self:16 for 16). Of several
    verifiers the mean rank counts."""
    profile: Annotated[Path | None, unset("FILE.json")] = None
    """Price profile of the model, for the sampler planned: the file of evaluate.py --price 1 4 16
    --json FILE.json."""
    output: Annotated[Path | None, unset("FILE.jsonl")] = None
    """Write the samples to this JSON Lines file, or to standard output if it is -. Each line has
    id, text, tokens, calls, rows, entropy (in nats, of the frequencies of the drawn tokens) and
    seed. Some samplers add score, verifier_calls, log_partition and log_prob (in nats). --features
    adds the features' values, --method weigh also weight and which tokens were given, and
    --watermark adds watermark: what sedd detect has to know beside the secret."""
    trace: Annotated[Path | None, unset("FILE.html")] = None
    """Write an HTML page that plays the denoising of the first 64 sequences."""
    batch_size: int = 32
    """Sequences that are drawn at the same time, over all devices; the candidates of a search
    count."""
    window: Annotated[int | None, unset("INT")] = None
    """Draw the tokens of one network call jointly, within windows of this many tokens, by the HMM
    head of the model (--network hmm_head); by default each is drawn independently."""
    below: float = BELOW
    """With --window: draw jointly in sequences of which at most this share is masked, and
    independently before."""
    mark: Annotated[WatermarkFlags, tyro.conf.arg(name="")] = WatermarkFlags()
    control: Annotated[ControlFlags, tyro.conf.arg(name="")] = ControlFlags()
    on: Annotated[DeviceFlags, tyro.conf.arg(name="")] = DeviceFlags()
    how: Annotated[LoadFlags, tyro.conf.arg(name="")] = LoadFlags()
    sampler: Annotated[Options, tyro.conf.arg(name="")]

    def __post_init__(self):
        for flag, value in (("--num", self.num), ("--batch-size", self.batch_size)):
            if value < 1:
                raise ValueError(f"{flag} must be at least 1, got {value}")
        if self.window is None and self.below != BELOW:
            raise ValueError(f"--below {self.below} goes with --window, which is not given")
        if self.num > 1 and self.seed + self.num > 2**32:
            raise ValueError(
                f"--seed {self.seed}: with --num {self.num} the last seed is beyond 2**32 - 1"
            )


def joint_of(command: SampleCommand) -> Joint | None:
    """The windows of the flags; None without ``--window``."""
    return None if command.window is None else Joint(command.window, command.below)


def read_command(arguments: Sequence[str]) -> SampleCommand:
    """Parse the flags, the options of the picked samplers among them.

    Raises:
        UserError: a flag is wrong or does not go with another one, a file cannot be written, or a
            function of the user cannot be loaded.
    """
    if take(arguments, "--method")[0] == "particle" and take(arguments, "--sampler")[0] is None:
        arguments = [*arguments, "--sampler", "particle"]
    command = parse_with_sampler(SampleCommand, arguments, TITLE, checkpoint=tyro.MISSING)
    check_files(command)
    check_control(command)
    check_functions(command)
    return command


def parse_with_sampler(
    kind: type[Command], arguments: Sequence[str], title: str, **given: Any
) -> Command:
    """Fill a dataclass from flags, the options of the picked samplers among them.

    Args:
        kind: the dataclass, with the fields ``checkpoint`` and ``sampler``.
        arguments: the command line.
        title: the beginning of the help.
        given: values of the fields without a default; ``tyro.MISSING`` makes a flag required.

    Raises:
        UserError: a flag is wrong.
    """
    name, rest = take(arguments, "--sampler")
    inner, rest = take(rest, "--inner")
    innermost, rest = take(rest, "--inner.inner")
    kinds = pick(sampler_for(rest) if name is None else name, inner, innermost)
    if not {"-h", "--help"} & set(rest):
        refuse_flags_of_others(rest, kind, kinds)
    return parse(
        kind,
        rest,
        default=kind(**{**given, "sampler": nested_type(kinds)()}),
        description=f"{title}\n\n{describe(kinds)}",
        taken=("--sampler", "--inner"),
    )


def sampler_for(arguments: Sequence[str]) -> str:
    """Choose the default sampler by the configuration of the model that --checkpoint names.

    The help has to show the options of the sampler that will be used, so this happens before the
    flags are parsed and reads no weights. If the configuration cannot be read, it is ``DEFAULT``.
    """
    checkpoint, _ = take(arguments, "--checkpoint")
    if checkpoint is None:
        return DEFAULT
    path = Path(checkpoint).expanduser()
    try:
        config = read_config(path)
        if config is not None:
            return default_sampler_of(config)
    except UserError:  # ``sedd.load`` says what is wrong, unless the checkpoint is published
        pass
    try:
        published = find_config(path)
        if published is None:
            return DEFAULT
        layout = read_layout(published)
        network: Any = layout.network
        if layout.constant_sigma is not None:
            network = dataclasses.replace(network, time_conditioned=False)
        return default_sampler_of(published_config(network, layout.description))
    except UserError:
        return DEFAULT


def check_files(command: SampleCommand) -> None:
    """Check the files of the flags, and flags that exclude each other.

    Raises:
        UserError: two flags name the same file, an output cannot be written or has the wrong
            suffix, a schema cannot be read, or ``--requests`` is combined with flags that its lines
            replace.
    """
    files = {"--requests": command.requests, "--output": command.output, "--trace": command.trace}
    taken: dict[str, str] = {}
    for flag, path in files.items():
        if path is None:
            continue
        target = os.path.realpath(path)
        if target in taken:
            raise UserError(f"{flag} {path}: it would replace the file of {taken[target]}")
        taken[target] = flag
        if flag != "--requests" and str(path) != "-":
            check_writable(path, f"{flag} {path}")
    if command.trace is not None:
        check_suffix("--trace", command.trace, (".html", ".htm"))
    if command.regex and command.json_schema:
        raise UserError("--regex and --json-schema: give one of them")
    for given in command.json_schema:
        read_schema(given)
    if command.chat is not None and (command.prompt or command.suffix or command.infill):
        raise UserError("--chat is all of the given text: give no --prompt, --suffix or --infill")
    depth = command.json_schema_depth
    if command.requests is not None:
        if command.regex or command.json_schema:
            raise UserError("--requests holds the constraints: give no --regex or --json-schema")
        if depth is not None:
            raise UserError(
                f"--json-schema-depth {depth}: --requests holds the constraints; write "
                "json_schema_depth into its lines"
            )
        texts = (command.prompt, command.suffix, command.infill, command.chat)
        if any(text not in ("", None) for text in texts):
            raise UserError(
                "--requests holds the prompts: give no --prompt, --suffix, --infill or --chat"
            )
        if command.num != 1:
            raise UserError(f"--num {command.num}: --requests says how many sequences there are")
    elif depth is not None and not command.json_schema:
        raise UserError(
            f"--json-schema-depth {depth}: it limits a JSON schema, and none is given; "
            "give --json-schema as well"
        )


def read_schema(given: str) -> Any:
    """Read a JSON schema from a file, or from the flag itself if it begins with a brace.

    Raises:
        UserError: the file cannot be read, or it holds no JSON object.
    """
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
    """Convert the values of a flag to a request's form: one for all gaps, or a list of one each."""
    return (values[0] if len(values) == 1 else list(values)) if values else None


def check_functions(command: SampleCommand) -> None:
    """Check the user's functions and the numbers that change the conditionals.

    Raises:
        UserError: a function cannot be loaded, the sampler needs or takes no verifier, or a number
            is out of range.
    """
    name = command.sampler.name
    searches = "verifier" in fields_of(name)
    if command.verifier and not searches:
        raise UserError(
            f"--verifier {' '.join(command.verifier)}: sampler {name!r} takes no verifier; "
            f"{takers('verifier')}"
        )
    if searches and not command.verifier and command.control.method != "particle":
        raise UserError(
            f"--sampler {name} needs --verifier FILE.py:FUNCTION, a function from a list of texts "
            "to a score each, or --verifier self"
        )
    for spec in command.verifier:
        load_verifier(spec)
    if command.logit_processor is not None:
        load_function(command.logit_processor, "--logit-processor")
    read_profile(command)
    _ = command.mark.scheme  # reads the secret
    reshape_numbers(command)


def load_verifier(spec: str) -> Callable[..., Any] | SelfLikelihood:
    """Load the function, or the verifier of the name ``self``, that one word of the flag names."""
    if spec.partition(":")[0] == SELF:
        return self_likelihood(spec)
    return load_function(spec, "--verifier")


def read_profile(command: SampleCommand) -> Profile | None:
    """Read the file of ``--profile``; None if the sampler is not planned.

    Raises:
        UserError: planned has no profile, another sampler has one, or the file cannot be read.
    """
    names, options = [command.sampler.name], sampler_options(command.sampler)
    while isinstance(options.values.get("inner"), SamplerOptions):
        options = options.values["inner"]
        names.append(options.name)
    takers = [name for name in names if "profile" in fields_of(name)]
    if command.profile is None:
        if takers:
            raise UserError(
                f"sampler {takers[0]!r} needs --profile FILE.json, which evaluate.py --price 1 4 "
                "16 --json FILE.json writes"
            )
        return None
    if not takers:
        raise UserError(
            f"--profile {command.profile}: sampler {names[-1]!r} takes no profile; planned does"
        )
    try:
        return Price.load(command.profile).profile
    except UserError as error:
        problem = str(error).removeprefix(f"{command.profile.expanduser()}: ")
        raise UserError(f"--profile {command.profile}: {problem}") from error


def reshape_numbers(command: SampleCommand) -> dict[str, Any]:
    """Return temperature, top_k, top_p and guidance of the flags.

    Raises:
        FieldError: one of them is out of range.
    """
    numbers = {name: getattr(command, name) for name in NUMBERS}
    reshape_of(1, numbers)
    return numbers
