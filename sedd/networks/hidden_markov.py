"""A hidden Markov model over tokens, and its dynamic programs in products with other factors.

A hidden Markov model (HMM) has H states. It begins in a state, moves to a next state at each
position, and emits a token from the state there: ``p(x) = Σ_z Π_i T(z_i | z_(i-1)) B(x_i | z_i)``.
The programs here are for one stretch of W positions, and for weights on its tokens: a weight
c_i(v) of token v at position i, or a known token. All that a position contributes is its factor for
each state, ``u_i(z) = Σ_v B(v | z) c_i(v)``, or ``B(x_i | z)`` of a known token; 1 of a position
that is summed out.

The recursion is that of the automata in ``sedd.constraints.recursions``, with T as the weights of
the edges: the suffix value ``v_i(z)`` is the total weight of positions i, i+1, … if the state
before them is z.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sedd.arrays import backward, forward
from sedd.types import Array, Float, Int

LEAST = 1e-37  # smallest factor of a state: log 0 would have no gradient


class HiddenMarkov(NamedTuple):
    """The probabilities of an HMM with H states over N tokens.

    Attributes:
        transition_ZH: probabilities of the next state: a row for each state before it, and a last
            row for the start, so that Z = H + 1.
        emission_HN: probabilities of the token in each state.
    """

    transition_ZH: Float[Array, "Z H"]
    emission_HN: Float[Array, "H N"]

    def log_factors(self, log_probs_RN: Float[Array, "R N"]) -> Float[Array, "R H"]:
        """log Σ_v B(v | z)·c(v) of R positions, for each state z, from the log weights log c(v).

        The weights c(v) of a position's tokens are, for example, a model's conditionals.
        """
        return log_factors(self.emission_HN, log_probs_RN)

    def log_factors_of(self, tokens: Int[Array, "*b"]) -> Float[Array, "*b H"]:
        """The log factors of positions with known tokens; ids out of range are clipped."""
        return jnp.log(jnp.maximum(self.emission_HN.T.at[tokens].get(mode="clip"), LEAST))

    def suffix_values(self, factor_WH: Float[Array, "W H"]) -> Float[Array, "W1 Z"]:
        """Sum the weights of a stretch with the log factors ``factor_WH`` from each position on.

        Entry (i, z) is the log of the total weight of positions i, i + 1, … if the state before i
        is z. The last column, z = H, is the start; the last row is 0.
        """

        def step(value_Z, factor_H):
            ahead_H = factor_H + value_Z[:-1]
            top = jax.lax.stop_gradient(ahead_H.max())
            return jnp.log(self.transition_ZH @ jnp.exp(ahead_H - top)) + top

        last_Z = jnp.zeros(len(self.transition_ZH), factor_WH.dtype)
        return backward(step, last_Z, factor_WH, len(factor_WH))

    def log_partition(self, factor_WH: Float[Array, "W H"]) -> Float[Array, ""]:
        """The log of the total weight of a stretch with the log factors ``factor_WH``.

        It is log p(x) if all tokens are known.

        Its gradient is the posterior probability of each state at each position.
        """
        return self.suffix_values(factor_WH)[0, -1]

    def draw_states(
        self, factor_WH: Float[Array, "W H"], noise_WH: Float[Array, "W H"]
    ) -> Int[Array, " W"]:
        """Draw the states of a stretch, given its log factors and Gumbel noise."""

        def step(state, position):
            factor_H, value_H, noise_H = position
            score_H = jnp.log(self.transition_ZH[state]) + factor_H + value_H + noise_H
            state = score_H.argmax()
            return state, state

        start = jnp.asarray(len(self.transition_ZH) - 1)
        value_WH = self.suffix_values(factor_WH)[1:, :-1]
        return forward(step, start, (factor_WH, value_WH, noise_WH), len(factor_WH))


def log_factors(
    emission_HN: Float[Array, "H N"], log_probs_RN: Float[Array, "R N"]
) -> Float[Array, "R H"]:
    """``HiddenMarkov.log_factors`` by the emissions, which are all that it takes."""
    top_R1 = log_probs_RN.max(-1, keepdims=True)
    mixed_RH = jnp.exp(log_probs_RN - top_R1) @ emission_HN.T
    return jnp.log(jnp.maximum(mixed_RH, LEAST)) + top_R1


def windows(values_BL: Array, width: int, fill: float = 0.0) -> Array:
    """Cut sequences into consecutive windows: [B, L, …] to [B, K, W, …].

    The last window is filled up with ``fill``.
    """
    batch, length = values_BL.shape[:2]
    count = -(-length // width)
    padding = [(0, 0), (0, count * width - length), *[(0, 0)] * (values_BL.ndim - 2)]
    padded = jnp.pad(values_BL, padding, constant_values=fill)
    return padded.reshape(batch, count, width, *values_BL.shape[2:])


def unwindowed(values_BKW: Array, length: int) -> Array:
    """Undo ``windows``: [B, K, W, …] to [B, L, …]."""
    batch, count, width = values_BKW.shape[:3]
    return values_BKW.reshape(batch, count * width, *values_BKW.shape[3:])[:, :length]
