"""The output of every benchmark: a table for people, and one line of JSON for programs."""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from sedd.commands.cli import parse, run


def start(main: Callable[[Any], Any], settings: type[Any], description: str | None) -> None:
    """Parse the settings from the command line, run ``main`` with them, and exit."""
    run(lambda arguments: main(parse(settings, arguments, description=description or "")))


def machine() -> dict[str, Any]:
    """The device, the number of cores and the versions, for the caption of the table."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def seconds(run: Callable[[], Any], repeats: int = 3) -> float:
    """The seconds of the fastest of ``repeats`` runs, after one run that compiles."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times)


def save_plot(figure: Any, axes: Sequence[Any], path: Path) -> None:
    """Save a figure of axes over calls, on a logarithmic scale, with one legend below."""
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.grid(axis="y", color="0.92", lw=0.8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, ncols=len(labels))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def report(title: str, rows: Sequence[Mapping[str, Any]], **settings: Any) -> None:
    """Print the rows as a table, and the rows, settings and machine as one line of JSON.

    Args:
        title: the name of the benchmark.
        rows: the rows; all have the same columns.
        settings: shown in the caption.
    """
    about = machine()
    caption = ", ".join(f"{name} {value}" for name, value in {**settings, **about}.items())
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for name in rows[0]:
        numeric = all(isinstance(row[name], int | float | None) for row in rows)
        table.add_column(name, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)
    print(json.dumps({"benchmark": title, **settings, **about, "rows": list(rows)}))


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
