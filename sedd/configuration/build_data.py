"""The data of a run from its configuration: corpora, tokenizer, packed rows, validation rows."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sedd.configuration.config import Config, DataOptions
from sedd.data.answer_rows import DEFAULT_PADDING, pack_records
from sedd.data.corpora import Mixture, open_corpus, parse_mixture
from sedd.data.packing import Packed, pack, validation_rows
from sedd.data.records import is_weighted
from sedd.data.row_ranges import Cut
from sedd.data.tokenizer_sources import build_tokenizer
from sedd.data.tokenizers import Tokenizer
from sedd.data.weighted_rows import read_weighted
from sedd.errors import FieldError, fields_within, mistakes_in


@dataclass(frozen=True, kw_only=True)
class Data:
    """The training data of a run.

    Args:
        tokenizer: the tokenizer of all parts.
        train: the packed training split of each part of the mixture, with the part's weight.
        validation: likewise the validation split.
    """

    tokenizer: Tokenizer
    train: list[tuple[Packed, float]]
    validation: list[tuple[Packed, float]]


def build_data(config: Config, *, tokenizer: Tokenizer | None = None, progress=None) -> Data:
    """Open the corpora, build the tokenizer if there is none, and tokenise and pack both splits.

    Packed tokens are kept in the configuration's ``cache_dir`` and read from there the next time.

    Args:
        config: its ``data`` is used.
        tokenizer: the tokenizer of an earlier run, which is resumed or whose weights are the start.
            None builds the configured tokenizer, which is trained on the corpus if it needs text.
        progress: called with the numbers of documents and tokens so far.

    Raises:
        UserError: a corpus cannot be read or lacks a split, or the tokenizer cannot be built.
    """
    cache_dir = Path(config.data.cache_dir).expanduser()
    with mistakes_in("data.corpus"):
        weighted = parse_mixture(config.data.corpus)
        corpora = [open_corpus(spec, cache_dir=cache_dir) for spec, _ in weighted]
    for corpus in corpora:
        for split in ("train", "validation"):
            if split not in corpus.splits:
                raise FieldError(
                    "data.corpus",
                    f": {corpus.name!r} has no {split} split, which training needs; it has "
                    f"{', '.join(corpus.splits)}",
                )
    if tokenizer is None:
        whole = corpora[0] if len(corpora) == 1 else Mixture.of(corpora)
        with fields_within("data"):
            tokenizer = build_tokenizer(
                config.data.tokenizer,
                whole,
                cache_dir=cache_dir,
                end_of_text=config.data.end_of_text,
            )
    parts = {
        split: [
            (_pack(corpus, split, tokenizer, config.data, cache_dir, progress), weight)
            for corpus, (_, weight) in zip(corpora, weighted, strict=True)
        ]
        for split in ("train", "validation")
    }
    return Data(tokenizer=tokenizer, **parts)


def pack_split(
    spec: str,
    split: str | None,
    tokenizer: Tokenizer,
    data: DataOptions,
    *,
    cache_dir: Path,
    progress=None,
) -> tuple[Packed, str]:
    """Tokenise and pack one split of a corpus, to evaluate on.

    Args:
        spec: the corpus by name or path, as in ``DataOptions.corpus``.
        split: the split; None for the one that the corpus is evaluated on.
        tokenizer: the tokenizer of the model.
        data: how the text is cut: ``length`` and ``wrap``.
        cache_dir: where the packed tokens are kept.
        progress: called with the numbers of documents and tokens so far.

    Returns:
        The packed rows, and the name of the split.
    """
    corpus = open_corpus(spec, cache_dir=cache_dir)
    split = split or corpus.evaluation_split
    return _pack(corpus, split, tokenizer, data, cache_dir, progress), split


def _pack(corpus, split, tokenizer, data: DataOptions, cache_dir, progress) -> Packed:
    """Pack text, or records; FieldError if an option goes with the other kind only."""
    if corpus.records and is_weighted(json.loads(next(iter(corpus.documents(split)), "{}"))):
        if not data.wrap or data.padding is not None:
            name = "padding" if data.wrap else "wrap"
            raise FieldError(f"data.{name}", f": {corpus.name!r} has whole rows of tokens")
        return read_weighted(corpus, tokenizer, split, length=data.length)
    if corpus.records:
        if not data.wrap:
            raise FieldError("data.wrap", ": --data.padding says how records fill rows")
        return pack_records(
            corpus,
            tokenizer,
            split,
            length=data.length,
            padding=data.padding or DEFAULT_PADDING,
            answers=data.answers,
            cache_dir=cache_dir,
            workers=data.workers,
            progress=progress,
        )
    if data.padding is not None:
        raise FieldError(
            "data.padding",
            f"is {data.padding}, which needs a corpus of messages, or of prompts with completions; "
            f"{corpus.name!r} is text",
        )
    cut = Cut(length=data.length, wrap=data.wrap)
    made = {"cache_dir": cache_dir, "workers": data.workers, "progress": progress}
    return pack(corpus, tokenizer, split, cut, **made)


@dataclass(frozen=True, kw_only=True)
class ValidationRows:
    """The validation rows of a run, in batches of tokens [B, L] and scored positions [B, L].

    Every iteration gives the same rows: of each part of the mixture equally many, evenly spread
    over it. The last batch of a part may be smaller.

    Args:
        parts: the packed validation splits.
        max_sequences: rows in total, divided among the parts and rounded up; None for all.
        batch_size: rows in a batch.
    """

    parts: Sequence[Packed]
    max_sequences: int | None
    batch_size: int

    def __len__(self) -> int:
        return sum(-(-len(rows) // self.batch_size) for _, rows in self._rows())

    def __iter__(self) -> Iterator[tuple[np.ndarray, ...]]:
        for packed, rows in self._rows():
            for first in range(0, len(rows), self.batch_size):
                yield packed.rows(rows[first : first + self.batch_size])

    def counts(self) -> np.ndarray:
        """Count how often each token occurs at scored positions of all rows, [N]."""
        counts_N = np.zeros(self.parts[0].counts.size, np.int64)
        for x0_BL, scored_BL, *_ in self:
            counts_N += np.bincount(x0_BL[scored_BL], minlength=counts_N.size)
        return counts_N

    def weights(self) -> np.ndarray:
        """The weight of each row, [S]; 1 where rows have none."""
        parts = [
            np.ones(len(rows)) if packed.weights is None else packed.weights[rows]
            for packed, rows in self._rows()
        ]
        return np.concatenate(parts)

    def _rows(self):
        each = None if self.max_sequences is None else -(-self.max_sequences // len(self.parts))
        return [(packed, validation_rows(packed, each)) for packed in self.parts]
