"""The weights of the schedule ``by_position``, from a file or measured on the training text."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sedd.configuration.config import Config
from sedd.data.packing import Packed, validation_rows
from sedd.errors import FieldError
from sedd.schedules.by_position import CORPUS, EXPECTED, numbers, spelled

MOST_ROWS = 50_000  # of each part of the corpus
LEAST = 0.05  # of the mean weight: a position whose token is always the same has a weight too


def weights_of(config: Config) -> str:
    """The option ``weights`` of the schedule; empty if it has none."""
    return getattr(config.schedule, "weights", "")


def with_weights(config: Config, weights: str) -> Config:
    """The configuration with other weights."""
    schedule = dataclasses.replace(config.schedule, **{"weights": weights})
    return dataclasses.replace(config, schedule=schedule)


def read_weights(config: Config) -> Config:
    """Replace the name of a file by the numbers in it, separated by spaces, commas or new lines.

    Raises:
        FieldError: the option is neither numbers nor a file with numbers.
    """
    given = weights_of(config)
    path = Path(given).expanduser()
    if not given or given == CORPUS or not path.is_file():
        return config  # the schedule checks it
    try:
        text = path.read_text(encoding="utf-8")
        weights = ",".join(text.replace(",", " ").split())
        if not numbers(weights):
            raise FieldError("weights", f"must be {EXPECTED}, got none")
    except OSError as error:
        raise FieldError("schedule.weights", f"{given}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise FieldError("schedule.weights", f"{given}: not UTF-8 text") from None
    except FieldError as error:
        raise FieldError("schedule.weights", f"{given} {error.problem}") from None
    return with_weights(config, weights)


def measure_weights(config: Config, parts: Sequence[Packed]) -> Config:
    """Replace ``corpus`` by the entropy of the tokens at each position, over the mean entropy.

    Positions whose tokens vary most get the largest weights, and are revealed first. The entropies
    are those of the frequencies in at most ``MOST_ROWS`` rows of each part, and at least ``LEAST``
    of their mean.

    Args:
        config: the configuration; returned as it is if its weights are not ``corpus``.
        parts: the packed training split of each part of the corpus.
    """
    if weights_of(config) != CORPUS:
        return config
    rows = [packed.rows(validation_rows(packed, MOST_ROWS)) for packed in parts]
    x0_SL, scored_SL = (np.concatenate(each) for each in zip(*(r[:2] for r in rows), strict=True))
    entropy_L = np.zeros(x0_SL.shape[1])
    for place, (tokens_S, scored_S) in enumerate(zip(x0_SL.T, scored_SL.T, strict=True)):
        counts = np.unique(tokens_S[scored_S], return_counts=True)[1]
        share = counts / max(counts.sum(), 1)
        entropy_L[place] = -(share * np.log(share)).sum()
    mean = max(entropy_L.mean(), 1e-9)
    return with_weights(config, spelled(np.maximum(entropy_L / mean, LEAST)))
