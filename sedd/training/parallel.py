"""One step on many devices: data parallel, a replica of the state on each."""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sedd.errors import UserError
from sedd.training.state import TrainState
from sedd.training.step import Step

AXIS = "devices"


def prepare_cpu() -> None:
    """Give XLA's CPU client enough threads; call it before the first array is made.

    With simulated devices and few cores its collectives wait for each other for ever.
    """
    os.environ.setdefault("NPROC", "16")


class DataParallel:
    """Runs a step with ``jax.pmap``; the state is one replicated array a leaf, without extra axes.

    Each process feeds its own rows of the global batch. Raises UserError when ``batch_size`` cannot
    be divided over ``devices`` (all of every process by default) and ``accumulate`` micro-batches.
    """

    def __init__(
        self,
        step: Step,
        *,
        batch_size: int,
        accumulate: int = 1,
        devices: Sequence[Any] | None = None,
    ):
        devices = jax.devices() if devices is None else list(devices)
        check_batch_size(batch_size, len(devices), accumulate)
        local = [d for d in devices if d.process_index == jax.process_index()]
        self.num_devices = len(devices)
        self.accumulate = accumulate
        self._num_local = len(local)
        self._replicated = NamedSharding(Mesh(np.asarray(local), (AXIS,)), PartitionSpec())
        self._step = jax.pmap(
            partial(step, axis_name=AXIS),
            axis_name=AXIS,
            in_axes=(None, 0),
            out_axes=None,  # the reduction leaves the same state on every device
            devices=devices,
            donate_argnums=0,
        )

    def replicate(self, state: TrainState) -> TrainState:
        """A copy on every local device, which the steps may then donate."""
        # device_put may take an array as the first replica, and a step would donate the caller's.
        return jax.device_put(jax.tree.map(jnp.copy, state), self._replicated)

    def shard(self, batch: dict) -> dict[str, np.ndarray]:
        """Rows [B_local, …] of this process as [local devices, A, b, …].

        Rows keep their ``index`` in the global batch, on which all randomness rests.
        """
        return {
            name: np.reshape(
                batch[name],
                (self._num_local, self.accumulate, -1, *np.shape(batch[name])[1:]),
            )
            for name in ("x0", "scored", "index")
        }

    def __call__(self, state: TrainState, batch: dict):
        """A step from a replicated state, which it donates, and a batch as the loader gives it."""
        return self._step(state, self.shard(batch))


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
