"""Where the parameters of a network lie on several devices, and programs that run on all of them.

The devices form a mesh with two axes, ``DATA`` and ``FSDP``. Sequences are split over both. Large
parameters are split over ``FSDP``: devices that differ only in their place along this axis hold one
copy together. There is one such copy for each place along ``DATA``. If ``FSDP`` has length 1, every
device holds all parameters.
"""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sedd.errors import FieldError
from sedd.networks.shard import Shard, whole
from sedd.types import Array, Bool, Params

DATA, FSDP = "data", "fsdp"
BOTH = (DATA, FSDP)
SEQUENCES = PartitionSpec(BOTH)  # of arrays whose first axis has a row for each sequence
LEAST_SPLIT = 2**17  # entries; gathering a smaller array costs more than keeping it whole


def device_mesh(devices: Sequence[Any] | None = None, *, fsdp: int | None = 1) -> Mesh:
    """Arrange devices as a mesh with the axes ``data`` and ``fsdp``.

    Args:
        devices: the devices; by default all devices of all processes.
        fsdp: how many devices share one copy of the parameters; None for all.

    Raises:
        FieldError: if ``fsdp`` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    fsdp = len(devices) if fsdp is None else fsdp
    if fsdp < 1 or len(devices) % fsdp:
        divisors = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise FieldError(
            "fsdp",
            f"must divide the {len(devices)} devices, got {fsdp}; these do: "
            f"{', '.join(map(str, divisors))}",
        )
    return Mesh(np.asarray(devices).reshape(-1, fsdp), BOTH)


def split_axes(params: Params, mesh: Mesh, stacked: str | None) -> Any:
    """Choose the axis along which each parameter is split; small arrays stay whole.

    Args:
        params: the parameters, possibly abstract.
        mesh: from ``device_mesh``.
        stacked: the name of the subtree whose arrays have an axis of layers in front. That axis is
            never split: a scan over the layers takes slices of it.

    Returns:
        A tree of axes, counted from the end (-1 is the last one), and 0 for no axis. The axis is
        the longest whose length the number of parts divides.
    """
    parts = mesh.shape[FSDP]

    def axis_of(path, leaf):
        first = 1 if is_stacked(path, stacked) else 0
        fits = [axis for axis in range(first, leaf.ndim) if leaf.shape[axis] % parts == 0]
        if parts == 1 or leaf.size < LEAST_SPLIT or not fits:
            return 0
        return max(fits, key=lambda axis: leaf.shape[axis]) - leaf.ndim

    return jax.tree_util.tree_map_with_path(axis_of, params)


def is_stacked(path: Any, stacked: str | None) -> bool:
    """Whether a path of ``jax.tree_util`` leads into the subtree of this name."""
    return stacked in jax.tree_util.keystr(path, simple=True, separator="/").split("/")


def partition(leaf, axis: int) -> PartitionSpec:
    """The partition of an array that is split along ``axis``, as ``split_axes`` returns it."""
    if axis == 0:
        return PartitionSpec()
    return PartitionSpec(*([None] * (leaf.ndim + axis)), FSDP)


def sharded(params: Params, axes: Any) -> Params:
    """Mark the split parameters as ``Shard``, inside a program that runs on the mesh."""
    return jax.tree.map(
        lambda leaf, axis: leaf if axis == 0 else Shard(part=leaf, axis=axis, over=FSDP),
        params,
        axes,
    )


def abstract(tree: Any, shardings: Any) -> Any:
    """Describe placed arrays by shape, type and sharding, for compiling without arrays."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """Copy the parts of a whole array to this process's devices."""
    array = np.asarray(leaf)
    # A CPU device takes over the memory that it is given, so each device gets a copy of its own.
    parts = [
        jax.device_put(np.array(array[index]), device)
        for device, index in sharding.addressable_devices_indices_map(array.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)


@dataclass(frozen=True)
class Placement:
    """How a model is computed on a mesh: the partition of its parameters, and of sequences.

    A placement is hashable: it is a static part of the compiled programs.

    Args:
        mesh: from ``device_mesh``.
        axes: of each parameter, in the order of ``jax.tree.leaves``, the axis along which it is
            split (``split_axes``).
        stacked: the name of the subtree of parameters with an axis of layers in front, as
            ``Network.stacked`` of the network has it; None if there is none.
    """

    mesh: Mesh
    axes: tuple[int, ...]
    stacked: str | None = None

    @classmethod
    def on(cls, mesh: Mesh, params: Params, stacked: str | None) -> "Placement":
        """The placement of parameters, possibly abstract, on a mesh."""
        axes = split_axes(params, mesh, stacked)
        return cls(mesh, tuple(jax.tree.leaves(axes)), stacked)

    @classmethod
    def of(cls, params: Params, stacked: str | None) -> "Placement | None":
        """The placement on the mesh on which parameters lie, split as ``on`` splits them.

        None if they do not lie on a mesh of ``device_mesh``.
        """
        sharding = getattr(next(iter(jax.tree.leaves(params)), None), "sharding", None)
        if not isinstance(sharding, NamedSharding) or sharding.mesh.axis_names != BOTH:
            return None
        return cls.on(sharding.mesh, params, stacked)  # pyright: ignore[reportArgumentType]

    @property
    def num_devices(self) -> int:
        """Devices of the mesh; a batch has a multiple of it."""
        return self.mesh.size

    def shardings(self, params: Params) -> Any:
        """Return where each parameter is to be; the parameters may be abstract."""
        return jax.tree.map(
            lambda spec: NamedSharding(self.mesh, spec),
            self._specs(params),
            is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
        )

    def place(self, params: Params) -> Params:
        """Put the parts of whole parameters on the devices; the result may share their memory."""
        shardings = self.shardings(params)
        if jax.process_count() > 1:
            return jax.tree.map(put, params, shardings)
        return jax.device_put(params, shardings)

    def run(
        self,
        function: Callable[[Params, Any, Any], Any],
        params: Params,
        shared: Any,
        rows: Any,
        out: Any = SEQUENCES,
    ) -> Any:
        """Call ``function(params, shared, rows)`` on every device with its part of the sequences.

        Inside, split parameters that are stacked over layers are ``Shard``s: each network call
        gathers them a layer at a time. All other split parameters are gathered once, before
        ``function`` runs.

        Network calls are then collective: the devices of a copy must make equally many, in the same
        order. Loops whose number of rounds depends on the sequences ask ``Denoiser.anywhere``.

        Args:
            function: returns a pytree of arrays.
            params: the parameters, in this placement.
            shared: a pytree of arrays that every device sees whole.
            rows: a pytree of arrays whose first axis has a row for each sequence.
            out: the partition of the results, or a prefix tree of them. By default their first axis
                has a row for each sequence.
        """
        treedef = jax.tree.structure(params)

        def on_device(params, shared, rows):
            return function(
                self._gathered(sharded(params, treedef.unflatten(self.axes))), shared, rows
            )

        # No sequence depends on another: the devices exchange nothing but parameters.
        return jax.shard_map(
            on_device,
            mesh=self.mesh,
            in_specs=(self._specs(params), PartitionSpec(), SEQUENCES),
            out_specs=out,
            check_vma=False,
        )(params, shared, rows)

    def spread(self, rows: Any) -> Any:
        """Split arrays by sequence, their first axis; each process passes the whole arrays."""
        return _distribute(rows, NamedSharding(self.mesh, SEQUENCES))

    def replicate(self, shared: Any) -> Any:
        """Copy whole arrays to every device; each process passes the same arrays."""
        return _distribute(shared, NamedSharding(self.mesh, PartitionSpec()))

    def _specs(self, params: Params) -> Any:
        axes = jax.tree.structure(params).unflatten(self.axes)
        return jax.tree.map(partition, params, axes)

    def _gathered(self, params: Params) -> Params:
        """Gather the parameters that are not stacked over layers."""

        def gather(path, leaf):
            return leaf if is_stacked(path, self.stacked) else whole(leaf)

        return jax.tree_util.tree_map_with_path(
            gather, params, is_leaf=lambda leaf: isinstance(leaf, Shard)
        )


def _distribute(tree: Any, sharding: NamedSharding) -> Any:
    """Copy arrays, random keys among them, of which this process has the whole to its devices."""

    def copy(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(copy(jax.random.key_data(leaf)))
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree.map(copy, tree)


def anywhere(params: Params, flags: Bool[Array, "*"]) -> Bool[Array, ""]:
    """Whether any flag is set, on this device or one that holds other parts of the parameters.

    Args:
        params: the parameters of a running program; without a ``Shard`` the device is alone.
        flags: flags of this device's sequences.
    """
    found = flags.any()
    for leaf in jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Shard)):
        if isinstance(leaf, Shard):
            return jax.lax.pmax(found.astype(jnp.int32), leaf.over) > 0
    return found


def from_first(value: Any) -> Any:
    """Return the value of the first process, in all processes, which must call it together."""
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    sent = data if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return pickle.loads(np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes())


def on_host(tree: Any) -> Any:
    """Copy arrays to numpy, whole; if several processes hold parts, all must call it together."""

    def copy(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(copy, tree)
