"""The flags of ``sedd evaluate``.

``--protocol NAME`` names a set of defaults (how text is cut, the estimator, the number of draws)
with which published figures were computed. Its fields are flags as well, so that one of them can be
changed. ``read_command`` therefore looks at ``--protocol`` first, and parses the other flags with
that protocol as default.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sedd.commands.cli import check_suffix, parse, take, unset
from sedd.commands.devices import DeviceFlags
from sedd.commands.frontier_flags import FrontierFlags, check_frontier
from sedd.commands.load_flags import LoadFlags
from sedd.evaluation.protocols import PROTOCOLS, Protocol, protocol
from sedd.evaluation.scoring import Order
from sedd.files import check_writable, is_stream

TITLE = "Bound the perplexity of a trained model on data sets or files, with standard errors."
SUFFIXES = {"table": (".md", ".tex"), "report": (".html", ".htm")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """The flags of ``sedd evaluate``; the fields of the protocol, such as --draws, are flags too.

    Raises:
        ValueError: a value is out of range, two flags exclude each other, or the name of a file to
            be written has the wrong suffix.
    """

    checkpoint: str
    """The directory of a run or of a published checkpoint, or hf://OWNER/NAME."""
    step: Annotated[int | Literal["best"] | None, unset("INT|best")] = None
    """Checkpoint of a run: the one of this step, or the best by validation; by default the newest.
    """
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="STR [STR ...]")]
    """Corpora by name, tfds:NAME, hf:OWNER/NAME, files or folders of text. NAME=FILE reads the
    known data set NAME from FILE; zeroshot is the eight data sets of the published tables."""
    split: Annotated[str | None, unset("STR")] = None
    """Split to evaluate. By default the protocol's split of a known data set, and the validation
    split of the training corpus. Other text: all of it if it has no splits; else its validation
    split, else its test split, else the text held out for validation."""
    max_sequences: Annotated[int | None, unset("INT")] = None
    """Number of sequences to evaluate, evenly spread over the split; by default all."""
    batch_size: int = 32
    """Sequences that are scored at the same time, over all devices. It changes no figure."""
    seed: int = 0
    """Seed of the Monte-Carlo noise. The same seed gives the same figures."""
    json: Annotated[Path | None, unset("FILE.json")] = None
    """Write every figure to this file, as one JSON object; - is standard output, and then no table
    is printed."""
    order: Annotated[Order | None, unset("forward|backward|random")] = None
    """Instead of a bound, compute the exact likelihood of the tokens in this order, with one
    network call for each token, or one in all for an any-subset model. Needs a time-independent
    absorbing model that is not autoregressive."""
    orders: int = 1
    """With --order random: average the likelihood over so many orders."""
    table: Annotated[Path | None, unset("FILE.md|FILE.tex")] = None
    """Write the table to this file, in Markdown or LaTeX."""
    samples: Annotated[Path | None, unset("FILE.jsonl")] = None
    """Compare these samples (from sample.py --output) with the text of the first data set."""
    judge: Annotated[str | None, unset("NAME|DIR")] = None
    """Generative perplexity of the samples under smollm2, hf:NAME, or an autoregressive run. For
    --frontier the default is smollm2; ngram, which counts the training text, is offline."""
    consistency: Annotated[int | None, unset("PAIRS")] = None
    """Test, at this many pairs of adjacent positions, whether the model's conditionals belong to
    one joint distribution."""
    price: Annotated[tuple[int, ...] | None, unset("CALLS [CALLS ...]")] = None
    """Measure what these numbers of network calls for a text cost in nats, if each call reveals
    several tokens, on the text of the first data set. --json then holds the profile for the
    sampler planned."""
    diagnose: Annotated[tuple[float, ...] | None, unset("[RATE ...]")] = None
    """Measure predictions by distance to the nearest revealed token, and how far masked neighbours
    depend on each other, at these mask rates (by default .25 .5 .75 .95), on the text of the first
    data set; with the price of parallelism. Needs an absorbing model."""
    marginals: Annotated[Path | None, unset("FILE")] = None
    """Rank the texts of this file by approximate log marginals from one network call each: a text
    with gaps such as {mask:12} in a line, or JSON lines with "infill" or "text" if the name ends in
    .jsonl. Needs a marginal head."""
    marginal_check: Annotated[int | None, unset("ORDERS")] = None
    """Compare the values of the marginal head with the log of the mean likelihood over this many
    random orders, on the first data set and on the texts of --marginals."""
    frontier: Annotated[FrontierFlags, tyro.conf.arg(name="")] = FrontierFlags()
    report: Annotated[Path | None, unset("FILE.html")] = None
    """Write all results to one HTML page."""
    resume: Annotated[Path | None, unset("FILE.jsonl")] = None
    """Save finished sequences to this file, and continue from it; by default a file beside --json,
    removed at the end."""
    cache_dir: Annotated[Path | None, unset("DIR")] = None
    """Where packed tokens are kept; by default where the run keeps them."""
    on: Annotated[DeviceFlags, tyro.conf.arg(name="")] = DeviceFlags()
    how: Annotated[LoadFlags, tyro.conf.arg(name="")] = LoadFlags()
    protocol: Annotated[Protocol, tyro.conf.OmitArgPrefixes]
    protocol_name: tyro.conf.Suppress[str] = "default"
    spelled_out: tyro.conf.Suppress[tuple[str, ...]] = ()  # fields whose flags were given
    arguments: tyro.conf.Suppress[tuple[str, ...]] = ()  # the whole command line, for the report

    def __post_init__(self):
        for name in ("batch_size", "max_sequences", "consistency", "marginal_check"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {self.seed}")
        if self.price == ():
            raise ValueError("--price needs numbers of network calls, such as 1 4 16 64")
        if self.data == ():
            raise ValueError("--data needs a value")
        check_frontier(self.frontier)
        if self.judge is not None and self.samples is None and not self.frontier.frontier:
            raise ValueError(
                f"--judge {self.judge} takes --samples FILE.jsonl or --frontier, which is missing"
            )
        if self.judge == "ngram" and self.samples is not None:
            raise ValueError("--judge ngram is for --frontier: it has no features for MAUVE")
        for name, suffixes in SUFFIXES.items():
            path = getattr(self, name)
            if path is not None:
                check_suffix(f"--{name}", path, suffixes)

    @property
    def journal(self) -> Path | None:
        """The file of finished sequences: that of ``--resume``, or one beside ``--json``.

        None without both flags, or if ``--json`` is a stream such as standard output. An
        interrupted evaluation then starts again.
        """
        if self.resume is not None or self.json is None or is_stream(self.json):
            return self.resume
        return self.json.with_name(self.json.name + ".partial")


def read_command(arguments: Sequence[str]) -> EvaluateCommand:
    """Parse the flags, with the protocol named by ``--protocol`` as the default of its fields.

    The result also records which flags were spelled out: a published protocol is refused on a model
    that it does not fit, unless the field in question was given explicitly.

    Raises:
        UserError: a flag is wrong, or a file that is to be written cannot be written.
    """
    name, rest = take(arguments, "--protocol")
    name = "default" if name is None else name
    flags = (a.partition("=")[0].removeprefix("--") for a in rest if a.startswith("--"))
    missing: Any = tyro.MISSING
    command = parse(
        EvaluateCommand,
        rest,
        default=EvaluateCommand(
            checkpoint=missing,
            data=missing,
            protocol=protocol(name),
            protocol_name=name,
            spelled_out=tuple(flag.replace("-", "_") for flag in flags),
            arguments=tuple(arguments),
        ),
        description=f"{TITLE}\n\n--protocol {{{','.join(PROTOCOLS)}}} sets the defaults of "
        "--estimator and of the flags after it.",
        taken=("--protocol",),
    )
    written = (("json", command.json), ("table", command.table), ("report", command.report))
    for flag, path in written:
        if path is not None:
            check_writable(path, f"--{flag} {path}")
    if command.journal is not None:
        flag = "resume" if command.resume else "json"
        check_writable(command.journal, f"--{flag} {command.journal}")
    return command
