"""Shows a waiting user what a program is doing: on a terminal at once, elsewhere after 3 s.

All commands use ``Activity`` for work that may take long: loading, reading a corpus, compiling, the
steps of a run. A ``Heartbeat`` alone covers the imports before. The Python interface shows nothing.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from sedd.errors import printable

QUIET_SECONDS = 3.0  # of silence before the first line
LONGEST_SECONDS = 60.0  # of silence between later lines


class Heartbeat:
    """Prints a line from a thread when nothing else has been printed for a while.

    The first line comes after ``seconds`` without output. Each further line takes twice the silence
    of the line before, up to a minute, so that the log of a long run does not fill with them. XLA
    releases the interpreter's lock while it compiles, so the thread prints during that time too.

    Args:
        line: returns the line to print, or an empty string to print nothing now.
        stream: where the lines are printed.
        seconds: the silence before the first line.
    """

    def __init__(self, line: Callable[[], str], stream: TextIO, *, seconds: float):
        self._line, self._stream, self._silence = line, stream, seconds
        self._last = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    def printed(self) -> None:
        """Note that something else has been printed now."""
        self._last = time.monotonic()

    def close(self) -> None:
        """Stop the thread; no line is printed afterwards."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(max(self._last + self._silence - time.monotonic(), 0.01)):
            if time.monotonic() < self._last + self._silence:
                continue
            if line := self._line():
                with suppress(OSError):  # a closed pipe ends the program where it prints itself
                    print(line, file=self._stream, flush=True)
                self.printed()
                self._silence = min(2 * self._silence, LONGEST_SECONDS)


class Activity:
    """Shows what the program is doing, from its creation to ``close`` or the end of its ``with``.

    On a terminal the last line shows ``doing``, a spinner and the elapsed time, and with ``total``
    a bar. Elsewhere a ``Heartbeat`` prints a line such as ``note: wikitext2, 3 of 10``.

    Args:
        doing: what is being done, such as "reading the corpus"; an empty string prints no line.
        total: the number of parts of the work, such as batches or steps; None if it is unknown.
        completed: how many of the parts are done already.
        stream: where to show it; standard error by default.
        line: makes the printed line from ``doing`` and ``completed``; by default the line above.
        transient: remove the bar from the terminal at the end.
    """

    shown: ClassVar[bool] = True  # commands set it to False in all processes but the first

    def __init__(
        self,
        doing: str = "",
        *,
        total: int | None = None,
        completed: int = 0,
        stream: TextIO | None = None,
        line: Callable[[str, int], str] | None = None,
        transient: bool = True,
    ):
        self.doing, self.total, self.completed = printable(doing), total, completed
        self._stream = sys.stderr if stream is None else stream
        self._line = line or self._note
        self._bar = self._heartbeat = None
        console = Console(file=self._stream)
        if not self.shown:
            pass
        elif self._stream.isatty() and console.is_terminal:
            self._bar = _bar(console, counted=total is not None, transient=transient)
            self._task = self._bar.add_task(self.doing, total=total, completed=completed)
            self._bar.start()
        else:
            self._heartbeat = Heartbeat(self._beat, self._stream, seconds=QUIET_SECONDS)

    @property
    def on_terminal(self) -> bool:
        """Whether the activity is shown on a terminal, and not by printed lines."""
        return self._bar is not None

    def update(self, doing: str | None = None, *, completed: int | None = None) -> None:
        """Change what is being done, or how many parts are done; None changes nothing."""
        self.doing = self.doing if doing is None else printable(doing)
        self.completed = self.completed if completed is None else completed
        if self._bar is not None:
            self._bar.update(self._task, description=self.doing, completed=self.completed)

    def say(self, message: str) -> None:
        """Print a line, above the bar where there is one.

        If the reader of a pipe has gone away (``| head``), the line is lost and the work goes on:
        a training run is worth more than its printed lines.
        """
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False)
        else:
            with suppress(BrokenPipeError):
                print(message, file=self._stream, flush=True)
        if self._heartbeat is not None:
            self._heartbeat.printed()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Clear the bar for the block, which prints to the same terminal by other means."""
        if self._bar is not None:
            self._bar.stop()
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.start()
            if self._heartbeat is not None:
                self._heartbeat.printed()

    def close(self) -> None:
        """Stop showing the activity."""
        if self._bar is not None:
            self._bar.stop()
        if self._heartbeat is not None:
            self._heartbeat.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _beat(self) -> str:
        return self._line(self.doing, self.completed) if self.doing else ""

    def _note(self, doing: str, completed: int) -> str:
        count = f", {completed} of {self.total}" if completed and self.total else ""
        return f"note: {doing}{count}"


def track(batches: Iterable[Any], label: str, total: int) -> Iterator[Any]:
    """Yield the batches and show how many of ``total`` are done.

    The first batch is shown as "compiling": its program is compiled before it runs.
    """
    with Activity(f"{label}: compiling", total=total) as activity:
        for number, batch in enumerate(batches):
            if number:
                activity.update(label, completed=number)
            yield batch


def _bar(console: Console, *, counted: bool, transient: bool) -> Progress:
    """The live line: a spinner, or a bar with its numbers, then the text and the elapsed time."""
    count = (MofNCompleteColumn(), BarColumn()) if counted else (SpinnerColumn(),)
    text = TextColumn("{task.description}", markup=False)
    return Progress(
        *count,
        text,
        TimeElapsedColumn(),
        console=console,
        transient=transient,
        # Output that is redirected to a file must not be led to the terminal's live line.
        redirect_stdout=sys.stdout.isatty(),
    )
