"""One training step, as it runs on one device.

The step is written for the examples that one device holds, and reduces over devices explicitly
(``sum_over_devices``). The same function runs under ``jax.pmap``, inside ``jax.shard_map``, and on
one device without either.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sedd.networks.base import Network
from sedd.networks.shard import Shard
from sedd.objectives.base import Objective, draw_uniform
from sedd.training.state import TrainState, init_state, update_ema
from sedd.types import Array, Bool, Int, Params

Batch = dict[str, Array]
Metrics = dict[str, Array]
Totals = dict[str, Any]
AxisNames = str | tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One training step, as two pure functions: ``totals`` of a batch, then an ``update``.

    The optimizer minimises the nats of the global batch divided by its sequences, not by its
    tokens; with ``by_text`` the nats of a text are divided by its scored tokens first. It changes
    the trainable parameters only (``Network.trainable``); frozen ones stay as they are, and have no
    averages.

    Args:
        network: the network.
        objective: the loss and its corruption.
        optimizer: the optimizer.
        ema_decay: decay of the averaged parameters; in step n of the run, skipped ones counted, it
            is at most (1 + n)/(10 + n).
        batch_size: sequences of the global batch.
        stratified: whether the uniform draws that determine the noise levels of a batch are spread
            evenly over [0, 1), or independent.
        by_text: whether texts have equal weight, or scored tokens. A text is a sequence, or one of
            the segments of a sequence that holds several.
        skip_nonfinite: whether an update is skipped if the loss or the gradient is not finite.
    """

    network: Network
    objective: Objective
    optimizer: optax.GradientTransformation
    ema_decay: float
    batch_size: int
    stratified: bool = True
    by_text: bool = False
    skip_nonfinite: bool = False

    def __call__(
        self, state: TrainState, batch: Batch, *, axis_name: AxisNames
    ) -> tuple[TrainState, Metrics]:
        """Run ``totals`` and ``update``; each device holds the whole state."""
        totals = self.totals(
            state.params, state.key, state.step, batch, axis_name=axis_name, teacher=state.teacher
        )
        return self.update(state, totals)

    def first_state(self, seed: int, *, params: Params | None = None) -> TrainState:
        """Make the state before the first step; see ``init_state``."""
        return init_state(
            self.network,
            self.optimizer,
            seed,
            params=params,
            teacher=self.objective.teacher_calls > 0,
        )

    def totals(
        self,
        params: Params,
        key: Array,
        step: Array,
        batch: Batch,
        *,
        axis_name: AxisNames,
        teacher: Params | None = None,
    ) -> Totals:
        """Compute sums over the global batch, one micro-batch after the other.

        Args:
            params: the parameters. A ``Shard`` among them gets the gradient of its part.
            key: the key of the run.
            step: the number of steps so far.
            batch: this device's part of the batch, A micro-batches of b sequences: ``x0`` and
                ``scored`` [A, b, L], and ``index`` [A, b], each sequence's place in the global
                batch. If sequences hold several texts, also ``segment`` [A, b, L]; if they have
                weights, ``weight`` [A, b].
            axis_name: the mapped axes over devices; None if one program holds the whole batch.
            teacher: ``TrainState.teacher``, for an objective with a teacher.

        Returns:
            ``grads`` of the trainable parameters, and the sums ``nats``, ``terms`` (the scored
            tokens, or with ``by_text`` the texts), ``tokens`` (scored ones) and ``read`` (positions
            at which the output layer ran).
        """
        key = jax.random.fold_in(key, step)

        def accumulate(totals, batch):
            more = self._micro_batch(params, teacher or {}, key, step, batch)
            return jax.tree.map(jnp.add, totals, more), None

        zero = {
            "grads": jax.tree.map(jnp.zeros_like, self.network.trainable(params)),
            "nats": jnp.zeros(()),
            "terms": jnp.zeros(()),
            "tokens": jnp.zeros((), jnp.int32),
            "read": jnp.zeros((), jnp.int32),
        }
        totals, _ = jax.lax.scan(accumulate, zero, batch)
        return sum_over_devices(totals, axis_name)

    def _micro_batch(self, params, teacher, key, step, batch) -> Totals:
        """The sums over one micro-batch: corrupt it, then differentiate its summed nats."""
        times_key, corruption_key, dropout_key = jax.random.split(key, 3)
        u_B = draw_uniform(times_key, batch["index"], self.batch_size, stratified=self.stratified)
        corruption_keys_B = keys_of(corruption_key, batch["index"])
        given = (step, corruption_keys_B, u_B, batch["x0"], batch["scored"])
        if "segment" in batch:
            corrupted = self.objective.corrupt_segments(*given, batch["segment"])
        else:
            corrupted = self.objective.corrupt_at(*given)
        if "weight" in batch:
            weight_BL = corrupted.weight_BL * batch["weight"][:, None]
            corrupted = replace(corrupted, weight_BL=weight_BL)
        keys_B = keys_of(dropout_key, batch["index"])
        terms = batch["scored"].sum(dtype=jnp.float32)
        if self.by_text:
            size_BL = scored_tokens(batch["scored"], batch.get("segment"))
            terms = (batch["scored"] / size_BL).sum()
            corrupted = replace(corrupted, weight_BL=corrupted.weight_BL / size_BL)
        if self.objective.teacher_calls:
            corrupted = self.objective.taught(self.network, params | teacher, corrupted)

        def summed_nats(trained):
            return self.objective.summed_nats(
                self.network, params | trained, corrupted, batch["x0"], keys_B=keys_B
            )

        nats, grads = jax.value_and_grad(summed_nats)(self.network.trainable(params))
        return {
            "grads": grads,
            "nats": nats,
            "terms": terms,
            "tokens": batch["scored"].sum(dtype=jnp.int32),
            "read": (corrupted.weight_BL > 0).sum(dtype=jnp.int32),
        }

    def update(self, state: TrainState, totals: Totals) -> tuple[TrainState, Metrics]:
        """Apply the optimizer; return the new state, and metrics of the global batch.

        The metrics are ``loss`` (nats per scored token: its mean over all scored tokens, or with
        ``by_text`` the mean over texts of each text's mean), ``grad_norm`` (before clipping),
        ``tokens`` and ``read``. With ``skip_nonfinite`` there is also ``skipped``: 1 if loss or
        gradient is not finite. Such an update changes only ``step``, and the teacher if the step
        ends a round.
        """
        grads = jax.tree.map(lambda g: g / self.batch_size, totals["grads"])
        trained = self.network.trainable(state.params)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        n = state.step + 1
        new_state = TrainState(
            step=n,
            params=state.params | trained,
            opt_state=opt_state,
            ema_params=update_ema(state.ema_params, trained, n, self.ema_decay),
            key=state.key,
            teacher=state.teacher,
        )
        metrics = {
            "loss": totals["nats"] / jnp.maximum(totals["terms"], 1),
            "grad_norm": optax.tree.norm(grads),
            "tokens": totals["tokens"],
            "read": totals["read"],
        }
        if self.skip_nonfinite:
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
            new_state = replace(where_tree(finite, new_state, state), step=n)
            metrics["skipped"] = 1 - finite.astype(jnp.int32)
        if self.objective.teacher_calls:
            ends = self.objective.ends_round(n)
            teacher = where_tree(ends, new_state.ema_params, state.teacher)
            new_state = replace(new_state, teacher=teacher)
        return new_state, metrics


def scored_tokens(
    scored_BL: Bool[Array, "B L"], segment_BL: Int[Array, "B L"] | None
) -> Int[Array, "B L"]:
    """The number of scored tokens in the text of each position, at least 1."""
    if segment_BL is None:
        segment_BL = jnp.zeros_like(scored_BL, jnp.int32)
    length = scored_BL.shape[1]

    def of_row(scored_L, segment_L):
        return jax.ops.segment_sum(scored_L.astype(jnp.int32), segment_L, length + 1)[segment_L]

    return jnp.maximum(jax.vmap(of_row)(scored_BL, segment_BL), 1)


def where_tree(condition: Array | bool, first: Any, second: Any) -> Any:
    """Return the tree ``first`` if ``condition``, a scalar, is true, else the tree ``second``."""
    return jax.tree.map(partial(jnp.where, condition), first, second)


def keys_of(key, index_B):
    """Return one key for each example, from its place in the global batch.

    An example has the same key on any number of devices.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index_B)


def sum_over_devices(tree: Any, axis_name: AxisNames) -> Any:
    """Sum a tree over devices: the only collective of a step except for those of ``Shard``.

    Numerators and denominators are summed separately, and the caller divides. A mean of the
    devices' means would be wrong, since they hold different numbers of scored tokens.

    The mapped programs do not track which values vary over devices (``check_vma=False``). If they
    did, gradients of shared parameters would already be summed here, and a second sum would only
    scale them, which Adam hides. The gradient of a ``Shard`` is already summed over the axis of its
    parts, and is summed over the other axes here.
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
