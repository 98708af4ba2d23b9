"""Bound the perplexity of a trained model on data sets or files, with its standard errors."""

import json
import sys
from collections.abc import Sequence

import sedd
from sedd.commands.cli import Terminal, fail
from sedd.commands.evaluate_flags import Evaluation, read_command
from sedd.commands.evaluate_report import beyond_perplexity, write_report
from sedd.files import write_whole


def main(arguments: Sequence[str]) -> int:
    """Evaluate, print the tables, write them; 2 where a data set could not be had."""
    command = read_command(arguments)
    evaluation = Evaluation(command=command, model=sedd.load(command.checkpoint, step=command.step))
    results, failed = evaluation.run_all()
    if results:
        table = evaluation.table(results)
        shown = table if len(results) > 1 else evaluation.detail(*results[0])
        # Where no terminal sets the width, no column is cut.
        console = Terminal(width=None if sys.stdout.isatty() else 160, markup=True, soft_wrap=False)
        console.print(shown.rich())
        sections, more = beyond_perplexity(evaluation, results)
        for section in sections:
            console.print(*(table.rich() for table in section.tables))
        if command.report is not None:
            write_report(command, evaluation, results, sections)
        if command.table is not None:
            text = table.markdown() if command.table.suffix == ".md" else table.latex()
            write_whole(command.table, f"{text}\n".encode())
        if command.json is not None:
            figures = evaluation.to_json(results) | more | ({"failed": failed} if failed else {})
            write_whole(command.json, json.dumps(figures, indent=2).encode())
            if command.resume is None and command.journal is not None and not failed:
                command.journal.unlink()
    for message in failed:
        fail(message)
    return 2 if failed else 0
