"""The Gumbel watermark: tokens are drawn with noise that is a function of a secret.

For each position i and token v the pseudorandom function gives a number u in (0, 1), and the token
of the position is the v with the least -log u / p_v, where p is the distribution to draw from. If u
is uniform, -log u is exponential, and v is drawn with probability p_v: the least of independent
exponential variables of rates p_v. The noise of a position does not depend on the order in which
positions are drawn, nor on how many are drawn in one call. Aaronson and Kirchner's watermark (2022)
in the form of arXiv:2511.02083 and arXiv:2506.04462.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from sedd.arrays import NAN
from sedd.types import Array, Float, Shaped
from sedd.watermark.base import Watermark
from sedd.watermark.prf import threefry, threefry_on_device


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Gumbel(Watermark):
    """The noise of a batch; all arrays are uint32.

    Attributes:
        key_BW: the key of each sequence, four words; ``key_of`` hashes a secret to it.
        nonce_B: a number for each sequence. Sequences of one key and nonce share their noise.
        candidate_B: further numbers, by which the candidates of one request differ.
    """

    replaces_noise = True

    key_BW: Shaped[Array, "B 4"]
    nonce_B: Shaped[Array, " B"]
    candidate_B: Shaped[Array, " B"]

    def tokens(self, rows, log_probs_RN):
        num_tokens = log_probs_RN.shape[-1]
        dtype = jnp.promote_types(log_probs_RN.dtype, jnp.float32)
        key_R1 = [rows.pick(self.key_BW[:, word])[:, None] for word in range(4)]
        pair_1P = jnp.arange(-(-num_tokens // 2), dtype=jnp.uint32)[None]
        position_R1, nonce_R1, candidate_R1 = (
            values_R.astype(jnp.uint32)[:, None]
            for values_R in (rows.position_R, rows.pick(self.nonce_B), rows.pick(self.candidate_B))
        )
        # A block of four words serves two tokens; ``words`` is the same for single tokens.
        block = threefry_on_device(key_R1, (position_R1, pair_1P, nonce_R1, candidate_R1))
        high_RN, low_RN = (
            jnp.stack(both, -1).reshape(len(log_probs_RN), -1)[:, :num_tokens]
            for both in (block[::2], block[1::2])
        )
        time_RN = jnp.log(exponential(high_RN, low_RN, dtype)) - log_probs_RN.astype(dtype)
        return jnp.where(jnp.isnan(log_probs_RN).any(-1), NAN, time_RN.argmin(-1))

    def repeat(self, count):
        """The candidates of a request have its nonce, and numbers of their own from 0 on."""
        key_BW, nonce_B, candidate_B = (
            jnp.repeat(jnp.asarray(each), count, 0)
            for each in (self.key_BW, self.nonce_B, self.candidate_B)
        )
        own_B = jnp.arange(len(nonce_B), dtype=jnp.uint32) % count
        candidate_B = candidate_B * jnp.uint32(count) + own_B
        return replace(self, key_BW=key_BW, nonce_B=nonce_B, candidate_B=candidate_B)


def exponential(high, low, dtype) -> Float[Array, "..."]:
    """-log u for u = (W + ½)/2⁶⁴, where W has the words ``high`` and ``low``; always above 0.

    From u = ½ on it is computed from 1 - u, whose W is the complement. The noise of probable tokens
    is small, and is thus accurate to the last bit of a float32 down to 2⁻⁶⁵.
    """

    def fraction(high, low):
        return high.astype(dtype) * dtype(2.0**-32) + (low.astype(dtype) + 0.5) * dtype(2.0**-64)

    dtype = jnp.dtype(dtype).type
    upper = high >= np.uint32(2**31)
    return jnp.where(upper, -jnp.log1p(-fraction(~high, ~low)), -jnp.log(fraction(high, low)))


def surprise(
    key_W: np.ndarray, position: np.ndarray, token: np.ndarray, nonce: int, candidate: int
) -> np.ndarray:
    """-log(1 - u) of tokens at positions, in float64 on the host: the statistic of the detector.

    Args:
        key_W: the key, four words.
        position: positions, not negative.
        token: token ids, in arrays that broadcast with ``position``.
        nonce: the nonce of the text.
        candidate: the number of the candidate.
    """
    position, token = (np.asarray(each, np.uint32) for each in (position, token))
    numbers = (np.asarray([each], np.uint32) for each in (nonce, candidate))
    block = threefry([key_W[i : i + 1] for i in range(4)], (position, token >> 1, *numbers))
    odd = (token & 1).astype(bool)
    high, low = np.where(odd, block[2], block[0]), np.where(odd, block[3], block[1])
    rest = ~(high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64))  # W of 1 - u
    return -np.log((rest.astype(np.float64) + 0.5) * 2.0**-64)
