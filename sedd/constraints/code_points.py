r"""Sets of code points, and the sets that the character classes of regexes stand for.

ECMAScript and Python disagree about some classes: ``\D`` excludes all Unicode digits in Python and
only ASCII digits in ECMAScript. A ``pattern`` of JSON Schema must mean the same in both, so it gets
the code points on which they agree (``portable_complement``, ``PORTABLE_ANY``).
"""

import re
import sys
from collections.abc import Iterable
from functools import lru_cache

# Code points from the first to the second number of each pair, both included. Pairs ascend and
# neither overlap nor touch.
Ranges = tuple[tuple[int, int], ...]
SURROGATES = ((0xD800, 0xDFFF),)  # UTF-8 cannot encode them

CATEGORIES: dict[str, Ranges] = {  # what \d, \s and \w match under re.ASCII
    "d": ((0x30, 0x39),),
    "s": ((0x09, 0x0D), (0x20, 0x20)),
    "w": ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)),
}
LINE_ENDS = ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))  # "." of ECMAScript excludes them
# What each category matches in ECMAScript or in Python with Unicode, as a pattern of the latter.
DISPUTED = {"d": r"\d", "s": r"[\s\ufeff]", "w": r"\w"}


def union(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The same code points as ascending ranges that neither overlap nor touch."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(high, merged[-1][1])
        else:
            merged.append((low, high))
    return tuple(merged)


def complement(ranges: Ranges) -> Ranges:
    """All code points outside ``ranges``."""
    edges = [-1, *(edge for pair in ranges for edge in pair), sys.maxunicode + 1]
    gaps = zip(edges[::2], edges[1::2], strict=True)
    return tuple((low + 1, high - 1) for low, high in gaps if low + 1 < high)


def without_surrogates(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The code points of ``ranges`` that UTF-8 can encode."""
    return complement(union([*complement(union(ranges)), *SURROGATES]))


def without(ranges: Ranges, others: Ranges) -> Ranges:
    """The code points of ``ranges`` that are not in ``others``."""
    return complement(union([*complement(ranges), *others]))


@lru_cache(maxsize=len(DISPUTED))
def portable_complement(category: str) -> Ranges:
    r"""The code points that are outside a category in both ECMAScript and Python.

    They are what ``\D``, ``\S`` and ``\W`` match in a portable pattern; ``category`` is "d", "s" or
    "w".
    """
    text = "".join(map(chr, range(sys.maxunicode + 1)))
    inside = re.finditer(f"(?:{DISPUTED[category]})+", text)
    return complement(union((found.start(), found.end() - 1) for found in inside))


def disputed(category: str) -> Ranges:
    """The code points that a category has in ECMAScript or in Python, but not in ``re.ASCII``."""
    return without(complement(portable_complement(category)), CATEGORIES[category])


EVERYTHING = without_surrogates(((0, sys.maxunicode),))
ANY = without(EVERYTHING, ((0x0A, 0x0A),))  # "." of Python
PORTABLE_ANY = without(EVERYTHING, LINE_ENDS)  # "." of Python and ECMAScript
