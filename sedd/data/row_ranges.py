"""Which tokens are in which row: how joined or separate documents are cut.

A row is a range of the tokens of all documents. Only the ends of the documents are needed to
compute these ranges, and no token is read.
"""

from dataclasses import dataclass

import numpy as np

from sedd.errors import UserError

Ranges = tuple[np.ndarray, np.ndarray]  # of tokens: (first, size) of rows, (begin, end) of dropped


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How documents are cut into rows.

    With ``wrap`` documents are joined, each followed by the end of a document if the tokenizer has
    one, and the joined tokens are cut into rows. Without ``wrap`` every document begins a new row
    and takes as many rows as it needs; the rest of its last row is padding, which is not scored.

    Args:
        length: tokens in a row, L; at least 1.
        wrap: whether documents are joined.
        drop_every: with ``wrap``: join only so many documents at a time, and drop the tokens at the
            end of each such group that do not fill a row. None joins all documents.
        around: ids that open and close every row, within ``length``; both are scored.
        truncate: without ``wrap``: keep one row of each document and drop the rest of it.
        pad_last: with ``wrap``: keep each remainder as a row, filled up with padding.

    Raises:
        UserError: if ``length`` or ``drop_every`` is below 1.
    """

    length: int
    wrap: bool
    drop_every: int | None = None
    around: tuple[int, int] | None = None
    truncate: bool = False
    pad_last: bool = False

    def __post_init__(self):
        for name in ("length", "drop_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")

    @property
    def equal(self) -> bool:
        """Whether row i is exactly the tokens from i·L to (i + 1)·L."""
        return self.wrap and self.drop_every is None and self.around is None and not self.pad_last

    def ranges(self, ends: np.ndarray, total: int, eos: int) -> tuple[Ranges, Ranges]:
        """Cut documents that end at ``ends`` in ``total`` tokens.

        Args:
            ends: position after each document, its end included, [documents].
            total: number of tokens.
            eos: how many tokens mark the end of each document: 1, or 0 for none.

        Returns:
            First token and size of each row, and begin and end of each range of dropped tokens.
        """
        inside = self.length - (0 if self.around is None else 2)
        if inside < 1:
            raise UserError(
                f"length {self.length} leaves no room for text: two tokens of every row open and "
                "close it"
            )
        if self.wrap:
            return _joined(ends, total, inside, self.drop_every, self.pad_last)
        return _separate(ends, inside, eos, self.truncate)


def _joined(
    ends: np.ndarray, total: int, length: int, drop_every: int | None, pad_last: bool
) -> tuple[Ranges, Ranges]:
    """Rows of joined documents, group by group of ``drop_every`` documents; see ``Cut.ranges``.

    A group of n tokens has floor(n / length) rows, or with ``pad_last`` ceil(n / length), of which
    the last may be shorter. Row k = 0, 1, … of a group begins k·length tokens after the group's
    first token.
    """
    stops = (
        np.array([total])
        if drop_every is None
        else np.append(ends[drop_every - 1 :: drop_every], total)
    )
    begins = np.concatenate([[0], stops[:-1]])
    rows_of = -(-(stops - begins) // length) if pad_last else (stops - begins) // length
    rank = _rank_within(rows_of)
    first = np.repeat(begins, rows_of) + rank * length
    size = np.minimum(np.repeat(stops, rows_of) - first, length)
    return (first, size.astype(np.int32)), (np.minimum(begins + rows_of * length, stops), stops)


def _separate(ends: np.ndarray, length: int, eos: int, truncate: bool) -> tuple[Ranges, Ranges]:
    """Rows of which none holds tokens of two documents; see ``Cut.ranges``."""
    ends = np.asarray(ends)
    begins = np.concatenate([[0], ends[:-1]])
    sizes = ends - begins - eos
    long = sizes > length if truncate else np.zeros(len(sizes), bool)
    dropped = begins[long] + length, begins[long] + sizes[long]
    sizes = np.where(long, length, sizes)
    rows_of = -(-sizes // length)
    document = np.repeat(np.arange(len(ends)), rows_of)
    done = _rank_within(rows_of) * length
    size = np.minimum(sizes[document] - done, length)
    return (begins[document] + done, size.astype(np.int32)), dropped


def _rank_within(rows_of: np.ndarray) -> np.ndarray:
    """0, 1, … within each group: ``rows_of`` [2, 3] gives [0, 1, 0, 1, 2]."""
    return np.arange(rows_of.sum()) - np.repeat(np.cumsum(rows_of) - rows_of, rows_of)
