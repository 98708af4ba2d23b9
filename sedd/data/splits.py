"""Splits that file names declare: train, validation and test, in the spellings that people use."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "validation", "test")
WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("heldout", "holdout"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def split_of(path: Path) -> str | None:
    """The split that a relative path declares, or None.

    The outermost folder that names a split decides, then the file. A name declares a split where
    its first or last word is one of ``WORDS``: ``train-00000-of-00002.jsonl``, ``wiki.valid.txt``
    and ``en_test`` do, ``contest.txt`` and ``my-test-notes.txt`` do not. Suffixes and the numbers
    of shards are no words.
    """
    for part in (*path.parts[:-1], _without_suffixes(path.name)):
        words = [w for w in re.split(r"[^a-z]+", part.lower()) if w and w != "of"]
        for word in (*words[:1], *words[-1:]):
            if word in WORDS:
                return WORDS[word]
    return None


def _without_suffixes(name: str) -> str:
    """``wiki.train.jsonl.gz`` without its format and compression: ``wiki.train``."""
    path = Path(name)
    if path.suffix.lower() == ".gz":
        path = path.with_suffix("")
    return path.stem


@dataclass(frozen=True, kw_only=True)
class Sorted:
    """Files by split. ``files`` is all of them under the split ``"all"`` where none is declared."""

    declared: bool
    files: tuple[tuple[str, Path], ...]
    left_out: tuple[Path, ...]  # files of no split, beside those of declared ones
    unused: tuple[Path, ...]  # files that look like splits, where none is declared

    @property
    def splits(self) -> tuple[str, ...]:
        """The declared splits in the order train, validation, test."""
        return tuple(s for s in SPLITS if any(split == s for split, _ in self.files))


def sort_into_splits(files: Sequence[Path], folder: Path) -> Sorted:
    """Sort files into the splits that their paths below ``folder`` declare.

    Splits are declared where there is a training split and another one, and at least half of the
    files are in splits: in a folder of source code, ``train.py`` and ``tests/`` declare nothing.
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
