"""A file of tokens that grows, and of which an interruption loses the last piece at most."""

import zlib
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from sedd.data.token_workers import Encoded

TOKENS = "tokens.bin"
ENDS = "ends.bin"
JOURNAL = "journal.bin"


class Position(NamedTuple):
    """How far a text has been tokenised; an entry of the journal, all int64."""

    documents: int = 0  # that are complete
    offset: int = 0  # characters of the next document that are done
    tokens: int = 0
    characters: int = 0
    size: int = 0  # bytes of the text in UTF-8
    checksum: int = 0  # CRC-32 of what this entry added to the other two files


class TokenLog:
    """Three files to which tokens are appended: ids, ends of documents, and a journal.

    Each ``append`` adds to the ids and the ends first, and then an entry to the journal. Opening
    the log again cuts all three files after the last entry whose data are complete and agree with
    its checksum. Work goes on from there, whether a process was killed or a machine lost its power.

    Args:
        folder: where the files are; an empty folder begins a new log.
        dtype: of the token ids.
    """

    position: Position  # after the last entry

    def __init__(self, folder: Path, dtype: np.dtype):
        self._tokens, self._ends, self._journal = self._files = [
            (folder / name).open("a+b") for name in (TOKENS, ENDS, JOURNAL)
        ]
        self._token_size = dtype.itemsize
        self.position, entries = self._intact()
        sizes = (self.position.tokens * self._token_size, self.position.documents * 8)
        for file, size in zip(self._files, (*sizes, entries * ENTRY), strict=True):
            file.truncate(size)

    def append(self, encoded: Encoded) -> None:
        """Append the tokens of the text that follows ``position``."""
        ids = encoded.ids.tobytes()
        ends = (encoded.ends + self.position.tokens).astype(np.int64).tobytes()
        self.position = Position(
            documents=self.position.documents + len(encoded.ends),
            offset=encoded.offset,
            tokens=self.position.tokens + len(encoded.ids),
            characters=self.position.characters + encoded.characters,
            size=self.position.size + encoded.size,
            checksum=zlib.crc32(ends, zlib.crc32(ids)),
        )
        entry = np.array(self.position, np.int64).tobytes()
        for file, data in zip(self._files, (ids, ends, entry), strict=True):
            file.write(data)
            file.flush()

    def _intact(self) -> tuple[Position, int]:
        """The last intact position, and the number of entries up to it."""
        for file in self._files:
            file.seek(0)
        last, entries = Position(), 0
        while len(entry := self._journal.read(ENTRY)) == ENTRY:
            position = Position(*np.frombuffer(entry, np.int64).tolist())
            num_ids = (position.tokens - last.tokens) * self._token_size
            num_ends = (position.documents - last.documents) * 8
            if num_ids < 0 or num_ends < 0:
                break
            ids, ends = self._tokens.read(num_ids), self._ends.read(num_ends)
            complete = len(ids) == num_ids and len(ends) == num_ends
            if not complete or zlib.crc32(ends, zlib.crc32(ids)) != position.checksum:
                break
            last, entries = position, entries + 1
        return last, entries

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.close()


ENTRY = 8 * len(Position())  # bytes of an entry of the journal
