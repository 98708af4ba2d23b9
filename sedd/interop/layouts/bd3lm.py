"""The layout of BD3-LM: MDLM's network with attention by blocks. arXiv:2503.09573.

The keys of ``config.json`` and the names of the tensors are those of MDLM. The network has a time
input, which the code runs at σ = 0.
"""

from dataclasses import replace

from sedd.errors import UserError
from sedd.interop.layouts import mdlm
from sedd.networks.ddit import DDiT

NAME = "BD3-LM"
CODE = "the code of BD3-LM (arXiv:2503.09573)"
NETWORK = DDiT


def matches(config, names):
    """Whether a class is BD3LM; the ``model_type`` is not asked."""
    return "BD3LM" in config.architectures


def read(config):
    """Read the flat configuration of MDLM, and the block size."""
    for key, only in (("adaln", True), ("causal", False)):
        if config.has(key) and config.data[key] is not only:
            raise UserError(
                f"{config.path}: {key} must be {str(only).lower()}, got {config.data[key]!r}"
            )
    layout = mdlm.read(config)
    block = config.read(block=("block_size", "size"))["block"]
    return replace(layout, name=NAME, description=replace(layout.description, block=block))


def refusals(network, description):
    """None: models that were not read from this layout are not written in it."""
    return None


tensors = mdlm.tensors


def write(network, description):
    """The configuration of MDLM with the block size, and the classes of BD3-LM's code."""
    return mdlm.write(network, description) | {
        "model_type": "bd3lm",
        "architectures": ["BD3LM"],
        "block_size": description.block,
    }
