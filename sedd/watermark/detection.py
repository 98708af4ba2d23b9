"""Detection of watermarks, in float64 on the host, by exact p-values.

A p-value is the probability that a text which was made without the secret reaches the statistic.
It holds for any text, of people or of models: the only assumption is that the numbers of the
pseudorandom function are independent of the text, which they are if its author did not have them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import special

from sedd.errors import FieldError
from sedd.watermark.green import is_green, list_of
from sedd.watermark.gumbel import surprise
from sedd.watermark.prf import key_of
from sedd.watermark.scheme import Kind, check_gamma

WORK = 2**20  # numbers of the pseudorandom function that are computed at a time


@dataclass(frozen=True, kw_only=True)
class Detection:
    """The result of ``detect``."""

    p_value: float
    """Probability that a text made without the secret gets such a result, at most 1. If several
    nonces, candidates or offsets were tried, the least p-value times their number (Bonferroni)."""
    statistic: float
    """gumbel: the sum of -log(1 - u) over the scored tokens (u as in ``detect``); on average 1 for
    a token without a watermark. green: how many of the distinct pairs are green."""
    scored: int
    """gumbel: number of tokens that were counted, n. green: number of distinct pairs of a green
    list and a token, without the first token of the text."""
    tests: int = 1
    """Number of p-values of which the least was taken."""
    nonce: int | None = None
    """gumbel: the nonce with the least p-value."""
    candidate: int | None = None
    """gumbel: the candidate with the least p-value."""
    offset: int | None = None
    """gumbel: the position of the text's first token when it was drawn, with the least p-value."""


def detect(
    tokens: Sequence[int] | np.ndarray,
    secret: bytes,
    *,
    kind: Kind = "gumbel",
    nonces: int | Sequence[int] = 1,
    candidates: int = 1,
    offsets: int = 0,
    scored: Sequence[bool] | np.ndarray | None = None,
    gamma: float = 0.5,
) -> Detection:
    """Test whether a text was drawn with the watermark of a secret.

    Of n tokens, ``gumbel`` sums S = Σ -log(1 - u), where u in (0, 1) is the number that the secret,
    the nonce and the candidate give to the token at its position. A watermarked token has a large
    u. Without the secret, S follows the Gamma distribution of shape n; its upper tail is the
    p-value. ``green`` counts the green tokens among the distinct pairs of a green list and a token;
    the upper tail is binomial.

    Args:
        tokens: the token ids of the text.
        secret: the secret.
        kind: the kind of watermark.
        nonces: nonces to try: a list, such as the nonces that texts were drawn with, or a number R
            for 0..R-1. Those that ``sedd.sample`` draws by default are random numbers below 2³²,
            which only a list finds. Like the next two arguments, it serves ``gumbel`` only.
        candidates: candidates of each nonce to try: n for texts of best_of_n, which draws n.
        offsets: how many positions the text may be shifted to either side, 0 for none.
        scored: tokens to count, by default all. Given and constrained ones should be left out.
        gamma: the share of green tokens in a list, for ``green``.

    Raises:
        FieldError: if a value is out of its range.
    """
    tokens_L = np.asarray(tokens)
    if tokens_L.ndim != 1 or (tokens_L.size and tokens_L.dtype.kind not in "iu"):
        raise FieldError("tokens", "must be one list of token ids")
    tokens_L = tokens_L.astype(np.int64)
    if ((tokens_L < 0) | (tokens_L >= 2**31)).any():
        raise FieldError("tokens", "must be at least 0 and below 2**31")
    scored_L = np.ones(len(tokens_L), bool) if scored is None else np.asarray(scored, bool)
    if scored_L.shape != tokens_L.shape:
        raise FieldError("scored", f"must be of {len(tokens_L)} tokens, got {scored_L.shape}")
    if kind == "green":
        return _detect_green(tokens_L, secret, scored_L, gamma)
    if kind != "gumbel":
        raise FieldError("kind", f"must be gumbel or green, got {kind!r}")
    if isinstance(nonces, int):
        tried, fits = range(nonces), 1 <= nonces <= 2**32
    else:
        tried = [int(nonce) for nonce in nonces]
        fits = bool(tried) and all(0 <= nonce < 2**32 for nonce in tried)
    if not fits:
        raise FieldError(
            "nonces", f"must be a number of at least 1, or numbers in [0, 2**32), got {nonces}"
        )
    if candidates < 1:
        raise FieldError("candidates", f"must be at least 1, got {candidates}")
    if offsets < 0:
        raise FieldError("offsets", f"must be at least 0, got {offsets}")
    return _detect_gumbel(tokens_L, secret, scored_L, tried, candidates, offsets)


def _detect_gumbel(
    tokens_L: np.ndarray,
    secret: bytes,
    scored_L: np.ndarray,
    nonces: Sequence[int],
    candidates: int,
    offsets: int,
) -> Detection:
    """``detect`` of the kind gumbel."""
    key_W = key_of(secret, "gumbel")
    place_S, token_S = np.flatnonzero(scored_L), tokens_L[scored_L]
    shifts = np.arange(-offsets, offsets + 1)
    tests = len(nonces) * candidates * len(shifts)
    best = Detection(p_value=1.0, statistic=0.0, scored=0, tests=tests)
    for shift_D in np.array_split(shifts, _pieces(len(shifts) * len(place_S), len(shifts))):
        position_DS = place_S + shift_D[:, None]
        there_DS = position_DS >= 0  # a token before the first position cannot have been drawn
        count_D = there_DS.sum(1)
        for nonce, candidate in _pairs(nonces, candidates):
            found_DS = surprise(key_W, np.maximum(position_DS, 0), token_S, nonce, candidate)
            sum_D = np.where(there_DS, found_DS, 0.0).sum(1)
            p_D = np.where(count_D > 0, special.gammaincc(np.maximum(count_D, 1), sum_D), 1.0)
            d = int(p_D.argmin())
            if p_D[d] < best.p_value or best.nonce is None:
                best = Detection(
                    p_value=float(p_D[d]),
                    statistic=float(sum_D[d]),
                    scored=int(count_D[d]),
                    tests=tests,
                    nonce=nonce,
                    candidate=candidate,
                    offset=int(shift_D[d]),
                )
    return replace(best, p_value=min(1.0, best.p_value * tests))


def _pieces(work: int, most: int) -> int:
    """Into how many parts to divide ``most`` shifts, so that each has about ``WORK`` numbers."""
    return min(max(-(-work // WORK), 1), most)


def _pairs(nonces: Sequence[int], candidates: int) -> Iterator[tuple[int, int]]:
    """Every candidate of every nonce."""
    return ((nonce, candidate) for nonce in nonces for candidate in range(candidates))


def _detect_green(
    tokens_L: np.ndarray, secret: bytes, scored_L: np.ndarray, gamma: float
) -> Detection:
    """``detect`` of the kind green; a text's first token has no list."""
    from scipy import stats  # which changes the filters of warnings

    check_gamma(gamma)
    key_W = key_of(secret, "green")
    counted_L = scored_L[1:]
    before_P, token_P = tokens_L[:-1][counted_L], tokens_L[1:][counted_L]
    pairs_P = np.stack([list_of(key_W, before_P).astype(np.int64), token_P], -1)
    _, first = np.unique(pairs_P, axis=0, return_index=True)
    count = len(first)
    green = int(is_green(key_W, before_P[first], token_P[first], gamma).sum())
    p_value = float(stats.binom.sf(green - 1, count, gamma)) if count else 1.0
    return Detection(p_value=p_value, statistic=float(green), scored=count)
