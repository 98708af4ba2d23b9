"""Counts the words, sentences and symbols of documents, for the tests of ``statistics``.

Words are runs of letters, digits and underscores with apostrophes inside them, in lower case. A
sentence ends at ``. ! ?`` followed by white space (after closing quotes or brackets), at an empty
line, or with its document; an abbreviation counts as an end in every document. Symbols are
characters that are neither letters nor digits nor white space.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

WORD = re.compile(r"\w+(?:['’]\w+)*")
SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*\s+|\n\s*\n")
SYMBOL = re.compile(r"[^\w\s]|_")
_STOP_WORDS = """
    a about after all also am an and any are as at be because been before being both but by can
    could did do does doing down during each few for from had has have having he her here hers him
    his how i if in into is it its just may me might more most must my no nor not now of off on once
    only or other our ours out over own shall she should so some such than that the their theirs
    them then there these they this those through to too under until up upon us very was we were
    what when where which while who whom whose why will with would you your yours"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
LONGEST = 200  # words of a sentence or of a run of stop words; longer ones count as this long
# Lengths in words at which the number of distinct words is recorded.
CHECKPOINTS = np.unique(np.round(8 * 2 ** (np.arange(23) / 2)).astype(int))  # 8, 11, 16, … 16384


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Counts of S documents.

    Args:
        num_types: V, the distinct words of all documents.
        counts_SV: how often each word occurs in each document.
        types_SG: entry g is the number of distinct words among the first ``CHECKPOINTS[g]`` words
            of a document; nan if the document has fewer words.
        bigram_types_SG: entry g is the number of distinct pairs of neighbouring words among the
            first ``CHECKPOINTS[g]`` pairs; nan if the document has fewer words.
        sentences_SK: entry k - 1 is the number of sentences of k words, for k = 1..LONGEST; longer
            ones count as LONGEST.
        stop_runs_SK: the same for runs of k stop words between other words.
        words_S: words of each document.
        stop_share_S: the share of stop words among a document's words.
        symbol_share_S: the share of symbols among its characters other than white space.
    """

    num_types: int
    counts_SV: sparse.csr_array
    types_SG: np.ndarray
    bigram_types_SG: np.ndarray
    sentences_SK: np.ndarray
    stop_runs_SK: np.ndarray
    words_S: np.ndarray
    stop_share_S: np.ndarray
    symbol_share_S: np.ndarray

    @property
    def size(self) -> int:
        """The number of documents, S."""
        return len(self.words_S)

    def counts(self, chosen_S: np.ndarray) -> np.ndarray:
        """Return how often each word occurs in the chosen documents together, [V]."""
        return np.asarray(self.counts_SV.T @ chosen_S.astype(np.float32))


def measure(texts: Sequence[str]) -> Documents:
    """Count the words, sentences, stop words and symbols of texts, each one document."""
    ids: dict[str, int] = {}
    rows, types, bigrams, sentences, runs, symbols = [], [], [], [], [], []
    for text in texts:
        words = WORD.findall(text.lower())
        row = np.array([ids.setdefault(word, len(ids)) for word in words], np.int64)
        rows.append(row)
        types.append(_growth(row, len(row)))
        bigrams.append(_growth((row[:-1] << 32) | row[1:], len(row)))
        lengths = [len(WORD.findall(sentence)) for sentence in SENTENCE_END.split(text)]
        sentences.append(_lengths(np.array(lengths)))
        stop = np.array([False, *(word in STOP_WORDS for word in words), False], int)
        runs.append(_lengths(np.flatnonzero(np.diff(stop) < 0) - np.flatnonzero(np.diff(stop) > 0)))
        symbols.append(len(SYMBOL.findall(text)) / max(len("".join(text.split())), 1))
    stop_words = np.array([word in STOP_WORDS for word in ids], bool)
    flat, sizes = np.concatenate([*rows, np.zeros(0, np.int64)]), np.array([len(r) for r in rows])
    owner = np.repeat(np.arange(len(rows)), sizes)
    counts = sparse.csr_array(
        (np.ones(len(flat), np.float32), (owner, flat)), shape=(len(rows), max(len(ids), 1))
    )
    return Documents(
        num_types=len(ids),
        counts_SV=counts,
        types_SG=np.array(types),
        bigram_types_SG=np.array(bigrams),
        sentences_SK=np.array(sentences, np.float32),
        stop_runs_SK=np.array(runs, np.float32),
        words_S=sizes,
        stop_share_S=np.array([stop_words[row].mean() if len(row) else 0.0 for row in rows]),
        symbol_share_S=np.array(symbols),
    )


def _lengths(lengths: np.ndarray) -> np.ndarray:
    """How often each length of 1..LONGEST occurs."""
    return np.bincount(np.minimum(lengths, LONGEST), minlength=LONGEST + 1)[1:]


def _growth(row: np.ndarray, length: int) -> np.ndarray:
    """Distinct entries among the first ones of a row, at each of ``CHECKPOINTS``."""
    first = np.sort(np.unique(row, return_index=True)[1])
    distinct = np.searchsorted(first, CHECKPOINTS).astype(float)
    distinct[length < CHECKPOINTS] = np.nan
    return distinct
