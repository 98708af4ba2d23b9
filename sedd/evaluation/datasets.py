"""Data sets to evaluate: rows of tokens, from a corpus as a protocol cuts it, or from arrays."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sedd.data.corpora import NAMES, MappedCorpus, open_corpus, parse_mixture
from sedd.data.detokenizers import DETOKENIZERS
from sedd.data.packing import Packed, TooShortError, pack, unigram_entropy, validation_rows
from sedd.data.tokenizers import Tokenizer
from sedd.errors import UserError, did_you_mean
from sedd.evaluation.protocols import SPLITS, Protocol

CHUNK = 256  # rows that are read at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenRows:
    """Rows of tokens in memory, read as those of ``Packed`` are."""

    x0_SL: np.ndarray
    scored_SL: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.x0_SL)

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens x0_BL (int32), and scored_BL, of rows by number."""
        return self.x0_SL[indices], self.scored_SL[indices]


@dataclass(frozen=True, kw_only=True, eq=False)
class DataSet:
    """The rows of one data set that are evaluated.

    Args:
        label: the name in tables and files.
        split: the split of the corpus; "tokens" for arrays.
        source: where the rows are read from.
        chosen: [S], the numbers of the evaluated rows; all, or evenly spread ones.
        num_dropped: tokens of the split in no row, since the cut drops remainders.
    """

    label: str
    split: str
    source: Packed | TokenRows
    chosen: np.ndarray
    num_dropped: int = 0

    def rows(self, first: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """x0_BL and scored_BL of at most ``size`` evaluated rows from the ``first`` on."""
        return self.source.rows(self.chosen[first : first + size])

    def spread(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """x0_BL and scored_BL of ``number`` evaluated rows, evenly spread; of all, if fewer."""
        size = len(self.chosen)
        places = np.linspace(0, size - 1, min(number, size)).astype(int)
        return self.source.rows(self.chosen[places])

    @property
    def num_rows_not_evaluated(self) -> int:
        """Rows of the split that are not evaluated, because of a maximal number of sequences."""
        return self.source.num_rows - len(self.chosen)

    @property
    def fingerprint(self) -> str:
        """A hash of the evaluated tokens, in their order, and of which are scored."""
        return self._read[0]

    @property
    def counts(self) -> np.ndarray:
        """How often each token is scored, up to the largest one that is, [at most N]."""
        return self._read[1]

    @property
    def unigram_entropy(self) -> float:
        """Entropy in nats of the frequencies of the scored tokens themselves.

        No model that ignores the context can be below it, since it is fitted to these tokens.
        """
        return unigram_entropy(self.counts)

    @cached_property
    def _read(self) -> tuple[str, np.ndarray]:
        """The fingerprint, and how often each token is scored; one pass over the rows."""
        counts, digest = np.zeros(1, np.int64), hashlib.blake2b(digest_size=16)
        for first in range(0, len(self.chosen), CHUNK):
            x0_BL, scored_BL = self.rows(first, CHUNK)
            found = np.bincount(x0_BL[scored_BL], minlength=len(counts))
            found[: len(counts)] += counts
            counts = found
            digest.update(x0_BL.astype(np.int32).tobytes() + scored_BL.tobytes())
        return digest.hexdigest(), counts


def token_data_set(
    x0_SL: Any, scored_SL: Any = None, *, num_tokens: int, max_sequences: int | None = None
) -> DataSet:
    """A data set of token ids [S, L]; all are scored unless ``scored_SL`` says otherwise.

    Raises:
        UserError: on another shape, no sequence, or an id outside of [0, ``num_tokens``).
    """
    x0_SL = np.asarray(x0_SL)
    if x0_SL.ndim != 2 or not x0_SL.size or not np.issubdtype(x0_SL.dtype, np.integer):
        raise UserError(
            f"data must be token ids of shape [sequences, length], got {x0_SL.dtype} of shape "
            f"{x0_SL.shape}"
        )
    if x0_SL.min() < 0 or x0_SL.max() >= num_tokens:
        raise UserError(f"token ids must be in [0, {num_tokens}), got {x0_SL.min()}..{x0_SL.max()}")
    scored_SL = np.ones(x0_SL.shape, bool) if scored_SL is None else np.asarray(scored_SL, bool)
    if scored_SL.shape != x0_SL.shape:
        raise UserError(f"scored_BL has shape {scored_SL.shape}, and the tokens {x0_SL.shape}")
    source = TokenRows(x0_SL=x0_SL.astype(np.int32), scored_SL=scored_SL)
    size = len(x0_SL) if max_sequences is None else min(max_sequences, len(x0_SL))
    chosen = np.arange(size) * len(x0_SL) // size
    return DataSet(label="tokens", split="tokens", source=source, chosen=chosen)


@dataclass(frozen=True, kw_only=True)
class TextReader:
    """Makes rows of text for a model; the fields are what the model was trained with.

    Args:
        tokenizer: the model's.
        length: tokens in a row, where the protocol does not say.
        wrap: whether documents were joined in training, for ``cut`` "as_trained".
        corpus: what the model was trained on, whose validation split is its default.
        cache_dir: where packed tokens are kept.
    """

    tokenizer: Tokenizer
    length: int
    wrap: bool
    corpus: str
    cache_dir: Path

    def open(
        self,
        spec: str,
        chosen: Protocol,
        *,
        name: str = "default",
        split: str | None = None,
        max_sequences: int | None = None,
    ) -> DataSet:
        """Read, clean, tokenise and cut a corpus as a protocol says.

        Args:
            spec: as ``open_corpus`` takes it, or ``NAME=FILE``: the data set NAME, read from FILE.
            chosen: the protocol.
            name: the name of the protocol, by which it has splits of its own.
            split: by default all of a file, the protocol's split of a data set it names, else the
                split that validates.
            max_sequences: evaluate at most so many rows, evenly spread.

        Raises:
            UserError: if the corpus cannot be had, has no such split, or is shorter than a row.
        """
        label, source = _label(spec)
        corpus = open_corpus(source, cache_dir=self.cache_dir)
        published = SPLITS.get(name, {}).get(label)
        # A file that stands for a data set has no splits: all of it is the published split.
        declared = published in corpus.splits and "all" not in corpus.splits
        split = split or (published if declared else None)
        split = split or self._validation_split(spec) or corpus.evaluation_split
        if chosen.detokenize and label in DETOKENIZERS:
            function = DETOKENIZERS[label]
            corpus = MappedCorpus(
                name=corpus.name,
                splits=corpus.splits,
                source=corpus,
                function=function,
                label=f"{function.__name__} 1",
            )
        try:
            packed = pack(
                corpus,
                self.tokenizer,
                split,
                length=chosen.length or self.length,
                wrap=self.wrap if chosen.cut == "as_trained" else chosen.cut != "truncated",
                cache_dir=self.cache_dir,
                drop_every=chosen.drop_every,
                around=self._specials() if chosen.specials else None,
                truncate=chosen.cut == "truncated",
                pad_last=chosen.cut == "whole",
            )
        except TooShortError as error:
            raise UserError(f"{error}; --cut whole evaluates it in one padded row") from error
        return DataSet(
            label=label,
            split=split,
            source=packed,
            chosen=validation_rows(packed, max_sequences),
            num_dropped=packed.num_dropped,
        )

    def _validation_split(self, spec: str) -> str | None:
        """The validation split, where the data is what the model was trained on."""
        parts = [part for part, _ in parse_mixture(self.corpus)]
        return "validation" if spec.removeprefix("corpus:") in parts else None

    def _specials(self) -> tuple[int, int]:
        bos_id, eos_id = self.tokenizer.bos_id, self.tokenizer.eos_id
        if bos_id is None or eos_id is None:
            raise UserError(f"--specials: tokenizer {self.tokenizer.name} has no end of a document")
        return bos_id, eos_id


def open_all(
    specs: Sequence[str], open_one: Callable[[str], DataSet]
) -> tuple[list[DataSet], list[str]]:
    """The data sets that can be opened, and one line for each that cannot.

    A label that occurs twice is refused: figures are kept by it.
    """
    opened: list[DataSet] = []
    failed = []
    for spec in dict.fromkeys(specs):
        try:
            data = open_one(spec)
            if data.label in [other.label for other in opened]:
                raise UserError(f"there is a {data.label} already")
            opened.append(data)
        except UserError as error:
            failed.append(f"{spec}: {error}")
    return opened, failed


def _label(spec: str) -> tuple[str, str]:
    """The label of a data set, and the corpus that it is read from: ``NAME=FILE`` has both."""
    label, equals, source = spec.partition("=")
    if equals and label in NAMES:
        return label, source
    if equals and not Path(spec).exists() and Path(source).expanduser().exists():
        raise UserError(
            f"{label!r} is no data set that can stand before '='{did_you_mean(label, NAMES)}: "
            f"there are {', '.join(NAMES)}; to evaluate the file under its own name, give "
            f"{source} alone"
        )
    return spec.removeprefix("corpus:"), spec
