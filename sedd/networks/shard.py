"""Sharded parameters: each device holds a part, and gathers the whole array where it is used.

The gather has a gradient of its own. Forward, every device receives all parts. Backward, every
device has the gradient of the whole array on its own batch; what the optimizer needs is the sum of
these over devices, and of that sum only the device's own part. One collective, a reduce-scatter,
gives exactly this. The parts travel in the compute type, which may be half as wide, but gradients
are summed in the shard's own type.
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
    """A device's part of an array that is split over the mesh axis ``over``.

    ``axis`` is the split axis, counted from the end, because a scan over stacked layers removes the
    first axis. Shards exist inside mapped programs only.
    """

    part: Array
    axis: int = field(metadata={"static": True})
    over: str = field(metadata={"static": True})


def whole(tree: Any, dtype: Any = None) -> Any:
    """Gather every ``Shard`` of the tree, in ``dtype`` if given; other leaves stay as they are.

    Gradients of gathered arrays are summed over devices and scattered: each keeps its own part.
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
    # Converted before it is sent: bfloat16 has half the bytes.
    return jax.lax.all_gather(part.astype(dtype), over, axis=part.ndim + axis, tiled=True)


def _forward(axis, over, dtype, part):
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
