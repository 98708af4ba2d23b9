"""What a waiting user is shown, on a terminal and elsewhere."""

import contextlib
import io
import sys
import time
from types import SimpleNamespace

import pytest

import sedd.__main__
from sedd import progress
from sedd.commands import sample
from sedd.progress import Activity, track


class Screen(io.StringIO):
    """A stream that takes itself for a terminal."""

    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def _short_silence(monkeypatch):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.05)
    monkeypatch.setenv("TERM", "xterm")


def lines_of(stream):
    return list(dict.fromkeys(stream.getvalue().splitlines()))


def test_a_line_says_what_is_done_now():
    stream = io.StringIO()
    with Activity("loading x", stream=stream) as activity:
        time.sleep(0.12)
        activity.update("reading")
        time.sleep(0.4)
        activity.update("")
        time.sleep(0.1)
    assert lines_of(stream) == ["note: loading x", "note: reading"]
    time.sleep(0.1)
    assert lines_of(stream) == ["note: loading x", "note: reading"]


def test_imports_that_take_long_are_shown(monkeypatch, capsys):
    run = []

    def import_module(name):
        time.sleep(0.2)
        return SimpleNamespace(main=name, run=run.append)

    monkeypatch.setattr(sedd.__main__, "importlib", SimpleNamespace(import_module=import_module))
    sedd.__main__.run_command("train")
    assert run == ["sedd.commands.train"]
    time.sleep(0.2)
    assert lines_of(io.StringIO(capsys.readouterr().err)) == ["note: loading sedd train"]
    monkeypatch.setattr(sys, "stderr", None)  # as after `2>&-`
    sedd.__main__.run_command("sample")
    assert run[1:] == ["sedd.commands.sample"]
    assert capsys.readouterr().out == ""


def test_no_line_while_others_are_printed(monkeypatch):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.5)
    stream = io.StringIO()
    with Activity("working", stream=stream) as activity:
        for number in range(5):
            time.sleep(0.1)
            activity.say(f"{number}")
            time.sleep(0.1)
            with activity.paused():
                print("by other means", file=stream)
    assert "note" not in stream.getvalue()


def test_silences_double():
    """Without doubling there would be 20 lines."""
    stream = io.StringIO()
    with Activity("working", stream=stream):
        time.sleep(1.0)
    assert 2 <= len(stream.getvalue().splitlines()) <= 5


def test_batches_are_counted(capsys):
    for number in track(range(3), "wikitext2", 3):
        time.sleep(0.5 if number != 1 else 0.0)
    assert lines_of(io.StringIO(capsys.readouterr().err)) == [
        "note: wikitext2: compiling",
        "note: wikitext2, 2 of 3",
    ]


def test_sampling_is_shown_while_it_compiles_and_draws(capsys):
    """The wait is in the iterator, whose first batch compiles; the caller's time is its own."""

    def batches():
        time.sleep(0.3)
        yield ["answer"] * 2
        time.sleep(0.6)
        yield ["answer"]

    with contextlib.closing(sample.shown(batches(), 3)) as shown:
        assert [len(batch) for batch in shown] == [2, 1]
    assert lines_of(io.StringIO(capsys.readouterr().err)) == [
        "note: compiling and drawing",
        "note: drawing, 2 of 3",
    ]


def test_an_abandoned_iteration_says_nothing_more(capsys):
    with contextlib.closing(sample.shown(iter([["answer"]] * 2), 2)) as shown:
        next(shown)
    time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_it_at_once_and_clears_it():
    screen = Screen()
    with Activity("loading [x]", stream=screen, total=4) as activity:
        activity.update(completed=1)
        activity.say("a [word] in brackets")
        with activity.paused():
            screen.write("by other means\n")
        activity.update("drawing")
    text = screen.getvalue()
    for shown in ("loading [x]", "drawing", "1/4"):
        assert shown in text
    assert "a [word] in brackets" in text
    assert "note: " not in text
    assert text.index("by other means") > text.index("loading [x]")
