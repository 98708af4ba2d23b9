"""How Orbax writes and reads the arrays of a checkpoint: by shard, each process its own.

A process copies the shards that it has to write to its memory, and writes them in the background.
Of several replicas of a shard one is written. To read, a process asks for the shards of its own
devices, whatever shards were written; the library finds the pieces.
"""

import functools
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from orbax.checkpoint import v1 as ocp

from sedd.training.named_arrays import Kinds, nested

# Bytes that a process encodes at a time for each tree of a checkpoint; at least one shard.
WRITE_BYTES = 2**24
# Parts of asyncio's messages about further arrays whose reads or writes failed after the first one,
# or were interrupted by a signal.
LEFT_OVER = ('"zarr3" driver', "in OCDBT database", "Task was destroyed but it is pending")


@functools.cache  # once a process
def quiet_orbax() -> None:
    """Suppress the messages that Orbax prints beside the exception of a failed read or write.

    Orbax logs one traceback per thread. The first error closes its event loop, and the arrays still
    in progress then report errors through asyncio's log and ``sys.unraisablehook``. The exception
    itself says all that a user needs. Only commands call this function: importing the package
    changes nothing in the process.
    """
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    logging.getLogger("asyncio").addFilter(
        lambda record: not any(words in record.getMessage() for words in LEFT_OVER)
    )
    report = sys.unraisablehook

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = hook


def writing(largest_shard: int) -> ocp.Context:
    """Return Orbax's settings for saves.

    The compressed shards wait in memory to be written. Without a bound all of them do, which takes
    as much memory again as the shards themselves.

    Args:
        largest_shard: the bytes of the largest shard.
    """
    context = ocp.Context()
    context.memory.write_concurrent_bytes = max(WRITE_BYTES, largest_shard) + 1
    saving = context.array.saving
    # The shards that are written are then those whose checksums are computed, and both use the one
    # copy in the host's memory that JAX keeps with an array.
    saving.use_replica_parallel = False
    saving.enable_pinned_host_transfer = False
    return context


def writable(array: Any) -> jax.Array:
    """Return an array as Orbax accepts it, without a copy if it is on the devices.

    Orbax refuses arrays that a process holds alone if there are several processes. Such an array is
    a replica of the same array in every process (``DataParallel``), and becomes a global one.
    """
    array = jax.device_put(array) if not isinstance(array, jax.Array) else array
    if jax.process_count() == 1 or not array.is_fully_addressable:
        return array
    first = {device.process_index: device for device in reversed(jax.devices())}
    everywhere = Mesh(np.array([first[process] for process in sorted(first)]), ("processes",))
    return jax.make_array_from_single_device_arrays(
        array.shape,
        NamedSharding(everywhere, PartitionSpec()),
        [jax.device_put(array.addressable_data(0), first[jax.process_index()])],
    )


def shard_bytes(array: jax.Array) -> int:
    """Return the bytes of the largest shard of an array."""
    return int(np.prod(array.sharding.shard_shape(array.shape))) * array.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class _OnHost(ocp.arrays.AbstractArray):
    """An array that is to be read whole into the host's memory."""

    shape: tuple[int, ...]
    dtype: Any


def read_tree(path: Path, tree: str, kinds: Kinds, shardings: dict[str, Sharding] | None) -> Any:
    """Read one tree of a checkpoint; raises any exception if it is damaged.

    Each process reads by itself: it waits for no other, which may have failed.

    Args:
        path: the directory of the checkpoint.
        tree: the name of the tree.
        kinds: types and shapes of all arrays of the checkpoint by name.
        shardings: where each array is to be; None for numpy arrays.

    Returns:
        Nested dictionaries of arrays.
    """
    wanted = {
        name: _OnHost(shape=tuple(shape), dtype=jnp.dtype(dtype))
        if shardings is None
        else jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=shardings[name])
        for name, (dtype, shape) in kinds.items()
        if name.split("/")[0] == tree
    }
    alone = ocp.Context()
    alone.multiprocessing.primary_host = jax.process_index()
    alone.multiprocessing.active_processes = {jax.process_index()}
    # The store describes random keys, which a checkpoint does not hold. Python would warn of its
    # coroutine, which is not awaited if an array cannot be read.
    alone.array.saving.array_metadata_store = None
    with alone:
        return ocp.load(str(path), nested(wanted)[tree], checkpointable_name=tree)
