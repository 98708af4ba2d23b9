"""What layouts of the network ``ddit`` share: tensor names, and Hydra's nested configuration.

SEDD, RADD, MDLM and GIDD have the same network code, so that their tensors have the same names
(``TENSORS``). SEDD and RADD also share a nested configuration written by Hydra; the functions
``hydra_…`` read and write the keys that both have.
"""

from collections.abc import Collection
from typing import Any

from sedd.interop.layouts.base import Description, PublishedConfig
from sedd.networks.ddit import DDiT

SCHEDULES = {"loglinear": "log_linear", "geometric": "geometric"}  # published name: ours
PROCESSES = {"absorb": "absorbing", "uniform": "uniform"}  # published name: ours
LOG_LINEAR_EPS = 1e-3  # constant in the code of SEDD, RADD and MDLM
MLP_RATIO = 4  # constant in the code of SEDD, RADD, MDLM and GIDD

# Our parameter: its name in the published code, with {} for the number of the block.
TENSORS = {
    "trunk/embed/embedding": "vocab_embed.embedding",
    "trunk/sigma_map/in/kernel": "sigma_map.mlp.0.weight",
    "trunk/sigma_map/in/bias": "sigma_map.mlp.0.bias",
    "trunk/sigma_map/out/kernel": "sigma_map.mlp.2.weight",
    "trunk/sigma_map/out/bias": "sigma_map.mlp.2.bias",
    "trunk/blocks/norm_attention/scale": "blocks.{}.norm1.weight",
    "trunk/blocks/norm_attention/bias": "blocks.{}.norm1.bias",
    "trunk/blocks/qkv/kernel": "blocks.{}.attn_qkv.weight",
    "trunk/blocks/attention_out/kernel": "blocks.{}.attn_out.weight",
    "trunk/blocks/norm_mlp/scale": "blocks.{}.norm2.weight",
    "trunk/blocks/norm_mlp/bias": "blocks.{}.norm2.bias",
    "trunk/blocks/mlp_in/kernel": "blocks.{}.mlp.0.weight",
    "trunk/blocks/mlp_in/bias": "blocks.{}.mlp.0.bias",
    "trunk/blocks/mlp_out/kernel": "blocks.{}.mlp.2.weight",
    "trunk/blocks/mlp_out/bias": "blocks.{}.mlp.2.bias",
    "trunk/blocks/modulation/kernel": "blocks.{}.adaLN_modulation.weight",
    "trunk/blocks/modulation/bias": "blocks.{}.adaLN_modulation.bias",
    "trunk/norm/scale": "output_layer.norm_final.weight",
    "trunk/norm/bias": "output_layer.norm_final.bias",
    "trunk/modulation/kernel": "output_layer.adaLN_modulation.weight",
    "trunk/modulation/bias": "output_layer.adaLN_modulation.bias",
    "head/kernel": "output_layer.linear.weight",
    "head/bias": "output_layer.linear.bias",
}

# Our field: (key in SEDD's and RADD's configuration, its kind; see ``PublishedConfig.read``).
SIZES = {
    "hidden_dim": ("model.hidden_size", "size"),
    "num_layers": ("model.n_blocks", "size"),
    "num_heads": ("model.n_heads", "size"),
    "dropout": ("model.dropout", float),
}
HYDRA = {"num_tokens": ("tokens", "size"), "length": ("model.length", "size")}


def hydra_noise(config: PublishedConfig) -> dict[str, Any]:
    """Arguments of ``read`` for the schedule; none if it is not stated, which means log-linear."""
    if not config.has("noise"):
        return {}
    keys: dict[str, Any] = {"schedule": ("noise.type", SCHEDULES)}
    if config.has("noise.type") and config.data["noise"]["type"] == "geometric":
        keys |= {name: (f"noise.{name}", float) for name in ("sigma_min", "sigma_max")}
    return keys


def hydra_description(
    config: PublishedConfig, values: dict[str, Any], *, parameterization: str
) -> Description:
    """Build the description from ``values``, and remove its fields from them.

    The fields that remain in ``values`` are those of the network.
    """
    schedule = {"name": values.pop("schedule", "log_linear")}
    for name in ("sigma_min", "sigma_max"):
        if name in values:
            schedule[name] = values.pop(name)
    corpus = config.data["data"].get("train") if config.has("data.train") else None
    return Description(
        process=values.pop("process"),
        parameterization=parameterization,
        schedule=schedule,
        num_tokens=values.pop("num_tokens"),
        length=values.pop("length"),
        corpus=corpus if isinstance(corpus, str) and corpus else None,
    )


def common_refusals(
    network: DDiT, description: Description, schedules: Collection[str], *, norm_bias: bool
) -> list[str]:
    """Why the code of SEDD, RADD and MDLM cannot build this network or schedule.

    Args:
        network: the network of the model.
        description: the rest of the model.
        schedules: names of the schedules that the layout allows.
        norm_bias: whether the layout allows norms with biases.

    Returns:
        The reasons, in words; an empty list if there are none.
    """
    problems = []
    if network.mlp_ratio != MLP_RATIO:
        problems.append(f"network.mlp_ratio must be {MLP_RATIO}, got {network.mlp_ratio}")
    if network.norm_bias and not norm_bias:
        problems.append("network.norm_bias must be False, got True")
    schedule = description.schedule["name"]
    if schedule not in schedules:
        problems.append(f"schedule must be {' or '.join(schedules)}, got {schedule}")
    elif description.schedule.get("eps", LOG_LINEAR_EPS) != LOG_LINEAR_EPS:
        problems.append(f"schedule.eps must be {LOG_LINEAR_EPS}, got {description.schedule['eps']}")
    return problems


def hydra_config(network: DDiT, description: Description) -> dict[str, Any]:
    """The part of a configuration that SEDD's and RADD's code have in common."""
    # The log-linear schedule does not use the two bounds, but the configuration must have them.
    schedule = {"sigma_min": 1e-4, "sigma_max": 20.0, **description.schedule}
    theirs = {ours: name for name, ours in SCHEDULES.items()}
    config: dict[str, Any] = {
        "tokens": description.num_tokens,
        "noise": {
            "type": theirs[schedule["name"]],
            "sigma_min": schedule["sigma_min"],
            "sigma_max": schedule["sigma_max"],
        },
        "model": {
            "length": description.length,
            "cond_dim": network.condition_dim,
            **{key.split(".")[1]: getattr(network, ours) for ours, (key, _) in SIZES.items()},
        },
    }
    if description.corpus is not None:
        config["data"] = {"train": description.corpus}
    return config
