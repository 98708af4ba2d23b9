"""A judge that needs no other model: n-grams of the tokens of a training text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sedd.errors import FieldError
from sedd.evaluation.judges import Judgement


@dataclass(frozen=True, kw_only=True)
class NgramJudge:
    """An n-gram model with Witten-Bell smoothing (Witten and Bell, 1991).

    p_k(c | h) = (n(hc) + t(h)·p_{k-1}(c | h')) / (n(h) + t(h)). Here h is the context of k - 1
    tokens, h' is h without its first token, n counts occurrences in the training text, t(h) is the
    number of distinct tokens after h, and p_0 is uniform. After a context that does not occur,
    p_k = p_{k-1}. It sees order - 1 tokens back, and so judges how fluent a text is, and no more.

    ``of`` counts the training text.

    Args:
        encode: returns the token ids of each text.
        num_tokens: the number of different tokens, N.
        tables: for each k = 1, …, order, the windows of k tokens that occur, as numbers in
            ascending order, and how often.
    """

    encode: Callable[[Sequence[str]], list[np.ndarray]]
    num_tokens: int
    tables: tuple[tuple[np.ndarray, np.ndarray], ...]

    @classmethod
    def of(
        cls,
        tokens: np.ndarray,
        num_tokens: int,
        order: int,
        encode: Callable[[Sequence[str]], list[np.ndarray]],
    ) -> "NgramJudge":
        """Count the windows of a training text of N different tokens, up to ``order`` tokens.

        Args:
            tokens: token ids of the training text, [T].
            num_tokens: N.
            order: length of the longest window, at least 1; N**order must be below 2**63.
            encode: returns the ids of each text.

        Raises:
            FieldError: ``order`` is out of its range.
        """
        if order < 1 or num_tokens**order >= 2**63:
            raise FieldError(
                "order",
                f"must be at least 1, with {num_tokens}**order below 2**63, got {order}",
            )
        windows = _windows(tokens.astype(np.int64), num_tokens, order)
        tables = tuple(np.unique(each, return_counts=True) for each in windows)
        return cls(encode=encode, num_tokens=num_tokens, tables=tables)

    @property
    def order(self) -> int:
        """The order n of the n-grams."""
        return len(self.tables)

    @property
    def name(self) -> str:
        """The name of the judge, for reports."""
        return f"{self.order}-grams of the training text"

    @property
    def first_token(self) -> str:
        """How the first token of a text is treated: it is scored, with a shorter context."""
        return "scored"

    def judge(self, texts: Sequence[str]) -> Judgement:
        """Compute the nats of each text; an empty text has 0 nats and 0 tokens."""
        rows = self.encode(texts)
        return Judgement(
            nats_S=np.array([self.nats(ids_L).sum() for ids_L in rows]),
            tokens_S=np.array([len(ids_L) for ids_L in rows]),
        )

    def nats(self, ids_L: np.ndarray) -> np.ndarray:
        """Return -log p of each token of a text, [L]."""
        probs_L = np.full(len(ids_L), 1 / self.num_tokens)
        windows = _windows(np.asarray(ids_L, np.int64), self.num_tokens, self.order)
        for k, wanted in enumerate(windows):
            known, counts = self.tables[k]
            seen = _look_up(known, counts, wanted)
            context = wanted // self.num_tokens
            first, last = (
                np.searchsorted(known, (context + i) * self.num_tokens) for i in range(2)
            )
            cumulative = np.concatenate([[0], np.cumsum(counts)])
            total, distinct = cumulative[last] - cumulative[first], last - first
            lower = probs_L[k:]
            probs_L[k:] = np.where(
                total > 0, (seen + distinct * lower) / np.maximum(total + distinct, 1), lower
            )
        return -np.log(probs_L)


def _windows(tokens: np.ndarray, num_tokens: int, order: int) -> list[np.ndarray]:
    """For each k = 1, …, ``order``: all windows of k tokens, each as one number."""
    found, window = [], np.zeros(len(tokens), np.int64)
    for k in range(order):
        size = max(len(tokens) - k, 0)
        window = window[:size] * num_tokens + tokens[k:]
        found.append(window)
    return found


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key; 0 for a key that is not there. ``keys`` are ascending."""
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0)
