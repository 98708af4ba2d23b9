"""The pseudorandom function of the watermarks, by its arithmetic on words of 32 bits.

It is Threefry-4x32 with 20 rounds (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy
as 1, 2, 3", SC 2011): a key and a counter of four words each give four words. Sums are modulo 2³²,
``^`` is the exclusive or, and ``<<<`` a rotation to the left. With the key k and the counter c:

    k₄ = k₀ ^ k₁ ^ k₂ ^ k₃ ^ 0x1BD11BDA
    xᵢ = cᵢ + kᵢ
    for r = 0, …, 19, with the rotations (u, v) = ROTATIONS[r mod 8]:
        r even:  x₀ += x₁;  x₁ = (x₁ <<< u) ^ x₀;  x₂ += x₃;  x₃ = (x₃ <<< v) ^ x₂
        r odd:   x₀ += x₃;  x₃ = (x₃ <<< u) ^ x₀;  x₂ += x₁;  x₁ = (x₁ <<< v) ^ x₂
        after every fourth round, with s = (r + 1)/4:  xᵢ += k₍ₛ₊ᵢ₎ mod 5, then x₃ += s

``threefry`` computes it with numpy, for the detector, and ``threefry_on_device`` with JAX.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROTATIONS = ((10, 26), (11, 21), (13, 27), (23, 5), (6, 20), (17, 11), (25, 10), (18, 20))
PARITY = 0x1BD11BDA
GROUPS = 5  # of four rounds each


def key_of(secret: bytes, kind: str) -> np.ndarray:
    """Hash a secret to a key: the first 16 bytes of SHA-256, as four big-endian words, [4].

    Args:
        secret: the bytes of the secret, hashed behind the ASCII text ``sedd watermark KIND`` and a
            zero byte.
        kind: the kind of the watermark, so that two kinds never share a key.
    """
    digest = hashlib.sha256(f"sedd watermark {kind}\0".encode() + secret).digest()
    return np.frombuffer(digest[:16], ">u4").astype(np.uint32)


def threefry(key: Sequence[np.ndarray], counter: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Threefry-4x32-20 of numpy arrays.

    Args:
        key: four arrays of uint32.
        counter: four arrays of uint32, which broadcast with those of the key.

    Returns:
        Four arrays of uint32.
    """
    with np.errstate(over="ignore"):  # numpy warns of overflows of scalars
        keys, x = _schedule(key), [c + k for c, k in zip(counter, key, strict=True)]
        for s in range(GROUPS):
            x = _four_rounds(x, np.array(ROTATIONS, np.uint32)[s % 2 * 4 :][:4])
            x = [word + keys[(s + 1 + i) % 5] for i, word in enumerate(x)]
            x[3] = x[3] + np.uint32(s + 1)
    return x


def threefry_on_device(key: Sequence[Any], counter: Sequence[Any]) -> list[Any]:
    """``threefry`` of JAX arrays. The loop is not unrolled, which would compile slowly."""
    shape = jnp.broadcast_shapes(*(word.shape for word in (*key, *counter)))
    x = [jnp.broadcast_to(c + k, shape) for c, k in zip(counter, key, strict=True)]
    keys_5 = jnp.stack([jnp.asarray(word) for word in _schedule(key)])
    rotations = jnp.array(ROTATIONS, jnp.uint32).reshape(2, 4, 2)

    def group(s, x):
        x = _four_rounds(x, rotations[s % 2])
        x = [word + keys_5[(s + 1 + i) % 5] for i, word in enumerate(x)]
        x[3] = x[3] + (s + 1).astype(jnp.uint32)
        return x

    return jax.lax.fori_loop(0, GROUPS, group, x)


def _schedule(key):
    """The five words that are added to the state in turn."""
    return [*key, key[0] ^ key[1] ^ key[2] ^ key[3] ^ np.uint32(PARITY)]


def _four_rounds(x, rotations_42):
    """Rounds r to r + 3, for an r that 4 divides."""
    x = list(x)
    for r in range(4):
        first, second = (1, 3) if r % 2 == 0 else (3, 1)
        for onto, word, by in ((0, first, rotations_42[r][0]), (2, second, rotations_42[r][1])):
            x[onto] = x[onto] + x[word]
            x[word] = (x[word] << by | x[word] >> (np.uint32(32) - by)) ^ x[onto]
    return x
