"""The training state: parameters, their average, the optimizer's state, and the random key."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sedd.errors import FieldError
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
        ema_params: the moving averages of the trainable parameters; it has no frozen ones.
        key: the key of the run. It never changes: a step folds its number into it.
        teacher: the teacher's values of the trainable parameters, if the objective has a teacher;
            else empty. The teacher shares the frozen parameters.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    ema_params: Params
    key: Key[Array, ""]
    teacher: Params = field(default_factory=dict)

    @property
    def averaged(self) -> Params:
        """The parameters that are validated and sampled: averages, and the frozen ones."""
        return self.params | self.ema_params


def init_state(
    network: Network,
    optimizer: optax.GradientTransformation,
    seed: int,
    *,
    params: Params | None = None,
    teacher: bool = False,
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
        teacher: whether the objective has a teacher, which begins with the same parameters.

    Raises:
        FieldError: parameters that are trained are bfloat16.
    """
    init_key, key = jax.random.split(jax.random.key(seed))
    given = params or {}

    def missing(key):
        return {name: tree for name, tree in network.init(key).items() if name not in given}

    params = jax.tree.map(jnp.asarray, jax.jit(missing)(init_key) | given)
    for leaf in jax.tree.leaves(network.trainable(params)):
        if leaf.dtype == jnp.bfloat16:
            raise FieldError(
                "network.param_dtype",
                "must be float32 in training: in bfloat16 most updates are rounded away",
            )
    trained = network.trainable(params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(trained),
        # A copy: the step donates its state, and no buffer can be donated twice.
        ema_params=jax.tree.map(jnp.copy, trained),
        key=key,
        teacher=jax.tree.map(jnp.copy, trained) if teacher else {},
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


def first_not_finite(state: TrainState) -> tuple[str, float] | None:
    """Return the name of the first array with a value that is not finite, and such a value.

    The arrays are examined on the devices that hold them; if several processes hold parts of them,
    all must call this function together. Returns None if all values are finite.
    """
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    for name, extremes in zip(
        arrays, jax.device_get(_extremes(list(arrays.values()))), strict=True
    ):
        for value in map(float, extremes):
            if not math.isfinite(value):
                return name, value
    return None


@jax.jit
def _extremes(arrays: list[Array]) -> list[tuple[Array, Array]]:
    """The largest and the smallest value of each array, or twice nan if it has a nan.

    These are reductions without an intermediate array, which a test of each value would need on a
    CPU.
    """
    return [(jnp.max(x), jnp.min(x)) for x in arrays]


def from_host(state: TrainState) -> TrainState:
    """Restore the key of a state from its uint32 data; all other arrays stay what they are."""
    return replace(state, key=jax.random.wrap_key_data(jnp.asarray(state.key)))
