"""Files that are complete or untouched, and directories with one writer."""

import fcntl
import io
import os
import resource
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny_run import ROOT

from sedd.errors import UserError
from sedd.files import check_writable, only_writer, open_stream, write_whole

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


def write_stream(path, data):
    with open_stream(path) as file:
        for start in range(0, len(data), 2):
            file.write(data[start : start + 2])


WRITERS = pytest.mark.parametrize("write", [write_whole, write_stream])


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
@WRITERS
def test_an_existing_file_keeps_its_mode(tmp_path, write, mode):
    path = tmp_path / "file"
    path.write_text("before, and longer")
    path.chmod(mode)
    check_writable(path, "--output")
    write(path, b"after")
    assert path.read_bytes() == b"after"
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
@WRITERS
def test_a_new_file_has_the_mode_of_any_other_and_the_umask_is_not_touched(
    tmp_path, write, umask, monkeypatch
):
    before = os.umask(umask)
    monkeypatch.setattr(os, "umask", None)  # of the process: other threads would see the change
    try:
        write(tmp_path / "new" / "file", b"x")
    finally:
        monkeypatch.undo()
        assert os.umask(before) == umask
    assert stat.S_IMODE((tmp_path / "new" / "file").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("links", [1, 2])
@WRITERS
def test_links_are_followed(tmp_path, write, exists, links):
    target = tmp_path / "elsewhere" / "target"
    target.parent.mkdir()
    if exists:
        target.write_text("before")
    path = target
    for number in range(links):
        link = tmp_path / f"link{number}"
        link.symlink_to(os.path.relpath(path, tmp_path))
        path = link
    check_writable(path, "--output")
    write(path, b"after")
    assert path.is_symlink()
    assert target.read_bytes() == b"after"
    assert [p.name for p in target.parent.iterdir()] == ["target"]


@WRITERS
def test_a_fifo_is_written_into(tmp_path, write):
    fifo, seen = tmp_path / "fifo", []
    os.mkfifo(fifo)
    check_writable(fifo, "--output")
    reader = threading.Thread(target=lambda: seen.append(fifo.read_bytes()))
    reader.start()
    write(fifo, b"some text")
    reader.join()
    assert seen == [b"some text"]
    assert stat.S_ISFIFO(fifo.stat().st_mode)


@WRITERS
def test_a_device_is_written_into(write):
    check_writable(Path("/dev/null"), "--output")
    write(Path("/dev/null"), b"x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("name", ["-", "/dev/fd/{fd}", "{path}"])
@WRITERS
def test_standard_output_goes_on_after_what_was_printed(tmp_path, write, name, monkeypatch):
    """A shell's ``> out.txt`` makes the names of standard output those of a regular file."""
    path = tmp_path / "out.txt"
    with path.open("w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        print("before")
        target = Path(name.format(fd=stdout.fileno(), path=path))
        check_writable(target, "--output")
        write(target, b"data\n")
        print("after")
    assert path.read_text() == "before\ndata\nafter\n"


@WRITERS
def test_bytes_of_a_file_do_not_depend_on_the_terminal(write, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    write(Path("-"), "é".encode())
    assert stdout.buffer.getvalue() == "é".encode()


@WRITERS
def test_a_closed_pipe_is_no_mistake(tmp_path, write):
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError), os.fdopen(writer, "wb"):
        write(Path(f"/dev/fd/{writer}"), b"x")


def test_what_was_flushed_stays_when_the_work_fails(tmp_path):
    def work():
        with open_stream(tmp_path / "out") as file:
            file.write(b"one\n")
            file.flush()
            assert (tmp_path / "out").read_bytes() == b"one\n"
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        work()
    assert (tmp_path / "out").read_bytes() == b"one\n"


def test_an_error_of_another_file_is_not_taken_for_this_one_s(tmp_path):
    with pytest.raises(FileNotFoundError), open_stream(tmp_path / "out"):
        (tmp_path / "none").read_bytes()


@pytest.mark.parametrize("write", [write_whole, write_stream])
def test_a_full_disk_is_one_line_and_leaves_a_whole_file_alone(tmp_path, write):
    path = tmp_path / "file"
    path.write_text("before")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3, before[1]))
    try:
        with pytest.raises(UserError, match=rf"^cannot write {path}: File too large$"):
            write(path, b"longer than three")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == [path]
    assert write is write_stream or path.read_text() == "before"
