"""A user's features of texts: functions from a list of texts to a number each."""

from collections.abc import Mapping

import numpy as np

from sedd.samplers.verifier import TextScorer, text_numbers


class Features:
    """Several functions on texts as one, from R texts to their features [R, F].

    Args:
        functions: the functions by name: each maps a list of texts to one finite number for each,
            such as 1 or 0 (or True or False) for a property that a text has or lacks.
    """

    def __init__(self, functions: Mapping[str, TextScorer]):
        self.functions = dict(functions)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the features."""
        return tuple(self.functions)

    def __call__(self, texts: list[str]) -> np.ndarray:
        """The features of texts, float64 [R, F].

        Raises:
            UserError: a function raises, or does not return a finite number for each text.
        """
        columns = [
            text_numbers(function, texts, f"feature {name}", "value")
            for name, function in self.functions.items()
        ]
        return np.stack(columns, 1)
