"""What layouts share: finding and reading configurations, naming tensors, choosing a layout."""

import functools
import importlib
import json
import pkgutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sedd.errors import UserError
from sedd.networks.ddit import DDiT

CONFIGS = ("config.json", ".hydra/config.yaml")
MARKS = ("model", "model_type", "architectures")  # one of them is in every published config.json
SCHEDULES = {"loglinear": "log_linear", "geometric": "geometric"}  # theirs: ours
PROCESSES = {"absorb": "absorbing", "uniform": "uniform"}
LOG_LINEAR_EPS = 1e-3  # fixed in the code of SEDD, RADD and MDLM
MLP_RATIO = 4  # likewise

# Our parameters under the names of SEDD's code, which RADD and MDLM keep; {} is a block's number.
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

# Our field: (the published key, its kind), of SEDD's and RADD's code.
SIZES = {
    "hidden_dim": ("model.hidden_size", "size"),
    "num_layers": ("model.n_blocks", "size"),
    "num_heads": ("model.n_heads", "size"),
    "dropout": ("model.dropout", float),
}
HYDRA = {"num_tokens": ("tokens", "size"), "length": ("model.length", "size")}


@dataclass(frozen=True, kw_only=True)
class Description:
    """A published model apart from its network, in this library's terms."""

    process: str  # "absorbing" or "uniform"
    parameterization: str  # "score" or "conditional"; of the time where the network is conditioned
    schedule: dict[str, Any]  # its name and its options
    num_tokens: int  # N, the real tokens, without the mask
    length: int  # of the training sequences
    corpus: str | None  # what it was trained on, where the configuration says so


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A published checkpoint's network, its description, and the names of its tensors.

    ``tensors`` maps our parameters to published names, with ``{}`` for the number of a block.
    PyTorch's linear weights are [out, in] and our kernels [in, out]. ``constant_sigma`` is given if
    the network is conditioned on σ but always runs at this one.
    """

    name: str
    network: DDiT
    description: Description
    tensors: Mapping[str, str] = field(default_factory=lambda: TENSORS)
    constant_sigma: float | None = None


def find_config(directory: Path) -> Path | None:
    """The published configuration in a directory, or None.

    A ``config.json`` that cannot be read counts as none, since a run has one too. ``UserError`` if
    ``.hydra/config.yaml`` cannot be read: only published code writes it.
    """
    for path in (directory / name for name in CONFIGS):
        if path.is_file():
            try:
                data = _parse(path)
            except (OSError, ValueError, yaml.YAMLError) as error:
                if path.suffix != ".json":
                    raise _unreadable(path, error) from None
                return None
            if isinstance(data, dict) and any(mark in data for mark in MARKS):
                return path
            return None
    return None


def read_layout(path: Path, names: Collection[str] = ()) -> Layout:
    """The layout of a configuration; ``names`` are those of its tensors, if they are known.

    Raises ``UserError`` if no layout matches, or if keys are missing or not understood; all of them
    are named.
    """
    try:
        data = _parse(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _unreadable(path, error) from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(data).__name__}")
    config = PublishedConfig(path, data)
    for layout in layouts().values():
        if layout.matches(config, names):
            return layout.read(config)
    raise UserError(
        f"{path}: an unknown layout, with the model_type {data.get('model_type')!r}: expected "
        f"the configuration of {_names()}"
    )


@functools.cache
def layouts() -> dict[str, Any]:
    """The modules of ``sedd.interop.layouts`` that are a layout, by their ``NAME``."""
    package = importlib.import_module("sedd.interop.layouts")
    modules = [
        importlib.import_module(f"{package.__name__}.{info.name}")
        for info in pkgutil.iter_modules(package.__path__)
    ]
    return {module.NAME: module for module in modules if hasattr(module, "matches")}


def _names() -> str:
    *most, last = sorted(layouts())
    return f"{', '.join(most)} or {last}"


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


class PublishedConfig:
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


def hydra_noise(config: PublishedConfig) -> dict[str, Any]:
    """The keys of the schedule. A configuration may leave it out: log-linear is the default."""
    if not config.has("noise"):
        return {}
    keys: dict[str, Any] = {"schedule": ("noise.type", SCHEDULES)}
    if config.has("noise.type") and config.data["noise"]["type"] == "geometric":
        keys |= {name: (f"noise.{name}", float) for name in ("sigma_min", "sigma_max")}
    return keys


def hydra_description(
    config: PublishedConfig, values: dict[str, Any], *, parameterization: str
) -> Description:
    """The description, taken out of ``values``; the network's fields stay there."""
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
    """The published layout that holds a model; UserError with all reasons if none does."""
    refused = {}
    for name, layout in layouts().items():
        refused[name] = layout.refusals(network, description)
        if refused[name] == []:
            tensors = layout.tensors(network)
            return Layout(name=name, network=network, description=description, tensors=tensors)
    for name, problems in refused.items():
        if problems:
            raise UserError(f"the layout of {name} cannot hold this model: {'; '.join(problems)}")
    raise UserError(
        f"this model is {description.parameterization}, and has no published layout: {_names()} "
        "hold other kinds"
    )


def config_of(layout: Layout) -> dict[str, Any]:
    """The ``config.json`` that ``read_layout`` reads as this layout."""
    return layouts()[layout.name].write(layout.network, layout.description)


def common_refusals(
    network: DDiT, description: Description, schedules: Collection[str], *, norm_bias: bool
) -> list[str]:
    """Reasons why the code of SEDD, RADD and MDLM cannot build this network or schedule."""
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
    """What the configurations of SEDD's and RADD's code have in common."""
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
    return config


def names_of(layout: Layout, key: str, shape: tuple[int, ...]) -> tuple[list[str], tuple[int, ...]]:
    """The published names of one of our parameters, one for each block, and the shape of each."""
    template = layout.tensors[key]
    stacked = "{}" in template
    names = [template.format(i) for i in range(shape[0])] if stacked else [template]
    shape = shape[1:] if stacked else shape
    return names, shape[::-1] if key.endswith("kernel") else shape


def to_published(layout: Layout, key: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """The published tensors of one of our parameters."""
    names, shape = names_of(layout, key, array.shape)
    each = array if array.ndim > len(shape) else [array]
    kernel = key.endswith("kernel")
    return {
        name: np.ascontiguousarray(one.T if kernel else one, np.float32)
        for name, one in zip(names, each, strict=True)
    }


def from_published(layout: Layout, key: str, arrays: list[np.ndarray]) -> np.ndarray:
    """One of our parameters from its published tensors, in the order of their names."""
    values = [array.T if key.endswith("kernel") else array for array in arrays]
    return np.stack(values) if "{}" in layout.tensors[key] else values[0]
