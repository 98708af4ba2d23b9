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
    """Of one forward and backward pass over ``batch_size`` sequences, ``read`` positions read out.

    6 for each weight of a matrix and token, and 12·L·D a token and layer for the attention: every
    position sees every other. A causal network is counted the same.
    """
    params = jax.eval_shape(network.init, jax.random.key(0))
    trunk = jax.tree_util.tree_flatten_with_path(params["trunk"])[0]
    per_token = per_sequence = 0
    for path, leaf in trunk:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("kernel"):
            conditioning = "sigma_map" in name or "modulation" in name
            per_sequence += leaf.size if conditioning else 0
            per_token += 0 if conditioning else leaf.size
    hidden_dim, num_states = params["head"]["kernel"].shape
    num_layers = params["trunk"]["blocks"]["qkv"]["kernel"].shape[0]
    attention = 12 * length * hidden_dim * num_layers
    tokens = batch_size * length
    return (
        tokens * (6 * per_token + attention)
        + 6 * batch_size * per_sequence
        + 6 * read * hidden_dim * num_states
    )


def peak_flops(device=None) -> float | None:
    """Of a device in bfloat16; None where it is not in the table, as on a CPU."""
    kind = (device or jax.devices()[0]).device_kind
    fits = [name for name in PEAK if kind.startswith(name)]
    return PEAK[max(fits, key=len)] if fits else None
