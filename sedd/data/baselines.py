"""Baselines that any model should beat: training frequencies, and a character trigram model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

CODE_POINTS = 0x110000  # of Unicode: the base distribution is uniform over all of them


def unigram_nats(train_counts_N: np.ndarray, counts_N: np.ndarray) -> float:
    """Cross entropy, in nats per token, of tokens with ``counts_N`` under training frequencies.

    Half a count is added to every token (Krichevsky and Trofimov), so that a token that the
    training text lacks has a probability. Unlike the entropy of the tokens' own frequencies, this
    is what a model without context attains that has not seen them.
    """
    smoothed_N = train_counts_N + 0.5
    log_probs_N = np.log(smoothed_N) - np.log(smoothed_N.sum())
    return float(-(counts_N * log_probs_N).sum() / counts_N.sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class CharacterTrigram:
    """A trigram model of characters with Witten-Bell smoothing (Witten and Bell, 1991).

    p(c | context) = (n(context, c) + d(context)·p(c | shorter)) / (n(context) + d(context)), where
    n counts the training text, d(context) is the number of distinct characters that follow the
    context there, and ``shorter`` is the context without its first character. The
    shortest context backs off to the uniform distribution over code points.
    """

    orders: tuple["_Counts", ...]  # of contexts of 0, 1 and 2 characters

    @classmethod
    def fit(cls, text: str) -> "CharacterTrigram":
        """Count the characters of a training text."""
        points = _points(text)
        return cls(orders=tuple(_Counts.of(points, length) for length in range(3)))

    def nats(self, texts: Iterable[str]) -> tuple[float, int]:
        """Total −log p of the texts, each without context at its beginning, and its characters."""
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
    """Counts of the n-grams of one length, as sorted keys, and of their contexts."""

    length: int  # characters of context
    grams: np.ndarray
    gram_counts: np.ndarray
    contexts: np.ndarray
    context_counts: np.ndarray
    followers: np.ndarray  # distinct characters after each context

    @classmethod
    def of(cls, points: np.ndarray, length: int) -> "_Counts":
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
        """p(character | context) of the n-grams of a text, given p under the shorter context."""
        keys = _keys(points, self.length + 1)
        gram_count = _look_up(self.grams, self.gram_counts, keys)
        context_count = _look_up(self.contexts, self.context_counts, keys // CODE_POINTS)
        followers = _look_up(self.contexts, self.followers, keys // CODE_POINTS)
        seen = context_count > 0
        total = np.where(seen, context_count + followers, 1)
        return np.where(seen, (gram_count + followers * shorter) / total, shorter)


def _points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)


def _keys(points: np.ndarray, length: int) -> np.ndarray:
    """Every run of ``length`` (at most 3) characters as one number: 3·21 bits fit in 63."""
    count = max(len(points) - length + 1, 0)
    keys = np.zeros(count, np.int64)
    for offset in range(length):
        keys = keys * CODE_POINTS + points[offset : offset + count]
    return keys


def _look_up(sorted_keys: np.ndarray, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The value of each key, 0 for keys that are not there."""
    if not len(sorted_keys):
        return np.zeros(len(keys), np.int64)
    place = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return np.where(sorted_keys[place] == keys, values[place], 0)


def joined_text(pieces: Sequence[bytes | None], ids: np.ndarray) -> str:
    """The text that tokens spell, from the bytes of each; tokens without bytes are skipped."""
    return b"".join([pieces[i] or b"" for i in ids.tolist()]).decode("utf-8", "replace")
