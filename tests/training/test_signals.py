"""Ctrl-C is answered at once: while modules are imported, and while the main thread is in C++."""

import signal
import subprocess
import sys

import pytest
from tiny_run import ROOT

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
