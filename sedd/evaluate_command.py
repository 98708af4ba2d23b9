"""What ``evaluate.py`` does: its flags, the data sets, the estimates, and how they are shown."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

from sedd.cli import parse, take
from sedd.data.corpora import NAMES, Mapped, open_corpus, parse_mixture
from sedd.data.detokenizers import DETOKENIZERS
from sedd.data.packing import Packed, pack, unigram_entropy, validation_rows
from sedd.errors import UserError
from sedd.evaluation.bound import BoundResult, resolve, score_sequences, summarise
from sedd.evaluation.journal import Journal
from sedd.evaluation.protocols import (
    PROTOCOLS,
    SPLITS,
    ZEROSHOT,
    Protocol,
    check_fit,
    describe,
    protocol,
)
from sedd.evaluation.report import Table
from sedd.files import check_writable, write_whole
from sedd.model import Model, text_counter

TITLE = "Bound the perplexity of a trained model on data sets or files, with standard errors."
SUFFIXES = (".md", ".tex")


def unset(metavar: str) -> Any:
    """How the help shows a flag that may be left out."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """The flags of ``evaluate.py``; the protocol's fields (--draws) are among them."""

    checkpoint: Path
    """A run's directory."""
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
    table: Annotated[Path | None, unset("FILE.md|FILE.tex")] = None
    """Write the table here, in Markdown or LaTeX."""
    resume: Annotated[Path | None, unset("FILE.jsonl")] = None
    """Keep what is done here, and go on from it; beside --json by default, until all is done."""
    cache_dir: Annotated[Path | None, unset("DIR")] = None
    """Where packed tokens are kept; the run's own place by default."""
    protocol: Annotated[Protocol, tyro.conf.OmitArgPrefixes]
    protocol_name: tyro.conf.Suppress[str] = "default"
    spelled_out: tyro.conf.Suppress[tuple[str, ...]] = ()

    def __post_init__(self):
        for name in ("batch_size", "max_sequences"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {self.seed}")
        if self.data == ():
            raise ValueError("--data needs a value")
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
        ),
        description=f"{TITLE}\n\n--protocol {{{','.join(PROTOCOLS)}}} says how, and is the default "
        "of the flags below it.",
    )
    for flag, path in (("json", command.json), ("table", command.table)):
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

    def batches(self, size: int, first: int = 0) -> list[np.ndarray]:
        """The row numbers from place ``first`` on."""
        return [self.rows[i : i + size] for i in range(first, len(self.rows), size)]


def open_data_set(spec: str, command: EvaluateCommand, model: Model) -> DataSet:
    """Read, clean, tokenise and cut as the protocol says; UserError where that fails."""
    chosen, tokenizer, config = command.protocol, model.tokenizer, model.config.data
    if tokenizer is None:
        raise UserError(f"{model.source}: no tokenizer to read {spec} with")
    label, equals, source = spec.partition("=")
    if not equals or label not in NAMES:
        label = source = spec
    label = label.removeprefix("corpus:")
    cache_dir = (command.cache_dir or Path(config.cache_dir)).expanduser()
    corpus = open_corpus(source, cache_dir=cache_dir)
    published = SPLITS.get(command.protocol_name, {}).get(label)
    split = command.split or (published if published in corpus.splits else None)
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


def evaluate_all(
    command: EvaluateCommand, model: Model
) -> tuple[list[tuple[DataSet, BoundResult]], list[str]]:
    """Every data set that can be had with its figures, and a line for each that cannot.

    UserError where the protocol does not fit the model, and where the only data set fails.
    """
    chosen, name = command.protocol, command.protocol_name
    has = model.tokenizer.name if model.tokenizer is not None else "none"
    check_fit(
        name, chosen, tokenizer=has, length=model.length, spelled_out=command.spelled_out
    )
    try:
        estimator = resolve(chosen.estimator, model.denoiser)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    specs = [n for spec in command.data for n in (ZEROSHOT if spec == "zeroshot" else [spec])]
    sets, failed = [], []
    for spec in dict.fromkeys(specs):
        try:
            sets.append(open_data_set(spec, command, model))
        except UserError as error:
            if len(specs) == 1:
                raise
            failed.append(f"{spec}: {error}")
    results = [(data, evaluate(data, command, model)) for data in ()]
    journal = None
    if command.journal is not None and sets:
        journal = Journal(command.journal, about(command, model, sets))
    for data in sets:
        done = journal.done(data.label) if journal is not None else None
        scored = [] if done is None else [done]
        first = sum(map(len, scored))
        batches = (data.packed.rows(rows) for rows in data.batches(command.batch_size, first))
        progress = shown(batches, data.label, len(data.batches(command.batch_size, first)))
        for batch in score_sequences(
            model.denoiser,
            model.schedule,
            jax.random.key(command.seed),
            progress,
            first=first,
            draws=chosen.draws,
            t_min=chosen.t_min,
            estimator=chosen.estimator,
            count_text=text_counter(model.tokenizer),
        ):
            scored.append(batch)
            if journal is not None:
                journal.add(data.label, batch)
        result = summarise(
            scored,
            draws=chosen.draws,
            estimator=estimator,
            t_min=chosen.t_min,
            outer_terms=chosen.outer_terms,
        )
        results.append((data, result))
    if journal is not None:
        journal.close()
    return results, failed
