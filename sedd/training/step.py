"""One training step on one device."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sedd.networks.base import Network
from sedd.objectives.base import Objective, draw_uniform
from sedd.training.state import TrainState, update_ema
from sedd.types import Array

Batch = dict[str, Array]
Step = Callable[..., tuple[TrainState, dict[str, Array]]]


def make_step(
    *,
    network: Network,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    batch_size: int,
    stratified: bool = True,
    skip_nonfinite: bool = False,
) -> Step:
    """``step(state, batch, *, axis_name) -> (state, metrics)``, a pure function.

    ``batch`` is one device's part of a global batch of ``batch_size`` sequences, in A micro-batches
    of b sequences, whose gradients are summed one after the other: ``x0`` [A, b, L], ``scored``
    [A, b, L], and ``index`` [A, b], each sequence's place in the global batch. ``axis_name`` is the
    mapped axis over devices; ``None`` where one program holds the whole batch.

    What is minimised is the mean over the global batch of each sequence's summed nats. Metrics are
    those of the global batch: ``loss`` (nats per scored token), ``grad_norm`` (before clipping) and
    ``tokens`` (scored). With ``skip_nonfinite`` a step whose loss or gradient is not finite changes
    nothing but ``step``, and ``skipped`` says so (0 or 1).
    """

    def micro_batch(params, key, batch):
        times_key, corruption_key, dropout_key = jax.random.split(key, 3)
        u_B = draw_uniform(times_key, batch["index"], batch_size, stratified=stratified)
        corrupted = objective.corrupt(
            keys_of(corruption_key, batch["index"]), u_B, batch["x0"], batch["scored"]
        )
        keys_B = keys_of(dropout_key, batch["index"])

        def summed_nats(params):
            return objective.nats(network, params, corrupted, batch["x0"], keys_B=keys_B).sum()

        nats, grads = jax.value_and_grad(summed_nats)(params)
        return {"grads": grads, "nats": nats, "tokens": batch["scored"].sum(dtype=jnp.int32)}

    def step(state: TrainState, batch: Batch, *, axis_name: str | None):
        key = jax.random.fold_in(state.key, state.step)

        def accumulate(totals, batch):
            part = micro_batch(state.params, key, batch)
            return jax.tree.map(jnp.add, totals, part), None

        zero = {
            "grads": jax.tree.map(jnp.zeros_like, state.params),
            "nats": jnp.zeros(()),
            "tokens": jnp.zeros((), jnp.int32),
        }
        totals, _ = jax.lax.scan(accumulate, zero, batch)
        totals = sum_over_devices(totals, axis_name)

        grads = jax.tree.map(lambda g: g / batch_size, totals["grads"])
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        n = state.step + 1
        new_state = TrainState(
            step=n,
            params=params,
            opt_state=opt_state,
            ema_params=update_ema(state.ema_params, params, n, ema_decay),
            key=state.key,
        )
        metrics = {
            "loss": totals["nats"] / jnp.maximum(totals["tokens"], 1),
            "grad_norm": optax.tree.norm(grads),
            "tokens": totals["tokens"],
        }
        if skip_nonfinite:
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
            new_state = replace(keep_if_finite(new_state, state, finite), step=n)
            metrics["skipped"] = 1 - finite.astype(jnp.int32)
        return new_state, metrics

    return step


def keep_if_finite(new: Any, old: Any, finite: Array) -> Any:
    """The tree ``new`` where ``finite``, a scalar, holds, and ``old`` where it does not."""
    return jax.tree.map(partial(jnp.where, finite), new, old)


def keys_of(key, index_B):
    """One key an example, by its place in the global batch: the same on any number of devices."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index_B)


def sum_over_devices(tree: Any, axis_name: str | None) -> Any:
    """The only collective of a step.

    It takes sums and the caller divides by global counts. A mean of per-device means is wrong where
    devices hold different numbers of scored tokens; and where the mapped program tracks which
    values vary over devices, gradients of shared parameters come summed already, and Adam hides it.
    """
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)
