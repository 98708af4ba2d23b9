"""Published PyTorch checkpoints of SEDD, RADD and MDLM, read without PyTorch.

A checkpoint is a directory with ``config.json`` and ``model.safetensors``, as the hub serves
``JingyangOu/radd-lambda-dce``, ``JingyangOu/radd-t-dce`` and ``kuleshov-group/mdlm-owt``, and
``louaaron/sedd-small`` and ``louaaron/sedd-medium`` once their ``pytorch_model.bin`` is converted.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from sedd.errors import UserError
from sedd.networks.ddit import DDiT, sigma_features
from sedd.types import Params

SCHEDULES = {"loglinear": "log_linear", "geometric": "geometric"}  # theirs: ours
PROCESSES = {"absorb": "absorbing", "uniform": "uniform"}

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
_KINDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published checkpoint in this library's terms.

    ``params`` are float32 arrays in host memory. ``description`` has the keys

    - ``process``: "absorbing" or "uniform";
    - ``parameterization``: "score" (SEDD) or "conditional" (RADD, MDLM), which depends on the time
      where ``network.time_conditioned``;
    - ``schedule``: ``{"name": "log_linear"}`` or ``{"name": "geometric", "sigma_min": …,
      "sigma_max": …}``, ``None`` where the configuration states none;
    - ``num_tokens``: N, the real tokens, without the mask;
    - ``length``: that of the training sequences.
    """

    network: DDiT
    params: Params
    description: dict[str, Any]


def load_published(path: str | os.PathLike) -> Published:
    """Read the checkpoint in the directory ``path``.

    The network computes in float32; ``dataclasses.replace(network, dtype="bfloat16")`` does as the
    published code does on a GPU. Raises ``UserError`` where a file or a key of the configuration is
    missing or not understood, and where tensors are missing, unexpected or of the wrong shape: all
    of them are listed.

    MDLM without ``time_conditioning`` holds a network that is conditioned on σ but always runs at
    σ = 0. It is returned as the network without a condition that it is a longer spelling of (see
    ``at_constant_sigma``), so that nothing downstream has to know of a σ that is not one.
    """
    directory = Path(path)
    config = _Config(directory / "config.json")
    if config.data.get("model_type") == "mdlm":
        network, description = _mdlm(config)
        prefix = "backbone."
    else:
        network, description = _sedd(config) if "graph" in config.data else _radd(config)
        prefix = ""
    params = _read_params(directory / "model.safetensors", network, prefix)
    if prefix and not config.get("time_conditioning", bool):
        network, params = at_constant_sigma(network, params, 0.0)
    return Published(network=network, params=params, description=description)


def at_constant_sigma(network: DDiT, params: Params, sigma: float) -> tuple[DDiT, Params]:
    """The unconditioned network that computes what ``network`` does at one σ; exact up to rounding.

    At a constant σ the modulations are constants. The scale and shift of a norm are then a weight
    and a bias of that norm, and a gate is a factor of the matrix (and bias) that ends its branch.
    """
    if not network.time_conditioned or network.norm_bias:
        raise ValueError("network must be time_conditioned and have no norm_bias")
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    trunk = params["trunk"]
    condition_C = np.asarray(sigma_features(jnp.full(1, sigma, jnp.float32))[0], np.float64)
    for name in ("in", "out"):
        condition_C = condition_C @ trunk["sigma_map"][name]["kernel"]
        condition_C = condition_C + trunk["sigma_map"][name]["bias"]
        condition_C = condition_C / (1 + np.exp(-condition_C))

    def modulation(layer, parts):
        out = np.einsum("c,...cd->...d", condition_C, layer["kernel"]) + layer["bias"]
        return np.split(out, parts, axis=-1)

    def norm(layer, shift, scale):
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


class _Config:
    """``config.json``, whose keys are asked for by their dotted name."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: {_reason(error)}; expected a published configuration"
            ) from None
        if not isinstance(self.data, dict):
            raise UserError(f"{path}: expected a JSON object, got {type(self.data).__name__}")

    def get(self, name: str, kind: type = int) -> Any:
        value = self.data
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                raise UserError(f"{self.path}: the key {name} is missing")
            value = value[part]
        try:
            converted = kind(value)  # YAML reads 1e-4 as a string, and some configurations kept it
        except (TypeError, ValueError):
            converted = None
        if converted is None or (kind is int and converted != value):
            raise UserError(f"{self.path}: {name} must be {_KINDS[kind]}, got {value!r}")
        return converted

    def choice(self, name: str, choices: dict[str, str]) -> str:
        value = self.get(name, str)
        if value not in choices:
            raise UserError(
                f"{self.path}: {name} must be one of {', '.join(choices)}, got {value!r}"
            )
        return choices[value]

    def network(self, **options) -> DDiT:
        try:
            return DDiT(**options)
        except ValueError as error:
            raise UserError(f"{self.path}: {error}") from None


def _sedd(config: _Config) -> tuple[DDiT, dict[str, Any]]:
    process = config.choice("graph.type", PROCESSES)
    absorbing = process == "absorbing"
    scaled = config.get("model.scale_by_sigma", bool)
    if scaled != absorbing:
        raise UserError(
            f"{config.path}: model.scale_by_sigma must be {str(absorbing).lower()} where the graph "
            f"is {process}, got {str(scaled).lower()}"
        )
    network = config.network(
        num_states=config.get("tokens") + absorbing,
        time_conditioned=True,
        condition_dim=config.get("model.cond_dim"),
        **_sizes(config),
    )
    return network, _description(config, process, "score")


def _radd(config: _Config) -> tuple[DDiT, dict[str, Any]]:
    network = config.network(
        num_states=config.get("tokens") + 1,
        time_conditioned=False,
        norm_bias=True,
        **_sizes(config),
    )
    return network, _description(config, "absorbing", "conditional")


def _mdlm(config: _Config) -> tuple[DDiT, dict[str, Any]]:
    network = config.network(
        num_states=config.get("vocab_size"),
        time_conditioned=True,
        hidden_dim=config.get("hidden_dim"),
        condition_dim=config.get("cond_dim"),
        num_layers=config.get("n_blocks"),
        num_heads=config.get("n_heads"),
        dropout=config.get("dropout", float),
    )
    description = {
        "process": "absorbing",
        "parameterization": "conditional",
        "schedule": None,
        "num_tokens": config.get("vocab_size") - 1,
        "length": config.get("model_length"),
    }
    return network, description


def _sizes(config: _Config) -> dict[str, Any]:
    return {
        "hidden_dim": config.get("model.hidden_size"),
        "num_layers": config.get("model.n_blocks"),
        "num_heads": config.get("model.n_heads"),
        "dropout": config.get("model.dropout", float),
    }


def _description(config: _Config, process: str, parameterization: str) -> dict[str, Any]:
    schedule = None
    if "noise" in config.data:
        schedule = {"name": config.choice("noise.type", SCHEDULES)}
        if schedule["name"] == "geometric":
            for name in ("sigma_min", "sigma_max"):
                schedule[name] = config.get(f"noise.{name}", float)
    return {
        "process": process,
        "parameterization": parameterization,
        "schedule": schedule,
        "num_tokens": config.get("tokens"),
        "length": config.get("model.length"),
    }


def _read_params(path: Path, network: DDiT, prefix: str) -> Params:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        hint = ""
        if not path.exists() and (path.parent / "pytorch_model.bin").exists():
            hint = "; pytorch_model.bin is a pickle, which is not read: convert it to safetensors"
        raise UserError(f"{path}: {_reason(error)}{hint}") from None

    tensors = {name: value for name, value in tensors.items() if not name.endswith(IGNORED)}
    ours, treedef = jax.tree_util.tree_flatten_with_path(
        jax.eval_shape(network.init, jax.random.key(0))
    )
    params, missing, misshapen, known = [], [], [], set()
    for key_path, leaf in ours:
        key = jax.tree_util.keystr(key_path, simple=True, separator="/")
        template = prefix + TENSORS[key]
        stacked = "{}" in template
        names = [template.format(i) for i in range(leaf.shape[0])] if stacked else [template]
        transposed = key.endswith("kernel")
        shape = leaf.shape[1:] if stacked else leaf.shape
        shape = shape[::-1] if transposed else shape
        known.update(names)
        missing += [name for name in names if name not in tensors]
        present = [name for name in names if name in tensors]
        misshapen += [
            f"{name} is {list(tensors[name].shape)}, not {list(shape)}"
            for name in present
            if tensors[name].shape != shape
        ]
        if missing or misshapen:
            continue
        values = [tensors[name].astype(np.float32) for name in names]
        values = [value.T for value in values] if transposed else values
        params.append(np.stack(values) if stacked else values[0])

    problems = []
    if missing:
        problems.append("missing " + ", ".join(missing))
    if unexpected := sorted(set(tensors) - known):
        problems.append("unexpected " + ", ".join(unexpected))
    if misshapen:
        problems.append("wrong shape: " + ", ".join(misshapen))
    if problems:
        raise UserError(f"{path} does not fit its config.json: {'; '.join(problems)}")
    return jax.tree_util.tree_unflatten(treedef, params)


def _reason(error: Exception) -> str:
    """The error in one line, without the path that an ``OSError`` repeats."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0]
