"""The training state: parameters, their average, the optimizer's state, and the random key."""

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
    """The state of a training run; a pytree.

    Args:
        step: the number of steps so far; a step whose update was skipped counts.
        params: the parameters.
        opt_state: the optimizer's state, of the trainable parameters.
        ema_params: the moving average of the parameters, which is validated and sampled.
        key: the key of the run. It never changes: a step folds its number into it.
    """

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
    """Return the state before the first step.

    ``jax.eval_shape(lambda: init_state(…))`` gives the abstract state that a checkpoint is restored
    into.

    Args:
        network: makes the parameters.
        optimizer: makes its state.
        seed: determines the parameters and the key of the run.
        params: parameters to start from. Entries that are missing are new, such as those of a
            causal head on a given trunk.
    """
    init_key, key = jax.random.split(jax.random.key(seed))
    given = params or {}

    def missing(key):
        return {name: tree for name, tree in network.init(key).items() if name not in given}

    params = jax.tree.map(jnp.asarray, jax.jit(missing)(init_key) | given)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(network.trainable(params)),
        # A copy: the step donates its state, and no buffer can be donated twice.
        ema_params=jax.tree.map(jnp.copy, params),
        key=key,
    )


def ema_decay_at(n: Int[Array, ""], decay: float) -> Float[Array, ""]:
    """Return the decay of the average at update n = 1, 2, …: min(decay, (1 + n)/(10 + n)).

    The small decay at the start makes the average forget the initial parameters quickly.
    """
    return jnp.minimum(decay, (1 + n) / (10 + n))


def update_ema(ema_params: Params, params: Params, n: Int[Array, ""], decay: float) -> Params:
    """Return the average after update n = 1, 2, …, given the average before it."""
    fresh = 1 - ema_decay_at(n, decay)
    return jax.tree.map(lambda ema, new: ema + fresh * (new - ema), ema_params, params)


def one_replica(tree: Any) -> Any:
    """Return the first local replica of replicated arrays, without a copy.

    The result shares the memory of the arrays, and is invalid after a step has donated them.
    """
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def to_host(state: TrainState) -> TrainState:
    """Copy the whole state to numpy arrays; the key becomes its uint32 data.

    If several processes hold parts of the state, all of them must call this function together.
    """
    if jnp.issubdtype(state.key.dtype, jax.dtypes.prng_key):
        state = replace(state, key=jax.random.key_data(state.key))
    return jax.tree.map(lambda x: whole_on_host(x) if isinstance(x, jax.Array) else x, state)


def whole_on_host(x: jax.Array) -> np.ndarray:
    """Copy a whole array to numpy; if several processes hold parts, all must call it together."""
    # On a CPU, np.asarray would be a view of the device's memory, which the next step overwrites.
    if x.is_fully_replicated:
        return np.array(x.addressable_data(0))
    if x.is_fully_addressable:
        return np.array(x)
    return np.array(multihost_utils.process_allgather(x, tiled=True))


def from_host(state: TrainState) -> TrainState:
    """Undo ``to_host``: restore the key; all other arrays stay in numpy."""
    return replace(state, key=jax.random.wrap_key_data(jnp.asarray(state.key)))
