"""Data sets to evaluate: rows of tokens.

``TextReader`` makes them from a corpus, as a protocol says; ``token_data_set`` from an array.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from sedd.data.answer_rows import Padding, pack_records
from sedd.data.base import Corpus
from sedd.data.corpora import NAMES, MappedCorpus, open_corpus, parse_mixture
from sedd.data.detokenizers import DETOKENIZERS
from sedd.data.packing import Packed, TooShortError, pack, unigram_entropy, validation_rows
from sedd.data.records import Answers
from sedd.data.row_ranges import Cut
from sedd.data.tokenizers import Tokenizer
from sedd.errors import UserError, did_you_mean
from sedd.evaluation.protocols import SPLITS, Protocol

CHUNK = 256  # rows read at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenRows:
    """Rows of tokens in memory, with the interface of ``Packed``.

    Args:
        x0_SL: token ids, int32.
        scored_SL: which of them are scored.
    """

    x0_SL: np.ndarray
    scored_SL: np.ndarray
    segmented: ClassVar[bool] = False

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return len(self.x0_SL)

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens x0_BL (int32) and scored_BL of the rows with these numbers."""
        return self.x0_SL[indices], self.scored_SL[indices]


# Shows progress: takes the batches, a label and the number of batches, and yields the batches.
Track = Callable[[Iterable[Any], str, int], Iterable[Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class DataSet:
    """The rows of one data set that are evaluated.

    Args:
        label: its name in tables and files.
        split: the split of the corpus; "tokens" for arrays.
        source: the rows of the split, of which some or all are evaluated.
        chosen: [S], the numbers of the evaluated rows, evenly spread.
        num_dropped: tokens of the split that are in no row, because the cut drops remainders.
    """

    label: str
    split: str
    source: Packed | TokenRows
    chosen: np.ndarray
    num_dropped: int = 0

    def rows(self, first: int, size: int) -> tuple[np.ndarray, ...]:
        """Return x0_BL and scored_BL of at most ``size`` evaluated rows, starting at ``first``.

        Rows of several texts have a third array, segment_BL.
        """
        return self.source.rows(self.chosen[first : first + size])

    def batches(
        self, size: int, *, first: int = 0, what: str = "", track: Track | None = None
    ) -> Iterable[Any]:
        """Return the evaluated rows from ``first`` on, at most ``size`` at a time; see ``rows``.

        ``track`` shows progress, with the label of the data set behind ``what``.
        """
        starts = range(first, len(self.chosen), size)
        batches = (self.rows(start, size) for start in starts)
        return batches if track is None else track(batches, what + self.label, len(starts))

    def spread(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return x0_BL and scored_BL of ``number`` evaluated rows (or all), evenly spread.

        Raises:
            UserError: if a row holds several texts.
        """
        if self.source.segmented:
            raise UserError(
                f"{self.label}: its rows hold several texts each (--data.padding none of the run), "
                "which have bounds only"
            )
        size = len(self.chosen)
        places = np.linspace(0, size - 1, min(number, size)).astype(int)
        return self.source.rows(self.chosen[places])

    @property
    def length(self) -> int:
        """Tokens in a row, padding included."""
        return self.rows(0, 1)[0].shape[1]

    @property
    def num_rows_not_evaluated(self) -> int:
        """Rows of the split that are not evaluated, because ``max_sequences`` leaves them out."""
        return self.source.num_rows - len(self.chosen)

    @property
    def fingerprint(self) -> str:
        """A hash of the evaluated tokens in their order, and of which of them are scored."""
        return self._read[0]

    @property
    def counts(self) -> np.ndarray:
        """How often each token id is scored, [n], where n - 1 is the largest id that is scored."""
        return self._read[1]

    @property
    def unigram_entropy(self) -> float:
        """Entropy in nats of the frequencies of the scored tokens.

        The frequencies are fitted to the evaluated tokens, so a model without context has at least
        this many nats per token.
        """
        return unigram_entropy(self.counts)

    @cached_property
    def _read(self) -> tuple[str, np.ndarray]:
        """The fingerprint and the counts, from one pass over the rows."""
        counts, digest = np.zeros(1, np.int64), hashlib.blake2b(digest_size=16)
        for first in range(0, len(self.chosen), CHUNK):
            x0_BL, scored_BL, *segment = self.rows(first, CHUNK)
            found = np.bincount(x0_BL[scored_BL], minlength=len(counts))
            found[: len(counts)] += counts
            counts = found
            digest.update(x0_BL.astype(np.int32).tobytes() + scored_BL.tobytes())
            digest.update(b"".join(each.tobytes() for each in segment))
        return digest.hexdigest(), counts


def token_data_set(
    x0_SL: Any, scored_SL: Any = None, *, num_tokens: int, max_sequences: int | None = None
) -> DataSet:
    """Make a data set of token ids.

    Args:
        x0_SL: integers of shape [sequences, length].
        scored_SL: booleans of the same shape: which tokens are scored; all by default.
        num_tokens: ids must be below it.
        max_sequences: evaluate at most so many sequences, evenly spread.

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
    """Reads corpora as rows of tokens for one model.

    Args:
        tokenizer: the model's tokenizer.
        length: tokens in a row of training, used if the protocol sets no length.
        wrap: whether documents were joined in training, for ``cut`` "as_trained".
        padding: how rows of records were filled in training, see ``sedd.data.answer_rows``.
        answers: which answers of records were learned.
        corpus: the corpus that the model was trained on; its validation split is evaluated.
        cache_dir: the folder in which tokenised corpora are kept.
    """

    tokenizer: Tokenizer
    length: int
    wrap: bool
    padding: Padding
    answers: Answers
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
            spec: a corpus as ``open_corpus`` takes it, or ``NAME=FILE``: the data set NAME, read
                from FILE.
            chosen: the protocol.
            name: the name of the protocol, whose table in ``SPLITS`` gives the split of a data set.
            split: by default the protocol's split of the data set, else the validation split of a
                corpus that the model was trained on, else the corpus's ``evaluation_split``.
            max_sequences: evaluate at most so many rows, evenly spread.

        Raises:
            UserError: if the corpus cannot be read, has no such split, or is shorter than a row.
        """
        label, source = _label(spec)
        corpus = open_corpus(source, cache_dir=self.cache_dir)
        split = split or self._split(spec, label, corpus, name)
        if chosen.detokenize and label in DETOKENIZERS:
            function = DETOKENIZERS[label]
            corpus = MappedCorpus(
                name=corpus.name,
                splits=corpus.splits,
                source=corpus,
                function=function,
                label=f"{function.__name__} 1",
            )
        packed = self._pack(corpus, split, chosen)
        return DataSet(
            label=label,
            split=split,
            source=packed,
            chosen=validation_rows(packed, max_sequences),
            num_dropped=packed.num_dropped,
        )

    def _split(self, spec: str, label: str, corpus: Corpus, protocol_name: str) -> str:
        """The split of a corpus to evaluate if the user names none.

        It is the protocol's split of the data set, or the validation split of a corpus that the
        model was trained on, or the corpus's own choice. A file that is read as a data set has only
        the split "all", which is taken for the protocol's.
        """
        published = SPLITS.get(protocol_name, {}).get(label)
        if published is not None and published in corpus.splits and "all" not in corpus.splits:
            return published
        trained_on = [part for part, _ in parse_mixture(self.corpus)]
        if spec.removeprefix("corpus:") in trained_on:
            return "validation"
        return corpus.evaluation_split

    def _pack(self, corpus: Corpus, split: str, chosen: Protocol) -> Packed:
        """Tokenise a split and cut it into rows."""
        if corpus.records:
            return self._pack_records(corpus, split, chosen)
        try:
            cut = Cut(
                length=chosen.length or self.length,
                wrap=self.wrap if chosen.cut == "as_trained" else chosen.cut != "truncated",
                drop_every=chosen.drop_every,
                around=self._specials() if chosen.specials else None,
                truncate=chosen.cut == "truncated",
                pad_last=chosen.cut == "whole",
            )
            return pack(corpus, self.tokenizer, split, cut, cache_dir=self.cache_dir)
        except TooShortError as error:
            raise UserError(f"{error}; --cut whole evaluates it in one padded row") from error

    def _pack_records(self, corpus: Corpus, split: str, chosen: Protocol) -> Packed:
        """Rows of records, which are cut as in training; UserError if the protocol cuts others."""
        if chosen.cut != "as_trained" or chosen.specials:
            what = "--specials" if chosen.specials else f"--cut {chosen.cut}"
            raise UserError(
                f"{corpus.name}: records of messages or prompts are cut as in training, without "
                f"{what}"
            )
        return pack_records(
            corpus,
            self.tokenizer,
            split,
            length=chosen.length or self.length,
            padding=self.padding,
            answers=self.answers,
            cache_dir=self.cache_dir,
        )

    def _specials(self) -> tuple[int, int]:
        """The ids of the beginning and the end of a document."""
        bos_id, eos_id = self.tokenizer.bos_id, self.tokenizer.eos_id
        if bos_id is None or eos_id is None:
            raise UserError(
                f"--specials: tokenizer {self.tokenizer.name} lacks a token for the beginning or "
                "the end of a document"
            )
        return bos_id, eos_id


def open_all(
    specs: Sequence[str], open_one: Callable[[str], DataSet]
) -> tuple[list[DataSet], list[str]]:
    """Open several data sets; return them, and one line about each that cannot be opened.

    A label that occurs twice is refused, because figures are stored under the label.

    Args:
        specs: the data sets, as the user wrote them.
        open_one: opens one of them, such as ``TextReader.open``.
    """
    opened: list[DataSet] = []
    failed = []
    for spec in dict.fromkeys(specs):
        try:
            data = open_one(spec)
            if data.label in [other.label for other in opened]:
                raise UserError(
                    f"another data set has the label {data.label!r} already, and figures are "
                    "stored by label"
                )
            opened.append(data)
        except UserError as error:
            about, colon, problem = str(error).partition(": ")
            known = colon and about in (spec, spec.partition("=")[2])  # shown as the line's start
            failed.append(f"{spec}: {problem if known else error}")
    return opened, failed


def _label(spec: str) -> tuple[str, str]:
    """Split a specification into the label of the data set and the corpus to read.

    ``NAME=FILE`` has both; any other specification is its own label.
    """
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
