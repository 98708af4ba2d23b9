"""Tokenised text on disk, and the rows of one length that are read from it.

A corpus is tokenised once: the file does not depend on the length of the rows nor on whether
documents are joined, since both only say where rows begin.
"""

import hashlib
import json
import mmap
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from sedd.data.base import Corpus, digest, exclusive, say
from sedd.data.tokenizers import Tokenizer
from sedd.errors import UserError

FORMAT = 1  # change it whenever what the files mean changes: older ones are then not found
CONTENT = ("tokens.bin", "ends.npy")
TASK_CHARACTERS = 1 << 18  # what a thread tokenises at a time

Progress = Callable[[int, int], None]  # documents and tokens so far


class TooShortError(UserError):
    """The joined documents have fewer tokens than one row."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """Rows of ``length`` tokens, read from a memory map.

    The counts are of the tokens that rows score: with joined documents, all but the remainder after
    the last row; otherwise, the documents without their ends. ``text_characters`` and
    ``text_bytes`` are the size of the text that those tokens spell, so that nats per token times
    ``num_tokens_total / text_characters`` are nats per character. Where a tokenizer does not say
    what its tokens spell, they are the whole text's, in proportion.
    """

    name: str  # the corpus and the split
    num_rows: int
    length: int
    num_tokens_total: int
    text_characters: int
    text_bytes: int
    counts: np.ndarray  # [N], of scored tokens
    pad_id: int
    tokens: np.ndarray  # every document followed by its end, where the tokenizer has one
    spans: tuple[np.ndarray, np.ndarray] | None  # first token and size of each row, if not equal
    num_dropped: int = 0  # tokens of the remainders that are in no row
    file: "MappedFile | None" = None  # that of ``tokens``; None where they are in memory
    around: tuple[int, int] | None = None  # what opens and closes every row, scored
    digest: str = ""  # hash of the tokens and the documents' ends; "" for tokens made in memory

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens ``x0_BL`` (int32), and ``scored_BL``: False on the padding after a document."""
        indices = np.asarray(indices)
        if indices.size and not (indices.min() >= 0 and indices.max() < self.num_rows):
            raise IndexError(
                f"rows are 0..{self.num_rows - 1}, got {indices.min()}..{indices.max()}"
            )
        if self.file is not None:
            self.file.check()
        if self.spans is None:
            tokens_SL = self.tokens[: self.num_rows * self.length].reshape(-1, self.length)
            x0_BL = tokens_SL[indices].astype(np.int32)
            return x0_BL, np.ones(x0_BL.shape, bool)
        first, size = self.spans
        first_B1, size_B1 = first[indices][:, None], size[indices][:, None]
        offsets_L = np.arange(self.length) - (self.around is not None)
        text_BL = (offsets_L >= 0) & (offsets_L < size_B1)
        x0_BL = self.tokens[np.where(text_BL, first_B1 + offsets_L, 0)].astype(np.int32)
        x0_BL = np.where(text_BL, x0_BL, np.int32(self.pad_id))
        if self.around is None:
            return x0_BL, text_BL
        x0_BL = np.where(offsets_L < 0, self.around[0], x0_BL)
        x0_BL = np.where(offsets_L == size_B1, self.around[1], x0_BL)
        return x0_BL.astype(np.int32), np.asarray(offsets_L <= size_B1)

    def unigram_entropy(self) -> float:
        """Entropy of the scored tokens' frequencies, in nats per token.

        It is what the best model that looks at no context attains on these rows.
        """
        return unigram_entropy(self.counts)


@dataclass(frozen=True, kw_only=True, eq=False)
class MappedFile:
    """A file in memory."""

    path: Path
    content: mmap.mmap

    @classmethod
    def of(cls, path: Path) -> "MappedFile":
        """All of a file that is not empty, to read."""
        with path.open("rb") as file:
            return cls(path=path, content=mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def check(self) -> None:
        """UserError where the file has shrunk: to read what is gone would kill the process.

        One that was deleted keeps its content until it is closed.
        """
        try:
            size = self.content.size()
        except OSError:  # of a network's file system, where it does not
            size = 0
        if size < len(self.content):
            raise UserError(
                f"the packed tokens {self.path} were cut or removed by another program: start "
                "again, and they are made anew"
            )


def unigram_entropy(counts: np.ndarray) -> float:
    """Of the frequencies behind these counts, in nats."""
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())


def pack(
    corpus: Corpus,
    tokenizer: Tokenizer,
    split: str,
    *,
    length: int,
    wrap: bool,
    cache_dir: Path,
    workers: int | None = None,
    progress: Progress | None = None,
    max_documents: int | None = None,
    drop_every: int | None = None,
    around: tuple[int, int] | None = None,
    truncate: bool = False,
    pad_last: bool = False,
) -> Packed:
    """Rows of ``length`` tokens of a split, tokenised in ``workers`` threads the first time.

    With ``wrap`` documents are joined, each followed by the end of a document where the tokenizer
    has one, and cut into rows; the remainder is dropped, once or after each ``drop_every``
    documents, or with ``pad_last`` it is a row filled up with unscored padding. Without, a document
    begins a row, fills as many as it needs (with ``truncate`` one, and the rest of it is dropped),
    and the last is filled up with ``tokenizer.pad_id``, unscored. ``around`` are ids that open and
    close every row, within ``length``; they are scored.

    The tokens are kept in ``cache_dir/packed``, under a hash of everything that they come from.
    They appear there whole or not at all; processes that need the same ones build them once.
    ``progress(documents, tokens)`` is called as they are made. ``UserError`` where there is no text
    or none long enough.

    Example:
        >>> from pathlib import Path
        >>> from sedd.data.corpora import open_corpus
        >>> from sedd.data.packing import pack
        >>> from sedd.data.tokenizers import build_tokenizer
        >>> cache = Path("cache")
        >>> corpus = open_corpus("my.txt", cache_dir=cache)
        >>> tokenizer = build_tokenizer("bytes", None, cache_dir=cache)
        >>> packed = pack(corpus, tokenizer, "all", length=16, wrap=True, cache_dir=cache)
        >>> x0_BL, scored_BL = packed.rows([0, 1])
        >>> x0_BL.shape, scored_BL.all()
        ((2, 16), np.True_)
    """
    if length < 1:
        raise UserError(f"length must be at least 1, got {length}")
    if max_documents is not None and max_documents < 1:
        raise UserError(f"max_documents must be at least 1, got {max_documents}")
    made_from = [FORMAT, corpus.fingerprint(), split, tokenizer.fingerprint(), max_documents]
    folder = cache_dir / "packed" / digest(made_from)
    meta = _read_meta(folder)
    if meta is None:
        try:
            with exclusive(folder) as alone:
                meta = _read_meta(folder)
                if meta is None:
                    if alone:
                        _remove_remains(folder)
                    if folder.exists():
                        say(f"the packed tokens of {corpus.name} ({split}) are damaged: made again")
                    documents = islice(corpus.documents(split), max_documents)
                    _build(folder, documents, tokenizer, workers or _cores(), progress)
                    meta = _read_meta(folder)
        except OSError as error:
            raise UserError(f"cannot write the packed tokens {folder}: {error.strerror}") from error
    if meta is None:
        raise UserError(f"{folder} cannot be read back; is the disk full?")
    name = f"{corpus.name} ({split})"
    return _open(
        folder, meta, name, tokenizer, length, wrap, drop_every, around, truncate, pad_last
    )


def validation_rows(packed: Packed, max_rows: int | None) -> np.ndarray:
    """At most ``max_rows`` row numbers, evenly spread, ascending, the same every time."""
    num = packed.num_rows if max_rows is None else min(max_rows, packed.num_rows)
    if num < 1:
        raise UserError(f"the number of rows to validate on must be at least 1, got {max_rows}")
    return np.arange(num) * packed.num_rows // num


def _open(
    folder: Path,
    meta: dict[str, Any],
    name: str,
    tokenizer: Tokenizer,
    length: int,
    wrap: bool,
    drop_every: int | None,
    around: tuple[int, int] | None,
    truncate: bool,
    pad_last: bool,
) -> Packed:
    total = meta["num_tokens"]
    ends = np.load(folder / "ends.npy", mmap_mode="r")
    if not total:
        raise UserError(f"{name} holds no text")
    file = MappedFile.of(folder / "tokens.bin")
    tokens = np.frombuffer(file.content, dtype=meta["dtype"])
    counts = np.array(meta["counts"], np.int64)
    inside = length - (0 if around is None else 2)
    if inside < 1:
        raise UserError(f"length {length} leaves no room between what opens and closes a row")
    if wrap:
        spans, dropped = _wrapped(ends, total, inside, drop_every, pad_last)
    else:
        eos = 0 if tokenizer.eos_id is None else 1
        spans, dropped = _spans(ends, inside, eos, truncate)
        if eos:
            counts[tokenizer.eos_id] -= len(ends)
    num_rows = len(spans[0])
    for begin, end in zip(*dropped, strict=True):
        counts -= np.bincount(np.asarray(tokens[begin:end], np.int64), minlength=len(counts))
    for special in around or ():
        counts[special] += num_rows
    if not num_rows and not wrap:
        raise UserError(f"{name} holds no text")
    if not num_rows:
        raise TooShortError(
            f"length {length} is longer than the data: {name} has {total:,} tokens, "
            f"{len(ends):,} ends of documents included"
            + (f", and no {drop_every:,} documents fill a row" if drop_every else "")
        )
    characters, size = _text_size(meta, counts, tokenizer)
    equal = wrap and drop_every is None and around is None and not pad_last
    return Packed(
        name=name,
        num_rows=num_rows,
        length=length,
        num_tokens_total=int(counts.sum()),
        num_dropped=int((dropped[1] - dropped[0]).sum()),
        text_characters=characters,
        text_bytes=size,
        counts=counts,
        pad_id=tokenizer.pad_id,
        tokens=tokens,
        spans=None if equal else spans,
        file=file,
        around=around,
        digest=meta.get("digest") or content_digest(folder),
    )


Ranges = tuple[np.ndarray, np.ndarray]


def _wrapped(
    ends: np.ndarray, total: int, length: int, drop_every: int | None, pad_last: bool
) -> tuple[Ranges, Ranges]:
    """First token and size of each row of joined documents; the ranges of tokens in no row.

    With ``pad_last`` the remainder is a row of fewer than ``length`` tokens, and nothing is
    dropped.
    """
    stops = (
        np.array([total])
        if drop_every is None
        else np.append(ends[drop_every - 1 :: drop_every], total)
    )
    begins = np.concatenate([[0], stops[:-1]])
    rows_of = -(-(stops - begins) // length) if pad_last else (stops - begins) // length
    rank = np.arange(rows_of.sum()) - np.repeat(np.cumsum(rows_of) - rows_of, rows_of)
    first = np.repeat(begins, rows_of) + rank * length
    size = np.minimum(np.repeat(stops, rows_of) - first, length)
    return (first, size.astype(np.int32)), (np.minimum(begins + rows_of * length, stops), stops)


def _spans(ends: np.ndarray, length: int, eos: int, truncate: bool) -> tuple[Ranges, Ranges]:
    """First token and size of each row where no row holds two documents, and what is dropped."""
    ends = np.asarray(ends)
    begins = np.concatenate([[0], ends[:-1]])
    sizes = ends - begins - eos
    long = sizes > length if truncate else np.zeros(len(sizes), bool)
    dropped = begins[long] + length, begins[long] + sizes[long]
    sizes = np.where(long, length, sizes)
    rows_of = -(-sizes // length)
    document = np.repeat(np.arange(len(ends)), rows_of)
    rank = np.arange(len(document)) - np.repeat(np.cumsum(rows_of) - rows_of, rows_of)
    done = rank * length
    size = np.minimum(sizes[document] - done, length)
    return (begins[document] + done, size.astype(np.int32)), dropped


def _text_size(meta: dict[str, Any], counts: np.ndarray, tokenizer: Tokenizer) -> tuple[int, int]:
    try:
        table = tokenizer.token_bytes()
    except UserError:  # a lossy tokenizer, whose tokens have no bytes
        text = sum(meta["counts"]) - (meta["num_documents"] if tokenizer.eos_id is not None else 0)
        scored = counts.sum() / max(text, 1)
        return round(meta["text_characters"] * scored), round(meta["text_bytes"] * scored)
    size = np.array([len(token or b"") for token in table], np.int64)
    # A character of UTF-8 has one byte that is not 0b10xxxxxx: counting those is additive.
    begun = np.array([sum(b & 0xC0 != 0x80 for b in token or b"") for token in table], np.int64)
    return int(counts @ begun), int(counts @ size)


def _read_meta(folder: Path) -> dict[str, Any] | None:
    """What is known of complete, undamaged tokens; None where there are none."""
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in meta["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return meta if sizes == meta["files"] else None


def content_digest(folder: Path) -> str:
    """Hash of the packed tokens and of where documents end, read from the files."""
    hashed = hashlib.blake2b(digest_size=16)
    for name in CONTENT:
        with (folder / name).open("rb") as file:
            while block := file.read(1 << 22):
                hashed.update(block)
    return hashed.hexdigest()


def _remove_remains(folder: Path) -> None:
    """Removes what builds that were killed left beside ``folder``."""
    for remains in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(remains, ignore_errors=True)


def _build(
    folder: Path,
    documents: Iterator[str],
    tokenizer: Tokenizer,
    workers: int,
    progress: Progress | None,
) -> None:
    """Writes the files beside their place and moves them there when they are complete."""
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        dtype = np.dtype(np.uint16 if tokenizer.num_tokens <= 1 << 16 else np.uint32)
        with (partial / "tokens.bin").open("wb") as file:
            meta, ends = _write_tokens(file, documents, tokenizer, workers, dtype, progress)
        np.save(partial / "ends.npy", ends)
        meta["files"] = {name: (partial / name).stat().st_size for name in CONTENT}
        meta["digest"] = content_digest(partial)
        (partial / "meta.json").write_text(json.dumps(meta), "utf-8")
        _move(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _move(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:  # there is one already: another process's, or a damaged one
        if _read_meta(folder) is None:
            damaged = folder.with_name(f".{folder.name}.damaged-{time.time_ns()}")
            folder.rename(damaged)
            partial.rename(folder)
            shutil.rmtree(damaged, ignore_errors=True)


def _write_tokens(
    file: IO[bytes],
    documents: Iterator[str],
    tokenizer: Tokenizer,
    workers: int,
    dtype: np.dtype,
    progress: Progress | None,
) -> tuple[dict[str, Any], np.ndarray]:
    counts = np.zeros(tokenizer.num_tokens, np.int64)
    ends: list[int] = []
    total = characters = size = 0
    end = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], dtype)
    for parts, ids in _tokenised(documents, tokenizer, workers):
        for (text, last), part in zip(parts, ids, strict=True):
            characters += len(text)
            size += len(text) if text.isascii() else len(text.encode())
            whole = np.concatenate([part.astype(dtype), end]) if last else part.astype(dtype)
            file.write(whole.tobytes())
            counts += np.bincount(whole, minlength=len(counts))
            total += len(whole)
            if last:
                ends.append(total)
        if progress is not None:
            progress(len(ends), total)
    meta = {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint(),
        "dtype": dtype.name,
        "num_tokens": total,
        "num_documents": len(ends),
        "text_characters": characters,
        "text_bytes": size,
        "counts": counts.tolist(),
    }
    return meta, np.array(ends, np.int64)


Part = tuple[str, bool]  # text, and whether a document ends with it


def _tokenised(
    documents: Iterator[str], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[list[Part], list[np.ndarray]]]:
    """Parts of documents with their ids, in order.

    In threads: every tokenizer here leaves Python's lock while it works. A few tasks are in flight
    for each thread, so that a corpus larger than memory passes through.
    """
    waiting: deque[tuple[list[Part], Future[list[np.ndarray]]]] = deque()
    with ThreadPoolExecutor(workers, "tokenise") as pool:
        try:
            for parts in _tasks(documents, tokenizer):
                texts = [text for text, _ in parts]
                waiting.append((parts, pool.submit(tokenizer.encode_batch, texts)))
                if len(waiting) > 2 * workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _tasks(documents: Iterator[str], tokenizer: Tokenizer) -> Iterator[list[Part]]:
    task: list[Part] = []
    held = 0
    for text in documents:
        parts = tokenizer.split(text, TASK_CHARACTERS) or [""]
        for number, part in enumerate(parts, start=1):
            task.append((part, number == len(parts)))
            held += len(part) + 16  # many short documents are a task too
            if held >= TASK_CHARACTERS:
                yield task
                task, held = [], 0
    if task:
        yield task


def _cores() -> int:
    return min(os.cpu_count() or 1, 16)
