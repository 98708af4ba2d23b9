"""What has been evaluated so far, on disk, so that an interrupted evaluation goes on."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from sedd.errors import UserError
from sedd.evaluation.bound import Scored


class Journal:
    """A file of JSON lines: what is evaluated, then the terms of a sequence each, as they come.

    ``about`` is everything that the figures depend on; UserError where the file holds the results
    of something else. A last line that was cut off counts as not written.
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
        """Fills in what is done, and returns the size of the lines that are whole."""
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
        """The sequences of a data set that were evaluated before, or None."""
        records = self._done.get(data)
        if not records:
            return None
        return Scored(
            **{f.name: np.array([r[f.name] for r in records], np.float64) for f in fields(Scored)}
        )

    def add(self, data: str, scored: Scored) -> None:
        """More sequences of a data set, on disk when this returns."""
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
        """Close the file; ``remove`` where the figures are elsewhere now."""
        self._file.close()
        if remove:
            self.path.unlink(missing_ok=True)
