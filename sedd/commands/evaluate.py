"""``sedd evaluate``: bound the perplexity of a model on data sets, with standard errors.

The command works in this order, so that no mistake shows after hours of computing:

1. Read the flags and check that every file to be written can be written.
2. Load the model, and check that the protocol fits it.
3. Read the file of ``--samples``, load the judge, and open all data sets. A data set that cannot
   be read is reported, and the others are evaluated.
4. Score every sequence of each data set. Finished sequences are appended to a journal. An
   interrupted evaluation continues from it.
5. Measure the price of parallelism, rank texts by their log marginals, draw and judge the texts of
   --frontier, compare the samples with real text, and test the consistency of the conditionals, if
   asked for.
6. Write the files (report, table, JSON), and then print the tables, which are printed even if a
   file cannot be written. If the JSON goes to standard output, no tables are printed.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import sedd
from sedd.commands.cli import Terminal, fail, note
from sedd.commands.devices import is_first
from sedd.commands.evaluate_flags import EvaluateCommand, read_command
from sedd.commands.evaluate_report import Comparisons, write_report
from sedd.errors import FieldError, UserError
from sedd.evaluating.bound import text_counter
from sedd.evaluation.datasets import DataSet, open_all
from sedd.evaluation.journal import Journal
from sedd.evaluation.protocols import ZEROSHOT, check_fit
from sedd.evaluation.report import Section
from sedd.evaluation.scoring import Estimate, EvaluationResult, choose_estimate, score_data_set
from sedd.evaluation.tables import detail_table, summary_table
from sedd.files import is_stdout, write_text
from sedd.model import Model
from sedd.progress import Activity, track

ALL = "zeroshot"  # stands for these data sets among the values of --data
NO_TERMINAL_WIDTH = 160  # columns of the tables if standard output is a file or a pipe


def main(arguments: Sequence[str]) -> int:
    """Evaluate, write the files and print the tables.

    Returns:
        0, or 2 if a data set of ``--data`` could not be read.

    Raises:
        UserError: a flag does not fit the model or the data; nothing has been computed then. Or a
            file cannot be written; the tables have been printed then.
    """
    command = read_command(arguments)
    mesh = command.on.join()
    alone = {
        "--samples": command.samples,
        "--consistency": command.consistency,
        "--frontier": command.frontier.frontier,
    }
    if jax.process_count() > 1 and any(alone.values()):
        flag = next(flag for flag, given in alone.items() if given)
        raise UserError(f"{flag} works in a single process only; leave it out, or run one process")
    if not is_first():
        command = dataclasses.replace(command, json=None, report=None, table=None, resume=None)
    with Activity(f"loading {command.checkpoint}"):
        model = command.how.load(command.checkpoint, step=command.step, mesh=mesh)
    estimate = checked_estimate(command, model)
    if model.denoiser.network.has_hmm_head:
        note(
            "the bound is that of the trunk: no likelihood is known of what the HMM head draws "
            "(--window)"
        )
    if model.denoiser.network.has_latent:
        note(
            "the bound is that of the network without a latent: no likelihood is known of what it "
            "draws with one"
        )
    with Activity("reading the samples and the judge"):
        comparisons = Comparisons.of(command, model)
    with Activity("reading the data"):
        opened, failed = open_data(command, model)
    if opened:
        comparisons.check(opened[0])
        results = evaluate_all(command, model, estimate, opened)
        sections, more = comparisons.compute(opened[0], results[0])
        figures = about(command, model) | by_data_set(results) | more
        if failed:
            figures["failed"] = failed
        try:
            write_files(command, model, results, figures, sections, whole=not failed)
        finally:  # print the figures even if they cannot be written
            if is_first() and (command.json is None or not is_stdout(command.json)):
                show(results, sections)
    for message in failed:
        fail(f"--data {message}")
    return 2 if failed else 0


def show(results: Sequence[EvaluationResult], sections: Sequence[Section]) -> None:
    """Print the tables to standard output.

    Args:
        results: the figures of the data sets. One is printed in detail, several as a summary with
            a row each.
        sections: the comparisons, each printed as its title and its tables.
    """
    # Into a file or a pipe rich would assume 80 columns and cut the wider tables.
    width = None if sys.stdout.isatty() else NO_TERMINAL_WIDTH
    console = Terminal(width=width, markup=True, soft_wrap=False)
    console.print(summary_table(results) if len(results) > 1 else detail_table(results[0]))
    for section in sections:
        if section.tables:
            console.print(f"\n{section.title}", style="bold", markup=False)
        for table in section.tables:
            console.print(table)


def checked_estimate(command: EvaluateCommand, model: Model) -> Estimate:
    """Choose how sequences are scored: by a bound, or exactly (``--order``, causal models).

    Raises:
        UserError: the protocol does not fit the model's tokenizer or length, or the estimator does
            not exist for this kind of model.
    """
    reader = model.text_reader
    check_fit(
        command.protocol_name,
        command.protocol,
        tokenizer=reader.tokenizer.name,
        length=model.length,
        spelled_out=command.spelled_out,
    )
    try:
        return choose_estimate(
            command.protocol,
            model.denoiser,
            command.order,
            command.orders,
            schedule=model.schedule,
        )
    except FieldError as error:
        raise UserError(error.named(f"--{error.field}")) from error


def open_data(command: EvaluateCommand, model: Model) -> tuple[list[DataSet], list[str]]:
    """Open the data sets of ``--data``, cut and packed as the protocol says.

    ``zeroshot`` among the values stands for the eight data sets of the published tables.

    Returns:
        The data sets, and one message for each that cannot be read (no network, no such file).
    """
    reader = model.text_reader
    if command.cache_dir is not None:
        reader = dataclasses.replace(reader, cache_dir=command.cache_dir.expanduser())
    specs = [n for spec in command.data for n in (ZEROSHOT if spec == ALL else [spec])]
    return open_all(
        specs,
        lambda spec: reader.open(
            spec,
            command.protocol,
            name=command.protocol_name,
            split=command.split,
            max_sequences=command.max_sequences,
        ),
    )


def evaluate_all(
    command: EvaluateCommand, model: Model, estimate: Estimate, opened: Sequence[DataSet]
) -> list[EvaluationResult]:
    """Score every data set, and return its figures.

    The nats of each finished sequence are appended to the command's journal. A second run of the
    same command reads them from there and scores only the others.
    """
    # The figures of a sequence depend on these values. A journal of other values is refused.
    depends_on = {
        "evaluation": 1,
        "model": model.digest,  # of parts in several processes: all of them compute it
        "estimator": estimate.name,
        "protocol": command.protocol.to_json(),
        "seed": command.seed,
        "data": {data.label: data.fingerprint for data in opened},
    }
    journal = None if command.journal is None else Journal(command.journal, depends_on)
    try:
        return [
            score_data_set(
                model.denoiser,
                model.schedule,
                jax.random.key(command.seed),
                data,
                estimate,
                protocol=command.protocol,
                protocol_name=command.protocol_name,
                batch_size=command.batch_size,
                count_text=text_counter(model.tokenizer),
                journal=journal,
                track=track,
                train_counts_N=model.train_counts,
            )
            for data in opened
        ]
    finally:
        if journal is not None:
            journal.close()


def about(command: EvaluateCommand, model: Model) -> dict[str, Any]:
    """Describe what was evaluated and how: the first fields of the JSON file."""
    return {
        "checkpoint": command.checkpoint,
        "step": model.step,
        "model": model.digest,
        "tokenizer": model.tokenizer and model.tokenizer.name,
        "length": command.protocol.length or model.length,
        "seed": command.seed,
        "max_sequences": command.max_sequences,
        "protocol": {"name": command.protocol_name, **command.protocol.to_json()},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that the figures depend on."""
    return {"sedd": sedd.__version__, "jax": jax.__version__, "numpy": np.__version__}


def by_data_set(results: Sequence[EvaluationResult]) -> dict[str, Any]:
    """The results in the form of the JSON file.

    The figures of a single data set are top-level fields; those of several are a list ``results``.
    """
    each = [result.to_json() for result in results]
    return each[0] if len(each) == 1 else {"results": each}


def write_files(command, model, results, figures, sections, *, whole: bool) -> None:
    """Write the files that the flags ask for: report, table and JSON.

    Args:
        command: the flags.
        model: the evaluated model, for the report.
        results: the figures of the data sets.
        figures: the content of the JSON file.
        sections: the comparisons, for the report.
        whole: whether every data set was evaluated. The journal beside ``--json`` is removed only
            then, since the next start is to evaluate the others.

    Raises:
        UserError: a file cannot be written.
    """
    if command.report is not None:
        write_report(command, results, sections, model=model, versions=versions())
    if command.table is not None:
        table = summary_table(results)
        text = table.markdown() if command.table.suffix == ".md" else table.latex()
        write_text(command.table, f"{text}\n")
    if command.json is not None:
        text = json.dumps(figures, indent=2, ensure_ascii=False)
        write_text(command.json, f"{text}\n")
        if command.resume is None and command.journal is not None and whole:
            command.journal.unlink()
