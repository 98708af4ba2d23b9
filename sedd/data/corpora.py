"""Corpora by name: built in, from two catalogues of data sets, or the user's own files."""

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

NAMES = ("sotu", "stdlib", *BENCHMARKS, "lm1b", *ELSEWHERE)  # the built-in corpora
FORMS = "tfds:NAME, hf:OWNER/NAME, or the path of a file, a folder or a pattern"
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|nan|inf"
WEIGHTED = re.compile(rf"(?P<name>.*)\*\s*(?P<weight>{NUMBER})", re.IGNORECASE)


def open_corpus(spec: str, *, cache_dir: Path) -> Corpus:
    """Open the corpus that ``spec`` names.

    ======================================  ====================================================
    a name in ``NAMES``                     a built-in corpus, also written as ``corpus:NAME``
    ``tfds:NAME[/config][:text_key]``       a data set of the TensorFlow Datasets catalogue
    ``hf:OWNER/NAME[/config][:text_key]``   a data set of the Hugging Face hub
    anything else                           a file, a folder or a pattern, see ``open_files``
    ======================================  ====================================================

    Data sets of the two catalogues are downloaded here, and other corpora when they are read. If
    files or a data set have a training split and no validation split, one is held out of it (see
    ``hold_out``).

    Args:
        spec: one of the forms above.
        cache_dir: directory for downloads.

    Raises:
        UserError: if there is no such corpus, or it cannot be downloaded.

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
        raise UserError(f"{name}: no such file, folder or pattern")
    near = difflib.get_close_matches(name, NAMES, n=1)
    hint = f", did you mean {near[0]!r}?" if near else "."
    raise UserError(f"unknown corpus {name!r}{hint} There are {', '.join(NAMES)}; {FORMS}")


def parse_mixture(spec: str) -> list[tuple[str, float]]:
    """Read the parts and weights of a mixture such as ``sotu*0.7+stdlib*0.3``.

    Weights are positive, and only their ratios matter; a part without a weight has weight 1. A part
    may be an existing path that contains ``+`` or ``*``: if there is a file ``a+b.txt``, it is the
    first part of ``a+b.txt+stdlib``.

    Returns:
        A corpus specification and a weight for each part.

    Raises:
        UserError: if a part is empty, or a weight is not positive and finite.
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
    """Split ``NAME*WEIGHT``; the whole part is the name if a path of that name exists."""
    if exists(part):
        return part, 1.0
    match = WEIGHTED.fullmatch(part.strip())
    if match is None:
        return part.strip(), 1.0
    return match["name"].strip(), float(match["weight"])
