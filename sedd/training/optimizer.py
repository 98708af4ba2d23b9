"""The optimizer: global-norm clipping, AdamW, Muon or SGD, and the learning-rate schedule."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from sedd.errors import FieldError


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """The optimizer and its settings; the defaults are those of SEDD.

    Raises:
        FieldError: ``learning_rate``, ``eps`` or ``clip_norm`` is not positive, ``warmup_steps`` or
            ``weight_decay`` is negative, ``final_fraction`` is not in [0, 1], or a decay
            (``beta1``, ``beta2``, ``ema_decay``) is not in [0, 1), or ``name`` or ``schedule`` is
            none of its choices.
    """

    name: Literal["adamw", "muon", "sgd"] = "adamw"
    """adamw; muon (for the kernels of the blocks, AdamW for all other parameters); or sgd (without
    momentum)."""
    learning_rate: float = 3e-4
    """The highest learning rate, after the warm-up."""
    warmup_steps: int = 2500
    """Updates over which the learning rate rises linearly."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """The learning rate after the warm-up."""
    final_fraction: float = 0.1
    """The fraction of the highest learning rate at which a falling schedule ends."""
    beta1: float = 0.9
    """Decay of Adam's average of gradients."""
    beta2: float = 0.999
    """Decay of Adam's average of squared gradients."""
    eps: float = 1e-8
    """Added to the denominator of Adam's update."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on every parameter."""
    clip_norm: float | None = 1.0
    """A gradient with a larger global norm is scaled down to this norm; None for no clipping. The
    gradient is that of the nats of a sequence, averaged over the batch; with --training.average
    texts, that of the nats per token of a text."""
    ema_decay: float = 0.9999
    """Decay of the averaged parameters (EMA), which are validated and sampled; in step n of the
    run, skipped ones counted, it is at most (1 + n)/(10 + n)."""

    def __post_init__(self):
        for field, choices in (
            ("name", ("adamw", "muon", "sgd")),
            ("schedule", ("constant", "cosine", "linear")),
        ):
            if getattr(self, field) not in choices:
                raise FieldError(
                    field, f"must be one of {', '.join(choices)}, got {getattr(self, field)!r}"
                )
        for field, low, high in (("beta1", 0, 1), ("beta2", 0, 1), ("ema_decay", 0, 1)):
            if not low <= getattr(self, field) < high:
                raise FieldError(field, f"must be in [0, 1), got {getattr(self, field)}")
        if not 0 <= self.final_fraction <= 1:
            raise FieldError("final_fraction", f"must be in [0, 1], got {self.final_fraction}")
        for field in ("warmup_steps", "weight_decay"):
            if not getattr(self, field) >= 0:
                raise FieldError(field, f"must not be negative, got {getattr(self, field)}")
        for field in ("learning_rate", "eps", "clip_norm"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise FieldError(field, f"must be positive, got {value}")


def make_schedule(options: OptimizerOptions, steps: int) -> optax.Schedule:
    """Return the learning rate of update n = 0, 1, …, steps - 1: a linear warm-up, then a schedule.

    ``cosine`` and ``linear`` fall from the highest learning rate to ``final_fraction`` of it, which
    they reach after the last update. Skipped updates are not counted by n.
    """

    def learning_rate(n):
        n = jnp.asarray(n, jnp.float32)
        warmup = jnp.minimum((n + 1) / max(options.warmup_steps, 1), 1)
        left = 1 - jnp.clip((n - options.warmup_steps) / max(steps - options.warmup_steps, 1), 0, 1)
        if options.schedule == "constant":
            left = jnp.ones_like(left)
        elif options.schedule == "cosine":
            left = (1 - jnp.cos(jnp.pi * left)) / 2
        floor = options.final_fraction
        return options.learning_rate * warmup * (floor + (1 - floor) * left)

    return learning_rate


def make_optimizer(options: OptimizerOptions, steps: int) -> optax.GradientTransformation:
    """Return the optimizer: clip, precondition, add weight decay, scale by the learning rate.

    Args:
        options: the settings.
        steps: the length of the run, which a falling schedule needs.
    """
    clip = optax.identity()
    if options.clip_norm is not None:
        clip = clip_by_global_norm(options.clip_norm)
    if options.name == "muon":
        return optax.chain(clip, _muon(options, steps))
    adam = optax.scale_by_adam(b1=options.beta1, b2=options.beta2, eps=options.eps)
    return optax.chain(
        clip,
        adam if options.name == "adamw" else optax.identity(),
        optax.add_decayed_weights(options.weight_decay),
        optax.scale_by_learning_rate(make_schedule(options, steps)),
    )


def _muon(options: OptimizerOptions, steps: int) -> optax.GradientTransformation:
    """Muon for the kernels of the blocks, AdamW for everything else, both with Nesterov momentum.

    Muon replaces the momentum of a matrix by the nearest orthogonal matrix, so that every direction
    of the matrix learns at the same speed. The blocks' kernels, or their adapters, are the only
    arrays with three axes, [layers, in, out]; embedding, head, norms and biases take AdamW. Updates
    of Muon are scaled to a root mean square of 0.2, that of Adam's, so that one learning rate fits
    both (arXiv:2502.16982).
    """

    def matrices(params):
        stacked = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
        return jax.tree.map(lambda leaf: stacked if leaf.ndim == 3 else None, params)

    return optax.contrib.muon(
        make_schedule(options, steps),
        weight_decay=options.weight_decay,
        adam_b1=options.beta1,
        adam_b2=options.beta2,
        adam_weight_decay=options.weight_decay,
        eps=options.eps,
        muon_weight_dimension_numbers=matrices,
        consistent_rms=0.2,
    )


def clip_by_global_norm(most: float) -> optax.GradientTransformation:
    """Return a transformation that scales gradients down to the norm ``most`` if theirs is larger.

    It computes the same as optax's function of this name, which divides every entry by the norm.
    XLA does not repeat a division in each fusion that uses the result, and keeps a second copy of
    the gradient in memory instead. Here the entries are multiplied by one factor.
    """

    def update(grads, params=None):
        factor = most / jnp.maximum(optax.tree.norm(grads), most)
        return jax.tree.map(lambda g: factor * g, grads)

    return optax.stateless(update)
