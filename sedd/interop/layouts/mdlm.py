"""The layout of MDLM's code: conditional models whose network takes a time. arXiv:2406.07524.

The keys of ``config.json`` are not nested. The network always has a time input; without
``time_conditioning`` the code runs it at σ = 0 (``Layout.constant_sigma``).
"""

from sedd.interop.layouts.base import Description, Layout
from sedd.interop.layouts.ddit import TENSORS, common_refusals
from sedd.networks.ddit import DDiT

NAME = "MDLM"
NETWORK = DDiT
CODE = "the code of MDLM (arXiv:2406.07524)"

KEYS = {  # our field: (key, kind)
    "num_states": ("vocab_size", "size"),
    "hidden_dim": ("hidden_dim", "size"),
    "condition_dim": ("cond_dim", "size"),
    "num_layers": ("n_blocks", "size"),
    "num_heads": ("n_heads", "size"),
    "dropout": ("dropout", float),
}


def matches(config, names):
    """Whether ``model_type`` is "mdlm"."""
    return config.has("model_type") and config.data["model_type"] == "mdlm"


def read(config):
    """Read the flat configuration; the mask is the last of the ``vocab_size`` states."""
    values = config.read(
        length=("model_length", "size"), conditioned=("time_conditioning", bool), **KEYS
    )
    length, conditioned = values.pop("length"), values.pop("conditioned")
    network = config.build(DDiT, time_conditioned=True, **values)
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
    """Why MDLM's code cannot hold a model; None unless it is a time-dependent conditional one."""
    if description.parameterization != "conditional" or not network.time_conditioned:
        return None
    return common_refusals(network, description, ["log_linear"], norm_bias=False)


def tensors(network):
    """A dictionary from our parameters to published names: SEDD's with the prefix ``backbone.``."""
    return {ours: f"backbone.{name}" for ours, name in TENSORS.items()}


def write(network, description):
    """The flat configuration of a time-dependent model."""
    return {
        "model_type": "mdlm",
        "architectures": ["MDLM"],
        "model_length": description.length,
        "time_conditioning": True,
        **{theirs: getattr(network, ours) for ours, (theirs, _) in KEYS.items()},
    }
