"""Tables and reports say what is in them, in every form, and nothing that a reader could run."""

import re

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from sedd.evaluation.report import Measured, Section, Table, show, write_html

TABLE = Table(
    title="Bounds & others",
    columns=("model", "nats ≤", "tokens"),
    rows=[("a_b|c [bold]", 1.23456789, 1000), ("<x>", None, 7)],
)
UNTITLED = Table(columns=TABLE.columns, rows=TABLE.rows)


def test_markdown():
    assert TABLE.markdown().split("\n") == [
        "Bounds & others",
        "",
        "| model | nats ≤ | tokens |",
        "| --- | ---: | ---: |",
        "| a_b\\|c [bold] | 1.235 | 1000 |",
        "| <x> | – | 7 |",
    ]
    assert UNTITLED.markdown() == "\n".join(TABLE.markdown().split("\n")[2:])


def test_latex():
    lines = UNTITLED.latex().split("\n")
    assert lines[0] == r"\begin{tabular}{lrr}"
    assert lines[2] == r"model & nats $\le$ & tokens \\"
    assert lines[4] == r"a\_b|c [bold] & 1.235 & 1000 \\"
    # A caption needs a float around it.
    assert TABLE.latex().split("\n") == [
        r"\begin{table}",
        r"\centering",
        r"\caption{Bounds \& others}",
        *lines,
        r"\end{table}",
    ]


def test_terminal_shows_markup_as_it_is():
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(TABLE)
    text = console.export_text()
    assert "a_b|c [bold]" in text
    assert "Bounds & others" in text


@pytest.mark.parametrize("width", [20, 34, 60, 200])
def test_a_narrow_terminal_cuts_no_figure(width):
    """Where the columns do not fit, each row is a table of names and values."""
    rows = [("a", "all", Measured(3.66921, 0.0143), 2880), ("b", "all", Measured(12.5, 0.5), 7)]
    table = Table(columns=("data", "split", "nats/token ≤", "tokens"), rows=rows, title="Bounds")
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    text = console.export_text()
    for shown in ("2880", "7"):
        assert f" {shown} " in text
    assert "…" not in text
    assert text.count("nats/token ≤") == (1 if width >= 60 else 2) or width == 20
    if width > 20:
        assert "3.669 ± 0.014" in text
        assert "12.50 ± 0.50" in text


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (2.37, 0.02238, "2.370 ± 0.022"),
        (10.7, 0.2396, "10.70 ± 0.24"),
        (2.37, 0.0998, "2.37 ± 0.10"),
        (493123.4, 29011.0, "493,000 ± 29,000"),
        (911.2, 72.4, "911 ± 72"),
        (5.0, 0.0, "5"),
        (5.4321987, None, "5.432"),
        (1.0, 1.458e-17, "1 ± 1.5e-17"),
        (float("inf"), 1.0, "inf"),
        (-0.001, 0.5, "-0.00 ± 0.50"),
    ],
)
def test_a_value_has_two_digits_of_its_error(value, error, shown):
    assert show(Measured(value, error)) == shown


def test_rows_must_fit():
    with pytest.raises(ValueError, match="a row of 1 cells under 2 columns"):
        Table(columns=("a", "b"), rows=[("x",)])


def test_html_is_whole_and_escaped(tmp_path):
    figure = Figure(figsize=(1, 1))
    figure.add_subplot().plot([0, 1])
    section = Section(
        title="<script>", text="one\n\ntwo", tables=[TABLE], figures=[figure], samples=["<b>&"]
    )
    path = tmp_path / "report.html"
    write_html(path, "A report", [section])
    page = path.read_text()
    assert "<script>" not in page
    assert "<p>one</p><p>two</p>" in page
    assert "<pre>&lt;b&gt;&amp;</pre>" in page
    assert "data:image/png;base64," in page
    assert not re.search(r'(src|href)="?http', page)
