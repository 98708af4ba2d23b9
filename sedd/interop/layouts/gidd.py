"""The layout of GIDD's code: hybrid noise, and a network that is told its time. arXiv:2503.04482.

The network is that of MDLM's code without a prefix of the names. The mask is the last token of the
vocabulary. Without uniform tokens (``p_uniform`` 0) the noise is absorbing.
"""

from sedd.errors import UserError
from sedd.interop.layouts.base import Description, Layout
from sedd.interop.layouts.ddit import MLP_RATIO, TENSORS
from sedd.networks.ddit import DDiT

NAME = "GIDD"
NETWORK = DDiT
CODE = "the code of GIDD (arXiv:2503.04482)"
GAMMA = 1.0  # constant in the published code

KEYS = {  # our field: (key, kind)
    "num_states": ("vocab_size", "size"),
    "hidden_dim": ("hidden_size", "size"),
    "condition_dim": ("timestep_cond_dim", "size"),
    "num_layers": ("num_hidden_layers", "size"),
    "num_heads": ("num_attention_heads", "size"),
    "dropout": ("attention_dropout", float),
}


def matches(config, names):
    """Whether ``model_type`` is "dit", or the class of the published code is named."""
    return config.data.get("model_type") == "dit" or "DIT" in config.architectures


def read(config):
    """Read the configuration; the mask is the last of the ``vocab_size`` states."""
    values = config.read(
        length=("max_seq_len", "size"), uniform=("p_uniform", float), eps=("t_eps", float), **KEYS
    )
    length, uniform, eps = (values.pop(name) for name in ("length", "uniform", "eps"))
    if not 0 <= uniform < 1:
        raise UserError(f"{config.path}: p_uniform must be in [0, 1), got {uniform}")
    if not 0 < eps < 0.5:
        raise UserError(f"{config.path}: t_eps must be in (0, 0.5), got {eps}")
    network = config.build(DDiT, time_conditioned=True, **values)
    description = Description(
        process="hybrid" if uniform else "absorbing",
        process_options={"uniform": uniform, "gamma": GAMMA} if uniform else {},
        parameterization="mean",
        condition="time",
        schedule={"name": "log_linear", "eps": eps},
        num_tokens=network.num_states - 1,
        mask_id=network.num_states - 1,
        length=length,
        corpus=None,
    )
    return Layout(name=NAME, network=network, description=description, tensors=tensors(network))


def refusals(network, description):
    """Why GIDD's code cannot hold a model; None unless its parameterization is mean."""
    if description.parameterization != "mean":
        return None
    gamma = description.process_options.get("gamma")
    wanted = (
        ("network.mlp_ratio", network.mlp_ratio, MLP_RATIO),
        ("network.norm_bias", network.norm_bias, False),
        ("parameterization.condition", description.condition, "time"),
        ("parameterization.time_independent", not network.time_conditioned, False),
        ("schedule", description.schedule["name"], "log_linear"),
        ("process.gamma", gamma, GAMMA if description.process == "hybrid" else None),
    )
    problems = [f"{name} must be {right}, got {got}" for name, got, right in wanted if got != right]
    if description.process not in ("hybrid", "absorbing"):
        problems.append(f"process must be hybrid or absorbing, got {description.process}")
    return problems


def tensors(network):
    """A dictionary from our parameters to published names: those of SEDD."""
    return dict(TENSORS)


def write(network, description):
    """The configuration of the published class."""
    return {
        "model_type": "dit",
        "architectures": ["DIT"],
        "max_seq_len": description.length,
        "p_uniform": description.process_options.get("uniform", 0.0),
        "t_eps": description.schedule["eps"],
        **{theirs: getattr(network, ours) for ours, (theirs, _) in KEYS.items()},
    }
