"""Fixed orders of positions, as users name them: forward, backward, random, or a list."""

import jax.numpy as jnp

from sedd.errors import FieldError
from sedd.samplers.noise import random_rank
from sedd.samplers.reveal import dense_rank
from sedd.types import Array, Bool, Int, Key

NAMES = ("forward", "backward", "random")


def check_order(order: str) -> None:
    """Raise FieldError unless ``order`` is one of ``NAMES`` or a list such as ``3,0,2``."""
    try:
        positions = listed(order)
    except ValueError:
        positions = [-1]
    if min(positions, default=0) < 0 or len(set(positions)) < len(positions):
        raise FieldError(
            "order",
            "must be forward, backward, random, or distinct positions from 0 on such as "
            f"3,0,2, got {order!r}",
        )


def listed(order: str) -> list[int]:
    """The positions that an order lists; none if it is one of ``NAMES``, ValueError if no list."""
    return [] if order in NAMES else [int(word) for word in order.split(",")]


def order_ranks(
    order: str, keys_B: Key[Array, " B"], free_BL: Bool[Array, "B L"]
) -> Int[Array, "B L"]:
    """Rank the free positions of each sequence in the order, from 0.

    Free positions that a list leaves out follow from left to right. Positions that are not free
    have the last ranks.

    Args:
        order: an order that ``check_order`` accepts.
        keys_B: a key for each sequence, for the order random.
        free_BL: the positions to rank.
    """
    if order == "random":
        return random_rank(keys_B, free_BL)
    place_L = jnp.arange(free_BL.shape[1])
    if order == "backward":
        place_L = -place_L
    elif positions := listed(order):
        # Listed positions sort before all others: they get the places -k to -1.
        first = jnp.arange(len(positions)) - len(positions)
        place_L = place_L.at[jnp.asarray(positions)].set(first, mode="drop")
    return dense_rank(jnp.broadcast_to(place_L, free_BL.shape), free_BL)
