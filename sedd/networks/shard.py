"""Sharded parameters: each device holds a part of an array, and gathers the array to use it.

The gather has a custom gradient. In the forward pass every device receives the parts of all others
(all-gather). In the backward pass every device has the gradient of the whole array for its own
share of the batch. The optimizer needs the sum of these gradients over devices, and on each device
only the part that the device holds. A reduce-scatter computes exactly this in one collective.

Parts are sent in the compute type, which may have half the bytes. Gradients are summed in the type
of the parameters, because a sum over many devices would lose accuracy in bfloat16.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sedd.types import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Shard:
    """A device's part of an array that is split over the mesh axis named ``over``.

    ``axis`` is the split axis as a negative number, counted from the end: it then stays valid
    where a scan over stacked layers removes the first axis. Shards exist only inside mapped
    programs, where collectives over ``over`` are possible.
    """

    part: Array
    axis: int = field(metadata={"static": True})
    over: str = field(metadata={"static": True})


def whole(tree: Any, dtype: Any = None) -> Any:
    """Replace every ``Shard`` in a pytree by its whole array, cast to ``dtype`` if given.

    Other leaves stay as they are. The gradient of a gathered array is summed over devices, and each
    device receives its own part of the sum.
    """
    return jax.tree.map(
        lambda leaf: (
            _gather(leaf.axis, leaf.over, dtype or leaf.part.dtype, leaf.part)
            if isinstance(leaf, Shard)
            else leaf
        ),
        tree,
        is_leaf=lambda leaf: isinstance(leaf, Shard),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gather(axis, over, dtype, part):
    # Cast before sending: bfloat16 has half the bytes.
    return jax.lax.all_gather(part.astype(dtype), over, axis=part.ndim + axis, tiled=True)


def _forward(axis, over, dtype, part):
    # The backward pass needs only the type of the part: a scalar carries it.
    return _gather(axis, over, dtype, part), jnp.zeros((), part.dtype)


def _backward(axis, over, dtype, like, cotangent):
    return (
        jax.lax.psum_scatter(
            cotangent.astype(like.dtype),
            over,
            scatter_dimension=cotangent.ndim + axis,
            tiled=True,
        ),
    )


_gather.defvjp(_forward, _backward)
