"""Parameters of which each device holds a part, made whole where they are used."""

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

    ``axis`` is the array's axis, counted from its end: a scan over stacked layers takes the first
    axis away. Exists inside mapped programs only.
    """

    part: Array
    axis: int = field(metadata={"static": True})
    over: str = field(metadata={"static": True})


def whole(tree: Any, dtype: Any = None) -> Any:
    """The tree with every ``Shard`` gathered, in ``dtype`` if given; what is whole stays as it is.

    The gradient of a gathered array is summed over the devices in the shard's own type and
    scattered: each keeps the sum of its part.
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
    # Narrowed before it travels: half the bytes.
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
