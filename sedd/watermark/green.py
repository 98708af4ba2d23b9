"""The green list watermark: tokens that a secret likes after the token to their left are likelier.

Kirchenbauer et al., arXiv:2301.10226, in the form for diffusion models of arXiv:2509.24368. The
token to the left of a position selects one of ``LISTS`` green lists, each a random share gamma of
the vocabulary. In place of p_i the token of position i is drawn from

    q_i(v) ∝ p_i(v)·exp(delta·α_i(v)),
    α_i(v) = P(v is green after the token at i - 1) + P(the token at i + 1 is green after v).

α is the gradient of the expected number of green tokens by p_i. Both probabilities are 0 or 1 where
the neighbour is known, and otherwise an expectation over its distribution without the watermark.
The second one is left out if the next position does not count for the detector (a given or
constrained one), or if the model cannot predict it.

This distorts the samples. The log of q_i/p_i ranges over at most 2·delta, so that KL(q_i ‖ p_i) is
at most delta²/2 nats, by Hoeffding's lemma.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from sedd.arrays import NO_MASS
from sedd.types import Array, Bool, Float, Int, Shaped
from sedd.watermark.base import Watermark
from sedd.watermark.prf import threefry, threefry_on_device

LISTS = 256  # green lists; a byte of the pseudorandom function selects one
GREEN, LIST = 0, 1  # words of a counter, for what a byte is used


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Green(Watermark):
    """The green lists of a batch.

    Attributes:
        key_BW: the key of each sequence, four words of uint32; the same for all sequences.
        scored_BL: positions that carry the watermark.
        delta_B: strength of the watermark in nats.
        threshold_B: 256·gamma, int32.
    """

    replaces_noise = False

    key_BW: Shaped[Array, "B 4"]
    scored_BL: Bool[Array, "B L"]
    delta_B: Float[Array, " B"]
    threshold_B: Int[Array, " B"]

    def marked(self, log_probs_RN, rows, neighbours):
        num_tokens, key_W = log_probs_RN.shape[-1], jnp.asarray(self.key_BW)[0]
        list_N = table(key_W, jnp.zeros(1, jnp.uint32), num_tokens, LIST)[0].astype(jnp.int32)
        lists_H = jnp.arange(LISTS, dtype=jnp.uint32)
        green_HN = table(key_W, lists_H, num_tokens, GREEN) < jnp.asarray(self.threshold_B)[0]
        green_HN = green_HN.astype(log_probs_RN.dtype)

        none_RH = jnp.zeros((len(log_probs_RN), LISTS), log_probs_RN.dtype)
        before_RH = none_RH.at[:, list_N].add(neighbours(-1))
        alpha_RN = before_RH @ green_HN
        next_R = jnp.minimum(rows.position_R + 1, self.scored_BL.shape[1] - 1)
        counts_R = self.scored_BL[rows.sequence_R, next_R]
        ahead_RN = jnp.where(counts_R[:, None], neighbours(1), 0.0)
        alpha_RN += (ahead_RN @ green_HN.T)[:, list_N]

        delta_R1 = rows.pick(self.delta_B)[:, None].astype(log_probs_RN.dtype)
        shifted_RN = jax.nn.log_softmax(log_probs_RN + delta_R1 * alpha_RN, -1)
        shifted_RN = jnp.maximum(shifted_RN, NO_MASS)
        return jnp.where(rows.pick(self.scored_BL)[:, None], shifted_RN, log_probs_RN)

    def repeat(self, count):
        return jax.tree.map(lambda each: jnp.repeat(each, count, 0), self)


def table(key_W, first_A, count: int, use: int) -> Int[Array, "A count"]:
    """The bytes ``byte(key, first, second, use)`` for each ``first`` and all ``second`` < count.

    A block of the pseudorandom function has sixteen bytes.
    """
    block_1P = jnp.arange(-(-count // 16), dtype=jnp.uint32)[None]
    numbers = (jnp.full((1, 1), number, jnp.uint32) for number in (use, 0))
    key = [key_W[i].reshape(1, 1) for i in range(4)]
    words = threefry_on_device(key, (first_A[:, None], block_1P, *numbers))
    bytes_AP44 = jnp.stack(words, -1)[..., None] >> jnp.arange(0, 32, 8, dtype=jnp.uint32)
    return (bytes_AP44 & jnp.uint32(255)).astype(jnp.uint8).reshape(len(first_A), -1)[:, :count]


def byte(key_W: np.ndarray, first: np.ndarray, second: np.ndarray, use: int) -> np.ndarray:
    """One byte for each pair of numbers, on the host.

    It is byte number ``second`` mod 16 of the four words of threefry at the counter
    (first, second // 16, use, 0), where the lowest byte of a word comes first.
    """
    first, second = np.broadcast_arrays(np.asarray(first, np.uint32), np.asarray(second, np.uint32))
    numbers = (np.full(1, number, np.uint32) for number in (use, 0))
    words = threefry([key_W[i : i + 1] for i in range(4)], (first, second >> 4, *numbers))
    word = np.choose(second >> 2 & 3, words)
    return (word >> (second & 3) * np.uint32(8)) & np.uint32(255)


def is_green(key_W: np.ndarray, before: np.ndarray, token: np.ndarray, gamma: float) -> np.ndarray:
    """Whether tokens are green after the tokens to their left, on the host."""
    return byte(key_W, list_of(key_W, before), token, GREEN) < round(256 * gamma)


def list_of(key_W: np.ndarray, before: np.ndarray) -> np.ndarray:
    """The number of the green list that a token selects for the token to its right."""
    return byte(key_W, np.zeros(1, np.uint32), before, LIST)
