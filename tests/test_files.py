"""One writer a directory, whatever becomes of it."""

import fcntl
import os
import resource
import socket
import subprocess
import sys

import pytest
from tiny_run import ROOT

from sedd.errors import UserError
from sedd.files import only_writer

HOLDER = """
import sys, time
from pathlib import Path
from sedd.files import only_writer
with only_writer(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_another_process_is_named_and_a_killed_one_holds_nothing(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "run"], cwd=ROOT, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with (
            pytest.raises(UserError) as caught,
            only_writer(tmp_path / "run", "--workdir run"),
        ):
            pass
        assert str(caught.value) == (
            f"--workdir run: process {process.pid} on {socket.gethostname()} is writing there; "
            "wait for it, stop it, or choose another directory"
        )
    finally:
        process.kill()
        process.communicate()
    assert (tmp_path / "run" / "lock").exists()
    with only_writer(tmp_path / "run", "it") as locked:
        assert locked
        assert (tmp_path / "run" / "lock").read_text().startswith(f"process {os.getpid()} on ")
    assert list((tmp_path / "run").iterdir()) == []


def test_nothing_is_left_where_nothing_was_written(tmp_path):
    with only_writer(tmp_path / "a" / "new", "it"):
        pass
    assert not (tmp_path / "a" / "new").exists()
    with only_writer(tmp_path / "kept", "it"):
        (tmp_path / "kept" / "file").touch()
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["file"]


def test_a_lock_that_its_holder_removed_meanwhile_is_not_taken(tmp_path, monkeypatch):
    flock, removed = fcntl.flock, []

    def late(file, operation):
        if not removed:
            removed.append((tmp_path / "lock").rename(tmp_path / "removed"))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with only_writer(tmp_path, "it"):
        assert removed
        assert (tmp_path / "lock").read_text().startswith("process ")


def without_locks(file, operation):
    raise OSError("no locks available")


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", without_locks)
    with only_writer(tmp_path, "it") as locked:
        assert not locked


def test_a_full_disk_names_the_file(tmp_path):
    """The limit on the size of a file stands for a full disk: it refuses writes in the same way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(UserError) as caught, only_writer(tmp_path, "--workdir run"):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value) == f"--workdir run: cannot write {tmp_path}/lock: File too large"
