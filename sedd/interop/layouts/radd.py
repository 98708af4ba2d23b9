"""The layout of RADD's code: conditional models without a time. arXiv:2406.03736.

The same nested configuration is ``config.json`` on the hub, and ``.hydra/config.yaml`` in a run.
"""

from sedd.interop.layouts.base import Layout
from sedd.interop.layouts.ddit import (
    HYDRA,
    SCHEDULES,
    SIZES,
    TENSORS,
    common_refusals,
    hydra_config,
    hydra_description,
    hydra_noise,
)
from sedd.networks.ddit import DDiT

NAME = "RADD"
NETWORK = DDiT
CODE = "the code of RADD (arXiv:2406.03736)"


def matches(config, names):
    """Whether there is the key ``use_checkpoint``, which only RADD's code writes, or no graph."""
    return config.has("model") and (not config.has("graph") or config.has("model.use_checkpoint"))


def read(config):
    """Read the nested configuration; the process is always absorbing."""
    values = config.read(**SIZES, **HYDRA, **hydra_noise(config)) | {"process": "absorbing"}
    description = hydra_description(config, values, parameterization="conditional")
    network = config.build(
        DDiT,
        num_states=description.num_tokens + 1,
        time_conditioned=False,
        norm_bias=True,
        **values,
    )
    return Layout(name=NAME, network=network, description=description, tensors=TENSORS)


def refusals(network, description):
    """Why RADD's code cannot hold a model; None unless it is a time-independent conditional one."""
    if description.parameterization != "conditional" or network.time_conditioned:
        return None
    return common_refusals(network, description, list(SCHEDULES.values()), norm_bias=True)


def tensors(network):
    """A dictionary from our parameters to the tensor names of SEDD's code."""
    return TENSORS


def write(network, description):
    """The nested configuration, with the name of RADD's network."""
    config = hydra_config(network, description)
    config["model"] |= {
        "name": "exported",
        "type": "ddit_wot",
        "use_checkpoint": False,
        "dtype": network.dtype,
    }
    return config
