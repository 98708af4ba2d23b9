"""The training step on many devices: each holds a copy of the state, or a part of it.

``DataParallel`` and ``FullySharded`` have the same methods and run the same ``Step``. ``init`` or
``place`` puts a state on the devices, and so does ``Checkpoints.restore_latest`` with
``shardings``; a call runs one step, and ``for_evaluation`` gives parameters that other programs can
use.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sedd.errors import UserError
from sedd.networks.mesh import BOTH, device_mesh, partition, put, sharded, split_axes
from sedd.networks.shard import Shard
from sedd.training.state import TrainState
from sedd.training.step import Batch, Step
from sedd.types import Params

AXIS = "devices"
# The entries of a batch that go to the devices; rows of single texts have no segments.
BATCH = ("x0", "scored", "index", "segment", "weight")


class DataParallel:
    """Runs the step with ``jax.pmap`` and a copy of the state on each device.

    A leaf of the state is one replicated array, without an axis for the devices. Each process feeds
    its own rows of the global batch.

    Args:
        step: the step of one device.
        accumulate: micro-batches that a batch is split into, to save memory.
        devices: all devices of all processes by default.

    Raises:
        UserError: if the batch size is not divisible by devices × micro-batches.
    """

    def __init__(self, step: Step, *, accumulate: int = 1, devices: Sequence[Any] | None = None):
        devices = jax.devices() if devices is None else list(devices)
        check_batch_size(step.batch_size, len(devices), accumulate)
        local = [d for d in devices if d.process_index == jax.process_index()]
        self.num_devices = len(devices)
        self.accumulate = accumulate
        self._num_local = len(local)
        self.shardings = NamedSharding(Mesh(np.asarray(local), (AXIS,)), PartitionSpec())
        self._mesh = device_mesh(devices)
        self.run = jax.pmap(
            partial(step, axis_name=AXIS),
            axis_name=AXIS,
            in_axes=(None, 0),
            out_axes=None,  # the reduction leaves the same state on every device
            devices=devices,
            donate_argnums=0,
        )

    def init(self, make: Callable[[], TrainState]) -> TrainState:
        """Return the state that ``make`` returns, computed directly on every local device."""
        return jax.jit(make, out_shardings=self.shardings)()

    def place(self, state: TrainState) -> TrainState:
        """Copy a state to every local device; a step may donate the copy."""
        return _placed(state, jax.tree.map(lambda _: self.shardings, state))

    def for_evaluation(self, params: Params) -> Params:
        """Return parameters of a placed state on a mesh; valid until a step donates them.

        The arrays are those of the state, without a copy. They are only described anew, as arrays
        that all devices of all processes hold.
        """
        replicated = NamedSharding(self._mesh, PartitionSpec())
        return jax.tree.map(
            lambda x: jax.make_array_from_single_device_arrays(
                x.shape, replicated, [shard.data for shard in x.addressable_shards]
            ),
            params,
        )

    def shard(self, batch: dict) -> dict[str, np.ndarray]:
        """Reshape this process's rows [B_local, …] to [local devices, A, b, …].

        A is the number of micro-batches, b the rows of one. Rows keep their ``index`` in the global
        batch, from which all random draws of an example follow.
        """
        return {
            name: np.reshape(
                batch[name],
                (self._num_local, self.accumulate, -1, *np.shape(batch[name])[1:]),
            )
            for name in BATCH
            if name in batch
        }

    def __call__(self, state: TrainState, batch: dict):
        """Run one step on a batch of the loader, from a placed state, which the step donates.

        Returns:
            The next state, placed like the first, and the metrics of ``Step.update``.
        """
        return self.run(state, self.shard(batch))


class FullySharded:
    """Runs the step with a part of the state on each device (arXiv:1910.02054, stage 3).

    The devices form a mesh (data, fsdp). Large arrays of the state are split over ``fsdp``, and the
    batch over both axes. The step has two parts:

    - ``Step.totals`` runs inside ``shard_map``, where the only collectives are those written in the
      source. Parameters are passed as ``Shard``: a layer is gathered where it is used, in the
      forward and again in the backward pass, and its gradient is scattered, so that no device
      holds all parameters or all gradients.
    - ``Step.update`` runs outside. There the arrays are whole from the program's view, so that a
      global norm needs no special case, and XLA partitions the update by the arrays' shardings.

    Args:
        step: the step of one device.
        accumulate: micro-batches that a batch is split into, to save memory.
        fsdp: devices over which arrays are split; all by default.
        devices: all devices of all processes by default.

    Raises:
        UserError: if ``fsdp`` does not divide the devices, or if the batch size is not divisible by
            devices × micro-batches.
    """

    def __init__(
        self,
        step: Step,
        *,
        accumulate: int = 1,
        fsdp: int | None = None,
        devices: Sequence[Any] | None = None,
    ):
        devices = jax.devices() if devices is None else list(devices)
        self.mesh = device_mesh(devices, fsdp=fsdp)
        check_batch_size(step.batch_size, len(devices), accumulate)
        self.num_devices = len(devices)
        self.accumulate = accumulate
        abstract = jax.eval_shape(lambda: step.first_state(0))  # the seed changes no shape
        axes = split_axes(abstract.params, self.mesh, step.network.stacked)
        param_specs = jax.tree.map(partition, abstract.params, axes)
        self.shardings = jax.tree.map(
            lambda spec: NamedSharding(self.mesh, spec),
            _state_specs(abstract, param_specs),
            is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
        )
        self._rows, same = NamedSharding(self.mesh, PartitionSpec(None, BOTH)), PartitionSpec()

        def trained(tree):
            return step.network.trainable(tree) if abstract.teacher else {}

        # The step sees split parameters as ``Shard``s; specs and optimizer see plain arrays.
        def totals(params, teacher, key, step_number, batch):
            teacher = sharded(teacher, trained(axes))
            totals = step.totals(
                sharded(params, axes), key, step_number, batch, axis_name=BOTH, teacher=teacher
            )
            grads = jax.tree.map(
                lambda leaf: leaf.part if isinstance(leaf, Shard) else leaf,
                totals["grads"],
                is_leaf=lambda leaf: isinstance(leaf, Shard),
            )
            return totals | {"grads": grads}

        mapped = jax.shard_map(
            totals,
            mesh=self.mesh,
            in_specs=(param_specs, trained(param_specs), same, same, self._rows.spec),
            out_specs={
                "grads": step.network.trainable(param_specs),
                **dict.fromkeys(("nats", "terms", "tokens", "read"), same),
            },
            check_vma=False,  # gradients are taken inside, and ``sum_over_devices`` sums them
        )

        def run(state: TrainState, batch: Batch):
            totals = mapped(state.params, state.teacher, state.key, state.step, batch)
            return step.update(state, totals)

        whole = NamedSharding(self.mesh, same)
        self.run = jax.jit(run, donate_argnums=0, out_shardings=(self.shardings, whole))

    def init(self, make: Callable[[], TrainState]) -> TrainState:
        """Return the state that ``make`` returns, computed in parts: no device holds all of it."""
        return jax.jit(make, out_shardings=self.shardings)()

    def place(self, state: TrainState) -> TrainState:
        """Copy the parts of a whole state to their devices; a step may donate the copies."""
        return _placed(state, self.shardings)

    def for_evaluation(self, params: Params) -> Params:
        """Return parameters of a placed state on the mesh; valid until a step donates them."""
        return params

    def shard(self, batch: dict) -> dict[str, jax.Array]:
        """Make global arrays [A, B/A, …] of this process's rows [B_local, …] and the others' rows.

        A is the number of micro-batches, B the global batch size. The second axis is split over all
        devices.
        """
        return {
            name: jax.make_array_from_process_local_data(
                self._rows,
                np.reshape(batch[name], (self.accumulate, -1, *np.shape(batch[name])[1:])),
            )
            for name in BATCH
            if name in batch
        }

    def __call__(self, state: TrainState, batch: dict):
        """Run one step on a batch of the loader, from a placed state, which the step donates.

        Returns:
            The next state, placed like the first, and the metrics of ``Step.update``.
        """
        return self.run(state, self.shard(batch))


def _state_specs(state: TrainState, param_specs: Any) -> TrainState:
    """The partition of each array of the state.

    The optimizer's averages have the path of their parameter at the end of their own path, and its
    shape: such arrays are split like the parameter. All others are replicated.
    """
    names = partial(jax.tree_util.keystr, simple=True, separator="/")
    known = {
        names(path): (leaf.shape, spec)
        for (path, leaf), spec in zip(
            jax.tree_util.tree_flatten_with_path(state.params)[0],
            jax.tree.leaves(param_specs, is_leaf=lambda x: isinstance(x, PartitionSpec)),
            strict=True,
        )
    }

    def spec_of(path, leaf):
        parts = names(path).split("/")
        for start in range(len(parts)):
            shape, spec = known.get("/".join(parts[start:]), (None, None))
            if shape == leaf.shape:
                return spec
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec_of, state)


def _placed(state: TrainState, shardings: TrainState) -> TrainState:
    """Copy a whole state to the devices; the copy shares no memory with ``state``.

    Arrays are copied one by one through the host. ``jax.device_put`` would reuse an array that is
    already on a device as its first replica, and a step would then donate the caller's array.
    """
    key: Any = shardings.key
    placed = jax.tree.map(
        put,
        replace(state, key=jax.random.key_data(state.key)),
        replace(shardings, key=NamedSharding(key.mesh, PartitionSpec())),
    )
    return replace(placed, key=jax.random.wrap_key_data(placed.key))


def check_batch_size(batch_size: int, num_devices: int, accumulate: int) -> None:
    """Raise UserError unless every micro-batch of every device has the same number of rows."""
    if accumulate < 1:
        raise UserError(f"accumulate must be at least 1, got {accumulate}")
    unit = num_devices * accumulate
    if batch_size < 1 or batch_size % unit:
        nearest = max(unit, round(batch_size / unit) * unit)
        raise UserError(
            f"batch_size must be divisible by devices × accumulate = {num_devices} × {accumulate} "
            f"= {unit}, got {batch_size}; the nearest that is: {nearest}"
        )
