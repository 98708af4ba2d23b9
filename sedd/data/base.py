"""The interface of a corpus, corpora made of other corpora, and helpers that sources share."""

import contextlib
import fcntl
import hashlib
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from sedd.errors import UserError

HELD_OUT_EVERY = 20  # one document in 20, or the last 20th of each, validates data without splits


@dataclass(frozen=True, kw_only=True)
class Corpus(ABC):
    """Named text in declared splits. Nothing is read or downloaded before ``documents``."""

    name: str  # as the user wrote it
    splits: tuple[str, ...]

    def documents(self, split: str) -> Iterator[str]:
        """The texts of a split, always in the same order; ``UserError`` for an undeclared split."""
        if split not in self.splits:
            raise UserError(
                f"corpus {self.name!r} has no split {split!r}: it has {', '.join(self.splits)}"
            )
        return self._documents(split)

    @property
    def evaluation_split(self) -> str:
        """The default split of an evaluation: all, else validation, else test, else the last."""
        for split in ("all", "validation", "test"):
            if split in self.splits:
                return split
        return self.splits[-1]

    @abstractmethod
    def _documents(self, split: str) -> Iterator[str]: ...

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes when the documents may have changed."""


@dataclass(frozen=True, kw_only=True)
class Mixture(Corpus):
    """Several corpora one after the other, in the splits that all of them have.

    A tokenizer that the parts share is trained on it. The loader, not the mixture, has weights.
    """

    parts: tuple[Corpus, ...]

    @classmethod
    def of(cls, parts: Iterable[Corpus]) -> "Mixture":
        """The mixture of ``parts``, at least one; the name joins theirs with ``+``."""
        parts = tuple(parts)
        if not parts:
            raise ValueError("a mixture needs at least one corpus")
        shared = tuple(s for s in parts[0].splits if all(s in part.splits for part in parts))
        return cls(name="+".join(part.name for part in parts), splits=shared, parts=parts)

    def _documents(self, split: str) -> Iterator[str]:
        return chain.from_iterable(part.documents(split) for part in self.parts)

    def fingerprint(self) -> str:
        return digest(["mixture", *(part.fingerprint() for part in self.parts)])


@dataclass(frozen=True, kw_only=True)
class MappedCorpus(Corpus):
    """A corpus with a function applied to each document, such as a detokenizer.

    ``label`` names the function in the fingerprint: change it whenever the function changes.
    """

    source: Corpus
    function: Callable[[str], str]
    label: str

    def _documents(self, split: str) -> Iterator[str]:
        return map(self.function, self.source.documents(split))

    def fingerprint(self) -> str:
        return digest(["mapped", self.label, self.source.fingerprint()])


@dataclass(frozen=True, kw_only=True)
class WithHeldOut(Corpus):
    """A corpus that declares no validation split, with one held out of its training split."""

    source: Corpus

    @classmethod
    def of(cls, corpus: Corpus) -> Corpus:
        """``corpus`` itself where it has a validation split, or nothing to hold out of."""
        if "validation" in corpus.splits or "train" not in corpus.splits:
            return corpus
        return cls(name=corpus.name, splits=(*corpus.splits, "validation"), source=corpus)

    @property
    def evaluation_split(self) -> str:
        """The source's, unless that is what it trains on."""
        declared = self.source.evaluation_split
        return "validation" if declared == "train" else declared

    def _documents(self, split: str) -> Iterator[str]:
        if split in ("train", "validation"):
            return hold_out(self.source.documents("train"), split)
        return self.source.documents(split)

    def fingerprint(self) -> str:
        return digest(["held out", HELD_OUT_EVERY, self.source.fingerprint()])


def hold_out(documents: Iterator[str], split: str) -> Iterator[str]:
    """The documents of a split (train, validation or all) of a corpus that declares none.

    With 20 documents or more, every 20th is validation. With fewer, the last twentieth of each
    document is, cut after a line or a word where there is one.
    """
    if split == "all":
        yield from documents
        return
    validation = split == "validation"
    first = list(islice(documents, HELD_OUT_EVERY))
    if len(first) < HELD_OUT_EVERY:
        for text in first:
            cut = _cut(text)
            if part := text[cut:] if validation else text[:cut]:
                yield part
        return
    for number, text in enumerate(chain(first, documents), start=1):
        if (number % HELD_OUT_EVERY == 0) == validation:
            yield text


def _cut(text: str) -> int:
    last = len(text) - len(text) // HELD_OUT_EVERY
    for mark in ("\n", " "):
        at = text.rfind(mark, last // 2, last)
        if at >= 0:
            return at + 1
    return last


def digest(value: Any) -> str:
    """Hash of a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@contextlib.contextmanager
def exclusive(name: Path) -> Iterator[bool]:
    """Hold the lock file ``name.lock``, so that one process at a time builds ``name``.

    The kernel releases the lock of a killed process. Yields whether the lock is held: False on a
    file system without locks, where several processes may be in the block at once.
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
    """Print a note on standard error, for what was skipped or repeated."""
    print(f"note: {message}", file=sys.stderr, flush=True)
