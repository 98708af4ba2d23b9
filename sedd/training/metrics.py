"""The outputs of a run: ``metrics.jsonl``, TensorBoard, the terminal, and ``curves.png``.

``Metrics`` writes records to files, ``ProgressReport`` shows them to the user, and ``plot_curves``
draws them. ``metrics.jsonl`` is the source: the picture is drawn from it, and so is the summary at
the end of a run.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore

from sedd.errors import UserError
from sedd.files import write_whole
from sedd.progress import Activity


class Metrics:
    """Writes the records of a run: one per logged step, in ascending order of steps.

    Args:
        workdir: the run's directory.
        step: the step that the run starts from. Records of later steps are removed: an earlier
            start wrote them after the checkpoint that the run resumes from.
        keep_last: whether the record of ``step`` itself is kept.
        wandb: arguments of ``wandb.init``; None if the run is not logged there.

    Raises:
        UserError: if a file cannot be written, or wandb is not installed. All methods raise it.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        step: int = 0,
        keep_last: bool = True,
        wandb: dict[str, Any] | None = None,
    ):
        self.path = Path(workdir) / "metrics.jsonl"
        self._wandb = None if wandb is None else _start_wandb(wandb)
        with _Writable(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _drop_after(self.path, step if keep_last else step - 1)
            self._file = self.path.open("a")
            logs = self.path.parent / "tensorboard"
            logs.mkdir(exist_ok=True)
            # SummaryWriter is not used: its thread dies on a full disk, and the next record hangs.
            # Its default file names have seconds; two starts within a second would share a file.
            self._events = EventsWriter(str(logs / "events"), f".{time.time_ns()}")
            # TensorBoard drops the events of later steps when it reads this event.
            start = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def check(self) -> None:
        """Raise UserError if the file has been deleted: writes would succeed and be lost."""
        with _Writable(self.path):
            self.path.stat()

    def write(self, step: int, record: dict[str, Any]) -> None:
        """Write one record of figures by name; values that are not finite are written as null."""
        plain = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        self.check()
        with _Writable(self.path):
            self._file.write(json.dumps({"step": step, **plain}) + "\n")
            self._file.flush()
            for name, value in numbers.items():
                self._event(step, summary.scalar(_tag(name), value))
            self._events.flush()
        if self._wandb is not None:
            self._wandb.log({_tag(name): value for name, value in numbers.items()}, step=step)

    def write_samples(self, step: int, texts: list[str]) -> None:
        """Write texts to ``samples/<step>.txt`` and TensorBoard."""
        path = self.path.parent / "samples" / f"{step:08d}.txt"
        with _Writable(path):
            path.parent.mkdir(exist_ok=True)
            path.write_text(
                "\n\n".join(f"--- {n}\n{text}" for n, text in enumerate(texts)) + "\n",
                encoding="utf-8",
            )
            for n, text in enumerate(texts):
                self._event(step, summary.text(f"sample/{n}", text))
            self._events.flush()

    def close(self) -> None:
        """Close all files, and end the run at wandb."""
        with _Writable(self.path):
            self._file.close()
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _event(self, step: int, value) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=value))


class ProgressReport:
    """Shows the progress of a training run.

    On a terminal it is a bar. Elsewhere it is a line for each record, and a line that says what is
    being done whenever nothing was printed for 3 s.

    Args:
        start: the step that the run starts from.
        steps: the last step.
        stream: where to print; standard output by default.
    """

    def __init__(self, *, start: int, steps: int, stream: TextIO | None = None):
        self.steps = steps
        self._activity = Activity(
            total=steps,
            completed=start,
            stream=sys.stdout if stream is None else stream,
            line=self._line,
            transient=False,
        )

    def advance(self, step: int) -> None:
        """Move the bar to ``step``."""
        # The bar goes on showing the latest figures.
        self._activity.update(None if self._activity.on_terminal else "training", completed=step)

    def doing(self, what: str) -> None:
        """Show what is being done, such as "validating"."""
        self._activity.update(what)

    def report(self, step: int, record: dict[str, Any]) -> None:
        """Show the figures of a record, and the remaining time at its speed."""
        parts = []
        if (loss := record.get("loss")) is not None:
            parts.append(f"loss {loss:.4f}")
        if (nats := record.get("validation_nats_per_token")) is not None:
            parts.append(f"validation {nats:.4f} nats/token")
        if (low := record.get("validation_least_variance_from")) is not None:
            high = record["validation_least_variance_to"]
            parts.append(f"least variance at levels {low:.2f} to {high:.2f}")
        if (speed := record.get("tokens_per_second")) is not None:
            parts.append(f"{speed:,.0f} tokens/s")
        if (mfu := record.get("mfu")) is not None:
            parts.append(f"MFU {mfu:.1%}")
        if (speed := record.get("steps_per_second")) is not None:
            parts.append(f"{_duration((self.steps - step) / speed)} left")
        status = "  ".join(parts)
        if self._activity.on_terminal:
            self._activity.update(status, completed=step)
        else:
            self.say(self._line(status, step))

    def say(self, message: str) -> None:
        """Print a line, above the bar where there is one."""
        self._activity.say(message)

    def close(self) -> None:
        """Leave the bar as it is, or stop the thread that prints lines."""
        self._activity.close()

    def _line(self, status: str, step: int) -> str:
        return f"step {step:>{len(str(self.steps))}}/{self.steps}  {status}"


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """Return the records of a run in their order; a truncated line is skipped."""
    return _records(Path(workdir) / "metrics.jsonl")


def plot_curves(
    workdir: str | Path, *, unigram_nats: float | None = None, unit: str = "nats per token"
) -> Path | None:
    """Draw ``curves.png``: training loss and validation ± 1 standard error.

    Args:
        workdir: the run's directory.
        unigram_nats: nats per token of the training frequencies, drawn as a dashed line.
        unit: the label of the vertical axis.

    Returns:
        The path of the picture; None if nothing has been recorded yet.

    Raises:
        UserError: if the picture cannot be written.
    """
    # Not pyplot, which would choose a backend by the user's display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(workdir)
    train = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    bound = [
        (r["step"], r["validation_nats_per_token"], r.get("validation_standard_error") or 0.0)
        for r in records
        if r.get("validation_nats_per_token") is not None
    ]
    if not train and not bound:
        return None
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    heights = []
    if train:
        heights += _draw_losses(axes, *np.array(train, float).T)
    if bound:
        heights += _draw_bounds(axes, *np.array(bound, float).T)
    if unigram_nats is not None:
        label = f"training frequencies, {unigram_nats:.3f}"
        axes.axhline(unigram_nats, color="#555555", linestyle="--", linewidth=1.2, label=label)
        heights.append(unigram_nats)
    low, high = min(heights), max(heights)
    margin = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    last = max(records[-1]["step"], 1)
    axes.set_xlim(0, last * (1.09 if bound else 1.02))  # room for the last bound's number
    axes.set_title(_title(Path(workdir).absolute().name), loc="left", parse_math=False)
    _style(axes, unit)
    figure.legend(frameon=False, loc="outside lower center", ncols=3, fontsize=9)
    path = Path(workdir) / "curves.png"
    with _Writable(path):
        figure.savefig(path)
    return path


def _title(name: str) -> str:
    """The title of the curves of a run: without its name if the font lacks a character of it."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    return f"Training of {name}" if all(ord(c) in known for c in name) else "Training"


def _draw_losses(axes, steps, losses) -> list[float]:
    """Draw the training loss and its smoothed curve; returns heights that the plot must hold.

    The highest percentile of the losses is left out: one wild early loss must not flatten the rest.
    """
    blue = "#2f6fb0"
    smooth = _smoothed(losses)
    axes.plot(steps, losses, color=blue, alpha=0.25, linewidth=1)
    axes.plot(steps, smooth, color=blue, linewidth=2, label="training loss, smoothed")
    return [*np.percentile(losses, [0, 99]), *smooth]


def _draw_bounds(axes, steps, nats, errors) -> list[float]:
    """Draw the validation bounds with error bars and the last one's number; returns heights."""
    orange = "#d1602b"
    axes.errorbar(
        steps,
        nats,
        yerr=errors,
        color=orange,
        marker="o",
        markersize=4.5,
        linewidth=1.5,
        capsize=3,
        label="validation ± 1 standard error",
    )
    axes.annotate(
        f"{nats[-1]:.3f}",
        (steps[-1], nats[-1]),
        xytext=(7, 0),
        textcoords="offset points",
        color=orange,
        va="center",
    )
    return [*(nats - errors), *(nats + errors)]


def _style(axes, unit: str) -> None:
    """Label the axes, draw the grid, and remove the frame."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _smoothed(losses: np.ndarray) -> np.ndarray:
    """Smooth a curve by running means over about a twentieth of its length.

    The window is centred. It is narrower at the start, where the curve is steep, and at the end it
    shrinks on one side only.
    """
    half = max(1, len(losses) // 40)
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    centre = np.arange(len(losses))
    first = centre - np.minimum(half, centre)
    last = np.minimum(centre + np.minimum(half, centre), len(losses) - 1)
    return (sums[last + 1] - sums[first]) / (last + 1 - first)


def _records(path: Path) -> list[dict[str, Any]]:
    """The records of a file; none if it does not exist."""
    records = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:  # a run was killed while it wrote the line
                continue
    return records


def _drop_after(path: Path, step: int) -> None:
    """Remove the records of later steps, and a truncated line."""
    records = _records(path)
    if path.exists():
        kept = [json.dumps(r) + "\n" for r in records if r["step"] <= step]
        write_whole(path, "".join(kept).encode())


class _Writable:
    """Turns an OSError of its block into a UserError that names the file."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, OSError):
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error


def _start_wandb(options: dict[str, Any]):
    """Start a run of wandb; UserError if the package is not installed."""
    try:
        import wandb  # pyright: ignore
    except ImportError as error:
        raise UserError("wandb is not installed: pip install -e '.[wandb]'") from error
    return wandb.init(**options)


def _tag(name: str) -> str:
    """The tag of a figure, which groups it: ``validation_x`` becomes ``validation/x``."""
    return name.replace("validation_", "validation/", 1) if "/" not in name else name


def _duration(seconds: float) -> str:
    """A duration in seconds, minutes or hours, such as ``8 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
