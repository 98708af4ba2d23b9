"""A file of finished sequences, from which an interrupted evaluation resumes.

The draws of a sequence depend only on the key and on its place in the data set. The figures after a
resume are therefore those of an evaluation without interruption.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from sedd.errors import UserError
from sedd.evaluation.bound import Scored


class Journal:
    """A file of JSON lines: a description of the evaluation, then a line per finished sequence.

    A truncated last line, as a killed process leaves it, is removed.

    Args:
        path: the file; it is created if missing.
        about: everything that the figures depend on, such as model, protocol and data. A file with
            another description is refused.

    Raises:
        UserError: if the file is that of another evaluation, is no journal, or cannot be written.
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
        """Read the finished sequences; returns the size in bytes of the complete lines."""
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
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{self.path} is not the file of an evaluation") from error
        if other:
            verb = "differs" if len(other) == 1 else "differ"
            raise UserError(
                f"{self.path} holds the results of another evaluation ({', '.join(other)} {verb}): "
                "remove it, or name another file"
            )
        return whole

    def done(self, data: str) -> Scored | None:
        """Return the finished sequences of a data set in their order; None if there are none."""
        records = self._done.get(data)
        if not records:
            return None
        return Scored(
            **{f.name: np.array([r[f.name] for r in records], np.float64) for f in fields(Scored)}
        )

    def add(self, data: str, scored: Scored) -> None:
        """Append finished sequences of a data set; they are in the file when this returns."""
        columns = {f.name: getattr(scored, f.name).tolist() for f in fields(Scored)}
        rows = zip(*columns.values(), strict=True)
        self._write([{"data": data, **dict(zip(columns, row, strict=True))} for row in rows])

    def _write(self, records: list[dict[str, Any]]) -> None:
        """Append lines and flush them."""
        try:
            self._file.write(b"".join(json.dumps(r).encode() + b"\n" for r in records))
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()
