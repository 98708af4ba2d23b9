"""The files of tokenised text: built once in the cache, complete or absent.

Layout of ``cache_dir/packed/HASH``, where HASH is a digest of everything that determines the ids:

- ``tokens.bin``: the ids of all documents one after the other, uint16 or uint32, each document
  followed by the end of a document where the tokenizer has one;
- ``ends.npy``: the position in ``tokens.bin`` after each document;
- ``meta.json``: counts, sizes and a digest. It is written last.

A build writes these into a hidden directory beside the final one and renames that directory when
all files are complete, so that a reader never sees a partial build, even if a build is killed. A
lock file lets one process build at a time; the others wait and then read the result.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from sedd.data.base import Corpus, digest, exclusive, say
from sedd.data.tokenizers import Tokenizer
from sedd.errors import UserError

FORMAT = 1  # part of HASH: raise it when the meaning of the files changes
CONTENT = ("tokens.bin", "ends.npy")
TASK_CHARACTERS = 1 << 18  # text that one thread tokenises at a time

Progress = Callable[[int, int], None]  # called with the documents and the tokens written so far


def token_files(
    corpus: Corpus,
    tokenizer: Tokenizer,
    split: str,
    cache_dir: Path,
    workers: int | None,
    progress: Progress | None,
    max_documents: int | None,
) -> tuple[Path, dict[str, Any]]:
    """Find or build the token files of a split.

    Args:
        corpus: source of the documents.
        tokenizer: encodes the documents.
        split: a split of ``corpus``.
        cache_dir: parent directory of ``packed``.
        workers: threads that tokenise; None for one per core, at most 16.
        progress: called as ``progress(documents, tokens)`` during a build.
        max_documents: how many documents to read, from the first; None reads all.

    Returns:
        The directory of the files, and the content of their ``meta.json``.

    Raises:
        UserError: if the files cannot be written or read back.
    """
    made_from = [FORMAT, corpus.fingerprint(), split, tokenizer.fingerprint(), max_documents]
    folder = cache_dir / "packed" / digest(made_from)
    meta = _read_meta(folder)
    if meta is None:
        try:
            with exclusive(folder) as alone:
                meta = _read_meta(folder)  # another process may have built it meanwhile
                if meta is None:
                    if alone:
                        _remove_remains(folder)
                    if folder.exists():
                        say(f"the packed tokens of {corpus.name} ({split}) are damaged: made again")
                    documents = islice(corpus.documents(split), max_documents)
                    _build(folder, documents, tokenizer, workers or _threads(), progress)
                    meta = _read_meta(folder)
        except OSError as error:
            raise UserError(f"cannot write the packed tokens {folder}: {error.strerror}") from error
    if meta is None:
        raise UserError(f"{folder} cannot be read back; is the disk full?")
    return folder, meta


def _read_meta(folder: Path) -> dict[str, Any] | None:
    """The content of ``meta.json``; None unless all files are there in the sizes it states."""
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in meta["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return meta if sizes == meta["files"] else None


def content_digest(folder: Path) -> str:
    """Hash ``tokens.bin`` and ``ends.npy``, so that corpora of equal size can be told apart."""
    hashed = hashlib.blake2b(digest_size=16)
    for name in CONTENT:
        with (folder / name).open("rb") as file:
            while block := file.read(1 << 22):
                hashed.update(block)
    return hashed.hexdigest()


def _remove_remains(folder: Path) -> None:
    """Remove the hidden directories of killed builds; call it under the lock."""
    for remains in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(remains, ignore_errors=True)


def _build(
    folder: Path,
    documents: Iterator[str],
    tokenizer: Tokenizer,
    workers: int,
    progress: Progress | None,
) -> None:
    """Build the files in a hidden directory, then rename that directory to ``folder``."""
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
    """Rename ``partial`` to ``folder``, in place of a damaged ``folder`` if there is one.

    A directory that is not empty cannot be renamed over: a damaged one is renamed away first. A
    complete ``folder`` comes from a process that built the same files where locks do not work, and
    is left as it is.
    """
    try:
        partial.rename(folder)
    except OSError:
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
    """Write ``tokens.bin``; return the content of ``meta.json`` and the ends of the documents."""
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


Part = tuple[str, bool]  # a part of a document, and whether it is the last part


def _tokenised(
    documents: Iterator[str], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[list[Part], list[np.ndarray]]]:
    """Tasks (lists of parts) with the ids of each part, in the order of the documents.

    Threads run in parallel because the tokenizers release Python's global lock while they encode.
    The queue ``waiting`` holds the tasks in order, at most two for each thread: results come out in
    order, and memory does not grow with the corpus.
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
    """Cut or join documents into tasks of about ``TASK_CHARACTERS`` characters.

    The tokenizer chooses where a document is cut, so that the ids do not depend on the cuts.
    """
    task: list[Part] = []
    held = 0
    for text in documents:
        parts = tokenizer.split(text, TASK_CHARACTERS) or [""]
        for number, part in enumerate(parts, start=1):
            task.append((part, number == len(parts)))
            held += len(part) + 16  # the overhead of a part: empty documents fill a task too
            if held >= TASK_CHARACTERS:
                yield task
                task, held = [], 0
    if task:
        yield task


def _threads() -> int:
    """The number of cores, at most 16."""
    return min(os.cpu_count() or 1, 16)
