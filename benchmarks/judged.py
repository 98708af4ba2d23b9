"""What benchmarks of judged samples share: text of the model's corpus, an n-gram judge, figures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import sedd
from sedd.configuration.build_data import pack_split
from sedd.data.packing import unigram_entropy
from sedd.evaluation.ngram_judge import NgramJudge

HELD_OUT = 512  # rows of real text, at most
NatsOf = Callable[[np.ndarray], np.ndarray]  # tokens [S, L] -> judged nats per token [S]


def judge_and_text(model: sedd.Model, checkpoint: Path, order: int) -> tuple[NatsOf, np.ndarray]:
    """Count the training text of a model's corpus, and read some of the held-out text.

    Returns:
        A function from tokens [S, L] to the mean nats per token of each sequence, [S] (all tokens
        count, those at the start with a shorter context), and tokens of held-out rows.
    """
    if model.tokenizer is None:
        raise sedd.UserError(f"{checkpoint}: no tokenizer to read the corpus with")
    data, tokenizer = model.config.data, model.tokenizer
    cache_dir = Path(data.cache_dir).expanduser()

    def rows(split, most):
        packed, _ = pack_split(data.corpus, split, tokenizer, data, cache_dir=cache_dir)
        count = packed.num_rows if most is None else min(most, packed.num_rows)
        return packed.rows(np.linspace(0, packed.num_rows - 1, count).astype(int))[0]

    judge = NgramJudge.of(
        rows("train", None).ravel(), model.process.num_tokens, order, encode=tokenizer.encode_batch
    )

    def nats_of(tokens_SL):
        return np.array([judge.nats(ids_L).mean() for ids_L in tokens_SL])

    return nats_of, rows("validation", HELD_OUT)


def entropies(tokens_SL: np.ndarray) -> np.ndarray:
    """The entropy of each sequence's own token frequencies in nats, [S]."""
    return np.array([unigram_entropy(np.bincount(ids_L)) for ids_L in tokens_SL])


def error_of(values_S: np.ndarray) -> float:
    """The standard error of the mean."""
    return float(values_S.std(ddof=1) / len(values_S) ** 0.5)


def mark_held_out(axis: Any, value: float) -> None:
    """Draw the figure of held-out text as a dashed line, and label the axis of calls."""
    axis.axhline(value, color="0.35", lw=1, ls="--")
    axis.annotate(
        "held-out text",
        (1, value),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        color="0.35",
        fontsize=8,
    )
    axis.set_xlabel("network calls a sample")
