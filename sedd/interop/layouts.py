"""The published layouts of SEDD, RADD and MDLM: their configurations and the names of tensors.

SEDD's and RADD's code writes its whole configuration, as ``config.json`` on the hub and as
``.hydra/config.yaml`` beside a training run; MDLM's ``config.json`` is flat.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sedd.errors import UserError
from sedd.networks.ddit import DDiT

CONFIGS = ("config.json", ".hydra/config.yaml")
SCHEDULES = {"loglinear": "log_linear", "geometric": "geometric"}  # theirs: ours
PROCESSES = {"absorb": "absorbing", "uniform": "uniform"}
LOG_LINEAR_EPS = 1e-3  # fixed in all three
MLP_RATIO = 4  # likewise

# Our parameters under the published names; {} is the number of the block. PyTorch's linear weights
# are [out, in], our kernels [in, out].
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
IGNORED = "rotary_emb.inv_freq"  # a constant that PyTorch saved along


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a published checkpoint is, apart from its network, in this library's terms."""

    process: str  # "absorbing" or "uniform"
    parameterization: str  # "score" or "conditional"; of the time where the network is conditioned
    schedule: dict[str, Any]  # its name and its options
    num_tokens: int  # N, the real tokens, without the mask
    length: int  # of the training sequences
    corpus: str | None  # what it was trained on, where the configuration says so


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a configuration says of the tensors beside it.

    ``constant_sigma`` is for a network that is conditioned on σ and always runs at this one.
    """

    name: str
    network: DDiT
    description: Description
    prefix: str = ""  # of the tensors' names
    constant_sigma: float | None = None


def find_config(directory: Path) -> Path | None:
    """The published configuration in a directory, or None where there is none.

    A ``config.json`` that cannot be read is none: a run has one too. ``UserError`` where the other
    one cannot be read, which is of published code alone.
    """
    for path in (directory / name for name in CONFIGS):
        if path.is_file():
            try:
                data = _parse(path)
            except (OSError, ValueError, yaml.YAMLError) as error:
                if path.suffix != ".json":
                    raise _unreadable(path, error) from None
                return None
            if isinstance(data, dict) and ("model" in data or "model_type" in data):
                return path
            return None
    return None


def read_layout(path: Path) -> Layout:
    """The layout that a configuration is of, and what it says.

    Raises ``UserError`` where a key is missing or not understood; all of them are named.
    """
    try:
        data = _parse(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _unreadable(path, error) from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(data).__name__}")
    config = _Config(path, data)
    if data.get("model_type") == "mdlm":
        return _mdlm(config)
    if "model" not in data:
        raise UserError(
            f"{path}: an unknown layout, with the model_type {data.get('model_type')!r}: expected "
            "the configuration of SEDD or RADD, with the keys tokens and model, or that of MDLM, "
            "with the model_type 'mdlm'"
        )
    if config.has("graph") and not config.has("model.use_checkpoint"):  # a key of RADD's code alone
        return _sedd(config)
    return _radd(config)


def reason(error: Exception) -> str:
    """The error in one line, without the path that an ``OSError`` repeats."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200]


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: {reason(error)}; expected a published configuration")


def _parse(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)


class _Config:
    """A configuration, whose keys are asked for by their dotted name."""

    def __init__(self, path: Path, data: dict[str, Any]):
        self.path, self.data = path, data

    def has(self, name: str) -> bool:
        value = self.data
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                return False
            value = value[part]
        return True

    def read(self, **keys: Any) -> dict[str, Any]:
        """The values of keys, each given as (dotted name, kind).

        A kind is a type, "size" for a positive integer, or a dictionary of choices to what they
        are here.
        """
        values, problems = {}, []
        for ours, (name, kind) in keys.items():
            try:
                values[ours] = self._get(name, kind)
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise UserError(f"{self.path}: {'; '.join(problems)}")
        return values

    def _get(self, name: str, kind: Any) -> Any:
        if not self.has(name):
            raise ValueError(f"the key {name} is missing")
        value: Any = self.data
        for part in name.split("."):
            value = value[part]
        if isinstance(kind, dict):
            if not isinstance(value, str) or value not in kind:
                raise ValueError(f"{name} must be one of {', '.join(kind)}, got {value!r}")
            return kind[value]
        if kind is bool and not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}")
        if kind is float:
            try:
                return float(value)  # YAML reads 1e-4 as text, and configurations kept it so
            except (TypeError, ValueError):
                raise ValueError(f"{name} must be a number, got {value!r}") from None
        if kind == "size" and not (type(value) is int and value > 0):
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
        return value

    def network(self, **options) -> DDiT:
        try:
            return DDiT(**options)
        except ValueError as error:
            raise UserError(f"{self.path}: {error}") from None


SIZES = {
    "hidden_dim": ("model.hidden_size", "size"),
    "num_layers": ("model.n_blocks", "size"),
    "num_heads": ("model.n_heads", "size"),
    "dropout": ("model.dropout", float),
}
HYDRA = {"num_tokens": ("tokens", "size"), "length": ("model.length", "size")}
MDLM = {
    "num_states": ("vocab_size", "size"),
    "hidden_dim": ("hidden_dim", "size"),
    "condition_dim": ("cond_dim", "size"),
    "num_layers": ("n_blocks", "size"),
    "num_heads": ("n_heads", "size"),
    "dropout": ("dropout", float),
}


def _sedd(config: _Config) -> Layout:
    values = config.read(
        process=("graph.type", PROCESSES),
        scaled=("model.scale_by_sigma", bool),
        condition_dim=("model.cond_dim", "size"),
        **SIZES,
        **HYDRA,
        **_noise(config),
    )
    absorbing = values["process"] == "absorbing"
    if values.pop("scaled") != absorbing:
        raise UserError(
            f"{config.path}: model.scale_by_sigma must be {str(absorbing).lower()} where the graph "
            f"is {values['process']}, got {str(not absorbing).lower()}"
        )
    description = _description(config, values, parameterization="score")
    network = config.network(
        num_states=description.num_tokens + absorbing, time_conditioned=True, **values
    )
    return Layout(name="SEDD", network=network, description=description)


def _radd(config: _Config) -> Layout:
    values = config.read(**SIZES, **HYDRA, **_noise(config)) | {"process": "absorbing"}
    description = _description(config, values, parameterization="conditional")
    network = config.network(
        num_states=description.num_tokens + 1, time_conditioned=False, norm_bias=True, **values
    )
    return Layout(name="RADD", network=network, description=description)


def _mdlm(config: _Config) -> Layout:
    values = config.read(
        length=("model_length", "size"), conditioned=("time_conditioning", bool), **MDLM
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
        name="MDLM",
        network=network,
        description=description,
        prefix="backbone.",
        constant_sigma=None if conditioned else 0.0,
    )


def _noise(config: _Config) -> dict[str, Any]:
    """The keys of the schedule, which a configuration may leave out: log-linear is the default."""
    if not config.has("noise"):
        return {}
    keys: dict[str, Any] = {"schedule": ("noise.type", SCHEDULES)}
    if config.has("noise.type") and config.data["noise"]["type"] == "geometric":
        keys |= {name: (f"noise.{name}", float) for name in ("sigma_min", "sigma_max")}
    return keys


def _description(config: _Config, values: dict[str, Any], *, parameterization: str) -> Description:
    """What is not the network's of ``values``, which keep the rest."""
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


def layout_for(network: DDiT, description: Description) -> Layout:
    """The published layout that holds this model; UserError with all reasons where none does."""
    reading = description.parameterization
    if reading not in ("score", "conditional"):
        raise UserError(
            f"this model is {reading}, and has no published layout: SEDD, RADD and MDLM have one, "
            "whose parameterization is score or conditional"
        )
    name = "SEDD"
    if reading == "conditional":
        name = "MDLM" if network.time_conditioned else "RADD"
    problems = []
    if network.mlp_ratio != MLP_RATIO:
        problems.append(f"network.mlp_ratio must be {MLP_RATIO}, got {network.mlp_ratio}")
    if network.norm_bias and name != "RADD":
        problems.append("network.norm_bias must be False, got True")
    schedule = description.schedule["name"]
    known = ["log_linear"] if name == "MDLM" else list(SCHEDULES.values())
    if schedule not in known:
        problems.append(f"schedule must be {' or '.join(known)}, got {schedule}")
    elif description.schedule.get("eps", LOG_LINEAR_EPS) != LOG_LINEAR_EPS:
        problems.append(f"schedule.eps must be {LOG_LINEAR_EPS}, got {description.schedule['eps']}")
    if problems:
        raise UserError(f"the layout of {name} cannot hold this model: {'; '.join(problems)}")
    prefix = "backbone." if name == "MDLM" else ""
    return Layout(name=name, network=network, description=description, prefix=prefix)


def config_of(layout: Layout) -> dict[str, Any]:
    """The ``config.json`` that ``read_layout`` reads as this layout."""
    network, description = layout.network, layout.description
    if layout.name == "MDLM":
        return {
            "model_type": "mdlm",
            "architectures": ["MDLM"],
            "model_length": description.length,
            "time_conditioning": layout.constant_sigma is None,
            **{theirs: getattr(network, ours) for ours, (theirs, _) in MDLM.items()},
        }
    schedule = {"sigma_min": 1e-4, "sigma_max": 20.0, **description.schedule}  # SEDD's own, unused
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
    if layout.name == "SEDD":
        absorbing = description.process == "absorbing"
        config["graph"] = {"type": "absorb" if absorbing else "uniform"}
        config["model"] |= {"name": "exported", "type": "ddit", "scale_by_sigma": absorbing}
    else:
        config["model"] |= {
            "name": "exported",
            "type": "ddit_wot",
            "use_checkpoint": False,
            "dtype": network.dtype,
        }
    return config


def names_of(key: str, shape: tuple[int, ...], prefix: str) -> tuple[list[str], tuple[int, ...]]:
    """The published names of one of our parameters, one for each block, and each one's shape."""
    template = prefix + TENSORS[key]
    stacked = "{}" in template
    names = [template.format(i) for i in range(shape[0])] if stacked else [template]
    shape = shape[1:] if stacked else shape
    return names, shape[::-1] if key.endswith("kernel") else shape


def to_published(key: str, array: np.ndarray, prefix: str) -> dict[str, np.ndarray]:
    """One of our parameters as the tensors that it is in the published layout."""
    names, shape = names_of(key, array.shape, prefix)
    each = array if array.ndim > len(shape) else [array]
    kernel = key.endswith("kernel")
    return {
        name: np.ascontiguousarray(one.T if kernel else one, np.float32)
        for name, one in zip(names, each, strict=True)
    }


def from_published(key: str, arrays: list[np.ndarray]) -> np.ndarray:
    """The inverse: one of our parameters from its tensors, in the order of their names."""
    values = [array.T if key.endswith("kernel") else array for array in arrays]
    return np.stack(values) if "{}" in TENSORS[key] else values[0]
