"""Diversity and repetition of samples, counted on token ids; see ``docs/sample_quality.md``.

These figures stand beside a generative perplexity, which falls when samples repeat themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sedd.data.packing import unigram_entropy
from sedd.evaluation.measured import Measured, mean_of
from sedd.evaluation.report import Cell


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """Diversity of S samples. Figures with an error are means over samples.

    Args:
        tokenization: the name of the tokenizer whose tokens are counted.
        num_samples: S.
        num_tokens: tokens of all samples.
        length: tokens of a sample.
        entropy: of the frequencies of a sample's own tokens, in nats; at most log of its length.
        distinct: entry n - 1 is the share of distinct n-grams among the n-grams of all samples
            together (arXiv:1510.03055), for n = 1..4. It falls as samples are added.
        repeated_4grams: the share of a sample's 4-grams that have occurred before in the sample
            (arXiv:1908.04319).
        longest_repeat: the length of the longest stretch that occurs twice in a sample, divided by
            the length of the sample; the two occurrences may overlap.
        entropy_S: the entropy of each sample.
    """

    tokenization: str
    num_samples: int
    num_tokens: int
    length: Measured
    entropy: Measured
    distinct: tuple[float, float, float, float]
    repeated_4grams: Measured
    longest_repeat: Measured
    entropy_S: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers; an estimate is [mean over samples, standard error]."""
        return {
            "tokenization": self.tokenization,
            "num_samples": self.num_samples,
            "num_tokens": self.num_tokens,
            "length": list(self.length),
            "entropy": list(self.entropy),
            "distinct": list(self.distinct),
            "repeated_4grams": list(self.repeated_4grams),
            "longest_repeat": list(self.longest_repeat),
        }

    def rows(self) -> list[tuple[Cell, ...]]:
        """Return a row of a table for each figure: its name and its value."""
        return [
            ("length, tokens", self.length),
            ("entropy of a sample, nats", self.entropy),
            *((f"distinct-{n}", share) for n, share in enumerate(self.distinct, start=1)),
            ("repeated 4-grams (rep-4)", self.repeated_4grams),
            ("longest repeat / length", self.longest_repeat),
        ]


def measure_diversity(sequences: Sequence[np.ndarray], *, tokenization: str) -> Diversity:
    """Count n-grams, repeats and entropy on the token ids of each sample.

    Every distinct n-gram gets an integer code, made from the code of its first n - 1 ids and its
    last id. Codes are renumbered for each n, so that they stay small. All samples are counted in
    one pass for each n.

    Args:
        sequences: the token ids of each sample.
        tokenization: the name of their tokenizer.

    Raises:
        ValueError: if there is no sample.
    """
    if not sequences:
        raise ValueError("there is no sample")
    length_S = np.array([len(ids) for ids in sequences])
    flat = np.concatenate([np.asarray(ids, np.int64) for ids in sequences])
    owner = np.repeat(np.arange(len(sequences)), length_S)
    # Tokens from each place to the end of its sample.
    left = np.repeat(np.cumsum(length_S), length_S) - np.arange(len(flat))
    code, distinct, repeated_S = np.zeros(len(flat), np.int64), [], np.zeros(len(sequences))
    ids = np.unique(flat, return_inverse=True)[1]
    for n in range(1, 5):
        following = ids[n - 1 :]
        pair = code[: len(following)] * (len(flat) + 1) + following
        code = np.unique(pair, return_inverse=True)[1]  # the number of the n-gram from each place
        within = left[: len(code)] >= n
        distinct.append(len(np.unique(code[within])) / max(within.sum(), 1))
        if n == 4:
            own = np.unique(owner[: len(code)][within] * (len(flat) + 1) + code[within])
            fresh_S = np.bincount(own // (len(flat) + 1), minlength=len(sequences))
            repeated_S = 1 - fresh_S / np.maximum(length_S - 3, 1)
            repeated_S[length_S < 4] = 0
    entropy_S = np.array(
        [unigram_entropy(np.unique(ids, return_counts=True)[1]) for ids in sequences]
    )
    repeat_S = np.array([longest_repeat(ids) / max(len(ids), 1) for ids in sequences])
    return Diversity(
        tokenization=tokenization,
        num_samples=len(sequences),
        num_tokens=len(flat),
        length=mean_of(length_S),
        entropy=mean_of(entropy_S),
        distinct=(distinct[0], distinct[1], distinct[2], distinct[3]),
        repeated_4grams=mean_of(repeated_S),
        longest_repeat=mean_of(repeat_S),
        entropy_S=entropy_S,
    )


def longest_repeat(ids: np.ndarray) -> int:
    """Return the length of the longest stretch of ids that occurs at two places.

    The two occurrences may overlap. Stretches are compared by prefix doubling: ``ranks[k][i]`` is a
    number for the 2^k ids that begin at i, and is the same for equal stretches. A stretch of any
    length is the union of two overlapping stretches of one length 2^k, so that two numbers
    represent it. Every part of a repeated stretch is repeated too, so bisection over the length
    finds the longest: O(n log² n) for n ids.
    """
    ranks = [np.unique(ids, return_inverse=True)[1].astype(np.int64)]

    def occurs_twice(length):
        k = length.bit_length() - 1
        while len(ranks) <= k:
            pairs = _pairs(ranks[-1], 1 << (len(ranks) - 1), len(ids))
            ranks.append(np.unique(pairs, return_inverse=True)[1].astype(np.int64))
        pairs = _pairs(ranks[k], length - (1 << k), len(ids))
        return len(np.unique(pairs)) < len(pairs)

    low, high = 0, max(len(ids) - 1, 0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if occurs_twice(middle) else (low, middle - 1)
    return low


def _pairs(rank, shift, size):
    """A number for each pair of ranks that are ``shift`` apart."""
    return rank[: len(rank) - shift] * size + rank[shift:]
