"""Divergences of two categorical distributions, from their log probabilities."""

from typing import Literal

import jax.numpy as jnp

from sedd.types import Array, Float

Divergence = Literal["forward_kl", "reverse_kl", "js", "hellinger"]


def f_divergence(
    kind: Divergence, log_p: Float[Array, "*b N"], log_q: Float[Array, "*b N"]
) -> Float[Array, "*b"]:
    """Compute D_f(p‖q) = Σ_v q_v·f(r_v) with the ratios r = p/q, in nats.

    ============  =============================  ==================  ============
    kind          f(r)                           ρ = f - r·f'        h = r²·f''
    ============  =============================  ==================  ============
    forward_kl    r·log r                        -r                  r
    reverse_kl    -log r                         -log r              1
    js            r·log r - (1+r)·log((1+r)/2)   -log((1+r)/2)       r/(1+r)
    hellinger     (1 - √r)²                      1 - √r              √r/2
    ============  =============================  ==================  ============

    The gradient in q is E_q[ρ(r)·∇ log q], a likelihood with weights, and h = -dρ/d log r is the
    weight that arXiv:2502.15681 gives to the change of log r. Near p = q the divergences differ by
    the factor h(1) alone: 1, 1, ½, ½. ``js`` is twice the usual Jensen-Shannon divergence. All sums
    are written with log probabilities, so that no ratio overflows.

    Args:
        kind: the divergence.
        log_p: log probabilities of p, the teacher; finite.
        log_q: log probabilities of q, the student; finite.
    """
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if kind == "forward_kl":
        return (p * (log_p - log_q)).sum(-1)
    if kind == "reverse_kl":
        return (q * (log_q - log_p)).sum(-1)
    if kind == "js":
        log_middle = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
        return (p * (log_p - log_middle) + q * (log_q - log_middle)).sum(-1)
    return jnp.square(jnp.exp(log_p / 2) - jnp.exp(log_q / 2)).sum(-1)
