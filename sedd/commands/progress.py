"""What a command is doing, shown on a terminal while nothing else is printed."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


def busy(what: str) -> AbstractContextManager[Any]:
    """Show ``what`` and a spinner on standard error, if that is a terminal, until the end."""
    console = Console(stderr=True)
    return console.status(f"{what} …") if console.is_terminal else nullcontext()


def track(batches: Iterable[Any], label: str, total: int) -> Iterator[Any]:
    """The batches, with their progress and the time on standard error, if that is a terminal.

    Until the second batch is taken, the first one's program is being compiled, and it says so.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from batches
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn())
    numbers = (TextColumn("{task.completed} of {task.total}"), TimeElapsedColumn())
    with Progress(*columns, *numbers, console=console, transient=True) as progress:
        task = progress.add_task(f"{label}: compiling", total=total)
        for number, batch in enumerate(batches):
            if number:
                progress.update(task, completed=number, description=label)
            yield batch
