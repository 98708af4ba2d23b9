"""The layout of MDLM's code: conditional models whose network takes a time. arXiv:2406.07524.

``config.json`` is flat. Without ``time_conditioning`` the network always runs at σ = 0.
"""

from sedd.interop.layouts.base import TENSORS, Description, Layout, common_refusals

NAME = "MDLM"
CODE = "the code of MDLM (arXiv:2406.07524)"

KEYS = {
    "num_states": ("vocab_size", "size"),
    "hidden_dim": ("hidden_dim", "size"),
    "condition_dim": ("cond_dim", "size"),
    "num_layers": ("n_blocks", "size"),
    "num_heads": ("n_heads", "size"),
    "dropout": ("dropout", float),
}


def matches(config, names):
    return config.has("model_type") and config.data["model_type"] == "mdlm"


def read(config):
    values = config.read(
        length=("model_length", "size"), conditioned=("time_conditioning", bool), **KEYS
    )
    length, conditioned = values.pop("length"), values.pop("conditioned")
    network = config.network(time_conditioned=True, **values)
    description = Description(
        process="absorbing",
        parameterization="conditional",
        schedule={"name": "log_linear"},
        num_tokens=network.num_states - 1,
        length=length,
        corpus=None,
    )
    return Layout(
        name=NAME,
        network=network,
        description=description,
        tensors=tensors(network),
        constant_sigma=None if conditioned else 0.0,
    )


def refusals(network, description):
    if description.parameterization != "conditional" or not network.time_conditioned:
        return None
    return common_refusals(network, description, ["log_linear"], norm_bias=False)


def tensors(network):
    return {ours: f"backbone.{name}" for ours, name in TENSORS.items()}


def write(network, description):
    return {
        "model_type": "mdlm",
        "architectures": ["MDLM"],
        "model_length": description.length,
        "time_conditioning": True,
        **{theirs: getattr(network, ours) for ours, (theirs, _) in KEYS.items()},
    }
