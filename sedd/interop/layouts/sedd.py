"""The layout of SEDD's code: score models of either process. arXiv:2310.16834.

The same nested configuration is ``config.json`` on the hub, and ``.hydra/config.yaml`` in a run.
"""

from sedd.errors import UserError
from sedd.interop.layouts.base import Layout
from sedd.interop.layouts.ddit import (
    HYDRA,
    PROCESSES,
    SCHEDULES,
    SIZES,
    TENSORS,
    common_refusals,
    hydra_config,
    hydra_description,
    hydra_noise,
)
from sedd.networks.ddit import DDiT

NAME = "SEDD"
NETWORK = DDiT
CODE = "the code of SEDD (arXiv:2310.16834)"


def matches(config, names):
    """Whether the configuration names a graph and has no key that only RADD's code writes."""
    # RADD's configurations may name a graph too; only they have the key use_checkpoint.
    return config.has("model") and config.has("graph") and not config.has("model.use_checkpoint")


def read(config):
    """Read the nested configuration; with an absorbing graph the mask is one more state."""
    values = config.read(
        process=("graph.type", PROCESSES),
        scaled=("model.scale_by_sigma", bool),
        condition_dim=("model.cond_dim", "size"),
        **SIZES,
        **HYDRA,
        **hydra_noise(config),
    )
    absorbing = values["process"] == "absorbing"
    if values.pop("scaled") != absorbing:
        raise UserError(
            f"{config.path}: model.scale_by_sigma must be {str(absorbing).lower()} where the graph "
            f"is {values['process']}, got {str(not absorbing).lower()}"
        )
    description = hydra_description(config, values, parameterization="score")
    network = config.build(
        DDiT, num_states=description.num_tokens + absorbing, time_conditioned=True, **values
    )
    return Layout(name=NAME, network=network, description=description, tensors=TENSORS)


def refusals(network, description):
    """Why SEDD's code cannot hold a model; None unless it is a score model."""
    if description.parameterization != "score":
        return None
    problems = common_refusals(network, description, list(SCHEDULES.values()), norm_bias=False)
    if description.process not in PROCESSES.values():
        problems.append(f"process must be absorbing or uniform, got {description.process}")
    return problems


def tensors(network):
    """A dictionary from our parameters to the tensor names of SEDD's code."""
    return TENSORS


def write(network, description):
    """The nested configuration, with the graph and the name of SEDD's network."""
    config = hydra_config(network, description)
    absorbing = description.process == "absorbing"
    config["graph"] = {"type": "absorb" if absorbing else "uniform"}
    config["model"] |= {"name": "exported", "type": "ddit", "scale_by_sigma": absorbing}
    return config
