"""Rows of tokens: how tokenised documents are cut into training and evaluation sequences.

The token files (``sedd.data.token_files``) hold the ids of all documents one after the other. A row
is a range of them: its first token and its size. A ``Cut`` (length, joined or separate documents,
truncation) only changes these ranges, so that a corpus is tokenised once for all of them, and a row
is read straight from the memory-mapped file.
"""

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sedd.data.base import Corpus
from sedd.data.row_ranges import Cut, Ranges
from sedd.data.token_files import Progress, content_digest, token_files
from sedd.data.tokenizers import Tokenizer
from sedd.errors import UserError


class TooShortError(UserError):
    """The joined documents have fewer tokens than one row."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """Rows of ``length`` tokens, read from a memory map.

    All counts but ``num_dropped`` are of scored tokens: those tokens of the documents that lie in a
    row, and the two ids of ``around`` in every row. The end of a document is scored if documents
    are joined, and not scored if they are separate.

    The scored tokens spell a text of ``text_characters`` characters and ``text_bytes`` bytes of
    UTF-8. Nats per character are therefore nats per token times
    ``num_tokens_total / text_characters``. For a tokenizer that does not tell the bytes of its
    tokens, both sizes are those of the whole text times the share of scored tokens.
    """

    name: str  # "CORPUS (SPLIT)", for messages
    num_rows: int
    length: int  # L
    num_tokens_total: int  # scored tokens of all rows
    text_characters: int
    text_bytes: int
    counts: np.ndarray  # [N], scored occurrences of each token
    pad_id: int
    tokens: np.ndarray  # ids of the documents, each followed by its end if the tokenizer has one
    spans: Ranges | None  # first token and size of each row; None if row i is tokens i*L to i*L + L
    num_dropped: int = 0  # tokens of the documents that lie in no row
    file: "MappedFile | None" = None  # the memory map behind ``tokens``; None for tokens in memory
    around: tuple[int, int] | None = None  # ids that open and close every row; both are scored
    digest: str = ""  # hash of the tokens and the documents' ends; "" for tokens in memory
    weights: np.ndarray | None = None  # [S], of the rows' losses, with mean 1; None if all are 1

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read the rows with numbers ``indices``, [B].

        Returns:
            ``x0_BL``, int32 token ids, and ``scored_BL``, bool: False on padding.

        Raises:
            IndexError: if a number is not in 0..num_rows-1.
            UserError: if the token file was truncated meanwhile.
        """
        indices = self.checked(indices)
        if self.spans is None:
            tokens_SL = self.tokens[: self.num_rows * self.length].reshape(-1, self.length)
            x0_BL = tokens_SL[indices].astype(np.int32)
            return x0_BL, np.ones(x0_BL.shape, bool)
        first, size = self.spans
        first_B1, size_B1 = first[indices][:, None], size[indices][:, None]
        # Offset 0 is the first token of the text; with ``around``, column 0 is offset -1.
        offsets_L = np.arange(self.length) - (self.around is not None)
        text_BL = (offsets_L >= 0) & (offsets_L < size_B1)
        x0_BL = self.tokens[np.where(text_BL, first_B1 + offsets_L, 0)].astype(np.int32)
        x0_BL = np.where(text_BL, x0_BL, np.int32(self.pad_id))
        if self.around is None:
            return x0_BL, text_BL
        x0_BL = np.where(offsets_L < 0, self.around[0], x0_BL)
        x0_BL = np.where(offsets_L == size_B1, self.around[1], x0_BL)
        return x0_BL.astype(np.int32), np.asarray(offsets_L <= size_B1)

    def checked(self, indices: np.ndarray) -> np.ndarray:
        """Return the numbers of rows as an array, and check them.

        Raises:
            IndexError: there is no row with such a number.
            UserError: the file of the rows is shorter than it was.
        """
        indices = np.asarray(indices)
        if indices.size and not (indices.min() >= 0 and indices.max() < self.num_rows):
            raise IndexError(
                f"rows are 0..{self.num_rows - 1}, got {indices.min()}..{indices.max()}"
            )
        if self.file is not None:
            self.file.check()
        return indices

    @property
    def segmented(self) -> bool:
        """Whether ``rows`` also returns the segments of several texts in a row; never here."""
        return False

    def first_tokens(self, count: int) -> np.ndarray:
        """The ids of the first tokens of the corpus."""
        return self.tokens[:count]

    def unigram_entropy(self) -> float:
        """Entropy of the scored tokens' own frequencies, in nats per token.

        No model without context has a lower cross entropy on these rows.
        """
        return unigram_entropy(self.counts)


@dataclass(frozen=True, kw_only=True, eq=False)
class MappedFile:
    """A file mapped into memory, read-only."""

    path: Path
    content: mmap.mmap

    @classmethod
    def of(cls, path: Path) -> "MappedFile":
        """Map a whole file, which must not be empty."""
        with path.open("rb") as file:
            return cls(path=path, content=mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def check(self) -> None:
        """Raise UserError if the file is shorter than its map.

        Reading the missing pages would end the process with SIGBUS. A file that was deleted is
        still readable through its map, and passes.
        """
        try:
            size = self.content.size()
        except OSError:  # some network file systems fail for a deleted file
            size = 0
        if size < len(self.content):
            raise UserError(
                f"the packed tokens {self.path} were cut or removed by another program: start "
                "again, and they are made anew"
            )


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy of the frequencies ``counts / counts.sum()`` of tokens [N], in nats."""
    frequencies = counts[counts > 0] / counts.sum()
    return abs(float((frequencies * np.log(frequencies)).sum()))  # never minus zero


def pack(
    corpus: Corpus,
    tokenizer: Tokenizer,
    split: str,
    cut: Cut,
    *,
    cache_dir: Path,
    workers: int | None = None,
    progress: Progress | None = None,
    max_documents: int | None = None,
) -> Packed:
    """Cut a split into rows of tokens; the split is tokenised if it was not before.

    Args:
        corpus: from ``open_corpus``.
        tokenizer: from ``build_tokenizer``.
        split: split of the corpus.
        cut: the length of a row, and how documents fill rows.
        cache_dir: the directory for the token files.
        workers: how many threads tokenise, and processes if the text is long; None for one per
            core, at most 16. The rows do not depend on it.
        progress: called with the numbers of documents and tokens so far.
        max_documents: read only so many documents.

    Returns:
        The rows, read from files in ``cache_dir/packed``.

    Raises:
        UserError: if there is no text, or ``workers`` or ``max_documents`` is below 1.
        TooShortError: if joined documents do not fill one row.

    Example:
        >>> from pathlib import Path
        >>> from sedd.data import Cut, build_tokenizer, open_corpus, pack
        >>> cache = Path("cache")
        >>> corpus = open_corpus("my.txt", cache_dir=cache)
        >>> tokenizer = build_tokenizer("bytes", None, cache_dir=cache)
        >>> packed = pack(corpus, tokenizer, "all", Cut(length=16, wrap=True), cache_dir=cache)
        >>> x0_BL, scored_BL = packed.rows([0, 1])
        >>> x0_BL.shape, scored_BL.all()
        ((2, 16), np.True_)
    """
    if corpus.records:
        raise UserError(
            f"{corpus.name}: it holds records of messages or prompts, which are not read as text; "
            "give another file, or PATH:KEY"
        )
    for name, value in (("max_documents", max_documents), ("workers", workers)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    made = (workers, progress, max_documents)
    folder, meta = token_files(corpus, tokenizer, split, cache_dir, *made)
    return _open(folder, meta, f"{corpus.name} ({split})", tokenizer, cut)


def validation_rows(packed: Packed, max_rows: int | None) -> np.ndarray:
    """Numbers of at most ``max_rows`` rows, evenly spread and ascending; all rows for None.

    Raises UserError if no row is left.
    """
    num = packed.num_rows if max_rows is None else min(max_rows, packed.num_rows)
    if num < 1:
        raise UserError(f"the number of rows to validate on must be at least 1, got {max_rows}")
    return np.arange(num) * packed.num_rows // num


def _open(folder: Path, meta: dict[str, Any], name: str, tokenizer: Tokenizer, cut: Cut) -> Packed:
    """The rows of token files, with the counts of the tokens that they score."""
    total = meta["num_tokens"]
    ends = np.load(folder / "ends.npy", mmap_mode="r")
    if not total:
        raise UserError(f"{name} holds no text")
    file, tokens = map_tokens(folder, meta["dtype"])
    eos_id = tokenizer.eos_id
    spans, dropped = cut.ranges(ends, total, 0 if eos_id is None else 1)
    num_rows = len(spans[0])
    if not num_rows and not cut.wrap:
        raise UserError(f"{name} holds no text")
    if not num_rows:
        group = ""
        if cut.drop_every:
            group = f", and no group of {cut.drop_every:,} joined documents has enough for one row"
        raise TooShortError(
            f"length {cut.length} is longer than the data: {name} has {total:,} tokens, "
            f"{len(ends):,} ends of documents included{group}"
        )
    # The scored tokens are all tokens of the files without unscored ends and dropped tokens, and
    # the ids of ``around`` once a row.
    counts = np.array(meta["counts"], np.int64)
    if eos_id is not None and not cut.wrap:
        counts[eos_id] -= len(ends)
    for begin, end in zip(*dropped, strict=True):
        counts -= np.bincount(np.asarray(tokens[begin:end], np.int64), minlength=len(counts))
    for special in cut.around or ():
        counts[special] += num_rows
    characters, size = text_size(meta, counts, tokenizer)
    return Packed(
        name=name,
        num_rows=num_rows,
        length=cut.length,
        num_tokens_total=int(counts.sum()),
        num_dropped=int((dropped[1] - dropped[0]).sum()),
        text_characters=characters,
        text_bytes=size,
        counts=counts,
        pad_id=tokenizer.pad_id,
        tokens=tokens,
        spans=None if cut.equal else spans,
        file=file,
        around=cut.around,
        digest=meta.get("digest") or content_digest(folder),
    )


def map_tokens(folder: Path, dtype: str) -> tuple[MappedFile, np.ndarray]:
    """Map the tokens of token files, which must not be empty, into memory."""
    file = MappedFile.of(folder / "tokens.bin")
    return file, np.frombuffer(file.content, dtype=dtype)


def text_size(meta: dict[str, Any], counts: np.ndarray, tokenizer: Tokenizer) -> tuple[int, int]:
    """Characters and bytes of the text that the counted tokens spell; see ``Packed``."""
    try:
        table = tokenizer.token_bytes()
    except UserError:  # a lossy tokenizer: its tokens have no bytes
        text = sum(meta["counts"]) - (meta["num_documents"] if tokenizer.eos_id is not None else 0)
        scored = counts.sum() / max(text, 1)
        return round(meta["text_characters"] * scored), round(meta["text_bytes"] * scored)
    size = np.array([len(token or b"") for token in table], np.int64)
    # Every character of UTF-8 has exactly one byte other than 0b10xxxxxx, even where a character
    # is spread over two tokens.
    begun = np.array([sum(b & 0xC0 != 0x80 for b in token or b"") for token in table], np.int64)
    return int(counts @ begun), int(counts @ size)
