"""The interface of a constraint to the samplers."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from sedd.types import Array, Bool, Int, Key

Read = Callable[[Array], Array]  # positions [B, K] -> log conditionals [B, K, N]


class Constraint(ABC):
    """A joint condition on the tokens of some positions of each sequence. A pytree.

    Samplers on absorbing processes choose the positions to reveal as without a constraint, and take
    their tokens from ``propose``. A proposal satisfies the condition as a whole, so whichever part
    of it is revealed, the rest can still be completed.
    """

    wants_commit: bool  # whether a proposal depends on the positions that the sampler will reveal

    @abstractmethod
    def inside(self, length: int) -> Bool[Array, "B L"]:
        """The positions under the constraint."""

    @abstractmethod
    def propose(
        self,
        keys_B: Key[Array, " B"],
        x_BL: Int[Array, "B L"],
        commit_BL: Bool[Array, "B L"],
        read: Read,
        mask_id: int,
    ) -> Int[Array, "B L"]:
        """Clean tokens for the positions under the constraint.

        Args:
            keys_B: one key for each sequence; the noise depends on key and position alone.
            x_BL: the current tokens; those other than ``mask_id`` are kept.
            commit_BL: the masked positions that the sampler is going to reveal.
            read: log conditionals at some positions [B, K]; called for a chunk of positions at a
                time, so that no array has a row of the vocabulary for every position.
            mask_id: the id of the mask.

        Returns:
            Tokens [B, L]: the proposal under the constraint, ``x_BL`` elsewhere, and -1 where the
            log conditionals hold nan.
        """

    @abstractmethod
    def repeat(self, count: int) -> "Constraint":
        """The constraint of a batch in which every sequence stands ``count`` times in a row."""
