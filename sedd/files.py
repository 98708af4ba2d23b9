"""Writing files so that a reader never sees half of one."""

import os
import tempfile
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
