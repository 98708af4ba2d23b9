"""Corpora by name: what the user writes and what it opens."""

import difflib
import math
import re
from pathlib import Path

from sedd.data.base import Corpus, HeldOut, Mapped, Mixture
from sedd.data.catalogue import (
    BENCHMARKS,
    ELSEWHERE,
    BenchmarkCorpus,
    BillionWords,
    CatalogueCorpus,
    HubCorpus,
)
from sedd.data.embedded import Addresses, StandardLibrary
from sedd.data.files import open_files
from sedd.errors import UserError

__all__ = ["NAMES", "Corpus", "Mapped", "Mixture", "open_corpus", "parse_mixture"]

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
    """
    kind, colon, rest = spec.partition(":")
    if colon and kind == "tfds":
        return HeldOut.of(CatalogueCorpus.of(spec, rest, cache_dir))
    if colon and kind == "hf":
        return HeldOut.of(HubCorpus.of(spec, rest, cache_dir))
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
        return HeldOut.of(corpus)
    if name == spec and re.search(r"[/\\*?]|\.\w+$", name):
        raise UserError(f"no such file, folder or pattern: {name}")
    near = difflib.get_close_matches(name, NAMES, n=1)
    hint = f", did you mean {near[0]!r}?" if near else "."
    raise UserError(f"unknown corpus {name!r}{hint} There are {', '.join(NAMES)}; {FORMS}")


def parse_mixture(spec: str) -> list[tuple[str, float]]:
    """The parts and weights of ``sotu*0.7+stdlib*0.3``; a part without a weight has weight 1.

    A path that exists as it stands is one part, whatever characters are in it. Weights are positive
    and relative to each other.
    """
    if spec and Path(spec).expanduser().exists():
        return [(spec, 1.0)]
    parts = []
    for part in re.split(r"(?<!\d[eE])\+", spec):
        match = WEIGHTED.fullmatch(part.strip())
        name = match["name"].strip() if match else part.strip()
        weight = float(match["weight"]) if match else 1.0
        if not name:
            raise UserError(f"mixture {spec!r}: a part is empty; write NAME*WEIGHT+NAME*WEIGHT")
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(
                f"mixture {spec!r}: the weight of {name} must be positive, got {weight}"
            )
        parts.append((name, weight))
    return parts
