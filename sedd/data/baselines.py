"""Baselines that any model should beat: training frequencies, and a character trigram model.

Reports show them beside a model's figures, so that a reader can tell a model that has learned
something from one that has not.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

CODE_POINTS = 0x110000  # of Unicode: the base distribution is uniform over all of them


def unigram_nats(train_counts_N: np.ndarray, counts_N: np.ndarray) -> float:
    """Cross entropy of evaluated tokens under the training frequencies, in nats per token.

    It is the figure of a model without context that was fitted to the training text. The entropy of
    the evaluated tokens' own frequencies is lower, because it is fitted to these tokens.

    Args:
        train_counts_N: occurrences of each token in the training text. Half a count is added to
            each (Krichevsky and Trofimov, 1981), so that no token has probability 0.
        counts_N: occurrences of each token in the evaluated text.
    """
    return float(-(counts_N * log_unigram(train_counts_N)).sum() / counts_N.sum())


def log_unigram(counts_N: np.ndarray) -> np.ndarray:
    """The log probabilities of tokens by their counts, each with half a count added, [N]."""
    smoothed_N = counts_N + 0.5
    return np.log(smoothed_N) - np.log(smoothed_N.sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class CharacterTrigram:
    """A trigram model of characters with Witten-Bell smoothing (Witten and Bell, 1991).

    p(c | context) = (n(context, c) + d(context)·p(c | shorter)) / (n(context) + d(context)). Here
    n counts occurrences in the training text, d(context) is the number of distinct characters that
    follow the context in it, and ``shorter`` is the context without its first character. The empty
    context backs off to the uniform distribution over code points.
    """

    orders: tuple["_Counts", ...]  # of contexts of 0, 1 and 2 characters

    @classmethod
    def fit(cls, text: str) -> "CharacterTrigram":
        """Count the characters of a training text."""
        points = _points(text)
        return cls(orders=tuple(_Counts.of(points, length) for length in range(3)))

    def nats(self, texts: Iterable[str]) -> tuple[float, int]:
        """Score texts one by one. The first characters of a text have a shorter context.

        Returns:
            The total of −log p in nats, and the number of characters.
        """
        total, characters = 0.0, 0
        for text in texts:
            points = _points(text)
            probs = np.full(len(points), 1 / CODE_POINTS)
            for length, counts in enumerate(self.orders):
                probs[length:] = counts.interpolated(points, probs[length:])
            total -= np.log(probs).sum()
            characters += len(points)
        return float(total), characters


@dataclass(frozen=True, kw_only=True, eq=False)
class _Counts:
    """Counts of the n-grams of one length and of their contexts, looked up by binary search."""

    length: int  # characters of context
    grams: np.ndarray  # sorted keys of the n-grams (``_keys``)
    gram_counts: np.ndarray  # occurrences of each n-gram
    contexts: np.ndarray  # sorted keys of the contexts
    context_counts: np.ndarray  # n-grams that begin with each context
    followers: np.ndarray  # distinct characters after each context

    @classmethod
    def of(cls, points: np.ndarray, length: int) -> "_Counts":
        """Count the n-grams of a text, with ``length`` characters of context each."""
        # The keys are sorted, so that the n-grams of one context are adjacent.
        grams, gram_counts = np.unique(_keys(points, length + 1), return_counts=True)
        contexts, first, followers = np.unique(
            grams // CODE_POINTS, return_index=True, return_counts=True
        )
        context_counts = np.add.reduceat(gram_counts, first) if len(first) else followers
        return cls(
            length=length,
            grams=grams,
            gram_counts=gram_counts,
            contexts=contexts,
            context_counts=context_counts,
            followers=followers,
        )

    def interpolated(self, points: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        """p(character | context) for the n-grams of a text.

        ``shorter`` has the probability of each of these characters under the shorter context.
        """
        keys = _keys(points, self.length + 1)
        gram_count = _look_up(self.grams, self.gram_counts, keys)
        context_count = _look_up(self.contexts, self.context_counts, keys // CODE_POINTS)
        followers = _look_up(self.contexts, self.followers, keys // CODE_POINTS)
        seen = context_count > 0
        total = np.where(seen, context_count + followers, 1)
        return np.where(seen, (gram_count + followers * shorter) / total, shorter)


def _points(text: str) -> np.ndarray:
    """The code points of a text, int64."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)


def _keys(points: np.ndarray, length: int) -> np.ndarray:
    """Each run of ``length`` characters as one number in base ``CODE_POINTS``.

    Three code points of 21 bits fit into the 63 bits of a positive int64.
    """
    count = max(len(points) - length + 1, 0)
    keys = np.zeros(count, np.int64)
    for offset in range(length):
        keys = keys * CODE_POINTS + points[offset : offset + count]
    return keys


def _look_up(sorted_keys: np.ndarray, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The value of each key, and 0 for a key that is not in ``sorted_keys``."""
    if not len(sorted_keys):
        return np.zeros(len(keys), np.int64)
    place = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return np.where(sorted_keys[place] == keys, values[place], 0)


def joined_text(pieces: Sequence[bytes | None], ids: np.ndarray) -> str:
    """Decode ids by the bytes of each token; special tokens, which have none, are skipped."""
    return b"".join([pieces[i] or b"" for i in ids.tolist()]).decode("utf-8", "replace")
