"""The files of tokenised text: built once in the cache, complete or absent.

Layout of ``cache_dir/packed/HASH``, where HASH is a digest of everything that determines the ids:

- ``tokens.bin``: the ids of all documents one after the other, uint16 or uint32, each document
  followed by the end of a document where the tokenizer has one; of records, the highest bit is set
  at given tokens;
- ``ends.npy``: the position in ``tokens.bin`` after each document;
- ``meta.json``: counts, sizes and a digest. It is written last.

A build writes these into a hidden directory beside the final one and renames that directory when
all files are complete, so that a reader never sees a partial build, even if a build is killed. The
next build continues in the hidden directory, where a journal says what is done
(``sedd.data.token_log``). A lock file lets one process build at a time; the others wait and then
read the result. On a file system without locks a killed build begins again.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from sedd.data.base import Corpus, digest, exclusive, say
from sedd.data.records import Answers
from sedd.data.token_log import ENDS, ENTRY, JOURNAL, TOKENS, Position, TokenLog
from sedd.data.token_workers import Task, encode_in_order, given_mark, token_dtype
from sedd.data.tokenizers import Tokenizer
from sedd.errors import UserError

FORMAT = 1  # part of HASH: raise it when the meaning of the files changes
RECORDS_FORMAT = 1  # part of HASH for records, likewise
CONTENT = (TOKENS, "ends.npy")
TASK_CHARACTERS = 1 << 18  # text that one worker tokenises at a time
BLOCK = 1 << 22  # bytes of a file that are read at a time

Progress = Callable[[int, int], None]  # called with the documents and the tokens written so far


def token_files(
    corpus: Corpus,
    tokenizer: Tokenizer,
    split: str,
    cache_dir: Path,
    workers: int | None,
    progress: Progress | None,
    max_documents: int | None,
    answers: Answers = "all",
) -> tuple[Path, dict[str, Any]]:
    """Find or build the token files of a split.

    Args:
        corpus: source of the documents.
        tokenizer: encodes the documents.
        split: a split of ``corpus``.
        cache_dir: parent directory of ``packed``.
        workers: how many tokenise at once; None for one per core, at most 16. The files do not
            depend on it.
        progress: called as ``progress(documents, tokens)`` during a build.
        max_documents: how many documents to read, from the first; None reads all.
        answers: for a corpus of records: the answers that are not given.

    Returns:
        The directory of the files, and the content of their ``meta.json``.

    Raises:
        UserError: if the files cannot be written or read back.
    """
    made_from = [FORMAT, corpus.fingerprint(), split, tokenizer.fingerprint(), max_documents]
    made_from += [RECORDS_FORMAT, answers] if corpus.records else []
    marked = answers if corpus.records else None
    folder = cache_dir / "packed" / digest(made_from)

    def read(start: int) -> Iterator[str]:
        most = None if max_documents is None else max_documents - start
        return islice(corpus.documents(split, start), most)

    meta = _read_meta(folder)
    if meta is None:
        try:
            with exclusive(folder) as alone:
                meta = _read_meta(folder)  # another process may have built it meanwhile
                if meta is None:
                    if folder.exists():
                        say(f"the packed tokens of {corpus.name} ({split}) are damaged: made again")
                    partial = _make_partial(folder, alone)
                    workers = workers or _cores()
                    _build(folder, partial, read, tokenizer, workers, progress, marked)
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
            while block := file.read(BLOCK):
                hashed.update(block)
    return hashed.hexdigest()


def _make_partial(folder: Path, alone: bool) -> Path:
    """The directory in which ``folder`` is built: under the lock, the one of a killed build.

    Under the lock (``alone``) other remains of killed builds are removed.
    """
    if not alone:
        return Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    partial = _resumable(folder)
    for remains in folder.parent.glob(f".{folder.name}.*"):
        if remains != partial:
            shutil.rmtree(remains, ignore_errors=True)
    partial.mkdir(exist_ok=True)
    return partial


def _resumable(folder: Path) -> Path:
    """The hidden directory in which a build under the lock works, and the next one continues."""
    return folder.with_name(f".{folder.name}.partial")


def _build(
    folder: Path,
    partial: Path,
    read: Callable[[int], Iterator[str]],
    tokenizer: Tokenizer,
    workers: int,
    progress: Progress | None,
    answers: Answers | None,
) -> None:
    """Build the files in the directory ``partial``, then rename that directory to ``folder``.

    After an error or an interruption ``partial`` stays if a build can continue there, and if it
    holds more than one task.

    Args:
        folder: the final directory.
        partial: an existing directory beside it, empty or of an interrupted build.
        read: returns the documents that follow a number of them.
        tokenizer: encodes the documents.
        workers: how many tokenise at once.
        progress: as in ``token_files``.
        answers: as in ``token_files``; None for text.
    """
    dtype = token_dtype(tokenizer, records=answers is not None)
    try:
        if _read_meta(partial) is None:
            with TokenLog(partial, dtype) as log:
                if log.position.tokens:
                    done = log.position.tokens
                    say(f"{done:,} tokens are there from an interrupted run, now the rest")
                for _ in _tokenise(log, read, tokenizer, workers, answers):
                    if progress is not None:
                        progress(log.position.documents, log.position.tokens)
            _complete(partial, log.position, tokenizer, dtype, answers is not None)
        for name in (ENDS, JOURNAL):
            (partial / name).unlink(missing_ok=True)
        _move(partial, folder)
    except BaseException:
        journal = partial / JOURNAL
        short = journal.exists() and journal.stat().st_size <= ENTRY
        if short or partial != _resumable(folder):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(partial, ignore_errors=True)  # another process may have built ``folder``


def _tokenise(
    log: TokenLog,
    read: Callable[[int], Iterator[str]],
    tokenizer: Tokenizer,
    workers: int,
    answers: Answers | None,
) -> Iterator[None]:
    """Append the tokens of all documents that the log lacks, one task an iteration."""
    documents = read(log.position.documents)
    if log.position.offset:  # the log ends inside a document
        documents = chain([next(documents)[log.position.offset :]], documents)
    tasks = _tasks(documents, tokenizer, log.position.offset, answers)
    for encoded in encode_in_order(tasks, tokenizer, workers):
        log.append(encoded)
        yield


def _complete(
    partial: Path, position: Position, tokenizer: Tokenizer, dtype: np.dtype, records: bool
) -> None:
    """Write ``ends.npy`` and ``meta.json``, which make the files of a log complete.

    Files are read in pieces or mapped into memory, because they may be larger than it.
    """
    counts = np.zeros(tokenizer.num_tokens, np.int64)
    given_counts = np.zeros_like(counts)
    mark = given_mark(dtype) if records else 0
    with (partial / TOKENS).open("rb") as file:
        while block := file.read(BLOCK):
            marked = np.frombuffer(block, dtype)
            ids = marked & ~dtype.type(mark)
            counts += np.bincount(ids, minlength=len(counts))
            given_counts += np.bincount(ids[(marked & mark) > 0], minlength=len(counts))
    empty = not position.documents  # an empty file cannot be mapped
    ends = np.empty(0, np.int64) if empty else np.memmap(partial / ENDS, np.int64, "r")
    np.save(partial / "ends.npy", ends)
    meta = {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint(),
        "dtype": dtype.name,
        "num_tokens": position.tokens,
        "num_documents": position.documents,
        "text_characters": position.characters,
        "text_bytes": position.size,
        "counts": counts.tolist(),
        **({"given_counts": given_counts.tolist()} if records else {}),
        "files": {name: (partial / name).stat().st_size for name in CONTENT},
        "digest": content_digest(partial),
    }
    (partial / "meta.json").write_text(json.dumps(meta), "utf-8")


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


def _tasks(
    documents: Iterator[str], tokenizer: Tokenizer, offset: int, answers: Answers | None = None
) -> Iterator[Task]:
    """Cut or join documents into tasks of about ``TASK_CHARACTERS`` characters.

    The tokenizer chooses where a document is cut, so that the ids do not depend on the cuts.

    Args:
        documents: the texts.
        tokenizer: knows where a text may be cut.
        offset: characters of the first document that came before its text.
        answers: of each task; not None for records, which are never cut.
    """
    texts: list[str] = []
    last: list[bool] = []
    held = 0
    for text in documents:
        parts = [text] if answers else tokenizer.split(text, TASK_CHARACTERS) or [""]
        for number, part in enumerate(parts, start=1):
            texts.append(part)
            last.append(number == len(parts))
            offset = 0 if last[-1] else offset + len(part)
            held += len(part) + 16  # the overhead of a part: empty documents fill a task too
            if held >= TASK_CHARACTERS:
                yield Task(texts, last, offset, answers)
                texts, last, held = [], [], 0
    if texts:
        yield Task(texts, last, offset, answers)


def _cores() -> int:
    """The number of cores that this process may use, at most 16."""
    return min(os.cpu_count() or 1, 16)
