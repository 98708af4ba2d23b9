"""Model FLOPs of a training step, and what share of a device's peak they are (MFU).

Counted is what the mathematics needs, not what runs: recomputation (remat) adds nothing, and the
output layer counts for the positions that the loss reads. A product of [a, b] and [b, c] is
2·a·b·c; the backward pass is twice the forward pass (arXiv:2204.02311, appendix B). Norms,
activations, softmax and the optimizer are not counted.
"""

import jax

from sedd.networks.base import Network

# Dense bfloat16 FLOP/s of one device as its maker states them; by the start of ``device_kind``.
PEAK = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def step_flops(network: Network, batch_size: int, length: int, *, read: float) -> float:
    """FLOPs of one forward and backward pass over ``batch_size`` sequences.

    ``read`` is the number of positions of the batch that are read out. The backward pass counts as
    two forward passes.
    """
    return 3 * batch_size * network.flops(length, read / batch_size)


def peak_flops(device=None) -> float | None:
    """Of a device in bfloat16; None where it is not in the table, as on a CPU."""
    kind = (device or jax.devices()[0]).device_kind
    fits = [name for name in PEAK if kind.startswith(name)]
    return PEAK[max(fits, key=len)] if fits else None
