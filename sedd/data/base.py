"""The interface of a corpus, corpora made of other corpora, and helpers that sources share.

A corpus is an iterator over the documents of each of its splits, and a fingerprint. Everything that
is derived from a corpus (trained tokenizers, token files) is stored under a name that contains the
fingerprint, and is made again when the fingerprint changes.
"""

import contextlib
import fcntl
import hashlib
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from sedd.errors import UserError, printable

HELD_OUT_EVERY = 20  # the validation split of data without splits is one twentieth of it


@dataclass(frozen=True, kw_only=True)
class Corpus(ABC):
    """Named text, divided into splits. ``documents`` reads the text of a split.

    A subclass sets ``splits`` and defines ``_documents`` and ``fingerprint``. It may override
    ``_documents_from``, if it can skip documents faster than it reads them.
    """

    name: str  # as the user wrote it
    splits: tuple[str, ...]  # such as ("train", "validation")

    def documents(self, split: str, start: int = 0) -> Iterator[str]:
        """Iterate over the texts of a split, always in the same order.

        Args:
            split: one of ``splits``.
            start: how many texts to leave out at the beginning.

        Raises:
            UserError: if the corpus has no such split, or the text cannot be read.
        """
        if split not in self.splits:
            raise UserError(
                f"corpus {self.name!r} has no split {split!r}: it has {', '.join(self.splits)}"
            )
        return self._documents_from(split, start) if start else self._documents(split)

    @property
    def records(self) -> bool:
        """Whether a document is no text but a record of ``sedd.data.records``."""
        return False

    @property
    def evaluation_split(self) -> str:
        """The split that is evaluated by default: all, validation, test, or else the last."""
        for split in ("all", "validation", "test"):
            if split in self.splits:
                return split
        return self.splits[-1]

    @abstractmethod
    def _documents(self, split: str) -> Iterator[str]:
        """The documents of a split that has been checked."""

    def _documents_from(self, split: str, start: int) -> Iterator[str]:
        """The documents of a split after the first ``start``."""
        return islice(self._documents(split), start, None)

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes when the documents may have changed; cheap to compute."""


@dataclass(frozen=True, kw_only=True)
class Mixture(Corpus):
    """Several corpora one after the other, in the splits that all of them have.

    It serves to train one tokenizer on all parts. The weights of a mixture belong to the loader.
    """

    parts: tuple[Corpus, ...]

    @classmethod
    def of(cls, parts: Iterable[Corpus]) -> "Mixture":
        """Join at least one corpus; the name joins the names of the parts with ``+``."""
        parts = tuple(parts)
        if not parts:
            raise ValueError("a mixture needs at least one corpus")
        shared = tuple(s for s in parts[0].splits if all(s in part.splits for part in parts))
        return cls(name="+".join(part.name for part in parts), splits=shared, parts=parts)

    @property
    def records(self) -> bool:
        return any(part.records for part in self.parts)

    def _documents(self, split: str) -> Iterator[str]:
        return chain.from_iterable(part.documents(split) for part in self.parts)

    def fingerprint(self) -> str:
        """A hash of the fingerprints of all parts."""
        return digest(["mixture", *(part.fingerprint() for part in self.parts)])


@dataclass(frozen=True, kw_only=True)
class MappedCorpus(Corpus):
    """A corpus with a function applied to each document, such as a detokenizer."""

    source: Corpus
    function: Callable[[str], str]
    label: str  # stands for the function in the fingerprint: change it with the function

    def _documents(self, split: str) -> Iterator[str]:
        return self._documents_from(split, 0)

    def _documents_from(self, split: str, start: int) -> Iterator[str]:
        return map(self.function, self.source.documents(split, start))

    def fingerprint(self) -> str:
        """A hash of ``label`` and the fingerprint of the source."""
        return digest(["mapped", self.label, self.source.fingerprint()])


@dataclass(frozen=True, kw_only=True)
class WithHeldOut(Corpus):
    """A corpus with a validation split that is held out of its training split; see ``hold_out``."""

    source: Corpus

    @classmethod
    def of(cls, corpus: Corpus) -> Corpus:
        """Add a validation split; a corpus that has one, or no training split, is unchanged."""
        if "validation" in corpus.splits or "train" not in corpus.splits:
            return corpus
        return cls(name=corpus.name, splits=(*corpus.splits, "validation"), source=corpus)

    @property
    def records(self) -> bool:
        return self.source.records

    @property
    def evaluation_split(self) -> str:
        """The evaluation split of the source; "validation" if that is "train"."""
        declared = self.source.evaluation_split
        return "validation" if declared == "train" else declared

    def _documents(self, split: str) -> Iterator[str]:
        return self._documents_from(split, 0)

    def _documents_from(self, split: str, start: int) -> Iterator[str]:
        if split in ("train", "validation"):
            return hold_out_from(partial(self.source.documents, "train"), split, start)
        return self.source.documents(split, start)

    def fingerprint(self) -> str:
        """A hash of the rule that holds documents out and the fingerprint of the source."""
        return digest(["held out", HELD_OUT_EVERY, self.source.fingerprint()])


def hold_out(documents: Iterator[str], split: str, *, whole: bool = False) -> Iterator[str]:
    """Yield the documents of one split of a corpus that has no validation split of its own.

    Of 20 documents or more, every 20th is validation. Of fewer, the last twentieth of each document
    is validation, cut after a line or a word if possible. All other text is training.

    Args:
        documents: all documents that are to be divided.
        split: "train", "validation", or "all" for the documents as they are.
        whole: whether documents are never cut. Of fewer than 20, the last one is validation then; a
            single one is in both splits.
    """
    if split == "all":
        yield from documents
        return
    validation = split == "validation"
    first = list(islice(documents, HELD_OUT_EVERY))
    if len(first) < HELD_OUT_EVERY and whole:
        yield from first[-1:] if validation else first[:-1] or first
        return
    if len(first) < HELD_OUT_EVERY:
        for text in first:
            cut = _cut(text)
            if part := text[cut:] if validation else text[:cut]:
                yield part
        return
    for number, text in enumerate(chain(first, documents), start=1):
        if (number % HELD_OUT_EVERY == 0) == validation:
            yield text


def hold_out_from(
    read: Callable[[int], Iterator[str]], split: str, start: int, *, whole: bool = False
) -> Iterator[str]:
    """The documents of ``hold_out`` after the first ``start``, of which most are not read.

    Args:
        read: returns all documents that are to be divided, after the number that it is given.
        split: "train", "validation" or "all".
        start: documents of the split to leave out.
        whole: as for ``hold_out``.
    """
    if split == "all":
        return read(start)
    if start < HELD_OUT_EVERY:  # documents may be divided, which only the first of them tell
        return islice(hold_out(read(0), split, whole=whole), start, None)
    validation = split == "validation"
    # In each run of 20 documents 19 are training, and the last is validation.
    first = (
        (start + 1) * HELD_OUT_EVERY - 1 if validation else start + start // (HELD_OUT_EVERY - 1)
    )
    numbered = enumerate(read(first), start=first + 1)
    return (text for number, text in numbered if (number % HELD_OUT_EVERY == 0) == validation)


def _cut(text: str) -> int:
    """Where the last twentieth begins: after the last newline or else space before that place."""
    last = len(text) - len(text) // HELD_OUT_EVERY
    for mark in ("\n", " "):
        at = text.rfind(mark, last // 2, last)
        if at >= 0:
            return at + 1
    return last


def digest(value: Any) -> str:
    """A hash of a JSON value, 32 hexadecimal digits; equal values have equal hashes."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@contextlib.contextmanager
def exclusive(name: Path) -> Iterator[bool]:
    """Hold the lock file ``name.lock`` in a block that builds ``name``.

    One process at a time is in the block; others wait. The kernel releases the lock of a process
    that is killed.

    Yields:
        True if the lock is held. False on a file system without locks, where several processes may
        be in the block at once.
    """
    name.parent.mkdir(parents=True, exist_ok=True)
    with (name.parent / f"{name.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False
        yield locked


def say(message: str) -> None:
    """Print a note on standard error, for example that files were skipped."""
    print(printable(f"note: {message}"), file=sys.stderr, flush=True)
