"""One step on many devices: a replica of the state on each, or a part of it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sedd.errors import UserError
from sedd.networks.shard import Shard
from sedd.training.state import TrainState, init_state, one_replica, whole_on_host
from sedd.training.step import Batch, Step
from sedd.types import Params

AXIS, DATA, FSDP = "devices", "data", "fsdp"
BATCH = ("x0", "scored", "index")  # what of a batch goes to the devices
LEAST_SPLIT = 2**17  # entries; to gather less costs more than to keep it


class DataParallel:
    """Runs a step with ``jax.pmap``; the state is one replicated array a leaf, without extra axes.

    Each process feeds its own rows of the global batch. Raises UserError when ``batch_size`` cannot
    be divided over ``devices`` (all of every process by default) and ``accumulate`` micro-batches.
    """

    def __init__(self, step: Step, *, accumulate: int = 1, devices: Sequence[Any] | None = None):
        devices = jax.devices() if devices is None else list(devices)
        check_batch_size(step.batch_size, len(devices), accumulate)
        local = [d for d in devices if d.process_index == jax.process_index()]
        self.num_devices = len(devices)
        self.accumulate = accumulate
        self._num_local = len(local)
        self._replicated = NamedSharding(Mesh(np.asarray(local), (AXIS,)), PartitionSpec())
        self.run = jax.pmap(
            partial(step, axis_name=AXIS),
            axis_name=AXIS,
            in_axes=(None, 0),
            out_axes=None,  # the reduction leaves the same state on every device
            devices=devices,
            donate_argnums=0,
        )

    def init(self, make: Callable[[], TrainState]) -> TrainState:
        """The state that ``make`` returns, computed on every local device: one copy on each."""
        return jax.jit(make, out_shardings=self._replicated)()

    def place(self, state: TrainState) -> TrainState:
        """Copy a state to every local device; the steps may donate the copy."""
        return _placed(state, jax.tree.map(lambda _: self._replicated, state))

    def for_evaluation(self, params: Params) -> Params:
        """Parameters of a placed state on one device, until a step donates them."""
        return one_replica(params)

    def shard(self, batch: dict) -> dict[str, np.ndarray]:
        """Rows [B_local, …] of this process as [local devices, A, b, …].

        Rows keep their ``index`` in the global batch, on which all randomness rests.
        """
        return {
            name: np.reshape(
                batch[name],
                (self._num_local, self.accumulate, -1, *np.shape(batch[name])[1:]),
            )
            for name in BATCH
        }

    def __call__(self, state: TrainState, batch: dict):
        """A step from a placed state, which it donates, and a batch as the loader gives it."""
        return self.run(state, self.shard(batch))


class FullySharded:
    """Runs the same step with every device holding a part of the state. arXiv:1910.02054, stage 3.

    The devices are a mesh of (data, fsdp). Large arrays of the state are split over ``fsdp``; the
    step gathers a layer where it uses it, in the forward and again in the backward pass, and
    scatters its gradient. That runs inside ``shard_map``: no collective but those that are written
    in the step can appear there. The optimizer runs outside, on whole arrays as the program sees
    them, so that a global norm is one.

    Raises UserError where ``fsdp`` (all devices by default) does not divide the devices, and as
    ``DataParallel`` does.
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
        fsdp = len(devices) if fsdp is None else fsdp
        check_mesh(len(devices), fsdp)
        check_batch_size(step.batch_size, len(devices), accumulate)
        self.num_devices = len(devices)
        self.accumulate = accumulate
        self.mesh = Mesh(np.asarray(devices).reshape(-1, fsdp), (DATA, FSDP))
        abstract = jax.eval_shape(
            lambda: init_state(step.network, step.optimizer, 0)  # the seed changes no shape
        )
        axes = split_axes(abstract.params, fsdp, step.network.stacked)
        param_specs = jax.tree.map(_spec, abstract.params, axes)
        self.shardings = jax.tree.map(
            lambda spec: NamedSharding(self.mesh, spec),
            _state_specs(abstract, param_specs),
            is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
        )
        self._rows = NamedSharding(self.mesh, PartitionSpec(None, (DATA, FSDP)))

        def totals(params, key, batch):
            params = jax.tree.map(
                lambda leaf, axis: leaf if axis == 0 else Shard(part=leaf, axis=axis, over=FSDP),
                params,
                axes,
            )
            totals = step.totals(params, key, batch, axis_name=(DATA, FSDP))
            grads = jax.tree.map(
                lambda leaf: leaf.part if isinstance(leaf, Shard) else leaf,
                totals["grads"],
                is_leaf=lambda leaf: isinstance(leaf, Shard),
            )
            return totals | {"grads": grads}

        mapped = jax.shard_map(
            totals,
            mesh=self.mesh,
            in_specs=(param_specs, PartitionSpec(), self._rows.spec),
            out_specs={
                "grads": param_specs,
                **dict.fromkeys(("nats", "tokens", "read"), PartitionSpec()),
            },
            check_vma=False,  # the gradient is taken inside, and summed by hand
        )

        def run(state: TrainState, batch: Batch):
            key = jax.random.fold_in(state.key, state.step)
            return step.update(state, mapped(state.params, key, batch))

        whole = NamedSharding(self.mesh, PartitionSpec())
        self.run = jax.jit(run, donate_argnums=0, out_shardings=(self.shardings, whole))

    def init(self, make: Callable[[], TrainState]) -> TrainState:
        """The state that ``make`` makes, made in parts: no device ever holds all of it."""
        return jax.jit(make, out_shardings=self.shardings)()

    def place(self, state: TrainState) -> TrainState:
        """Copy the parts of a whole state to their devices; the steps may donate the copies."""
        return _placed(state, self.shardings)

    def for_evaluation(self, params: Params) -> Params:
        """Parameters of a placed state, whole, in the host's memory."""
        return jax.tree.map(whole_on_host, params)

    def shard(self, batch: dict) -> dict[str, jax.Array]:
        """Rows [B_local, …] of this process as its part of a global [A, b, …]."""
        return {
            name: jax.make_array_from_process_local_data(
                self._rows,
                np.reshape(batch[name], (self.accumulate, -1, *np.shape(batch[name])[1:])),
            )
            for name in BATCH
        }

    def __call__(self, state: TrainState, batch: dict):
        """A step from a placed state, which it donates, and a batch as the loader gives it."""
        return self.run(state, self.shard(batch))


def split_axes(params: Params, parts: int, stacked: str | None) -> Any:
    """The axis of each parameter that is split into ``parts``, counted from its end; 0 for none.

    It is the longest that can be divided, and never the axis of the layers, which a scan takes
    apart: the first one of arrays under the name ``stacked``. Small arrays stay whole.
    """

    def axis_of(path, leaf):
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        first = 1 if stacked in names else 0
        fits = [axis for axis in range(first, leaf.ndim) if leaf.shape[axis] % parts == 0]
        if parts == 1 or leaf.size < LEAST_SPLIT or not fits:
            return 0
        return max(fits, key=lambda axis: leaf.shape[axis]) - leaf.ndim

    return jax.tree_util.tree_map_with_path(axis_of, params)


def _spec(leaf, axis: int) -> PartitionSpec:
    if axis == 0:
        return PartitionSpec()
    return PartitionSpec(*([None] * (leaf.ndim + axis)), FSDP)


def _state_specs(state: TrainState, param_specs: Any) -> TrainState:
    """Parameters as given, and whatever has the name and shape of a parameter like it."""
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
    """A copy of a whole state on the devices, which shares no memory with ``state``.

    It is made array by array through the host. ``jax.device_put`` would keep an array that is on
    a device already as the first replica, and a step would then donate the caller's array.
    """
    key: Any = shardings.key
    placed = jax.tree.map(
        _put,
        replace(state, key=jax.random.key_data(state.key)),
        replace(shardings, key=NamedSharding(key.mesh, PartitionSpec())),
    )
    return replace(placed, key=jax.random.wrap_key_data(placed.key))


def _put(leaf, sharding: NamedSharding) -> jax.Array:
    """A copy of a whole array, of which this process makes its own devices' parts."""
    array = np.asarray(leaf)
    # On a CPU a device takes over the memory that it is given: each gets memory of its own.
    parts = [
        jax.device_put(np.array(array[index]), device)
        for device, index in sharding.addressable_devices_indices_map(array.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)


def check_mesh(num_devices: int, fsdp: int) -> None:
    """Raises UserError unless ``fsdp`` divides the devices."""
    if fsdp < 1 or num_devices % fsdp:
        divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
        raise UserError(
            f"training.fsdp must divide the {num_devices} devices, got {fsdp}; these do: "
            f"{', '.join(map(str, divisors))}"
        )


def check_batch_size(batch_size: int, num_devices: int, accumulate: int) -> None:
    """Raises UserError unless every micro-batch of every device has the same number of rows."""
    if accumulate < 1:
        raise UserError(f"accumulate must be at least 1, got {accumulate}")
    unit = num_devices * accumulate
    if batch_size < 1 or batch_size % unit:
        nearest = max(unit, round(batch_size / unit) * unit)
        raise UserError(
            f"batch_size must be divisible by devices × accumulate = {num_devices} × {accumulate} "
            f"= {unit}, got {batch_size}; the nearest that is: {nearest}"
        )
