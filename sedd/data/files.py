"""Corpora made of the user's own files: text, JSON lines, folders and patterns.

A text file is one document, and so is each line of a JSON lines file. Splits are taken from the
names of files and folders (``sedd.data.splits``); without such names a validation split is held
out. Everything that is skipped is reported in a note, and text that cannot be read is an error that
names the file and the line.
"""

import glob
import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from sedd.data.base import Corpus, digest, hold_out, say
from sedd.data.splits import sort_into_splits
from sedd.errors import UserError

# Suffixes of the files that are read in a folder. A file that the user names may have any suffix.
LINES = (".jsonl", ".ndjson")
PROSE = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".xml")
DATA = (".csv", ".tsv", ".json", ".yaml", ".yml", ".toml")
CODE = (".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".java", ".js", ".ts", ".go", ".rs", ".rb", ".sh")
TEXT_SUFFIXES = frozenset((*LINES, *PROSE, *DATA, *CODE))
MAGIC = {  # first bytes of a file that is no plain text: (its format, how to convert it)
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "decompress it: zstd -d"),
    b"\x1f\x8b": ("compressed with gzip", "give it the suffix .gz, or decompress it: gzip -d"),
    b"BZh": ("compressed with bzip2", "decompress it: bzip2 -d"),
    b"\xfd7zXZ\0": ("compressed with xz", "decompress it: xz -d"),
    b"PK\x03\x04": ("a zip archive", "unpack it: unzip"),
    b"7z\xbc\xaf\x27\x1c": ("a 7-Zip archive", "unpack it: 7z x"),
    b"\x04\x22M\x18": ("compressed with lz4", "decompress it: lz4 -d"),
    b"PAR1": ("a Parquet file", "convert it to JSON lines, for example with pandas"),
    b"ARROW1": ("an Arrow file", "convert it to JSON lines, for example with pandas"),
    b"\x93NUMPY": ("a NumPy array", "give the text, not its tokens"),
    b"%PDF": ("a PDF document", "convert it to text, for example with pdftotext"),
}
BLOCK = 512  # bytes of the header of a tar archive, whose mark is in its middle
UNSPLIT = ("train", "validation", "all")  # the splits of files whose names declare none
SHOWN = 3  # file names that a note lists


@dataclass(frozen=True, kw_only=True)
class FileCorpus(Corpus):
    """Text files with one document each, and JSON lines files with one document a line."""

    files: tuple[tuple[str, Path], ...]  # (split, file); the split is "all" if none is declared
    key: str | None = None  # key of the text in JSON; None is "text" in JSON lines

    def _documents(self, split: str) -> Iterator[str]:
        declared = self.splits != UNSPLIT
        chosen = [path for of, path in self.files if not declared or of == split]
        documents = chain.from_iterable(read_documents(path, self.key) for path in chosen)
        return documents if declared else hold_out(documents, split)

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
        spec: a path, or ``PATH:KEY`` where KEY is the key of the text in JSON and JSON lines.

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
    texts = [path for path in found if _suffix(path) in TEXT_SUFFIXES and path.stat().st_size]
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


def _suffix(path: Path) -> str:
    """The suffix in lower case; of a gzipped file, the one before ``.gz``."""
    lower = Path(path.name.lower())
    return Path(lower.stem).suffix if lower.suffix == ".gz" else lower.suffix


def read_documents(path: Path, key: str | None = None) -> Iterator[str]:
    """Read the documents of one file, which may be compressed with gzip.

    - JSON lines: every line is an object with a document under ``key`` (default ``"text"``).
    - ``.json`` with a ``key``: an object, or a list of objects, with a document each under ``key``.
    - Any other file is one document, a ``.json`` file without a ``key`` included.

    Raises:
        UserError: if the file is not text of this form; names the file, and the line if possible.
    """
    if _suffix(path) in LINES:
        yield from _read_lines(path, key or "text")
    elif key is None:
        yield read_text(path)
    elif _suffix(path) == ".json":
        yield from _read_json(path, key)
    else:
        raise UserError(
            f"{path}: it has no key {key!r}; PATH:KEY is for .json, {' and '.join(LINES)} files"
        )


def read_text(path: Path) -> str:
    """Read the text of a file: its bytes as UTF-8, newlines unchanged, without a byte order mark.

    Raises UserError if the file is empty, cannot be read, or is not UTF-8.
    """
    data = b"".join(_chunks(path))
    if not data:
        raise UserError(f"{path} is empty")
    if b"\0" in data:
        raise UserError(f"{path} is not text: byte {data.index(0)} is NUL")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x}); convert the file, "
            f"for example with iconv -t UTF-8"
        ) from error


def _chunks(path: Path) -> Iterator[bytes]:
    """The lines of a file as bytes, decompressed if its suffix is ``.gz``.

    UserError if the file cannot be read or decompressed, or begins like a format in ``MAGIC`` or
    a tar archive.
    """
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            start = file.peek(BLOCK)
            if start[257:262] == b"ustar":
                raise UserError(f"{path} is a tar archive, not text; unpack it: tar -xf")
            for magic, (kind, remedy) in MAGIC.items():
                if start.startswith(magic):
                    raise UserError(f"{path} is {kind}, not text; {remedy}")
            yield from file
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}") from error


def _read_json(path: Path, key: str) -> Iterator[str]:
    """The documents of a ``.json`` file; see ``read_documents``."""
    try:
        data = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not JSON ({error})") from error
    records = data if isinstance(data, list) else [data]
    for number, record in enumerate(records, start=1):
        where = f"{path}, item {number}" if isinstance(data, list) else str(path)
        yield _text_of(record, key, where, path)


def _read_lines(path: Path, key: str) -> Iterator[str]:
    """The documents of JSON lines; empty lines are skipped."""
    number = 0
    empty = True
    for number, line in enumerate(_chunks(path), start=1):
        if not line.strip():
            continue
        empty = False
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
            raise UserError(f"{where}: not a line of JSON ({error})") from error
        yield _text_of(record, key, where, path)
    if empty:
        raise UserError(f"{path} is empty")


def _text_of(record: Any, key: str, where: str, path: Path) -> str:
    """The text under ``key`` of a JSON object; UserError that begins with ``where``."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object, got {type(record).__name__}")
    if key not in record:
        keys = ", ".join(map(repr, record)) or "none"
        raise UserError(
            f"{where}: no key {key!r}, the keys are {keys}; name the text's as {path}:KEY"
        )
    text = record[key]
    if not isinstance(text, str):
        raise UserError(f"{where}: {key!r} is {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {key!r} holds half of a surrogate pair") from error
    return text
