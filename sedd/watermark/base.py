"""The interface of a watermark to the denoiser and the samplers.

``sedd.watermark.gumbel`` and ``sedd.watermark.green`` implement it. The interface is some layers
below, so that denoiser and samplers need not know any watermark.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from sedd.networks.rows import Rows
from sedd.types import Array, Float, Int

Neighbours = Callable[[int], Array]
"""Distance, -1 or 1 -> the probabilities [R, N] of the tokens at this distance from each row.

They are those of the model without a watermark. A visible token has the probability 1. The row is 0
where there is no such position, or where the model cannot predict it.
"""


class Watermark(ABC):
    """A change of the draws of a batch that a holder of the secret can detect; a pytree.

    It replaces the noise of the tokens, or changes the conditionals of clean tokens. Each leaf has
    a row for each sequence.

    Attributes:
        replaces_noise: whether the tokens are drawn by ``tokens``. The law of a sampler stays the
            same only if it draws each position once.
    """

    replaces_noise: ClassVar[bool]

    def tokens(self, rows: Rows, log_probs_RN: Float[Array, "R N"]) -> Int[Array, " R"]:
        """Draw a token for each row, with noise that depends on the secret; ``NAN`` from nan."""
        raise NotImplementedError

    def marked(
        self, log_probs_RN: Float[Array, "R N"], rows: Rows, neighbours: Neighbours
    ) -> Float[Array, "R N"]:
        """The log conditionals of masked positions with the watermark in them, normalised."""
        return log_probs_RN

    @abstractmethod
    def repeat(self, count: int) -> "Watermark":
        """The watermark of a batch in which each sequence is repeated ``count`` times in a row."""
