"""What the functions of this package are given: a key, sizes, and a corpus or token ids."""

import os
from pathlib import Path
from typing import Any

import jax

from sedd.errors import FieldError, UserError
from sedd.evaluation.datasets import DataSet, token_data_set
from sedd.evaluation.protocols import Protocol, check_fit
from sedd.model import Model
from sedd.types import Array, Key


def key_of(key: Key[Array, ""] | int) -> Key[Array, ""]:
    """A key, or that of an integer seed."""
    return jax.random.key(key) if isinstance(key, int) else key


def check_sizes(batch_size: int, max_sequences: int | None) -> None:
    """Raise FieldError unless both are at least 1; None is no limit."""
    for field, value in (("batch_size", batch_size), ("max_sequences", max_sequences)):
        if value is not None and value < 1:
            raise FieldError(field, f"must be at least 1, got {value}")


def data_set_of(
    model: Model,
    data: Any,
    protocol: Protocol,
    name: str,
    scored_BL: Any,
    split: str | None,
    max_sequences: int | None,
) -> DataSet:
    """The rows to evaluate: a corpus cut as the protocol says, or the given token ids."""
    data = os.fspath(data) if isinstance(data, Path) else data
    if not isinstance(data, str):
        num_tokens = model.process.num_tokens
        return token_data_set(data, scored_BL, num_tokens=num_tokens, max_sequences=max_sequences)
    if scored_BL is not None:
        raise UserError(
            "scored_BL is only for token ids; for a corpus the protocol decides which tokens are "
            "scored"
        )
    reader = model.text_reader
    check_fit(name, protocol, tokenizer=reader.tokenizer.name, length=model.length)
    return reader.open(data, protocol, name=name, split=split, max_sequences=max_sequences)


def texts_of(model: Model, data: DataSet, number: int) -> list[str]:
    """Decode ``number`` evaluated rows, evenly spread over the data set.

    There are fewer if the data set has fewer. A text has the length of a row, and most statistics
    depend on the length: the samples should have the same.
    """
    tokenizer = model.text_reader.tokenizer
    x0_BL, scored_BL = data.spread(number)
    return [
        tokenizer.decode(x0_L[scored_L]) for x0_L, scored_L in zip(x0_BL, scored_BL, strict=True)
    ]
