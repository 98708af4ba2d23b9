"""``sedd.price``: what it costs to reveal several tokens in one network call."""

from pathlib import Path
from typing import Any

from sedd.evaluating.inputs import check_sizes, data_set_of, key_of
from sedd.evaluation.datasets import DataSet, Track
from sedd.evaluation.price import Price
from sedd.evaluation.price_draws import measure_price
from sedd.evaluation.protocols import protocol
from sedd.model import Model
from sedd.types import Array, Key


def price(
    model: Model,
    x0_BL: str | Path | Any,
    key: Key[Array, ""] | int = 0,
    *,
    draws: int = 64,
    max_sequences: int | None = None,
    batch_size: int = 32,
) -> Price:
    """Measure what revealing several tokens in one network call costs a model, in nats.

    See ``docs/parallel_decoding.md``. The result is also the profile of the sampler ``planned``.

    Args:
        model: a time-independent absorbing model, from ``load``.
        x0_BL: token ids [S, L], or a corpus as ``evaluate`` takes it. All tokens are priced; rows
            with padding are refused.
        key: a key, or an integer seed.
        draws: the most network calls for each sequence; the value must be at least 2. With at least
            L draws (and L at most 128) every number of known tokens is measured. Otherwise at most
            ``draws`` numbers, and at most 128, are measured, and those between them are
            interpolated. Each measured number gets equally many calls, so that fewer calls may be
            made; ``Price.draws`` has their number.
        max_sequences: measure at most so many sequences, evenly spread.
        batch_size: sequences in a batch, over all devices.

    Raises:
        UserError: if the model is autoregressive, a block model, depends on the noise level, is of
            another process or was trained with weights of positions (``by_position``), or the data
            cannot be read or have padding.
        FieldError: if a number is out of its range.

    Example:
        >>> import sedd
        >>> model = sedd.load("runs/tiny")  # sequences of 12 tokens
        >>> price = sedd.price(model, "my.txt", draws=12, max_sequences=32)
        >>> price.nats_by_known.shape, sum(price.plan(4))
        ((12,), 12)
        >>> nats, error = price.nats_per_token([2, 2, 4, 4])
        >>> 0 < error < nats
        True
    """
    check_sizes(batch_size, max_sequences)
    data = data_set_of(model, x0_BL, protocol("default"), "default", None, None, max_sequences)
    return price_of(
        model,
        data,
        key_of(key),
        draws=draws,
        batch_size=batch_size,
    )


def price_of(
    model: Model,
    data: DataSet,
    key: Key[Array, ""],
    *,
    draws: int,
    batch_size: int,
    track: Track | None = None,
) -> Price:
    """Measure the price of parallelism on the rows of a data set; see ``price``.

    ``track`` wraps the batches to show progress.
    """
    return measure_price(
        model.denoiser,
        model.schedule,
        key,
        data.batches(batch_size, what="price of ", track=track),
        model=model.digest,
        length=data.length,
        draws=draws,
    )
