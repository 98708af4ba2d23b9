"""What ``evaluate.py`` does: its flags, the data sets, the estimates, and how they are shown."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

from sedd.commands.cli import parse, take
from sedd.data.corpora import NAMES, Mapped, open_corpus, parse_mixture
from sedd.data.detokenizers import DETOKENIZERS
from sedd.data.packing import Packed, pack, unigram_entropy, validation_rows
from sedd.errors import UserError
from sedd.evaluation.bound import (
    REPLICATES,
    BoundResult,
    MonteCarlo,
    SequenceNats,
    resolve,
    score_sequences,
    summarise,
)
from sedd.evaluation.journal import Journal
from sedd.evaluation.ordered import make_order, ordered_nats
from sedd.evaluation.protocols import (
    PROTOCOLS,
    SPLITS,
    ZEROSHOT,
    Protocol,
    check_fit,
    describe,
    protocol,
)
from sedd.evaluation.report import Cell, Table
from sedd.files import check_writable
from sedd.model import Model, text_counter

TITLE = "Bound the perplexity of a trained model on data sets or files, with standard errors."
ALL = "zeroshot"
SUFFIXES = (".md", ".tex")


def unset(metavar: str) -> Any:
    """How the help shows a flag that may be left out."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """The flags of ``evaluate.py``; the protocol's fields (--draws) are among them."""

    checkpoint: str
    """A run's directory, a published checkpoint's, or hf://OWNER/NAME."""
    step: Annotated[int | Literal["best"] | None, unset("INT|best")] = None
    """Which checkpoint: of a step, or the best by validation; the newest by default."""
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="STR [STR ...]")]
    """corpus:NAME, tfds:NAME, hf:NAME, a file or folder of text; NAME=FILE reads a data set from a
    file of yours; zeroshot is the eight of the published tables."""
    split: Annotated[str | None, unset("STR")] = None
    """All of a file, the protocol's split of a data set, else the one that validates."""
    max_sequences: Annotated[int | None, unset("INT")] = None
    """Evenly spread over the split; all of them by default."""
    batch_size: int = 32
    """Sequences side by side, over all devices."""
    seed: int = 0
    """Of the noise: the same seed, the same figures."""
    json: Annotated[Path | None, unset("FILE.json")] = None
    """Write every figure here."""
    order: Annotated[
        Literal["forward", "backward", "random"] | None, unset("forward|backward|random")
    ] = None
    """The exact likelihood of this order of the tokens, by a network call for each, not a bound."""
    table: Annotated[Path | None, unset("FILE.md|FILE.tex")] = None
    """Write the table here, in Markdown or LaTeX."""
    samples: Annotated[Path | None, unset("FILE.jsonl")] = None
    """Compare these samples (of sample.py --output) with the first data set's text."""
    judge: Annotated[str | None, unset("NAME|DIR")] = None
    """Generative perplexity of the samples under smollm2, hf:NAME, or an autoregressive run."""
    consistency: Annotated[int | None, unset("PAIRS")] = None
    """Compare the joints that the conditionals imply at so many pairs of positions."""
    report: Annotated[Path | None, unset("FILE.html")] = None
    """Write all of it to one page."""
    resume: Annotated[Path | None, unset("FILE.jsonl")] = None
    """Keep what is done here, and go on from it; beside --json by default, until all is done."""
    cache_dir: Annotated[Path | None, unset("DIR")] = None
    """Where packed tokens are kept; the run's own place by default."""
    protocol: Annotated[Protocol, tyro.conf.OmitArgPrefixes]
    protocol_name: tyro.conf.Suppress[str] = "default"
    spelled_out: tyro.conf.Suppress[tuple[str, ...]] = ()
    arguments: tyro.conf.Suppress[tuple[str, ...]] = ()  # as they were given

    def __post_init__(self):
        for name in ("batch_size", "max_sequences", "consistency"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {self.seed}")
        if self.data == ():
            raise ValueError("--data needs a value")
        if self.judge is not None and self.samples is None:
            raise ValueError(f"--judge {self.judge} takes --samples FILE.jsonl, which is missing")
        if self.table is not None and self.table.suffix not in SUFFIXES:
            raise ValueError(f"--table {self.table}: the name must end in .md or .tex")

    @property
    def journal(self) -> Path | None:
        """Where what is done is kept."""
        if self.resume is not None or self.json is None:
            return self.resume
        return self.json.with_name(self.json.name + ".partial")


def read_command(arguments: Sequence[str]) -> EvaluateCommand:
    """The flags: first the protocol by name, whose fields are the defaults of the others."""
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
        description=f"{TITLE}\n\n--protocol {{{','.join(PROTOCOLS)}}} says how, and is the default "
        "of the flags below it.",
    )
    written = (("json", command.json), ("table", command.table), ("report", command.report))
    for flag, path in written:
        if path is not None:
            check_writable(path, f"--{flag} {path}")
    if command.journal is not None:
        flag = "resume" if command.resume else "json"
        check_writable(command.journal, f"--{flag} {command.journal}")
    return command


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSet:
    """Rows to evaluate, what they are called, and a hash of their tokens."""

    label: str
    split: str
    packed: Packed
    rows: np.ndarray
    digest: str
    unigram_entropy: float


def open_data_set(spec: str, command: EvaluateCommand, model: Model) -> DataSet:
    """Read, clean, tokenise and cut as the protocol says; UserError where that fails."""
    chosen, tokenizer, config = command.protocol, model.tokenizer, model.config.data
    assert tokenizer is not None  # Evaluation checks it
    label, equals, source = spec.partition("=")
    if not equals or label not in NAMES:
        label = source = spec
    label = label.removeprefix("corpus:")
    cache_dir = (command.cache_dir or Path(config.cache_dir)).expanduser()
    corpus = open_corpus(source, cache_dir=cache_dir)
    published = SPLITS.get(command.protocol_name, {}).get(label)
    # A file in a data set's place is that split, whole.
    declared = published in corpus.splits and "all" not in corpus.splits
    split = command.split or (published if declared else None)
    split = split or trained_on(spec, model) or corpus.evaluation_split
    if chosen.detokenize and label in DETOKENIZERS:
        function = DETOKENIZERS[label]
        corpus = Mapped(
            name=corpus.name,
            splits=corpus.splits,
            source=corpus,
            function=function,
            label=f"{function.__name__} 1",
        )
    around = None
    if chosen.specials:
        if tokenizer.bos_id is None or tokenizer.eos_id is None:
            raise UserError(f"--specials: tokenizer {tokenizer.name} has no end of a document")
        around = tokenizer.bos_id, tokenizer.eos_id
    packed = pack(
        corpus,
        tokenizer,
        split,
        length=row_length(command, model),
        wrap=config.wrap if chosen.cut == "as_trained" else chosen.cut == "wrapped",
        cache_dir=cache_dir,
        drop_every=chosen.drop_every,
        around=around,
        truncate=chosen.cut == "truncated",
    )
    rows = validation_rows(packed, command.max_sequences)
    counts, digest = np.zeros_like(packed.counts), hashlib.blake2b(digest_size=16)
    for first in range(0, len(rows), 256):
        x0_BL, scored_BL = packed.rows(rows[first : first + 256])
        counts += np.bincount(x0_BL[scored_BL], minlength=len(counts))
        digest.update(x0_BL.tobytes() + scored_BL.tobytes())
    return DataSet(
        label=label,
        split=split,
        packed=packed,
        rows=rows,
        digest=digest.hexdigest(),
        unigram_entropy=unigram_entropy(counts),
    )


def row_length(command: EvaluateCommand, model: Model) -> int:
    """Tokens in a row: the protocol's, else the model's."""
    return command.protocol.length or model.length


def trained_on(data: str, model: Model) -> str | None:
    """The validation split, where the data is what the run was trained on."""
    parts = [spec for spec, _ in parse_mixture(model.config.data.corpus)]
    return "validation" if data.removeprefix("corpus:") in parts else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class InOrder:
    """The exact NLL of one order of a sequence's tokens, in the place of an estimate."""

    order: str

    def __call__(self, denoiser, schedule, keys_B, x0_BL, scored_BL) -> SequenceNats:
        order_BL = make_order(self.order, keys_B, scored_BL)
        nats_B = ordered_nats(denoiser, order_BL, x0_BL, scored_BL)
        nats_BR = jnp.repeat(nats_B[:, None], REPLICATES, 1)
        zero_BR = jnp.zeros_like(nats_BR)
        return SequenceNats(prior_B=zero_BR[:, 0], diffusion_BR=nats_BR, reconstruction_BR=zero_BR)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A command on a loaded model, checked against each other."""

    command: EvaluateCommand
    model: Model

    def __post_init__(self):
        command, model = self.command, self.model
        if model.tokenizer is None:
            raise UserError(
                f"checkpoint {command.checkpoint}: it has no tokenizer to read text with; put its "
                "tokenizer.json beside its config.json"
            )
        check_fit(
            command.protocol_name,
            command.protocol,
            tokenizer=model.tokenizer.name,
            length=model.length,
            spelled_out=command.spelled_out,
        )
        try:
            _ = self.estimator
        except ValueError as error:
            raise UserError(f"--{error}") from error

    @property
    def estimator(self) -> str:
        """What is computed, in a word."""
        if self.command.order is None:
            return resolve(self.command.protocol.estimator, self.model.denoiser)
        if self.model.denoiser.causal:
            raise ValueError(f"order {self.command.order}: an autoregressive model has its own")
        if not self.model.time_independent or not self.model.process.absorbing:
            raise ValueError("order needs a time-independent absorbing model")
        return f"{self.command.order} order"

    @property
    def draws(self) -> int:
        """Noise levels a sequence; an exact likelihood has none."""
        exact = self.command.order is not None or self.estimator == "exact"
        return 0 if exact else self.command.protocol.draws

    def open_all(self) -> tuple[list[DataSet], list[str]]:
        """The data sets that can be had, and a line for each that cannot."""
        opened, failed = [], []
        named = [n for spec in self.command.data for n in (ZEROSHOT if spec == ALL else [spec])]
        for spec in dict.fromkeys(named):
            try:
                data = open_data_set(spec, self.command, self.model)
                if data.label in [other.label for other in opened]:
                    raise UserError(f"there is a {data.label} already")
                opened.append(data)
            except UserError as error:
                failed.append(f"{spec}: {error}")
        return opened, failed

    def about(self, opened: Sequence[DataSet]) -> dict[str, Any]:
        """All that the terms of the sequences depend on."""
        return {
            "evaluation": 1,
            "model": parameters_digest(self.model),
            "estimator": self.estimator,
            "protocol": self.command.protocol.to_json(),
            "seed": self.command.seed,
            "data": {data.label: data.digest for data in opened},
        }

    def run(self, data: DataSet, journal: Journal | None) -> BoundResult:
        """The figures of one data set; what the journal has is not computed again."""
        command, model, chosen = self.command, self.model, self.command.protocol
        done = journal.done(data.label) if journal is not None else None
        scored = [] if done is None else [done]
        first = sum(map(len, scored))
        starts = range(first, len(data.rows), command.batch_size)
        console = Console(stderr=True)
        batches = track(
            (data.packed.rows(data.rows[i : i + command.batch_size]) for i in starts),
            data.label,
            total=len(starts),
            console=console,
            transient=True,
            disable=not console.is_terminal,  # it would leave an empty line
        )
        estimate = MonteCarlo(draws=chosen.draws, t_min=chosen.t_min, estimator=chosen.estimator)
        for part in score_sequences(
            model.denoiser,
            model.schedule,
            jax.random.key(command.seed),
            batches,
            estimate if command.order is None else InOrder(order=command.order),
            first=first,
            count_text=text_counter(model.tokenizer),
        ):
            scored.append(part)
            if journal is not None:
                journal.add(data.label, part)
        return summarise(
            scored,
            draws=self.draws,
            estimator=self.estimator,
            t_min=chosen.t_min,
            outer_terms=chosen.outer_terms,
        )

    def run_all(self) -> tuple[list[tuple[DataSet, BoundResult]], list[str]]:
        """The data sets with their figures, and a line for each that could not be had."""
        opened, failed = self.open_all()
        path = self.command.journal
        if path is None or not opened:
            return [(data, self.run(data, None)) for data in opened], failed
        journal = Journal(path, self.about(opened))
        try:
            return [(data, self.run(data, journal)) for data in opened], failed
        finally:
            journal.close()

    def to_json(self, results: Sequence[tuple[DataSet, BoundResult]]) -> dict[str, Any]:
        """Every figure and how it came about; of several data sets a list."""
        command, model = self.command, self.model
        protocol = {"name": command.protocol_name, **command.protocol.to_json()}
        about = {
            "checkpoint": command.checkpoint,
            "tokenizer": model.tokenizer and model.tokenizer.name,
            "length": row_length(command, model),
            "seed": command.seed,
            "max_sequences": command.max_sequences,
            "protocol": protocol,
        }
        each = [
            {
                "data": data.label,
                "split": data.split,
                "unigram_entropy": data.unigram_entropy,
                **result.to_json(),
            }
            for data, result in results
        ]
        return about | (each[0] if len(each) == 1 else {"results": each})

    def table(self, results: Sequence[tuple[DataSet, BoundResult]]) -> Table:
        """A row a data set."""
        at_most = self.at_most(results[0][1])
        how = describe(self.command.protocol_name, self.command.protocol)
        rows = [
            (
                data.label,
                data.split,
                result.nats_per_token,
                result.standard_error,
                result.perplexity,
                result.perplexity * result.standard_error,
                result.num_sequences,
                result.num_tokens,
                self.draws or None,
                how,
            )
            for data, result in results
        ]
        columns = ("data", "split", f"nats/token{at_most}", "± s.e.", f"perplexity{at_most}")
        columns += ("± s.e.", "sequences", "tokens", "draws", "protocol")
        return Table(columns=columns, rows=rows, title=self.title(results[0][1]))

    def at_most(self, result: BoundResult) -> str:
        """What stands behind the name of a figure that is a bound."""
        return " ≤" if result.is_bound else ""

    def title(self, result: BoundResult) -> str:
        """What the figures are, above all whether they are bounds."""
        if self.command.order is not None:
            return f"Exact negative log likelihood of the tokens in one order ({self.estimator})"
        if result.exact:
            return "Negative log likelihood"
        if result.is_bound:
            return "Upper bound on the negative log likelihood"
        return "NOT a bound: the prior and the reconstruction are left out, as the protocol says"

    def detail(self, data: DataSet, result: BoundResult) -> Table:
        """All figures of one data set, one below the other."""
        left_out = "" if result.is_bound or result.exact else ", left out"
        at_most = self.at_most(result)
        nats, error = result.nats_per_token, result.standard_error
        rows: list[tuple[Cell, Cell, Cell]] = [
            (f"nats per token{at_most}, error over sequences", nats, error),
            (f"nats per token{at_most}, error over draws", nats, result.standard_error_draws),
            (f"perplexity{at_most}", result.perplexity, result.perplexity * error),
        ]
        for name in ("bits_per_character", "bits_per_byte"):
            value = getattr(result, name)
            if value is not None:
                rows.append((name.replace("_", " ") + at_most, value, value * error / nats))
        rows += [
            (f"  prior{left_out}", result.prior, None),
            ("  diffusion", result.diffusion, None),
            (f"  reconstruction{left_out}", result.reconstruction, None),
            ("unigram entropy of the data", data.unigram_entropy, None),
            ("sequences", result.num_sequences, None),
            ("tokens", result.num_tokens, None),
            (f"draws ({result.estimator})", self.draws or None, None),
        ]
        how = describe(self.command.protocol_name, self.command.protocol)
        title = f"{self.title(result)}: {data.label} · {data.split} · protocol {how}"
        return Table(columns=("", "value", "± standard error"), rows=rows, title=title)


def parameters_digest(model: Model) -> str:
    """A hash of what the model computes with."""
    digest = hashlib.blake2b(digest_size=16)
    config = {**model.config.to_json(), "data": None, "training": None, "sampler": None}
    digest.update(json.dumps(config, sort_keys=True).encode())
    for leaf in jax.tree.leaves(model.denoiser.params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
