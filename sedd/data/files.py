"""Corpora made of the user's own files: text, JSON lines, folders and patterns."""

import glob
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from sedd.data.base import Corpus, digest, hold_out, say
from sedd.errors import UserError

# What a folder is searched for; a file that the user names may have any suffix.
LINES = (".jsonl", ".ndjson")
PROSE = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".xml")
DATA = (".csv", ".tsv", ".json", ".yaml", ".yml", ".toml")
CODE = (".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".java", ".js", ".ts", ".go", ".rs", ".rb", ".sh")
TEXT_SUFFIXES = frozenset((*LINES, *PROSE, *DATA, *CODE))
SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


@dataclass(frozen=True, kw_only=True)
class FileCorpus(Corpus):
    """Text files, a document each, and JSON lines, a document a line."""

    files: tuple[tuple[str, Path], ...]  # (split, file); the split is "all" where none is declared
    key: str = "text"

    def _documents(self, split: str) -> Iterator[str]:
        declared = self.splits != UNSPLIT
        chosen = [path for of, path in self.files if not declared or of == split]
        documents = chain.from_iterable(read_documents(path, self.key) for path in chosen)
        return documents if declared else hold_out(documents, split)

    def fingerprint(self) -> str:
        entries = []
        for split, path in self.files:
            try:
                stat = path.stat()
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror}") from error
            entries.append([split, str(path.resolve()), stat.st_size, stat.st_mtime_ns])
        return digest(["files", self.key, entries])


UNSPLIT = ("train", "validation", "all")


def open_files(spec: str) -> FileCorpus | None:
    """The corpus of a file, folder or pattern, or of ``PATH:KEY``; None where nothing has the name.

    A folder is searched for text files at every depth, hidden ones apart. Where its files are named
    train, validation (valid, val, dev) and test, or lie in folders so named, those are the splits;
    otherwise they are train, validation and all (see ``hold_out``).
    """
    for place, key in _readings(spec):
        path = Path(place).expanduser()
        if path.is_dir():
            return _open_folder(spec, path, key)
        if path.exists():
            matches = [path]
        else:
            matches = sorted(map(Path, glob.glob(str(path), recursive=True)))
            matches = [match for match in matches if match.is_file()]
        if matches:
            files = tuple(("all", match) for match in matches)
            return FileCorpus(name=spec, splits=UNSPLIT, files=files, key=key)
    return None


def _readings(spec: str) -> Iterator[tuple[str, str]]:
    yield spec, "text"
    place, colon, key = spec.rpartition(":")
    if colon and place and key:
        yield place, key


def _open_folder(spec: str, folder: Path, key: str) -> FileCorpus:
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )
    texts = [path for path in found if _suffix(path) in TEXT_SUFFIXES and path.stat().st_size]
    if not texts:
        raise UserError(
            f"folder {folder} holds no text: of its {len(found)} files none is non-empty and has a "
            f"suffix such as .txt, .md or .jsonl"
        )
    files = [(SPLIT_NAMES.get(_stem(path, folder)), path) for path in texts]
    splits = {split for split, _ in files if split}
    if "train" in splits and len(splits) > 1:
        ordered = tuple(s for s in ("train", "validation", "test") if s in splits)
        kept = tuple((split, path) for split, path in files if split)
    else:
        ordered, kept = UNSPLIT, tuple(("all", path) for path in texts)
    if skipped := len(found) - len(kept):
        say(f"{folder}: skipped {skipped} of {len(found)} files (empty, not text or in no split)")
    return FileCorpus(name=spec, splits=ordered, files=kept, key=key)


def _suffix(path: Path) -> str:
    """The suffix in lower case; of a gzipped file, the one before ``.gz``."""
    lower = Path(path.name.lower())
    return Path(lower.stem).suffix if lower.suffix == ".gz" else lower.suffix


def _stem(path: Path, folder: Path) -> str:
    return path.relative_to(folder).parts[0].split(".")[0].lower()


def read_documents(path: Path, key: str = "text") -> Iterator[str]:
    """The documents of one file, gzipped or not: each line's ``key`` in JSON lines, else the whole.

    ``UserError`` names the file, and the line where there is one, of anything that is not text.
    """
    if _suffix(path) in LINES:
        yield from _read_lines(path, key)
    else:
        yield read_text(path)


def read_text(path: Path) -> str:
    """A file's text exactly as it is, newlines included, without a byte order mark."""
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
    """A file's lines; what goes wrong in reading or unpacking it is the user's to know."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield from file
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}") from error


def _read_lines(path: Path, key: str) -> Iterator[str]:
    number = 0
    empty = True
    for number, line in enumerate(_chunks(path), start=1):
        if not line.strip():
            continue
        empty = False
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:  # not JSON, or not UTF-8
            raise UserError(f"{where}: not a line of JSON ({error})") from error
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
        yield text
    if empty:
        raise UserError(f"{path} is empty")
