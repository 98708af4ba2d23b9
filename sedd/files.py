"""Writing files so that a reader never sees half of one, and directories of one writer."""

import fcntl
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sedd.errors import UserError


def write_whole(path: Path, data: bytes) -> None:
    """A file that is either all there or as it was before; missing folders are made.

    UserError where it cannot be written.
    """
    try:
        _write_whole(path, data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def check_writable(path: Path, flag: str) -> None:
    """UserError beginning with ``flag`` where nothing can be made at ``path``; it makes nothing.

    For what is written after long work: a mistake in its place should not wait until then.
    """
    there = next(p for p in path.absolute().parents if p.exists())
    if path.is_dir():
        raise UserError(f"{flag}: it is a directory, not a file")
    if not there.is_dir():
        raise UserError(f"{flag}: {there} is a file, not a directory")
    if not os.access(path if path.exists() else there, os.W_OK):
        raise UserError(f"{flag}: no permission to write there")


@contextmanager
def only_writer(directory: Path, flag: str) -> Iterator[bool]:
    """Nobody else writes in ``directory``, which is made, for as long as this lasts.

    UserError beginning with ``flag`` where somebody does. The kernel's lock on the file ``lock`` is
    what counts: a killed process holds nothing. The file goes at the end, and with it a new
    directory where nothing was written. Yields False on a file system without locks.
    """
    path = directory / "lock"
    try:
        new = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        file, locked = _lock(path, flag)
    except OSError as error:
        raise UserError(f"{flag}: cannot write {path}: {error.strerror or error}") from error
    with file:
        try:
            yield locked
        finally:
            with suppress(OSError):  # the directory may be gone, or no longer ours to change
                path.unlink()
                if new:
                    directory.rmdir()


def _lock(path: Path, flag: str):
    """The open file and whether it is locked; not one that its last holder has just removed."""
    while True:
        file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                time.sleep(0.1)  # it may have been taken just now, and not signed yet
                file.seek(0)
                other = file.read().decode() or "another process"
            raise UserError(
                f"{flag}: {other} is writing there; wait for it, stop it, or choose another "
                "directory"
            ) from None
        except OSError:
            locked = False
        else:
            locked = True
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
                return file, locked
        file.close()


def _write_whole(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(partial, 0o666 & ~umask)  # mkstemp's files are the owner's alone
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
