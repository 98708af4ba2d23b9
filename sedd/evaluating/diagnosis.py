"""``sedd.diagnose``: what a model predicts, by distance to the nearest revealed token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sedd.evaluating.inputs import check_sizes, data_set_of, key_of
from sedd.evaluation.datasets import DataSet, TokenRows, Track
from sedd.evaluation.diagnosis import RATES, Diagnosis, measure_predictions
from sedd.evaluation.protocols import protocol
from sedd.model import Model
from sedd.types import Array, Key


def diagnose(
    model: Model,
    x0_BL: str | Path | Any,
    key: Key[Array, ""] | int = 0,
    *,
    rates: Sequence[float] = RATES,
    draws: int = 64,
    scored_BL: Any = None,
    max_sequences: int | None = None,
    batch_size: int = 32,
) -> Diagnosis:
    """Measure what a model predicts at masked positions, by distance to the nearest revealed token.

    See ``docs/diagnostics.md``.

    Args:
        model: an absorbing model, from ``load``.
        x0_BL: token ids [S, L], or a corpus as ``evaluate`` takes it.
        key: a key, or an integer seed.
        rates: distinct probabilities in (0, 1) with which a position is masked.
        draws: the most network calls for each sequence: two for each masking of the text, with
            equally many maskings for each rate; at least 2·``len(rates)``.
        scored_BL: which positions may be masked, [S, L], only with token ids; the others are always
            given. Default: all.
        max_sequences: measure at most so many sequences, evenly spread.
        batch_size: sequences in a batch, over all devices.

    Raises:
        UserError: the model is autoregressive, a block model or of another process, or the data
            cannot be read.
        FieldError: a number is out of its range.

    Example:
        >>> import sedd
        >>> model = sedd.load("runs/tiny")
        >>> found = sedd.diagnose(model, "my.txt", rates=[0.5, 0.9], draws=8, max_sequences=32)
        >>> value, error = found.mean("entropy", rate=0.9, distance=2)
        >>> 0 < error < value
        True
    """
    check_sizes(batch_size, max_sequences)
    data = data_set_of(model, x0_BL, protocol("default"), "default", scored_BL, None, max_sequences)
    return diagnosis_of(
        model,
        data,
        key_of(key),
        rates=rates,
        draws=draws,
        batch_size=batch_size,
    )


def diagnosis_of(
    model: Model,
    data: DataSet,
    key: Key[Array, ""],
    *,
    rates: Sequence[float],
    draws: int,
    batch_size: int,
    track: Track | None = None,
) -> Diagnosis:
    """Measure predictions on the rows of a data set; see ``diagnose``.

    ``track`` wraps the batches to show progress.
    """
    return measure_predictions(
        model.denoiser,
        key,
        data.batches(batch_size, what="diagnosis of ", track=track),
        length=data.length,
        counts_N=np.pad(data.counts, (0, model.process.num_tokens - len(data.counts))),
        train_counts_N=model.train_counts,
        rates=rates,
        draws=draws,
        padded=not isinstance(data.source, TokenRows),
    )
