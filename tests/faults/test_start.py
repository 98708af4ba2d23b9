"""Before the first step: signals end the command cleanly, and a second run is refused."""

import fcntl
import os
import signal

import pytest
import tiny_run
from tiny_run import TINY, call

import sedd.data.token_files
from sedd.files import only_writer


@pytest.fixture
def train(tmp_path):
    (tmp_path / "text.txt").write_text(tiny_run.text())
    flags = [*TINY, "--data.corpus", tmp_path / "text.txt", "--data.cache-dir", tmp_path / "cache"]
    return lambda: call("train", "--workdir", tmp_path / "run", *flags)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_text_is_packed(tmp_path, monkeypatch, train, number):
    tasks = sedd.data.token_files._tasks

    def signalled(*arguments):
        yield from tasks(*arguments)
        signal.raise_signal(number)

    before = signal.getsignal(number)
    monkeypatch.setattr(sedd.data.token_files, "_tasks", signalled)
    outcome = train()
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.endswith("stopped before the first step; start again to go on\n")
    assert not (tmp_path / "run").exists()
    assert [p.suffix for p in (tmp_path / "cache" / "packed").iterdir()] == [".lock"]
    assert signal.getsignal(number) is before


def test_a_directory_without_locks_is_said_once(monkeypatch, train):
    def refused(file, operation):
        raise OSError("no locks available")

    def interrupted(*_):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(fcntl, "flock", refused)
    monkeypatch.setattr(sedd.data.token_files, "_tasks", interrupted)
    outcome = train()
    assert outcome.code == 0
    (line,) = outcome.err.splitlines()
    assert line.startswith("note: ")
    assert line.endswith("is on a file system without locks: start no second run in it")


def test_a_second_run_in_a_directory_is_refused(tmp_path, train):
    with only_writer(tmp_path / "run", "it"):
        outcome = train()
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]
    assert outcome.code == 2
    (line,) = outcome.errors
    assert line.startswith(f"error: --workdir {tmp_path}/run: process {os.getpid()} on ")
