"""Regexes of JSON arrays and objects, from the regexes of their elements.

Nothing here knows schemas. The difficulty is in the commas: a comma stands between two elements, so
an optional element brings one along or not, depending on which elements stand before it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from sedd.constraints.json_text import one_of, repeat

MAX_PERMUTED = 4  # distinct items in any order up to here, in the given order beyond


@dataclass(frozen=True, kw_only=True)
class Containers:
    """Writes the regexes of arrays and objects with the given separators.

    Every method returns a regex. ``members`` and ``some`` return the inside of an array or object,
    without brackets or braces. The other methods include them.

    Attributes:
        comma: between elements, with the white space after it.
        colon: between a name and its value, with the white space after it.
    """

    comma: str
    colon: str

    def members(self, pairs: Sequence[str], needed: Sequence[bool]) -> str:
        """A selection of the pairs in their order, with commas between them.

        Args:
            pairs: regexes of elements, or of names with their values.
            needed: whether each pair must be in the selection.
        """
        if not any(needed):
            return f"(?:{self.some(pairs)})?" if pairs else ""
        # Every other pair is written with a comma, on the side of the first needed pair.
        first = needed.index(True)
        before = [f"(?:{pair}{self.comma})?" for pair in pairs[:first]]
        after = [
            self.comma + pair if need else f"(?:{self.comma}{pair})?"
            for pair, need in zip(pairs[first + 1 :], needed[first + 1 :], strict=True)
        ]
        return "".join([*before, pairs[first], *after])

    def some(self, pairs: Sequence[str]) -> str:
        """At least one of n pairs, in their order, with commas between them.

        The pairs are halved: either some of the left half and any of the right, or some of the
        right half alone. This writes n·log n pairs, where the list of all selections has 2ⁿ.
        """
        if len(pairs) == 1:
            return pairs[0]
        left, right = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
        rest = "".join(f"(?:{self.comma}{pair})?" for pair in right)
        return one_of([self.some(left) + rest, self.some(right)])

    def free_object(self, pairs: Sequence[tuple[str, str]], fewest: int, most: float) -> str:
        """An object of ``fewest`` (0 or 1) to ``most`` members, each one of the pairs.

        Args:
            pairs: regexes of a name, quotes included, and of its value.
            fewest: the smallest number of members, 0 or 1.
            most: the largest number of members, at least 1.
        """
        pair = one_of([f"{key}{self.colon}{value}" for key, value in pairs])
        body = f"{pair}{repeat(f'(?:{self.comma}{pair})', 0, most - 1)}"
        return rf"\{{{body}\}}" if fewest else rf"\{{(?:{body})?\}}"

    def array(self, item: str, low: int, high: float, first: Sequence[str] = ()) -> str:
        """An array of ``low`` to ``high`` elements: first those of ``first``, then items."""
        first = first[: int(min(high, len(first)))]
        taken = max(len(first), 1)  # every item after so many elements follows a comma
        rest = ""
        if high > taken:
            rest = repeat(f"(?:{self.comma}{item})", max(low - taken, 0), high - taken)
        elements = [*first, item][:taken] if high else []
        for index, element in reversed(list(enumerate(elements))):
            rest = f"{self.comma if index else ''}{element}{rest}"
            rest = rest if index < low else f"(?:{rest})?"
        return rf"\[{rest}\]"

    def distinct_array(self, texts: Sequence[str], low: int, high: int) -> str:
        """An array of ``low`` to ``high`` <= ``len(texts)`` different elements out of ``texts``.

        Up to ``MAX_PERMUTED`` texts come in any order, more of them in the order given.
        """
        if len(texts) > MAX_PERMUTED:
            needed = [index < low for index in range(len(texts))]
            if high < len(texts):
                texts, needed = texts[:high], needed[:high]
            return rf"\[{self.members(texts, needed)}\]"
        rows = [
            self.comma.join(row)
            for size in range(low, high + 1)
            for row in itertools.permutations(texts, size)
        ]
        return rf"\[{one_of(rows)}\]"
