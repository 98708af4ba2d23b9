"""Corpora made of the user's own files: text, JSON lines, Parquet, folders and patterns.

A text file is one document, and so is each line of a JSON lines file and each row of a Parquet file
(``sedd.data.readers``). Splits are taken from the names of files and folders
(``sedd.data.splits``); without such names a validation split is held out. Everything that is
skipped is reported in a note.
"""

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from sedd.data.base import Corpus, digest, hold_out_from, say
from sedd.data.readers import (
    LINES,
    PARQUET,
    holds_records,
    read_documents,
    without_compression,
)
from sedd.data.splits import sort_into_splits
from sedd.errors import UserError

# Suffixes of the files that are read in a folder. A file that the user names may have any suffix.
PROSE = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".xml")
DATA = (".csv", ".tsv", ".json", ".yaml", ".yml", ".toml")
CODE = (".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".java", ".js", ".ts", ".go", ".rs", ".rb", ".sh")
TEXT_SUFFIXES = frozenset((*LINES, PARQUET, *PROSE, *DATA, *CODE))
UNSPLIT = ("train", "validation", "all")  # the splits of files whose names declare none
SHOWN = 3  # file names that a note lists


@dataclass(frozen=True, kw_only=True)
class FileCorpus(Corpus):
    """Text files with one document each, and files with a document in each line or row.

    If the first line of the first file is a record of ``sedd.data.records``, all lines must be.
    """

    files: tuple[tuple[str, Path], ...]  # (split, file); the split is "all" if none is declared
    key: str | None = None  # key or column of the text; None is "text"

    @cached_property
    def records(self) -> bool:
        return self.key is None and holds_records(self.files[0][1])

    def _documents(self, split: str) -> Iterator[str]:
        return self._documents_from(split, 0)

    def _documents_from(self, split: str, start: int) -> Iterator[str]:
        if self.splits == UNSPLIT:
            read = partial(self._read, self.files)
            return hold_out_from(read, split, start, whole=self.records)
        return self._read([entry for entry in self.files if entry[0] == split], start)

    def _read(self, files: Sequence[tuple[str, Path]], skip: int) -> Iterator[str]:
        """The documents of ``files`` after the first ``skip``."""
        for _, path in files:
            skip = yield from read_documents(path, self.key, skip, records=self.records)

    def fingerprint(self) -> str:
        """A hash of the key and of the path, split, size and time of change of each file."""
        entries = []
        for split, path in self.files:
            try:
                stat = path.stat()
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror}") from error
            entries.append([split, str(path.resolve()), stat.st_size, stat.st_mtime_ns])
        return digest(["files", self.key, entries])


def open_files(spec: str) -> FileCorpus | None:
    """Open a file, a folder or a pattern as a corpus.

    A folder is searched for text files at every depth, through links to folders too, without hidden
    files and folders. If the names of files declare splits (see ``sort_into_splits``), these are
    the splits of the corpus. Otherwise they are train, validation and all (see ``hold_out``).

    Args:
        spec: a path, or ``PATH:KEY`` where KEY is the key of the text in JSON and JSON lines, or
            its column in Parquet.

    Returns:
        The corpus; None if there is no such file or folder and no match of the pattern.

    Raises:
        UserError: if a folder holds no text.
    """
    for place, key in _with_and_without_key(spec):
        path = Path(place).expanduser()
        if path.is_dir():
            return _open_folder(spec, path, key)
        if path.exists():
            files, root = [path], None
        else:
            matches = sorted(map(Path, glob.glob(str(path), recursive=True)))
            files = [match for match in matches if match.is_file()]
            root = Path(os.path.commonpath([f.parent for f in files])) if files else None
        if files:
            return _corpus_of(spec, files, root, key)
    return None


def exists(spec: str) -> bool:
    """Whether ``spec`` is an existing path or a matching pattern, with or without ``:KEY``."""
    for place, _ in _with_and_without_key(spec):
        path = str(Path(place).expanduser())
        if os.path.exists(path) or (glob.has_magic(path) and glob.glob(path, recursive=True)):
            return True
    return False


def _with_and_without_key(spec: str) -> Iterator[tuple[str, str | None]]:
    """The two readings of ``spec``: a path that may contain a colon, and ``PATH:KEY``."""
    yield spec, None
    place, colon, key = spec.rpartition(":")
    if colon and place and key and not set(key) & set("*+/\\"):
        yield place, key


def _open_folder(spec: str, folder: Path, key: str | None) -> FileCorpus:
    """The corpus of all text files in a folder, with a note on the files that are skipped."""
    found = sorted(_walk(folder))
    texts = [
        path
        for path in found
        if without_compression(path.name).suffix in TEXT_SUFFIXES and path.stat().st_size
    ]
    if not texts:
        raise UserError(
            f"folder {folder} holds no text: of its {len(found)} files none is non-empty and has a "
            f"suffix such as .txt, .md or .jsonl"
        )
    if skipped := [path for path in found if path not in set(texts)]:
        say(
            f"{folder}: skipped {len(skipped)} of {len(found)} files, empty or without a suffix of "
            f"text: {_listed(skipped, folder)}"
        )
    return _corpus_of(spec, texts, folder, key)


def _walk(folder: Path) -> Iterator[Path]:
    """Files at every depth except hidden ones; a folder reached by several links is read once."""
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(place, name) for name in files if not name.startswith("."))
        yield from (path for path in paths if path.is_file())


def _corpus_of(spec: str, files: list[Path], root: Path | None, key: str | None) -> FileCorpus:
    """The corpus of ``files`` in the splits that their paths below ``root`` declare.

    Without a ``root``, for a single file, the name declares nothing. A note says which files are in
    which split, and which look like a split but are not read as one.
    """
    if root is None:
        chosen = tuple(("all", path) for path in files)
        return FileCorpus(name=spec, splits=UNSPLIT, files=chosen, key=key)
    in_splits = sort_into_splits(files, root)
    if in_splits.declared:
        counts = Counter(split for split, _ in in_splits.files)
        sizes = ", ".join(f"{split} {counts[split]}" for split in in_splits.splits)
        line = f"{spec}: files by split, from their names: {sizes}"
        if in_splits.left_out:
            line += f"; in no split, and not read: {_listed(in_splits.left_out, root)}"
        say(line)
    elif in_splits.unused:
        say(
            f"{spec}: {_listed(in_splits.unused, root)} look like splits by name, but are read "
            "like all other files. Names count as splits only if there are a train split and "
            "another split, and at least half of the files belong to a split"
        )
    splits = in_splits.splits if in_splits.declared else UNSPLIT
    return FileCorpus(name=spec, splits=splits, files=in_splits.files, key=key)


def _listed(paths: Sequence[Path], root: Path) -> str:
    """The first ``SHOWN`` names below ``root``, and how many more there are."""
    names = ", ".join(str(path.relative_to(root)) for path in paths[:SHOWN])
    more = len(paths) - SHOWN
    return f"{names} and {more:,} more" if more > 0 else names
