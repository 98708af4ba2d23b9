"""Corpora by name: what the user writes and what it opens."""

import difflib
import math
import re
from pathlib import Path

from sedd.data.base import Corpus, MappedCorpus, Mixture, WithHeldOut
from sedd.data.catalogue import (
    BENCHMARKS,
    ELSEWHERE,
    BenchmarkCorpus,
    BillionWords,
    CatalogueCorpus,
    HubCorpus,
)
from sedd.data.embedded import Addresses, StandardLibrary
from sedd.data.files import exists, open_files
from sedd.errors import UserError

__all__ = ["NAMES", "Corpus", "MappedCorpus", "Mixture", "open_corpus", "parse_mixture"]

NAMES = ("sotu", "stdlib", *BENCHMARKS, "lm1b", *ELSEWHERE)
FORMS = "tfds:NAME, hf:OWNER/NAME, or the path of a file, a folder or a pattern"
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|nan|inf"
WEIGHTED = re.compile(rf"(?P<name>.*)\*\s*(?P<weight>{NUMBER})", re.IGNORECASE)


def open_corpus(spec: str, *, cache_dir: Path) -> Corpus:
    """The corpus of a name in ``NAMES`` (``corpus:NAME`` too) or of one of the other forms.

    ``tfds:NAME[/config][:text_key]`` is of the TensorFlow Datasets catalogue,
    ``hf:OWNER/NAME[/config][:text_key]`` of the Hugging Face hub; both are prepared here. Anything
    else is a path (``open_files``). Where one of these declares a train split and no validation,
    that is held out of it (``hold_out``). ``UserError`` where there is nothing of that name.

    Example:
        >>> from pathlib import Path
        >>> from sedd.data.corpora import open_corpus
        >>> corpus = open_corpus("my.txt", cache_dir=Path("cache"))
        >>> corpus.splits, next(corpus.documents("all"))[:7]
        (('train', 'validation', 'all'), 'the cat')
    """
    kind, colon, rest = spec.partition(":")
    if colon and kind == "tfds":
        return WithHeldOut.of(CatalogueCorpus.of(spec, rest, cache_dir))
    if colon and kind == "hf":
        return WithHeldOut.of(HubCorpus.of(spec, rest, cache_dir))
    name = rest if colon and kind == "corpus" else spec
    if name == "sotu":
        return Addresses(name=spec)
    if name == "stdlib":
        return StandardLibrary(name=spec)
    if name == "lm1b":
        return BillionWords.of(spec, "lm1b:text", cache_dir)
    if name in ELSEWHERE:
        return open_corpus(ELSEWHERE[name], cache_dir=cache_dir)
    if name in BENCHMARKS:
        return BenchmarkCorpus.of(name, cache_dir)
    if name == spec and name and (corpus := open_files(spec)) is not None:
        return WithHeldOut.of(corpus)
    if name == spec and re.search(r"[/\\*?]|\.\w+$", name):
        raise UserError(f"no such file, folder or pattern: {name}")
    near = difflib.get_close_matches(name, NAMES, n=1)
    hint = f", did you mean {near[0]!r}?" if near else "."
    raise UserError(f"unknown corpus {name!r}{hint} There are {', '.join(NAMES)}; {FORMS}")


def parse_mixture(spec: str) -> list[tuple[str, float]]:
    """The parts and weights of ``sotu*0.7+stdlib*0.3``; a part without a weight has weight 1.

    Weights are positive and relative to each other. Files, folders and patterns that exist are
    taken as they stand, whatever characters are in them: of ``a+b.txt+stdlib`` the first part is
    the file ``a+b.txt`` where there is one.
    """
    pieces = re.split(r"(?<!\d[eE])\+", spec)
    parts = []
    while pieces:
        # The longest run of pieces that is a path, else a single piece.
        for size in range(len(pieces), 0, -1):
            name, weight = _weighted("+".join(pieces[:size]))
            if size == 1 or exists(name):
                break
        del pieces[:size]
        if not name:
            raise UserError(f"mixture {spec!r}: a part is empty; write NAME*WEIGHT+NAME*WEIGHT")
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(
                f"mixture {spec!r}: the weight of {name} must be positive, got {weight}"
            )
        parts.append((name, weight))
    return parts


def _weighted(part: str) -> tuple[str, float]:
    """A part's name and weight; a path that exists keeps what looks like a weight."""
    if exists(part):
        return part, 1.0
    match = WEIGHTED.fullmatch(part.strip())
    if match is None:
        return part.strip(), 1.0
    return match["name"].strip(), float(match["weight"])
