"""Tables and sections of results: for a terminal, for a paper, or as one self-contained HTML page.

An evaluation makes ``Table``s and ``Section``s, and each output renders them in its own form. Cells
are numbers, not text, so that one rule rounds them all (``show``).
"""

import base64
import html
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.table import Table as RichTable

from sedd.evaluation.measured import Measured
from sedd.files import write_text

Cell = str | int | float | Measured | None


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells under column names, with an optional title.

    A float is shown to four digits, a measured value as ``2.370 ± 0.022`` with two digits of the
    error, and None as a dash.

    Raises:
        ValueError: if a row does not have a cell for each column.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row of {len(row)} cells under {len(self.columns)} columns")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RichTable]:
        """Print on a terminal; if it is too narrow, each row becomes a table of two columns."""
        wide = self._rich(self.columns, self.rows, self._numeric(), self.title)
        natural = console.measure(wide, options=options.update(max_width=10_000)).maximum
        if natural <= options.max_width or len(self.columns) < 3:
            yield wide
            return
        for row in self.rows:
            pairs = list(zip(self.columns[1:], row[1:], strict=True))
            head = (self.columns[0], show(row[0]))
            yield self._rich(head, pairs, [False, True], self.title if row is self.rows[0] else "")

    @staticmethod
    def _rich(columns, rows, numeric, title) -> RichTable:
        """A table of rich; numeric columns are aligned to the right."""
        table = RichTable(title=_literal(title) or None, title_justify="left")
        for name, right in zip(columns, numeric, strict=True):
            table.add_column(_literal(name), justify="right" if right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(_literal(show(cell)) for cell in row))
        return table

    def markdown(self) -> str:
        """Return the table in GitHub's Markdown, below its title."""
        rule = ["---:" if numeric else "---" for numeric in self._numeric()]
        lines = [list(self.columns), rule, *([show(cell) for cell in row] for row in self.rows)]
        title = f"{self.title}\n\n" if self.title else ""
        return title + "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
        )

    def latex(self) -> str:
        """Return a LaTeX ``tabular`` with rules of ``booktabs``; a title makes it a ``table``."""
        form = "".join("r" if numeric else "l" for numeric in self._numeric())
        lines = [self.columns, *([show(cell) for cell in row] for row in self.rows)]
        head, *body = (" & ".join(map(_latex, line)) + r" \\" for line in lines)
        rows = "\n".join(body)
        tabular = (
            f"\\begin{{tabular}}{{{form}}}\n\\toprule\n{head}\n\\midrule\n{rows}\n"
            "\\bottomrule\n\\end{tabular}"
        )
        if not self.title:
            return tabular
        return (
            f"\\begin{{table}}\n\\centering\n\\caption{{{_latex(self.title)}}}\n{tabular}\n"
            "\\end{table}"
        )

    def html(self) -> str:
        """Return an HTML ``<table>``."""
        numeric = self._numeric()

        def line(cells, tag):
            return "".join(
                f"<{tag}{' class=n' if right else ''}>{html.escape(show(cell))}</{tag}>"
                for cell, right in zip(cells, numeric, strict=True)
            )

        title = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        body = "\n".join(f"<tr>{line(row, 'td')}</tr>" for row in self.rows)
        return (
            f"<div class=wide><table>{title}<thead><tr>{line(self.columns, 'th')}</tr></thead>"
            f"<tbody>{body}</tbody></table></div>"
        )

    def _numeric(self) -> list[bool]:
        """Whether each column has only numbers and dashes; these are aligned to the right."""
        return [
            all(isinstance(row[i], int | float | Measured | None) for row in self.rows)
            for i in range(len(self.columns))
        ]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a report.

    Args:
        title: its heading.
        text: paragraphs, separated by empty lines.
        tables: shown below the text.
        figures: matplotlib figures, or paths of PNG files; shown below the tables.
        samples: texts, each shown verbatim in a block.
    """

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Any] = ()
    samples: Sequence[str] = field(default=())


def write_html(path: str | Path, title: str, sections: Sequence[Section]) -> None:
    """Write one page with all sections, figures and styles inside, which loads no other file.

    Args:
        path: the file; it is replaced as a whole.
        title: the heading.
        sections: the parts in their order.
    """
    parts = "\n".join(map(_section, sections))
    page = PAGE.format(title=html.escape(title), style=STYLE, sections=parts)
    write_text(Path(path), page)


def plain_axes(axes) -> None:
    """Give the axes of a plot the style of reports: a light grid, two of four border lines."""
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def show(cell: Cell) -> str:
    """Return a cell as text, rounded as ``Table`` describes."""
    if cell is None:
        return "–"
    if isinstance(cell, Measured):
        return _show_measured(cell)
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _show_measured(cell: Measured) -> str:
    """Value and error, both rounded to two digits of the error."""
    value, error = cell
    if not error or not math.isfinite(value) or not math.isfinite(error):
        return f"{value:.4g}"
    # The decimal place of the error's second digit. The error is rounded first: 0.0996 is 0.10.
    last = 1 - math.floor(math.log10(float(f"{error:.1e}")))
    if last > 6 or abs(value) >= 1e6:  # plain notation would be long
        return f"{value:.4g} ± {error:.1e}"
    places = max(last, 0)
    return f"{round(value, last):,.{places}f} ± {round(error, last):,.{places}f}"


def _section(section: Section) -> str:
    """The HTML of a section."""
    paragraphs = "".join(f"<p>{html.escape(p)}</p>" for p in section.text.split("\n\n") if p)
    tables = "".join(table.html() for table in section.tables)
    figures = "".join(_figure(figure, section.title) for figure in section.figures)
    samples = "".join(f"<pre>{html.escape(text)}</pre>" for text in section.samples)
    return (
        f"<section><h2>{html.escape(section.title)}</h2>{paragraphs}{tables}{figures}{samples}"
        "</section>"
    )


def _figure(figure: Any, description: str) -> str:
    """An HTML image that contains its own data."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if isinstance(figure, Path):
        data = figure.read_bytes()
    else:
        image = io.BytesIO()
        FigureCanvasAgg(figure).print_png(image)
        data = image.getvalue()
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return f'<img alt="{html.escape(description)}" src="{source}">'


def _literal(text: str) -> str:
    """Escape text so that rich finds no markup in it."""
    return text.replace("[", "\\[")


def _latex(text: str) -> str:
    """Escape text for LaTeX, and write the symbols of tables as commands."""
    plain = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    math = {"≤": r"$\le$", "±": r"$\pm$", "–": "--", "σ": r"$\sigma$", "λ": r"$\lambda$"}
    escaped = {c: f"\\{c}" for c in "&%$#_{}"}
    return "".join((plain | math | escaped).get(c, c) for c in text)


STYLE = """
:root { color-scheme: light dark; --text: #222; --page: #fff; --line: #ddd; --rule: #888;
  --code: #f6f6f6 }
@media (prefers-color-scheme: dark) {
  :root { --text: #ddd; --page: #181a1b; --line: #3a3d40; --rule: #777; --code: #24272a }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem }
h1, p { overflow-wrap: anywhere }
.wide { overflow-x: auto }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line) }
th { border-bottom: 2px solid var(--rule) } .n { text-align: right; white-space: nowrap }
td:first-child { white-space: pre-wrap }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px }
pre { background: var(--code); padding: .7rem 1rem; white-space: pre-wrap;
  overflow-wrap: anywhere }
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1>
{sections}
</body></html>
"""
