"""What a training run carries from step to step."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from sedd.networks.base import Network
from sedd.types import Array, Float, Int, Key, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """A pytree. ``step`` counts updates; ``key`` never changes, steps are folded into it."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    ema_params: Params
    key: Key[Array, ""]


def init_state(
    network: Network,
    optimizer: optax.GradientTransformation,
    seed: int,
    *,
    params: Params | None = None,
) -> TrainState:
    """The state before the first step; ``params`` replaces a fresh initialisation.

    ``jax.eval_shape(lambda: init_state(…))`` is what a checkpoint is restored into.
    """
    init_key, key = jax.random.split(jax.random.key(seed))
    if params is None:
        params = jax.jit(network.init)(init_key)
    params = jax.tree.map(jnp.asarray, params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),  # pyright: ignore[reportArgumentType]
        # Buffers of their own: the step donates its state, and no buffer can be donated twice.
        ema_params=jax.tree.map(jnp.copy, params),
        key=key,
    )


def ema_decay_at(n: Int[Array, ""], decay: float) -> Float[Array, ""]:
    """min(decay, (1 + n)/(10 + n)) at update n = 1, 2, …: the average forgets its start quickly."""
    return jnp.minimum(decay, (1 + n) / (10 + n))


def update_ema(ema_params: Params, params: Params, n: Int[Array, ""], decay: float) -> Params:
    """The average after update n = 1, 2, …"""
    fresh = 1 - ema_decay_at(n, decay)
    return jax.tree.map(lambda ema, new: ema + fresh * (new - ema), ema_params, params)


def one_replica(tree: Any) -> Any:
    """The first local replica of replicated arrays, without a copy.

    It shares the replicated arrays' memory, and goes when a step donates them.
    """
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def to_host(state: TrainState) -> TrainState:
    """A copy in numpy of the whole state, the key as its uint32 data.

    Where other processes hold parts of it, all of them must call this together.
    """
    if jnp.issubdtype(state.key.dtype, jax.dtypes.prng_key):
        state = replace(state, key=jax.random.key_data(state.key))
    return jax.tree.map(lambda x: whole_on_host(x) if isinstance(x, jax.Array) else x, state)


def whole_on_host(x: jax.Array) -> np.ndarray:
    """A copy of the whole array; where other processes hold parts of it, all must call this."""
    # A plain np.asarray would be a view of device memory on CPU, which the next step reuses.
    if x.is_fully_replicated:
        return np.array(x.addressable_data(0))
    if x.is_fully_addressable:
        return np.array(x)
    return np.array(multihost_utils.process_allgather(x, tiled=True))


def from_host(state: TrainState) -> TrainState:
    """The inverse of ``to_host``; the parameters stay in numpy."""
    return replace(state, key=jax.random.wrap_key_data(jnp.asarray(state.key)))
