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

The functions take numpy arrays, for the detector on the host, or JAX arrays, for samplers on any
device, and give the same words.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

ROTATIONS = ((10, 26), (11, 21), (13, 27), (23, 5), (6, 20), (17, 11), (25, 10), (18, 20))
PARITY = 0x1BD11BDA
ROUNDS = 20


def key_of(secret: bytes, kind: str) -> np.ndarray:
    """Hash a secret to a key: the first 16 bytes of SHA-256, as four big-endian words, [4].

    Args:
        secret: the bytes of the secret, hashed behind the ASCII text ``sedd watermark KIND`` and a
            zero byte.
        kind: the kind of the watermark, so that two kinds never share a key.
    """
    digest = hashlib.sha256(f"sedd watermark {kind}\0".encode() + secret).digest()
    return np.frombuffer(digest[:16], ">u4").astype(np.uint32)


def threefry(key: Sequence[Any], counter: Sequence[Any]) -> list[Any]:
    """Threefry-4x32-20.

    Args:
        key: four arrays of uint32.
        counter: four arrays of uint32, which broadcast with those of the key.

    Returns:
        Four arrays of uint32.
    """
    with np.errstate(over="ignore"):  # numpy warns of overflows of scalars
        keys = [*key, key[0] ^ key[1] ^ key[2] ^ key[3] ^ np.uint32(PARITY)]
        x = [c + k for c, k in zip(counter, key, strict=True)]
        for r in range(ROUNDS):
            first, second = (1, 3) if r % 2 == 0 else (3, 1)
            for onto, word, by in zip((0, 2), (first, second), ROTATIONS[r % 8], strict=True):
                x[onto] = x[onto] + x[word]
                x[word] = _rotated(x[word], by) ^ x[onto]
            if r % 4 == 3:
                s = (r + 1) // 4
                x = [x[i] + keys[(s + i) % 5] for i in range(4)]
                x[3] = x[3] + np.uint32(s)
    return x


def _rotated(word, by: int):
    """Rotate words of 32 bits to the left."""
    return (word << np.uint32(by)) | (word >> np.uint32(32 - by))
