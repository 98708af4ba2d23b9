"""Tokenising in parallel: in threads, and for long text in processes.

Processes are started as new interpreters that import the tokenizers only. They do not import the
script of the user or JAX, and they end when their standard input does, so that none outlives a
process that was killed. Task and answer travel through their standard streams, pickled.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sedd.data.records import Answers, document_of
from sedd.data.tokenizers import BytePairs, Pretrained, Tokenizer, tokenizer_from_json
from sedd.errors import UserError

# Text that threads tokenise before processes are started, which takes about a second.
THREADS_CHARACTERS = 1 << 23
# Tokenizers that processes can build and that take longer than the way to a process and back.
IN_PROCESSES = (BytePairs, Pretrained)
MAIN = "from sedd.data.token_workers import main; main()"
# A process has one thread: the processes are as many as the cores.
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1"}


class Task(NamedTuple):
    """Parts of documents that are tokenised together."""

    texts: list[str]
    last: list[bool]  # whether a part is the last one of its document
    offset: int  # characters of the last document up to here if its end is in a later task, else 0
    answers: Answers | None = None  # for records: the answers that are not given


class Encoded(NamedTuple):
    """The tokens of a task."""

    ids: np.ndarray  # uint16 or uint32, with the ends of documents
    ends: np.ndarray  # int64, position in ``ids`` after each document that ends here
    offset: int  # as in ``Task``
    characters: int  # of the texts
    size: int  # bytes of the texts in UTF-8


def token_dtype(tokenizer: Tokenizer, *, records: bool = False) -> np.dtype:
    """The type in which token ids are stored. Of records the highest bit marks given tokens."""
    return np.dtype(
        np.uint16 if tokenizer.num_tokens <= 1 << (15 if records else 16) else np.uint32
    )


def encode(tokenizer: Tokenizer, task: Task) -> Encoded:
    """Tokenise a task; the end of a document follows it if the tokenizer has one."""
    if task.answers is not None:
        return _encode_records(tokenizer, task, task.answers)
    dtype = token_dtype(tokenizer)
    end = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], dtype)
    pieces = []
    for ids, last in zip(tokenizer.encode_batch(task.texts), task.last, strict=True):
        pieces.append(np.concatenate([ids.astype(dtype), end]) if last else ids.astype(dtype))
    stops = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    return Encoded(
        ids=np.concatenate(pieces),
        ends=stops[np.array(task.last, bool)],
        offset=task.offset,
        characters=sum(map(len, task.texts)),
        size=sum(len(t) if t.isascii() else len(t.encode()) for t in task.texts),
    )


def _encode_records(tokenizer: Tokenizer, task: Task, answers: Answers) -> Encoded:
    """Tokenise records; an end of a document follows each that does not end with one."""
    dtype = token_dtype(tokenizer, records=True)
    mark = given_mark(dtype)
    pieces, characters, size = [], 0, 0
    for text in task.texts:
        document = document_of(tokenizer, text, answers)
        ids, given_L = tokenizer.encode_spans(*document)
        if tokenizer.eos_id is not None and ids[-1:].tolist() != [tokenizer.eos_id]:
            ids, given_L = np.append(ids, tokenizer.eos_id), np.append(given_L, False)
        pieces.append(ids.astype(dtype) | np.where(given_L, mark, 0).astype(dtype))
        characters, size = characters + len(document.text), size + len(document.text.encode())
    return Encoded(
        ids=np.concatenate(pieces),
        ends=np.cumsum([len(piece) for piece in pieces], dtype=np.int64),
        offset=task.offset,
        characters=characters,
        size=size,
    )


def given_mark(dtype: np.dtype) -> int:
    """The bit that marks given tokens of records: the highest one of the type."""
    return 1 << (8 * dtype.itemsize - 1)


def encode_in_order(tasks: Iterable[Task], tokenizer: Tokenizer, workers: int) -> Iterator[Encoded]:
    """Tokenise tasks in parallel; the results come in the order of the tasks.

    Threads tokenise the first ``THREADS_CHARACTERS`` characters, so that short text needs no other
    process. Then each thread passes its tasks to a process of its own, unless there is one worker
    or the tokenizer is not of a class in ``IN_PROCESSES``.

    At most two tasks for each worker and one more are in memory, however long the text is.

    Args:
        tasks: an iterator that is read as far as is needed.
        tokenizer: encodes the tasks.
        workers: threads, and later processes.

    Raises:
        UserError: if a text cannot be encoded, or a process cannot be started or is killed.
    """
    waiting: deque[Future[Encoded]] = deque()
    own = threading.local()
    processes: list[Process] = []

    def encode_in_process(task: Task) -> Encoded:
        if not hasattr(own, "process"):
            own.process = Process(tokenizer)
            processes.append(own.process)
        return own.process.encode(task)

    left = THREADS_CHARACTERS
    encode_in_thread = partial(encode, tokenizer)
    may_leave = workers > 1 and type(tokenizer) in IN_PROCESSES
    pool = ThreadPoolExecutor(workers, "tokenise")
    try:
        for task in tasks:
            leaves = may_leave and left <= 0
            waiting.append(pool.submit(encode_in_process if leaves else encode_in_thread, task))
            left -= sum(map(len, task.texts))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        for process in processes:
            process.close()


class Process:
    """A process that tokenises one task at a time.

    Args:
        tokenizer: of a class in ``IN_PROCESSES``.

    Raises:
        UserError: if the process cannot be started.
    """

    def __init__(self, tokenizer: Tokenizer):
        places = [str(Path(place).absolute()) for place in sys.path]
        environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(places)}
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-P", "-c", MAIN],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
        except OSError as error:
            raise UserError(
                f"cannot start a process that tokenises: {error.strerror}; a single worker "
                "needs none (--data.workers 1)"
            ) from error
        self._first = [tokenizer.to_json()]  # sent before the first task

    def encode(self, task: Task) -> Encoded:
        """Tokenise a task in the process; errors are those of ``encode_in_order``."""
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        try:
            while self._first:
                pickle.dump(self._first.pop(), self._popen.stdin)
            pickle.dump(task, self._popen.stdin)
            self._popen.stdin.flush()
            answer = pickle.load(self._popen.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            code = self._popen.wait()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            raise UserError(
                f"a process that tokenises {how}; if memory ran out, use fewer (--data.workers)"
            ) from error
        if isinstance(answer, str):
            raise UserError(answer)
        return answer

    def close(self) -> None:
        """End the process."""
        self._popen.kill()
        with contextlib.suppress(OSError), self._popen:  # what was not sent is lost
            pass


def main() -> None:
    """Answer the tasks from standard input on standard output until the former ends.

    The first object read is a tokenizer's description. The answer is an ``Encoded``, or the message
    of a UserError. An interrupt from the keyboard is for the process that started this one.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source = sys.stdin.buffer
    # The other process may be killed while it writes a task or before it reads an answer.
    gone = (EOFError, pickle.UnpicklingError, BrokenPipeError)
    with contextlib.suppress(*gone), open(os.dup(1), "wb") as sink:
        os.dup2(2, 1)  # what a library prints must not be taken for an answer
        tokenizer = tokenizer_from_json(pickle.load(source))
        while True:
            task = pickle.load(source)
            try:
                answer: Encoded | str = encode(tokenizer, task)
            except UserError as error:
                answer = str(error)
            pickle.dump(answer, sink)
            sink.flush()
