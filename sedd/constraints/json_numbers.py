"""Regexes of decimals between bounds, and of multiples of whole numbers.

The idea. Decimals of at most six digits after the point are whole numbers of units of 10⁻⁶, so
bounds become whole numbers. The whole numbers from ``low`` to ``high`` of equal width are a union
of products of digit ranges (``Span``): 234 to 567 is 23[4-9], 2[4-9][0-9], [34][0-9][0-9],
5[0-5][0-9] and 56[0-7]. Other widths and the sign are separate alternatives.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import groupby
from typing import Any

from sedd.constraints.json_text import Path, one_of, refuse, repeat, show

Span = tuple[tuple[str, str], ...]  # the smallest and the largest digit at each place

BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
INTEGER_DIGITS = 15  # readers that use doubles represent all such integers exactly
FRACTION_DIGITS = 6  # at most, after the point
BOUND_DIGITS = 19  # of the largest supported bound of an integer: those of 64 bits
# Below this magnitude, neighbouring decimals of FRACTION_DIGITS are different doubles. A number
# written below an exclusive bound is then also read as below it.
EXACT = 10**9
MAX_MULTIPLES = 1_000  # of each sign that are listed, if the step is no power of 10


def number(parts: Sequence[tuple[Mapping[str, Any], Path]], path: Path, kind: str) -> str | None:
    """The regex of the decimals that satisfy the bounds and ``multipleOf`` of every part.

    Args:
        parts: schemas with their paths.
        path: the path of the number, for messages.
        kind: "integer", "number" (whole numbers included) or "fraction" (whole numbers excluded).

    Returns:
        The regex; None if no decimal with at most ``FRACTION_DIGITS`` after the point satisfies
        them.
    """
    step = 1
    for schema, at in parts:
        if "multipleOf" in schema:
            step = math.lcm(step, _step(schema["multipleOf"], (*at, "multipleOf")))
            kind = "integer" if kind == "number" else kind
    if kind == "fraction":
        return _fractions(parts, path, step)
    whole = kind == "integer"
    found = _interval(parts, whole)
    if found is None:
        return None
    low, high = found
    zeros = 0
    while step % 10 == 0:
        step, zeros = step // 10, zeros + 1
    unit = 10**zeros
    low, high = -(-low // unit), high // unit
    texts = _multiples(low, high, step) if step > 1 else _signed(low, high, whole)
    if not zeros or not texts:
        return one_of(texts) if texts else None
    others = _multiples(low, high, step, zero=False) if step > 1 else _signed(low, high, True, 1)
    shown = [f"{one_of(others)}{'0' * zeros}"] if others else []
    return one_of([*(["0"] if low <= 0 <= high else []), *shown])


def _step(value: Any, path: Path) -> int:
    """The value of ``multipleOf``."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not (known and 1 <= value < 10**INTEGER_DIGITS and value == int(value)):
        refuse(path, f"only whole numbers from 1 up are supported, got {show(value)}")
    return int(value)


def _multiples(low: int, high: int, step: int, *, zero: bool = True) -> list[str]:
    """The multiples of ``step`` from ``low`` to ``high``; if there are many, those nearest to 0."""
    first, last = -(-low // step), high // step
    first = max(first, min(-MAX_MULTIPLES, last - MAX_MULTIPLES))
    last = min(last, max(MAX_MULTIPLES, first + MAX_MULTIPLES))
    return [str(n * step) for n in range(first, last + 1) if n or zero]


def _signed(low: int, high: int, whole: bool, least: int = 0) -> list[str]:
    """Alternatives for the decimals from ``low`` to ``high`` with a magnitude from ``least`` up."""
    magnitudes = _naturals if whole else _decimals
    negative = magnitudes(max(-high, 1), -low) if low < 0 and low <= high else []  # never -0
    positive = magnitudes(max(low, least), high) if high >= max(low, least) else []
    return [*(["-" + one_of(negative)] if negative else []), *positive]


def _fractions(
    parts: Sequence[tuple[Mapping[str, Any], Path]], path: Path, step: int
) -> str | None:
    """The regex of decimals that are no whole numbers; refuses bounds and steps."""
    bounded = any(key in schema for schema, _ in parts for key in BOUNDS)
    if bounded or step > 1:
        refuse(path, "numbers that are no integers are supported without bounds only")
    return rf"-?(?:0|[1-9][0-9]{{0,8}})\.[0-9]{{0,{FRACTION_DIGITS - 1}}}[1-9]"


def _interval(
    parts: Sequence[tuple[Mapping[str, Any], Path]], whole: bool
) -> tuple[int, int] | None:
    """The smallest and the largest number between all bounds, in units of the last digit.

    The unit is 1 if ``whole``, else 10⁻⁶. None if no number lies between the bounds.
    """
    unit = 1 if whole else 10**FRACTION_DIGITS
    bounds = [
        (key, _bound(schema[key], (*path, key), whole))
        for schema, path in parts
        for key in BOUNDS
        if key in schema
    ]
    digits = INTEGER_DIGITS
    if any(abs(bound) >= 10**digits for _, bound in bounds):
        digits = BOUND_DIGITS
    low, high = 1 - unit * 10**digits, unit * 10**digits - 1
    for key, bound in bounds:
        scaled = bound * unit
        if key == "minimum":
            low = max(low, math.ceil(scaled))
        elif key == "exclusiveMinimum":
            low = max(low, math.floor(scaled) + 1)
        elif key == "maximum":
            high = min(high, math.floor(scaled))
        else:
            high = min(high, math.ceil(scaled) - 1)
    return (low, high) if low <= high else None


def _bound(value: Any, path: Path, whole: bool) -> Fraction:
    """The value of a bound, exactly as the decimal that a schema writes."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        refuse(path, f"expected a number, got {show(value)}")
    largest = 10**BOUND_DIGITS if whole else 10**INTEGER_DIGITS
    if not whole and path[-1].startswith("exclusive"):
        largest = EXACT + 1
    if not abs(value) < largest:
        refuse(path, f"expected a magnitude below {largest}, got {show(value)}")
    # ``repr`` returns the shortest decimal of the double: 0.1, not 0.1000000000000000055….
    return Fraction(value) if value == int(value) else Fraction(repr(value))


def _naturals(low: int, high: int) -> list[str]:
    """Alternatives for the integers from ``low`` >= 0 to ``high``, width by width.

    Consecutive widths that are complete, such as 10 to 99 and 100 to 999, are one alternative.
    """
    texts, full = ["0"] if low == 0 else [], []
    low = max(low, 1)
    for width in range(len(str(low)), len(str(high)) + 1):
        least, most = max(low, 10 ** (width - 1)), min(high, 10**width - 1)
        if least == 10 ** (width - 1) and most == 10**width - 1:
            full.append(width)
        elif least <= most:
            texts += [_digits(span) for span in _spans(str(least), str(most))]
    if full:
        texts.append("[1-9]" + repeat("[0-9]", full[0] - 1, full[-1] - 1))
    return texts


def _decimals(low: int, high: int) -> list[str]:
    """Alternatives for the decimals from ``low`` >= 0 to ``high``, both in units of 10⁻⁶.

    Only the first and the last whole part restrict the digits after the point.
    """
    unit = 10**FRACTION_DIGITS
    (first, above), (last, below) = divmod(low, unit), divmod(high, unit)
    if first == last:
        return [str(first) + _fraction(above, below)]
    texts = []
    if above:
        texts.append(str(first) + _fraction(above, unit - 1))
        first += 1
    if below != unit - 1:
        texts.append(str(last) + _fraction(0, below))
        last -= 1
    if first <= last:
        texts.append(one_of(_naturals(first, last)) + _fraction(0, unit - 1))
    return texts


def _fraction(low: int, high: int) -> str:
    """The regex of the point and the six digits after it, from ``low`` to ``high``.

    Trailing zeros may be left out, and so may the point if all digits are zeros.
    """
    texts = []
    for span in _spans(*(f"{bound:0{FRACTION_DIGITS}}" for bound in (low, high))):
        kept = len(span)
        while kept > 1 and span[kept - 1][0] == "0":
            kept -= 1
        if len(set(span[kept:])) == 1:
            tail = repeat(_digits(span[kept : kept + 1]), 0, len(span) - kept)
        else:
            tail = ""
            for position in reversed(span[kept:]):
                tail = f"(?:{_digits((position,))}{tail})?"
        texts.append(_digits(span[:kept]) + tail)
    return rf"(?:\.{one_of(texts)})" + ("" if low else "?")


def _spans(low: str, high: str) -> Iterator[Span]:
    """The numbers from ``low`` to ``high``, of equal width, as products of digit ranges."""
    width = len(low)
    if set(low) <= {"0"} and set(high) <= {"9"}:
        yield (("0", "9"),) * width
        return
    first, last, rest = int(low[0]), int(high[0]), width - 1
    if first == last:
        yield from (((low[0], low[0]), *span) for span in _spans(low[1:], high[1:]))
        return
    if low[1:] != "0" * rest:
        yield from (((low[0], low[0]), *span) for span in _spans(low[1:], "9" * rest))
        first += 1
    if high[1:] != "9" * rest:
        yield from (((high[0], high[0]), *span) for span in _spans("0" * rest, high[1:]))
        last -= 1
    if first <= last:
        yield ((str(first), str(last)), *(("0", "9"),) * rest)


def _digits(span: Span) -> str:
    """The regex of a product of digit ranges; runs of equal ranges become repeats."""
    return "".join(
        repeat(low if low == high else f"[{low}-{high}]", count, count)
        for (low, high), count in ((pair, len(list(run))) for pair, run in groupby(span))
    )
