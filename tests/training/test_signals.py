"""Ctrl-C is answered at once: while modules are imported, and while the main thread is in C++."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest
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
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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
    assert answered == ["\nnote: stopping after the step under way; once more to stop at once\n"]


def test_other_signals_are_not_answered(capfd):
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        with stop_requests() as stop:
            signal.raise_signal(signal.SIGUSR1)
            assert not stop(1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert capfd.readouterr().err == ""
