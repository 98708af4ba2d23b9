"""Rows of tokens for fine-tuning: prompts are given, answers are learned.

The token files of records (``sedd.data.token_files``) mark each token that is given. How the rest
of a row behind its text is filled decides what a model learns about the ends of texts:

=============  ====================================================================================
``none``       records are packed into rows, each a segment of its own: they do not see each other,
               and padding is in no segment
``eos``        a record a row; ends of a document fill it up, and are learned like text, so that a
               model learns to end early, and how long its answers may be (LLaDA, dllm)
``rainbow``    the same, but behind the first end of a document seven further tokens take turns,
               which makes early ends less likely (Rainbow padding, 2026)
``unified``    records are joined and cut into rows; all tokens are learned, prompts too (iLLaDA)
=============  ====================================================================================
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sedd.data.base import Corpus, say
from sedd.data.packing import Packed, TooShortError, map_tokens, text_size
from sedd.data.records import Answers
from sedd.data.row_ranges import Cut, Ranges
from sedd.data.token_files import Progress, token_files
from sedd.data.token_workers import given_mark
from sedd.data.tokenizers import Tokenizer
from sedd.errors import UserError

Padding = Literal["none", "eos", "rainbow", "unified"]
DEFAULT_PADDING: Padding = "eos"
COLOURS = 7  # tokens that take turns in ``rainbow``
SPARE = re.compile(r"reserved|unused|extra", re.IGNORECASE)  # in names of special tokens of no use


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerRows(Packed):
    """Rows of records, read from a memory map.

    Scored are the tokens that are not given, the end of each document, and what fills a row up.
    ``tokens`` has the marks of given tokens; ``first_tokens`` gives ids.
    """

    padding: Padding
    fill: tuple[int, ...]  # what fills a row up, in turns; with ``none`` padding that is not scored
    ends: np.ndarray  # position in ``tokens`` after each document

    @property
    def segmented(self) -> bool:
        """Whether ``rows`` also returns segments."""
        return self.padding == "none"

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, ...]:
        """Read the rows with numbers ``indices``, [B].

        Returns:
            ``x0_BL``, int32 token ids, and ``scored_BL``, bool. With the padding ``none`` also
            ``segment_BL``, int32: 1, 2, … for the records of a row, and 0 for padding.

        Raises:
            IndexError: if a number is not in 0..num_rows-1.
            UserError: if the token file was truncated meanwhile.
        """
        indices = self.checked(indices)
        assert self.spans is not None
        first_B1, size_B1 = (each[indices][:, None] for each in self.spans)
        offset_L = np.arange(self.length)
        text_BL = offset_L < size_B1
        place_BL = np.where(text_BL, first_B1 + offset_L, first_B1)
        marked_BL = self.tokens[place_BL]
        mark = self.tokens.dtype.type(given_mark(self.tokens.dtype))
        given_BL = (marked_BL & mark) > 0 if self.padding != "unified" else np.zeros_like(text_BL)
        fill_BL = np.array(self.fill)[(offset_L - size_B1) % len(self.fill)]
        x0_BL = np.where(text_BL, marked_BL & ~mark, fill_BL).astype(np.int32)
        if not self.segmented:
            return x0_BL, ~(text_BL & given_BL)
        segment_BL = np.searchsorted(self.ends, place_BL, "right")
        segment_BL = np.where(text_BL, segment_BL - segment_BL[:, :1] + 1, 0).astype(np.int32)
        return x0_BL, text_BL & ~given_BL, segment_BL

    def first_tokens(self, count: int) -> np.ndarray:
        """The ids of the first tokens of the corpus, given ones too."""
        mark = self.tokens.dtype.type(given_mark(self.tokens.dtype))
        return self.tokens[:count] & ~mark


def pack_records(
    corpus: Corpus,
    tokenizer: Tokenizer,
    split: str,
    *,
    length: int,
    padding: Padding,
    answers: Answers,
    cache_dir: Path,
    workers: int | None = None,
    progress: Progress | None = None,
    max_documents: int | None = None,
) -> AnswerRows:
    """Tokenise a split of records, if it was not before, and cut it into rows.

    A record that is longer than a row is cut at its end, except with ``unified``. If nothing of its
    answer is left, it is left out. A note says how many records this concerns.

    Args:
        corpus: a corpus of records.
        tokenizer: its chat template writes conversations.
        split: split of the corpus.
        length: tokens in a row, L.
        padding: how rows are filled, see the module.
        answers: whether all answers of a conversation are learned, or the last one only.
        cache_dir: the directory for the token files.
        workers: as for ``pack``.
        progress: as for ``pack``.
        max_documents: read only so many records.

    Raises:
        UserError: there is no record that fits, the tokenizer lacks what ``padding`` needs, or a
            record cannot be written by the chat template.
        TooShortError: joined records do not fill one row.
    """
    if tokenizer.eos_id is None:
        raise UserError(
            f"tokenizer {tokenizer.name!r} has no end of a document, which answers end with; name "
            "one (--data.end-of-text)"
        )
    made = (workers, progress, max_documents, answers)
    folder, meta = token_files(corpus, tokenizer, split, cache_dir, *made)
    return _open(folder, meta, f"{corpus.name} ({split})", tokenizer, length, padding)


def _open(
    folder: Path,
    meta: dict[str, Any],
    name: str,
    tokenizer: Tokenizer,
    length: int,
    padding: Padding,
) -> AnswerRows:
    """The rows of token files, with the counts of the tokens that they score."""
    if not meta["num_tokens"]:
        raise UserError(f"{name} holds no records")
    file, tokens = map_tokens(folder, meta["dtype"])
    ends = np.load(folder / "ends.npy", mmap_mode="r")
    if padding == "unified":
        spans, dropped = Cut(length=length, wrap=True).ranges(ends, meta["num_tokens"], 0)
        if not len(spans[0]):
            raise TooShortError(
                f"length {length} is longer than the data: {name} has {meta['num_tokens']:,} tokens"
            )
    else:
        spans, dropped = _whole_records(name, tokens, np.asarray(ends), length, padding)
    counts = _learned_counts(meta, tokens, dropped, padding)
    characters, size = text_size(meta, counts, tokenizer)
    fill = _fill(tokenizer, padding)
    if padding in ("eos", "rainbow"):
        for turn, token in enumerate(fill):  # of the free places of a row, every len(fill)-th
            counts[token] += ((length - spans[1] - turn + len(fill) - 1) // len(fill)).sum()
    return AnswerRows(
        name=name,
        num_rows=len(spans[0]),
        length=length,
        num_tokens_total=int(counts.sum()),
        num_dropped=int((dropped[1] - dropped[0]).sum()),
        text_characters=characters,
        text_bytes=size,
        counts=counts,
        pad_id=tokenizer.pad_id,
        tokens=tokens,
        spans=spans,
        file=file,
        digest=f"{meta['digest']} {padding}",
        padding=padding,
        fill=fill,
        ends=ends,
    )


def _learned_counts(
    meta: dict[str, Any], tokens: np.ndarray, dropped: Ranges, padding: Padding
) -> np.ndarray:
    """How often each token is learned in the text of the rows, without what fills them up, [N]."""
    mark = given_mark(tokens.dtype)
    counts = np.array(meta["counts"], np.int64)
    if padding != "unified":
        counts -= np.array(meta["given_counts"], np.int64)
    for begin, end in zip(*dropped, strict=True):
        marked = np.asarray(tokens[begin:end])
        lost = marked if padding == "unified" else marked[(marked & mark) == 0]
        counts -= np.bincount(lost & ~tokens.dtype.type(mark), minlength=len(counts))
    return counts


def _fill(tokenizer: Tokenizer, padding: Padding) -> tuple[int, ...]:
    """The tokens that fill a row up; UserError if the tokenizer has too few for ``rainbow``."""
    if padding == "none":
        return (tokenizer.pad_id,)
    assert tokenizer.eos_id is not None
    if padding != "rainbow":
        return (tokenizer.eos_id,)
    spare = sorted(index for name, index in tokenizer.specials.items() if SPARE.search(name))
    if len(spare) < COLOURS:
        raise UserError(
            f"padding rainbow needs {COLOURS} special tokens of no other use, with a name such as "
            f"<|reserved_token_0|>: tokenizer {tokenizer.name!r} has {len(spare)}"
        )
    return tuple(spare[:COLOURS])


def _whole_records(
    name: str, tokens: np.ndarray, ends: np.ndarray, length: int, padding: Padding
) -> tuple[Ranges, Ranges]:
    """The first token and the size of each row, and begin and end of each range of lost tokens.

    With ``none`` a row takes the records that follow each other as long as they fit; otherwise each
    row has one record.
    """
    mark = given_mark(tokens.dtype)
    begins = np.concatenate([[0], ends[:-1]])
    sizes = ends - begins
    long = np.flatnonzero(sizes > length)
    answered = [bool(((tokens[b : b + length] & mark) == 0).any()) for b in begins[long]]
    without = long[~np.array(answered, bool)]
    lost = begins[long] + np.where(answered, length, 0), ends[long]
    kept = np.ones(len(ends), bool)
    kept[without] = False
    if len(long):
        more = f", and {len(without):,} left out, whose prompt fills it" if len(without) else ""
        say(
            f"{name}: {len(long) - len(without):,} of {len(ends):,} records are longer than "
            f"{length} tokens and cut{more}"
        )
    sizes = np.minimum(sizes, length)
    if not kept.any():
        raise UserError(f"{name} holds no record whose answer begins within {length} tokens")
    if padding != "none":
        return (begins[kept], sizes[kept].astype(np.int32)), lost
    rows: list[tuple[int, int]] = []
    end, room = -1, 0
    numbers = np.flatnonzero(kept)
    for begin, size in zip(begins[numbers].tolist(), sizes[numbers].tolist(), strict=True):
        if begin == end and size <= room:
            rows[-1] = (rows[-1][0], rows[-1][1] + size)
        else:
            rows.append((begin, size))
        end, room = begin + size, length - rows[-1][1]
    first, size = np.array(rows, np.int64).T
    return (first, size.astype(np.int32)), lost
