"""Ctrl-C is answered at once: while modules are imported, and while the main thread is in C++.

SIGTERM leaves every batch that was drawn in the file.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest
import tiny_run
from tiers import nightly
from tiny_run import ROOT

from sedd.training.signals import stop_requests

INTERRUPTED_IMPORT = """
import signal, sys
class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("the process should have ended")
sys.meta_path.insert(0, Interrupts())
from sedd.__main__ import main
sys.argv = ["sedd", {command!r}]
main()
"""


def python(program):
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


@pytest.mark.parametrize(
    ("command", "module"),
    [("train", "sedd.commands.cli"), ("sample", "jax"), ("evaluate", "sedd.commands.evaluate")],
)
def test_an_interrupted_import_ends_without_a_traceback(command, module):
    result = python(INTERRUPTED_IMPORT.format(command=command, module=module))
    outcome = tiny_run.Outcome(result.returncode, result.stdout, result.stderr)
    assert (outcome.code, outcome.out, outcome.errors) == (-signal.SIGINT, "", [])


LEFT_WHILE_COLLECTING = """
import gc, signal, time, weakref
from sedd.training.signals import leave_on_signals
class Cycle:
    def __del__(self):
        if {where!r} == "destructor":
            signal.raise_signal(signal.{name})
def callback(*args):
    gc.callbacks.clear()
    signal.raise_signal(signal.{name})
with leave_on_signals():
    cycle = Cycle()
    cycle.itself = cycle
    reference = weakref.ref(cycle, callback if {where!r} == "weak reference" else None)
    del cycle
    if {where!r} == "collection":
        gc.callbacks.append(callback)
    gc.collect()
    time.sleep(100)
"""


@pytest.mark.parametrize(
    ("where", "name"),
    [("collection", "SIGTERM"), ("destructor", "SIGINT"), ("weak reference", "SIGTERM")],
)
def test_a_signal_within_a_garbage_collection_is_not_lost(where, name):
    result = python(LEFT_WHILE_COLLECTING.format(where=where, name=name))
    said = "stopped before the first step; start again to go on\n"
    assert (result.returncode, result.stdout, result.stderr) == (0, said, "")


@pytest.mark.parametrize("number", [nightly(signal.SIGINT), signal.SIGTERM])
def test_a_signal_is_answered_while_the_main_thread_is_in_c(capfd, number):
    """A call of C without the interpreter's lock, as compiling is; nothing in Python runs here."""
    jax.devices()  # what JAX prints at its start is no answer
    capfd.readouterr()
    answered = []

    def look():
        time.sleep(0.3)
        os.kill(os.getpid(), number)
        time.sleep(0.3)
        answered.append(capfd.readouterr().err)

    with stop_requests() as stop:
        thread = threading.Thread(target=look)
        thread.start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 4_000_000)  # more than a second
        thread.join()
        assert stop(1)
    assert answered == [
        "\nnote: stopping after the current step; send the signal (Ctrl-C) again to stop at once\n"
    ]


def test_other_signals_are_not_answered(capfd):
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        with stop_requests() as stop:
            signal.raise_signal(signal.SIGUSR1)
            assert not stop(1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert capfd.readouterr().err == ""


STUCK_VERIFIER = """
import time
from pathlib import Path

def score(texts):
    with Path(__file__).with_name("batches").open("a") as file:
        print(len(texts), file=file)
    if len(Path(__file__).with_name("batches").read_text().splitlines()) == 4:
        time.sleep(600)
    return [0.0] * len(texts)
"""


def test_sigterm_leaves_every_whole_batch_in_the_file(tmp_path):
    """The process is ended by the signal, in its fourth batch, which the verifier holds up."""
    run = tiny_run.make_run(tmp_path / "run", tiny_run.config())
    (tmp_path / "code.py").write_text(STUCK_VERIFIER)
    batches, output = tmp_path / "batches", tmp_path / "out.jsonl"
    flags = [
        *("--checkpoint", run, "--output", output, "--num", 99, "--batch-size", 2),
        *("--sampler", "best_of_n", "--n", 1, "--inner", "ordered", "--inner.steps", 2),
        *("--verifier", f"{tmp_path}/code.py:score"),
    ]
    process = subprocess.Popen(
        [sys.executable, "sample.py", *map(str, flags)], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not batches.exists() or len(batches.read_text().splitlines()) < 4:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
    finally:
        process.kill()
    text = output.read_text()
    assert text.endswith("\n")
    assert [json.loads(line)["id"] for line in text.splitlines()] == [0, 1, 2, 3, 4, 5]
