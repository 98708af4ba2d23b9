"""Rows of tokens with weights: texts that a model has drawn, weighted to another law.

A line of ``sample.py --method weigh`` is a JSON object with ``tokens``, ``weight`` and, if text was
given, the positions ``given``. The tokens are used as they are: a text that is encoded again may
have others.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from sedd.data.base import Corpus
from sedd.data.packing import Packed, text_size
from sedd.data.records import WEIGHTED, is_weighted
from sedd.data.tokenizers import Tokenizer
from sedd.errors import UserError


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightedRows(Packed):
    """Rows in memory, each with the weight of its loss; given tokens are not scored."""

    scored: np.ndarray  # [S, L]

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        indices = self.checked(indices)
        tokens_SL = self.tokens.reshape(-1, self.length)
        return tokens_SL[indices].astype(np.int32), self.scored[indices]


def read_weighted(corpus: Corpus, tokenizer: Tokenizer, split: str, *, length: int) -> WeightedRows:
    """Read a split of weighted lines; their weights are divided by their mean.

    Args:
        corpus: a corpus of records whose lines are weighted.
        tokenizer: the tokenizer of the model that drew the tokens.
        split: split of the corpus.
        length: tokens in a row, which every line must have.

    Raises:
        UserError: a line has another number of tokens, an id that is no token, or a weight below 0
            or not finite; or all weights are 0.
    """
    name = f"{corpus.name} ({split})"
    tokens, weights, scored = [], [], []
    for line in corpus.documents(split):
        record = json.loads(line)
        where = record["where"]
        if not is_weighted(record):
            raise UserError(f"{where}: other lines have tokens and a weight, and this one does not")
        tokens_L, scored_L = _row(record, where, tokenizer.num_tokens, length)
        tokens.append(tokens_L)
        scored.append(scored_L)
        weights.append(float(record["weight"]))
    if not tokens:
        raise UserError(f"{name} holds no lines")
    weight_S, tokens_SL, scored_SL = np.array(weights), np.stack(tokens), np.stack(scored)
    if not weight_S.any():
        raise UserError(f"{name}: all weights are 0, so that there is nothing to learn")
    counts = np.bincount(tokens_SL[scored_SL], minlength=tokenizer.num_tokens)
    meta = {"counts": counts, "num_documents": 0, "text_characters": 0, "text_bytes": 0}
    characters, size = text_size(meta, counts, tokenizer)
    digest = hashlib.sha256(tokens_SL.tobytes() + scored_SL.tobytes() + weight_S.tobytes())
    return WeightedRows(
        name=name,
        num_rows=len(weight_S),
        length=length,
        num_tokens_total=int(scored_SL.sum()),
        text_characters=characters,
        text_bytes=size,
        counts=counts,
        pad_id=tokenizer.pad_id,
        tokens=tokens_SL.ravel(),
        spans=None,
        digest=digest.hexdigest(),
        weights=weight_S / weight_S.mean(),
        scored=scored_SL,
    )


def _row(
    record: dict[str, Any], where: str, num_tokens: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a line, and which are scored; UserError that names the line."""
    try:
        tokens_L = np.array(record["tokens"], np.int32)
        given = np.array(record.get("given", []), np.int64)
        weight = float(record["weight"])
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{where}: {' and '.join(WEIGHTED)} must be numbers") from None
    if tokens_L.shape != (length,):
        raise UserError(
            f"{where}: it has {tokens_L.size} tokens and --data.length is {length}: give "
            f"--data.length {tokens_L.size}"
        )
    if not ((tokens_L >= 0) & (tokens_L < num_tokens)).all():
        raise UserError(f"{where}: the ids of tokens must be in 0..{num_tokens - 1}")
    if not (np.isfinite(weight) and weight >= 0):
        raise UserError(f"{where}: a weight must be a finite number from 0 on, got {weight}")
    if given.size and not (given.min() >= 0 and given.max() < length):
        raise UserError(f"{where}: given positions must be in 0..{length - 1}")
    scored_L = np.ones(length, bool)
    scored_L[given] = False
    return tokens_L, scored_L
