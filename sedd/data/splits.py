"""Recognise splits in the names of files: train, validation and test in common spellings."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sedd.data.readers import without_compression

SPLITS = ("train", "validation", "test")
WORDS = {  # spelling: split
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("heldout", "holdout"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def split_of(path: Path) -> str | None:
    """The split that a relative path declares, or None.

    A name declares a split if its first or last word is one of ``WORDS``. The names
    ``train-00000-of-00002.jsonl``, ``wiki.valid.txt`` and ``en_test`` do; ``contest.txt`` and
    ``my-test-notes.txt`` do not. Suffixes and numbers of shards do not count as words. The
    outermost folder that declares a split decides, and then the name of the file.
    """
    for part in (*path.parts[:-1], without_compression(path.name).stem):
        words = [w for w in re.split(r"[^a-z]+", part.lower()) if w and w != "of"]
        for word in (*words[:1], *words[-1:]):
            if word in WORDS:
                return WORDS[word]
    return None


@dataclass(frozen=True, kw_only=True)
class Sorted:
    """Files sorted by split."""

    declared: bool  # whether the names declare splits
    files: tuple[tuple[str, Path], ...]  # (split, file); the split is "all" if none is declared
    left_out: tuple[Path, ...]  # if splits are declared: files that belong to none
    # If no splits are declared: files whose names look like a split; none if these all say train.
    unused: tuple[Path, ...]

    @property
    def splits(self) -> tuple[str, ...]:
        """The declared splits in the order train, validation, test."""
        return tuple(s for s in SPLITS if any(split == s for split, _ in self.files))


def sort_into_splits(files: Sequence[Path], folder: Path) -> Sorted:
    """Sort files into the splits that their paths below ``folder`` declare.

    Splits count as declared if there is a training split and another one, and at least half of the
    files belong to splits. In a folder of source code, ``train.py`` and ``tests/`` therefore
    declare nothing.
    """
    named = [(split_of(path.relative_to(folder)), path) for path in files]
    chosen = tuple((split, path) for split, path in named if split is not None)
    found = {split for split, _ in chosen}
    if "train" in found and len(found) > 1 and 2 * len(chosen) >= len(files):
        left_out = tuple(path for split, path in named if split is None)
        return Sorted(declared=True, files=chosen, left_out=left_out, unused=())
    unused = () if found == {"train"} else tuple(path for _, path in chosen)
    everything = tuple(("all", path) for path in files)
    return Sorted(declared=False, files=everything, left_out=(), unused=unused)
