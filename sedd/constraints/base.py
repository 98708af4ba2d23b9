"""The interface of a constraint to the samplers.

``sedd.constraints.spans`` implements it. The interface is a layer below, so that denoiser and
samplers need not know any constraint.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

from sedd.types import Array, Bool, Int, Keys

Read = Callable[[Array], Array]  # positions [B, K] -> log conditionals [B, K, N]


class Constraint(ABC):
    """A joint condition on the tokens of some positions of each sequence; a pytree.

    Samplers on absorbing processes choose the positions to reveal as they do without a constraint,
    and take the tokens from ``propose``. Every proposal satisfies the condition as a whole. So
    after a part of it is revealed, the rest can still be completed.

    Attributes:
        wants_commit: whether a proposal depends on which positions the sampler will reveal.
    """

    wants_commit: bool

    @abstractmethod
    def inside(self, length: int) -> Bool[Array, "B L"]:
        """The positions under the constraint, in sequences of L positions."""

    @abstractmethod
    def propose(
        self,
        keys_B: Keys,
        x_BL: Int[Array, "B L"],
        commit_BL: Bool[Array, "B L"],
        read: Read,
        mask_id: int,
    ) -> Int[Array, "B L"]:
        """Propose clean tokens for the positions under the constraint.

        Args:
            keys_B: keys of the sequences; the noise depends on key and position alone.
            x_BL: the current tokens; those other than ``mask_id`` stay.
            commit_BL: the masked positions that the sampler is going to reveal.
            read: returns log conditionals [B, K, N] at positions [B, K]. It is called for a chunk
                of positions at a time, so that no array has a row for every position.
            mask_id: the id of the mask.

        Returns:
            Tokens [B, L]: the proposal at positions under the constraint, ``x_BL`` elsewhere, and
            -1 where the log conditionals contain nan.
        """

    @abstractmethod
    def repeat(self, count: int) -> "Constraint":
        """The constraint of a batch in which each sequence is repeated ``count`` times in a row."""
