"""Atomic file writes, streams of results, and directories with a single writer.

Outputs may also be pipes, devices or standard output. These are written into, never replaced.
"""

import fcntl
import os
import secrets
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from sedd.errors import UserError

STDOUT = Path("-")  # the value of a flag that means standard output


def write_whole(path: Path, data: bytes) -> None:
    """Write a file atomically: at any time it has its old content or all of the new one.

    The data goes to a temporary file in the same folder, which then replaces the target. Missing
    folders are created, a symbolic link is followed, and an existing file keeps its mode and owner.
    A device, a FIFO or standard output (``-``, ``/dev/stdout``) is written into directly.

    Args:
        path: the file.
        data: its new content.

    Raises:
        UserError: the file cannot be written.
        BrokenPipeError: the reader of a pipe has closed it.
    """
    try:
        _write_whole(path, data)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _cannot_write(path, error) from error


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8 by ``write_whole``.

    Halves of surrogate pairs, which paths that are not UTF-8 contain, are written as escapes.
    """
    write_whole(path, text.encode(errors="backslashreplace"))


@contextmanager
def open_stream(path: Path) -> Iterator[BinaryIO]:
    """Open a file for results that are written one after the other.

    If the program stops, the file keeps everything flushed before. An existing file is truncated
    and keeps its mode. Links, devices and ``-`` are treated as in ``write_whole``.

    Raises:
        UserError: the file cannot be opened or written.
        BrokenPipeError: the reader of a pipe has closed it.
    """
    file = _opened_already(path)
    ours = file is None
    try:
        if file is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("wb")
        yield file
        file.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        if file is not None and error.filename is not None:
            raise  # an error about another file, from the caller's block
        raise _cannot_write(path, error) from error
    finally:
        if ours and file is not None:
            with suppress(OSError):  # closing would repeat a write that has failed
                file.close()


def is_stdout(path: Path) -> bool:
    """Whether a path names standard output: then nothing else may be printed between its data."""
    return path == STDOUT or os.path.realpath(path) == os.path.realpath("/dev/stdout")


def is_stream(path: Path) -> bool:
    """Whether a path names a stream (standard output or error, a FIFO, a device), not a file."""
    return path == STDOUT or _opened_already(path) is not None or not _is_replaced(path)


def check_writable(path: Path, flag: str) -> None:
    """Check, before long work, that a file can be written later. Creates nothing.

    Args:
        path: the file.
        flag: the beginning of error messages, such as ``--output FILE``.

    Raises:
        UserError: it cannot be written.
    """
    if path == STDOUT:
        return
    if path.is_dir():
        raise UserError(f"{flag}: it is a directory, not a file")
    real = Path(os.path.realpath(path))
    if any(map(os.path.islink, (real, *real.parents))):  # all other links have been followed
        raise UserError(f"{flag}: a link that leads back to itself")
    needed = [path] if path.exists() else []
    if _is_replaced(path):
        folder = next(p for p in real.parents if p.exists())
        if not folder.is_dir():
            raise UserError(f"{flag}: {folder} is a file, not a directory")
        needed.append(folder)
    if not all(os.access(place, os.W_OK) for place in needed):
        raise UserError(f"{flag}: no permission to write there")


@contextmanager
def only_writer(directory: Path, flag: str) -> Iterator[bool]:
    """Lock a directory against other writers for the duration of the block.

    The lock is a kernel lock (``flock``) on a file named ``lock`` in the directory. The kernel
    releases it when the process ends, for whatever reason, so no stale lock can remain. A missing
    directory is created. At the end the lock file is removed. The directory is removed too if this
    call created it and it is still empty.

    Args:
        directory: the directory to lock.
        flag: the beginning of error messages, such as ``--workdir runs/a``.

    Yields:
        Whether the directory is locked; False on a file system without locks.

    Raises:
        UserError: another process holds the lock, or the file cannot be written.
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
            with suppress(OSError):  # the directory may be removed or read-only by now
                path.unlink()
                if new:
                    directory.rmdir()


def _lock(path: Path, flag: str):
    """Open and lock the lock file; returns the file and whether it is locked.

    Another process may remove the file between its opening and its locking. A lock on a removed
    file excludes nobody, so the path must still name the locked file; otherwise this is repeated.
    """
    while True:
        file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                time.sleep(0.1)  # the other process may not have written its name yet
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


def _cannot_write(path: Path, error: OSError) -> UserError:
    """The error that a file cannot be written, with the reason of the system."""
    return UserError(f"cannot write {path}: {error.strerror or error}")


def _is_replaced(path: Path) -> bool:
    """Whether an atomic write applies: the path names a regular file or nothing."""
    return path.is_file() or not path.exists()


def _opened_already(path: Path) -> BinaryIO | None:
    """Standard output or standard error, if ``path`` names it: ``-``, ``/dev/stdout`` or a file.

    A shell may have redirected the stream to a regular file. Opening that file a second time would
    overwrite the output of the stream. None if ``path`` names neither stream.
    """
    if path == STDOUT:
        sys.stdout.flush()
        return sys.stdout.buffer
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # no descriptor, or no such file
            same = os.path.samestat(path.stat(), os.fstat(stream.fileno()))
            if same and not path.samefile(os.devnull):
                stream.flush()
                return stream.buffer
    return None


def _write_whole(path: Path, data: bytes) -> None:
    """``write_whole`` with errors as the system raises them."""
    if (stream := _opened_already(path)) is not None:
        stream.write(data)
        stream.flush()
        return
    if not _is_replaced(path):
        with path.open("wb") as file:
            file.write(data)
        return
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{secrets.token_hex(8)}.partial")
    # Mode 666 less the umask of the process, as for any new file.
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            with suppress(FileNotFoundError):
                _copy_owner(target.stat(), handle)
            file.write(data)
        os.replace(partial, target)
    except BaseException:
        partial.unlink()
        raise


def _copy_owner(before: os.stat_result, handle: int) -> None:
    """Give the open file the owner and the mode of the file that it will replace."""
    if os.geteuid() == 0:
        os.fchown(handle, before.st_uid, before.st_gid)
    os.fchmod(handle, stat.S_IMODE(before.st_mode))
