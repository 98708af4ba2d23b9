"""FLOPs of a training step, for the model FLOPs utilisation (MFU).

The FLOPs are those of the mathematics, not of the executed program: recomputation (remat) adds
nothing, and the output layer counts only at positions with a loss. A product of [a, b] and [b, c]
counts 2·a·b·c, and the backward pass twice the forward pass (arXiv:2204.02311, appendix B). Norms,
activations, softmax and the optimizer are not counted. MFU is the FLOPs per second divided by the
peak FLOPs per second of the devices.
"""

import jax

from sedd.networks.base import Network

# Dense bfloat16 FLOP/s of one device, as its maker states it, by the start of its ``device_kind``.
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


def step_flops(
    network: Network, batch_size: int, length: int, *, read: float, teacher_calls: int = 0
) -> float:
    """Return the FLOPs of one forward and backward pass over a batch, and of a teacher's calls.

    Args:
        network: the network.
        batch_size: sequences in the batch.
        length: rows of the network for a sequence, ``Objective.rows``.
        read: positions in the batch at which the output layer runs.
        teacher_calls: forward passes of a teacher, whose output layer runs once at the same
            positions; the few tokens that it draws are not counted.
    """
    each = read / batch_size
    total = network.training_flops(length, each)
    if teacher_calls:
        total += teacher_calls * network.flops(length, each / teacher_calls)
    return batch_size * total


def peak_flops(device=None) -> float | None:
    """Return the peak bfloat16 FLOP/s of a device (the first one by default).

    None if the device is not in the table, as for a CPU.
    """
    kind = (device or jax.devices()[0]).device_kind
    fits = [name for name in PEAK if kind.startswith(name)]
    return PEAK[max(fits, key=len)] if fits else None
