"""The documents of one file: text, JSON, JSON lines and Parquet, plain or compressed.

Text that cannot be read is an error of one line that names the file, and the line or row if
possible.
"""

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from sedd.data.records import is_record, record_text
from sedd.errors import UserError

LINES = (".jsonl", ".ndjson")
PARQUET = ".parquet"
COMPRESSIONS = (".gz", ".zst")
MAGIC = {  # first bytes of a file that is no plain text: (its format, what to do with it)
    b"\x28\xb5\x2f\xfd": (
        "compressed with zstd",
        "give it the suffix .zst, or decompress it: zstd -d",
    ),
    b"\x1f\x8b": ("compressed with gzip", "give it the suffix .gz, or decompress it: gzip -d"),
    b"BZh": ("compressed with bzip2", "decompress it: bzip2 -d"),
    b"\xfd7zXZ\0": ("compressed with xz", "decompress it: xz -d"),
    b"PK\x03\x04": ("a zip archive", "unpack it: unzip"),
    b"7z\xbc\xaf\x27\x1c": ("a 7-Zip archive", "unpack it: 7z x"),
    b"\x04\x22M\x18": ("compressed with lz4", "decompress it: lz4 -d"),
    b"PAR1": ("a Parquet file", f"give it the suffix {PARQUET}"),
    b"ARROW1": ("an Arrow file", "convert it to JSON lines, for example with pandas"),
    b"\x93NUMPY": ("a NumPy array", "give the text, not its tokens"),
    b"%PDF": ("a PDF document", "convert it to text, for example with pdftotext"),
}
BLOCK = 512  # bytes of the header of a tar archive, whose mark is in its middle
BUFFER = 1 << 20  # bytes that are read from a compressed file at a time
ROWS = 64  # rows of a Parquet file in memory at a time

# The documents of a file after the first ``skip``. The value of the generator is how many of these
# ``skip`` the file did not have: they are to be skipped in the next file.
Documents = Generator[str, None, int]


def without_compression(name: str) -> Path:
    """A file name without the suffix of its compression, if it has one: ``a.txt`` of ``a.txt.gz``.

    The result is in lower case.
    """
    path = Path(name.lower())
    return Path(path.stem) if path.suffix in COMPRESSIONS else path


def holds_records(path: Path) -> bool:
    """Whether the first line of a file is a record of ``sedd.data.records``; False on any error.

    Errors are those of ``read_documents`` later.
    """
    if without_compression(path.name).suffix not in LINES:
        return False
    with contextlib.suppress(UserError, ValueError, RecursionError), _opened(path) as file:
        line = next((line for line in file if not line.isspace()), b"")
        return is_record(json.loads(line))
    return False


def read_documents(
    path: Path, key: str | None = None, skip: int = 0, *, records: bool = False
) -> Documents:
    """Read the documents of one file, which may be compressed with gzip (.gz) or zstd (.zst).

    - JSON lines: every line is an object with a document under ``key`` (default ``"text"``).
    - Parquet: every row has a document in the column ``key`` (default ``"text"``).
    - ``.json`` with a ``key``: an object, or a list of objects, with a document each under ``key``.
    - Any other file is one document, a ``.json`` file without a ``key`` included.

    Args:
        path: the file.
        key: the key or column of the text.
        skip: documents to leave out at the beginning. They are not parsed, and row groups of a
            Parquet file are not even read.
        records: whether every line is a record of ``sedd.data.records``; JSON lines only.

    Returns:
        A generator, whose own value is what remains of ``skip`` after the file's last document.

    Raises:
        UserError: if the file is not text of this form; names the file, and the line if possible.
    """
    suffix = without_compression(path.name).suffix
    if suffix in LINES:
        return _read_lines(path, key or "text", skip, records)
    if records:
        raise UserError(
            f"{path}: other files of this corpus are JSON lines of messages or prompts, and this "
            "one is not"
        )
    if suffix == PARQUET:
        return _read_parquet(path, key or "text", skip)
    if key is None:
        return _read_whole(path, skip)
    if suffix == ".json":
        return _read_json(path, key, skip)
    raise UserError(
        f"{path}: it has no key {key!r}; PATH:KEY is for .json, {', '.join(LINES)} and {PARQUET} "
        "files"
    )


def read_text(path: Path) -> str:
    """Read the text of a file: its bytes as UTF-8, newlines unchanged, without a byte order mark.

    Raises UserError if the file is empty, cannot be read, or is not UTF-8.
    """
    with _opened(path) as file:
        data = file.read()
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


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file to read its bytes, decompressed.

    UserError if the file cannot be read or decompressed, also later in the block, or if it begins
    like a format in ``MAGIC`` or a tar archive.
    """
    try:
        with contextlib.ExitStack() as stack:
            file = _decompressed(path, stack)
            start = file.peek(BLOCK)
            if start[257:262] == b"ustar":
                raise UserError(f"{path} is a tar archive, not text; unpack it: tar -xf")
            for magic, (kind, remedy) in MAGIC.items():
                if start.startswith(magic):
                    raise UserError(f"{path} is {kind}, not text; {remedy}")
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error


def _decompressed(path: Path, stack: contextlib.ExitStack) -> io.BufferedReader:
    """The bytes of a file; the suffix says how they are compressed."""
    file = stack.enter_context(path.open("rb"))
    match path.suffix.lower():
        case ".gz":
            raw: Any = stack.enter_context(gzip.GzipFile(fileobj=file))
        case ".zst":
            import pyarrow

            raw = stack.enter_context(pyarrow.CompressedInputStream(file, "zstd"))
        case _:
            return file
    return io.BufferedReader(raw, BUFFER)


def _unreadable(path: Path, error: Exception) -> UserError:
    """The error that a file cannot be read or decoded, in one line."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return UserError(f"cannot read {path}: {reason}")


def _read_whole(path: Path, skip: int) -> Documents:
    """The one document of a text file."""
    if skip:
        return skip - 1
    yield read_text(path)
    return 0


def _read_json(path: Path, key: str, skip: int) -> Documents:
    """The documents of a ``.json`` file; see ``read_documents``."""
    try:
        data = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not JSON ({error})") from error
    records = data if isinstance(data, list) else [data]
    for number, record in enumerate(records[skip:], start=skip + 1):
        where = f"{path}, item {number}" if isinstance(data, list) else str(path)
        yield _text_of(record, key, where, path)
    return max(0, skip - len(records))


def _read_lines(path: Path, key: str, skip: int, records: bool) -> Documents:
    """The documents of JSON lines; empty lines are no documents."""
    empty = True
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            empty = False
            if skip:
                skip -= 1
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
                raise UserError(f"{where}: not a line of JSON ({error})") from error
            yield record_text(record, where) if records else _text_of(record, key, where, path)
    if empty:
        raise UserError(f"{path} is empty")
    return skip


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


def _read_parquet(path: Path, key: str, skip: int) -> Documents:
    """The documents of a Parquet file, ``ROWS`` rows of one column at a time."""
    import pyarrow
    from pyarrow import parquet

    row = 0  # rows before the next one
    try:
        with path.open("rb") as file:
            table = parquet.ParquetFile(cast(BinaryIO, file), buffer_size=BUFFER)
            _check_column(path, table.schema_arrow, key)
            if not table.metadata.num_rows:
                raise UserError(f"{path} is empty")
            for group in range(table.num_row_groups):
                size = table.metadata.row_group(group).num_rows
                if skip >= size:
                    skip, row = skip - size, row + size
                    continue
                for batch in table.iter_batches(ROWS, [group], [key], use_threads=False):
                    for text in batch.column(0).to_pylist():
                        row += 1
                        if skip:
                            skip -= 1
                            continue
                        if text is None:
                            raise UserError(f"{path}, row {row}: {key!r} is null, not text")
                        yield text
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    return skip


def _check_column(path: Path, schema: Any, key: str) -> None:
    """Raise UserError unless the schema of a Parquet file has one column of text called ``key``."""
    from pyarrow import types

    if key not in schema.names:
        names = ", ".join(map(repr, schema.names)) or "none"
        raise UserError(
            f"{path}: no column {key!r}, the columns are {names}; name the text's as {path}:KEY"
        )
    kind = schema.field(key).type
    text = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(text) or types.is_large_string(text) or types.is_string_view(text)):
        raise UserError(f"{path}: column {key!r} is {' '.join(str(kind).split())}, not text")
