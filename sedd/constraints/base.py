"""What a constraint is to a sampler."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from sedd.types import Array, Bool, Int, Key

Read = Callable[[Array], Array]  # positions [B, K] -> log conditionals [B, K, N]


class Constraint(ABC):
    """What the tokens of some positions have to be together. A pytree.

    Samplers on the absorbing process decide what to reveal as ever, and draw what it says from
    ``propose``: whatever part of a proposal is revealed, the rest can still be completed.
    """

    wants_commit: bool  # whether a proposal depends on what is going to be revealed of it

    @abstractmethod
    def inside(self, length: int) -> Bool[Array, "B L"]:
        """The positions that it governs."""

    @abstractmethod
    def propose(
        self,
        keys_B: Key[Array, " B"],
        x_BL: Int[Array, "B L"],
        commit_BL: Bool[Array, "B L"],
        read: Read,
        mask_id: int,
    ) -> Int[Array, "B L"]:
        """Clean tokens for the positions that it governs, x's own where they are revealed.

        ``commit_BL`` are the masked positions whose tokens the sampler is going to keep.
        """

    @abstractmethod
    def repeat(self, count: int) -> "Constraint":
        """For a batch in which each sequence stands ``count`` times in a row."""
