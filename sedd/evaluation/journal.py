"""A file of finished sequences, from which an interrupted evaluation resumes."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from sedd.errors import UserError
from sedd.evaluation.bound import Scored


class Journal:
    """A file of JSON lines: first what is evaluated, then a line for each finished sequence.

    A last line that was cut off, as by a kill, is removed.

    Args:
        path: the file; it is created if missing.
        about: everything that the figures depend on.

    Raises:
        UserError: if the file holds the results of another evaluation or of something else, or
            cannot be written.
    """

    def __init__(self, path: Path, about: dict[str, Any]):
        self.path = path
        about = json.loads(json.dumps(about))
        self._done: dict[str, list[dict[str, Any]]] = {}
        whole = self._read(about) if path.exists() else 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("r+b" if path.exists() else "wb")
            self._file.truncate(whole)
            self._file.seek(whole)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        if not whole:
            self._write([about])

    def _read(self, about: dict[str, Any]) -> int:
        """Read the finished sequences; returns the size of the whole lines in bytes."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from error
        if not data:
            return 0
        whole = data.rfind(b"\n") + 1
        try:
            first, *rest = (json.loads(line) for line in data[:whole].splitlines())
            other = [k for k in sorted({*about, *first}) if first.get(k) != about.get(k)]
            for record in rest:
                self._done.setdefault(record["data"], []).append(record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path} is not the file of an evaluation") from error
        if other:
            verb = "differs" if len(other) == 1 else "differ"
            raise UserError(
                f"{self.path} holds the results of another evaluation ({', '.join(other)} {verb}): "
                "remove it, or name another file"
            )
        return whole

    def done(self, data: str) -> Scored | None:
        """The finished sequences of a data set, in order; None if there are none."""
        records = self._done.get(data)
        if not records:
            return None
        return Scored(
            **{f.name: np.array([r[f.name] for r in records], np.float64) for f in fields(Scored)}
        )

    def add(self, data: str, scored: Scored) -> None:
        """Append finished sequences of a data set; they are written when this returns."""
        columns = {f.name: getattr(scored, f.name).tolist() for f in fields(Scored)}
        rows = zip(*columns.values(), strict=True)
        self._write([{"data": data, **dict(zip(columns, row, strict=True))} for row in rows])

    def _write(self, records: list[dict[str, Any]]) -> None:
        try:
            self._file.write(b"".join(json.dumps(r).encode() + b"\n" for r in records))
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error

    def close(self, *, remove: bool = False) -> None:
        """Close the file, and with ``remove`` delete it."""
        self._file.close()
        if remove:
            self.path.unlink(missing_ok=True)
