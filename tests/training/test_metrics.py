"""Records, the report on the screen, and the picture."""

import contextlib
import io
import json
import os
import resource
import sys
import time
import warnings

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from sedd import progress
from sedd.errors import UserError
from sedd.training import metrics
from sedd.training.metrics import Metrics, ProgressReport, plot_curves, read_metrics


def events(workdir):
    """Parsed from the record framing: length, checksum, bytes, checksum."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            found.append(Event.FromString(content[12 : 12 + size]))
            content = content[16 + size :]
    return found


def test_records_are_lines_and_events(tmp_path):
    log = Metrics(tmp_path)
    log.write(5, {"loss": 0.1 + 0.2, "tokens": 7})
    log.write(10, {"loss": 1.5, "validation_nats_per_token": float("inf")})
    log.write_samples(10, ["some text"])
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 5, "loss": 0.1 + 0.2, "tokens": 7}
    assert json.loads(lines[1])["validation_nats_per_token"] is None
    scalars = {
        (event.step, value.tag): value.simple_value
        for event in events(tmp_path)
        for value in event.summary.value
    }
    assert scalars[5, "loss"] == np.float32(0.3)
    assert (10, "validation/nats_per_token") in scalars
    assert (10, "sample/0/text_summary") in scalars


def test_a_resume_drops_what_came_later(tmp_path):
    log = Metrics(tmp_path)
    for step in (1, 2, 3, 4):
        log.write(step, {"loss": float(step)})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    Metrics(tmp_path, step=3).close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    Metrics(tmp_path, step=3, keep_last=False).close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    # TensorBoard forgets events from the step of a start on.
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert sorted(starts) == [1, 4, 4]
    Metrics(tmp_path).close()
    assert read_metrics(tmp_path) == []


def test_an_only_line_that_was_cut_off_spoils_no_other(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo')
    metrics = Metrics(tmp_path)
    metrics.write(1, {"loss": 2.0})
    metrics.close()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # it would be cut, for good
    log = Metrics(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl: File too large"):
            log.write(1, {"text": "x" * 300})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_wandb_is_asked_for_by_name_when_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[wandb\]'"):
        Metrics(tmp_path, wandb={"project": "x"})


def test_wandb_gets_the_numbers(tmp_path, monkeypatch):
    class Fake:
        def __init__(self):
            self.logged = []

        def init(self, **options):
            assert options == {"project": "x"}
            return self

        def log(self, numbers, step):
            self.logged.append((step, numbers))

        def finish(self):
            self.logged.append("finished")

    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = Metrics(tmp_path, wandb={"project": "x"})
    log.write(3, {"loss": 1.5})
    log.close()
    assert fake.logged == [(3, {"loss": 1.5}), "finished"]


def test_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    report = ProgressReport(start=0, steps=1000, stream=stream)
    report.advance(50)
    report.report(100, {"loss": 2.34567, "tokens_per_second": 12345.6, "steps_per_second": 2.0})
    report.report(200, {"validation_nats_per_token": 1.5})
    report.say("stopped")
    report.close()
    assert stream.getvalue().splitlines() == [
        "step  100/1000  loss 2.3457  12,346 tokens/s  8 min left",
        "step  200/1000  validation 1.5000 nats/token",
        "stopped",
    ]


def test_a_line_whenever_nothing_was_printed_for_a_while(monkeypatch):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.05)
    stream = io.StringIO()
    report = ProgressReport(start=3, steps=1000, stream=stream)
    report.doing("compiling the training step")
    time.sleep(0.6)  # silences of 0.05, 0.1, 0.2, 0.4 … s
    report.advance(4)
    report.close()
    lines = stream.getvalue().splitlines()
    assert set(lines) == {"step    3/1000  compiling the training step"}
    assert 1 <= len(lines) <= 4
    time.sleep(0.1)
    assert stream.getvalue().splitlines() == lines


@pytest.mark.parametrize("size", [1, 100_000])
def test_a_run_goes_on_without_a_reader(monkeypatch, size):
    """As after ``sedd train | head``, whose printed lines are lost: it has files to complete."""
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.01)
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(BrokenPipeError), os.fdopen(writer, "w") as stream:
        report = ProgressReport(start=0, steps=10, stream=stream)
        report.report(1, {"loss": 2.5})
        report.doing("x" * size)
        time.sleep(0.1)
        report.say("y" * size)
        report.close()


def test_a_bar_where_there_is_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    report = ProgressReport(start=0, steps=10, stream=stream)
    report.report(10, {"loss": 2.5})
    report.say("a [word] in brackets")
    report.close()
    assert "loss 2.5000" in stream.getvalue()
    assert "a [word] in brackets" in stream.getvalue()


def write_run(workdir, steps=200, noise=0.15):
    rng = np.random.default_rng(0)
    log = Metrics(workdir)
    for step in range(50, 50 * steps + 1, 50):
        mean = 1.9 + 1.3 * np.exp(-step / 1500)
        record = {"loss": float(mean + noise * rng.standard_normal())}
        if step % 1000 == 0:
            record["validation_nats_per_token"] = float(mean + 0.02)
            record["validation_standard_error"] = 0.02
        log.write(step, record)
    log.close()


def test_curves(tmp_path):
    assert plot_curves(tmp_path) is None
    write_run(tmp_path)
    path = plot_curves(tmp_path, unigram_nats=2.8)
    assert path == tmp_path / "curves.png"
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["国语", "a$x$ $\\nothing$", "क", "\x1b[31m", "naïve run"])
def test_curves_of_a_run_by_any_name(tmp_path, name):
    """A font lacks some characters, and dollar signs are no formula."""
    write_run(tmp_path / name, steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plot_curves(tmp_path / name) is not None
    whole = name in ("a$x$ $\\nothing$", "naïve run")
    assert metrics._title(name) == (f"Training of {name}" if whole else "Training")


def test_the_smoothed_curve_is_a_mean():
    ramp = np.arange(200.0)
    np.testing.assert_allclose(metrics._smoothed(ramp)[:-5], ramp[:-5])
    np.testing.assert_allclose(metrics._smoothed(ramp)[-1], ramp[-6:].mean())
    assert metrics._smoothed(np.array([3.0])) == [3.0]
    noise = np.random.default_rng(0).standard_normal(400)
    assert metrics._smoothed(noise)[50:-50].std() < 0.35  # 1/√21 of 1, and correlated
