"""Bound the perplexity of a trained model on data sets or files, with its standard errors."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import sedd
from sedd.commands.cli import Terminal, fail
from sedd.commands.evaluate_flags import EvaluateCommand, read_command
from sedd.commands.evaluate_report import Comparisons, write_report
from sedd.errors import FieldError, UserError
from sedd.evaluating import text_counter
from sedd.evaluation.datasets import DataSet, open_all
from sedd.evaluation.journal import Journal
from sedd.evaluation.protocols import ZEROSHOT, check_fit
from sedd.evaluation.report import Section
from sedd.evaluation.scoring import Estimate, EvaluationResult, choose_estimate, score_data_set
from sedd.evaluation.tables import detail_table, summary_table
from sedd.files import write_whole
from sedd.model import Model
from sedd.progress import Activity, track

ALL = "zeroshot"  # stands for these data sets among the values of --data
NO_TERMINAL_WIDTH = 160  # columns, where standard output is a file or a pipe


def main(arguments: Sequence[str]) -> int:
    """Evaluate, print the tables and write the files; returns 2 if a data set cannot be had.

    Everything that can be wrong with the flags is checked before the first figure is computed.
    """
    command = read_command(arguments)
    with Activity(f"loading {command.checkpoint}"):
        model = sedd.load(command.checkpoint, step=command.step)
    estimate = checked_estimate(command, model)
    with Activity("reading the samples and the judge"):
        comparisons = Comparisons.of(command, model)
    with Activity("reading the data"):
        opened, failed = open_data(command, model)
    if opened:
        comparisons.check(opened[0])
        results = evaluate_all(command, model, estimate, opened)
        with Activity("comparing samples and conditionals"):
            sections, more = comparisons.compute(opened[0])
        figures = about(command, model) | by_data_set(results) | more
        if failed:
            figures["failed"] = failed
        try:
            write_files(command, model, results, figures, sections, whole=not failed)
        finally:  # figures that cannot be written are shown all the same
            show(results, sections)
    for message in failed:
        fail(message)
    return 2 if failed else 0


def show(results: Sequence[EvaluationResult], sections: Sequence[Section]) -> None:
    """Print the table of the results, and those of the sections."""
    # Without a terminal no column is cut.
    width = None if sys.stdout.isatty() else NO_TERMINAL_WIDTH
    console = Terminal(width=width, markup=True, soft_wrap=False)
    console.print(summary_table(results) if len(results) > 1 else detail_table(results[0]))
    for section in sections:
        if section.tables:
            console.print(f"\n{section.title}", style="bold", markup=False)
        for table in section.tables:
            console.print(table)


def checked_estimate(command: EvaluateCommand, model: Model) -> Estimate:
    """How sequences are scored; UserError if the model does not fit the flags."""
    reader = model.text_reader
    check_fit(
        command.protocol_name,
        command.protocol,
        tokenizer=reader.tokenizer.name,
        length=model.length,
        spelled_out=command.spelled_out,
    )
    try:
        return choose_estimate(command.protocol, model.denoiser, command.order)
    except FieldError as error:
        raise UserError(error.named(f"--{error.field}")) from error


def open_data(command: EvaluateCommand, model: Model) -> tuple[list[DataSet], list[str]]:
    """The data sets of ``--data``, and a line for each that cannot be had."""
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
    """The figures of each data set; finished sequences are kept in the command's journal."""
    journal = None
    if command.journal is not None:
        depends_on = {
            "evaluation": 1,
            "model": model.digest,
            "estimator": estimate.name,
            "protocol": command.protocol.to_json(),
            "seed": command.seed,
            "data": {data.label: data.fingerprint for data in opened},
        }
        journal = Journal(command.journal, depends_on)
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
    """What was evaluated and how: the head of the JSON file."""
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
    """The versions of the packages that figures depend on."""
    return {"sedd": sedd.__version__, "jax": jax.__version__, "numpy": np.__version__}


def by_data_set(results: Sequence[EvaluationResult]) -> dict[str, Any]:
    """The figures of one data set, or of several as a list ``results``."""
    each = [result.to_json() for result in results]
    return each[0] if len(each) == 1 else {"results": each}


def write_files(command, model, results, figures, sections, *, whole: bool) -> None:
    """Write the files that flags ask for; ``whole`` if no data set failed."""
    if command.report is not None:
        write_report(command, results, sections, model=model, versions=versions())
    if command.table is not None:
        table = summary_table(results)
        text = table.markdown() if command.table.suffix == ".md" else table.latex()
        write_whole(command.table, f"{text}\n".encode())
    if command.json is not None:
        write_whole(command.json, json.dumps(figures, indent=2, ensure_ascii=False).encode())
        if command.resume is None and command.journal is not None and whole:
            command.journal.unlink()
