"""One training step on one device."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sedd.networks.base import Network
from sedd.networks.shard import Shard
from sedd.objectives.base import Objective, draw_uniform
from sedd.training.state import TrainState, update_ema
from sedd.types import Array, Params

Batch = dict[str, Array]
Metrics = dict[str, Array]
Totals = dict[str, Any]
AxisNames = str | tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of training, as pure functions: ``totals`` of a batch, then an ``update`` of them.

    What is minimised is the mean over the global batch, ``batch_size`` sequences, of each
    sequence's summed nats.
    """

    network: Network
    objective: Objective
    optimizer: optax.GradientTransformation
    ema_decay: float
    batch_size: int
    stratified: bool = True
    skip_nonfinite: bool = False

    def __call__(
        self, state: TrainState, batch: Batch, *, axis_name: AxisNames
    ) -> tuple[TrainState, Metrics]:
        """Both, where each device holds the whole state. See ``totals``, ``update``."""
        key = jax.random.fold_in(state.key, state.step)
        return self.update(state, self.totals(state.params, key, batch, axis_name=axis_name))

    def totals(self, params: Params, key: Array, batch: Batch, *, axis_name: AxisNames) -> Totals:
        """Sums over the global batch: ``grads``, ``nats``, ``tokens`` (scored) and ``read``.

        ``batch`` is one device's part of it, in A micro-batches of b sequences, whose gradients are
        summed one after the other: ``x0`` [A, b, L], ``scored`` [A, b, L], and ``index`` [A, b],
        each sequence's place in the global batch. ``axis_name`` is the mapped axes over devices;
        ``None`` where one program holds the whole batch. ``read`` counts the positions that were
        read out. Parameters that are a ``Shard`` get the gradient of their part.
        """

        def accumulate(totals, batch):
            return jax.tree.map(jnp.add, totals, self._micro_batch(params, key, batch)), None

        zero = {
            "grads": jax.tree.map(jnp.zeros_like, params),
            "nats": jnp.zeros(()),
            "tokens": jnp.zeros((), jnp.int32),
            "read": jnp.zeros((), jnp.int32),
        }
        totals, _ = jax.lax.scan(accumulate, zero, batch)
        return sum_over_devices(totals, axis_name)

    def _micro_batch(self, params, key, batch) -> Totals:
        times_key, corruption_key, dropout_key = jax.random.split(key, 3)
        u_B = draw_uniform(times_key, batch["index"], self.batch_size, stratified=self.stratified)
        corrupted = self.objective.corrupt(
            keys_of(corruption_key, batch["index"]), u_B, batch["x0"], batch["scored"]
        )
        keys_B = keys_of(dropout_key, batch["index"])

        def summed_nats(params):
            return self.objective.summed_nats(
                self.network, params, corrupted, batch["x0"], keys_B=keys_B
            )

        nats, grads = jax.value_and_grad(summed_nats)(params)
        return {
            "grads": grads,
            "nats": nats,
            "tokens": batch["scored"].sum(dtype=jnp.int32),
            "read": (corrupted.weight_BL > 0).sum(dtype=jnp.int32),
        }

    def update(self, state: TrainState, totals: Totals) -> tuple[TrainState, Metrics]:
        """The state after it, and metrics of the global batch.

        They are ``loss`` (nats per scored token), ``grad_norm`` (before clipping), ``tokens`` and
        ``read``. With ``skip_nonfinite`` a step whose loss or gradient is not finite changes
        nothing but ``step``, and ``skipped`` says so (0 or 1).
        """
        grads = jax.tree.map(lambda g: g / self.batch_size, totals["grads"])
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        n = state.step + 1
        new_state = TrainState(
            step=n,
            params=params,
            opt_state=opt_state,
            ema_params=update_ema(state.ema_params, params, n, self.ema_decay),
            key=state.key,
        )
        metrics = {
            "loss": totals["nats"] / jnp.maximum(totals["tokens"], 1),
            "grad_norm": optax.tree.norm(grads),
            "tokens": totals["tokens"],
            "read": totals["read"],
        }
        if self.skip_nonfinite:
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
            new_state = replace(keep_if_finite(new_state, state, finite), step=n)
            metrics["skipped"] = 1 - finite.astype(jnp.int32)
        return new_state, metrics


def keep_if_finite(new: Any, old: Any, finite: Array) -> Any:
    """The tree ``new`` where ``finite``, a scalar, holds, and ``old`` where it does not."""
    return jax.tree.map(partial(jnp.where, finite), new, old)


def keys_of(key, index_B):
    """One key an example, by its place in the global batch: the same on any number of devices."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index_B)


def sum_over_devices(tree: Any, axis_name: AxisNames) -> Any:
    """The only collective of a step, but for those of ``Shard``.

    It takes sums and the caller divides by global counts. A mean of per-device means is wrong where
    devices hold different numbers of scored tokens; and where the mapped program tracks which
    values vary over devices, gradients of shared parameters come summed already, and Adam hides it.
    The gradient of a ``Shard`` is summed over its own axis already.
    """
    if axis_name is None:
        return tree
    axes = (axis_name,) if isinstance(axis_name, str) else axis_name

    def summed(leaf):
        if not isinstance(leaf, Shard):
            return jax.lax.psum(leaf, axes)
        others = tuple(axis for axis in axes if axis != leaf.over)
        return replace(leaf, part=jax.lax.psum(leaf.part, others) if others else leaf.part)

    return jax.tree.map(summed, tree, is_leaf=lambda leaf: isinstance(leaf, Shard))
