"""Networks rewritten as equal ones, so that they fit a layout or need no condition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sedd.networks.ddit import DDiT, sigma_features
from sedd.networks.decoder import Decoder, of_unit_size
from sedd.types import Params


def at_constant_sigma(network: DDiT, params: Params, sigma: float) -> tuple[DDiT, Params]:
    """Fold a constant σ into the parameters of a conditioned network.

    At a constant σ all modulations are constants. The modulation of a norm then is a change of its
    weight and bias, and the gate of a branch is a factor of the matrix and bias at its end.

    Args:
        network: a time-conditioned network without ``norm_bias``; ValueError for another one.
        params: its parameters.
        sigma: the total noise.

    Returns:
        An unconditioned network and its parameters, with equal outputs up to rounding.
    """
    if not network.time_conditioned or network.norm_bias:
        raise ValueError("network must be time_conditioned and have no norm_bias")
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    trunk = params["trunk"]
    # The condition, as in the network: two linear layers with SiLU.
    condition_C = np.asarray(sigma_features(jnp.full(1, sigma, jnp.float32))[0], np.float64)
    for name in ("in", "out"):
        condition_C = condition_C @ trunk["sigma_map"][name]["kernel"]
        condition_C = condition_C + trunk["sigma_map"][name]["bias"]
        condition_C = condition_C / (1 + np.exp(-condition_C))

    def modulation(layer, parts):
        """The constant shifts, scales and gates; for stacked blocks, one row a layer."""
        out = np.einsum("c,...cd->...d", condition_C, layer["kernel"]) + layer["bias"]
        return np.split(out, parts, axis=-1)

    def norm(layer, shift, scale):
        """The parameters of a norm followed by x·(1 + scale) + shift."""
        return {"scale": layer["scale"] * (1 + scale), "bias": shift}

    blocks = trunk["blocks"]
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation(blocks["modulation"], 6)
    folded = {
        "embed": trunk["embed"],
        "blocks": {
            "norm_attention": norm(blocks["norm_attention"], shift_a, scale_a),
            "qkv": blocks["qkv"],
            "attention_out": {"kernel": blocks["attention_out"]["kernel"] * gate_a[:, None, :]},
            "norm_mlp": norm(blocks["norm_mlp"], shift_m, scale_m),
            "mlp_in": blocks["mlp_in"],
            "mlp_out": {
                "kernel": blocks["mlp_out"]["kernel"] * gate_m[:, None, :],
                "bias": blocks["mlp_out"]["bias"] * gate_m,
            },
        },
        "norm": norm(trunk["norm"], *modulation(trunk["modulation"], 2)),
    }
    network = dataclasses.replace(network, time_conditioned=False, norm_bias=True)
    params = {"trunk": folded, "head": params["head"]}
    return network, jax.tree.map(lambda x: x.astype(np.float32), params)


def with_norm_bias(network: DDiT, params: Params) -> tuple[DDiT, Params]:
    """Return an equal network whose norms have biases; added biases are 0."""
    if network.norm_bias:
        return network, params
    trunk, blocks = params["trunk"], params["trunk"]["blocks"]

    def biased(norm):
        """The parameters of a norm with a bias of 0."""
        return {**norm, "bias": np.zeros_like(norm["scale"])}

    blocks = blocks | {name: biased(blocks[name]) for name in ("norm_attention", "norm_mlp")}
    trunk = trunk | {"blocks": blocks, "norm": biased(trunk["norm"])}
    return dataclasses.replace(network, norm_bias=True), params | {"trunk": trunk}


def without_embed_norm(network: Decoder, params: Params) -> tuple[Decoder, Params]:
    """Return an equal network, up to rounding, whose table holds the normed embeddings.

    A tied output layer, which reads the embeddings as they were, becomes one of its own.
    """
    if not network.embed_norm:
        return network, params
    embedding_VD = params["trunk"]["embed"]["embedding"]
    normed_VD = of_unit_size(embedding_VD.astype(jnp.float32), network.norm_eps)
    trunk = params["trunk"] | {"embed": {"embedding": normed_VD.astype(embedding_VD.dtype)}}
    head = {"head": {"kernel": embedding_VD.T}} if network.tied else {}
    network = dataclasses.replace(network, embed_norm=False, tied=False)
    return network, params | {"trunk": trunk} | head
