"""Low-rank adapters in the files of PEFT, read and written without PyTorch.

A directory of PEFT has ``adapter_config.json``, which names the base model, the rank and α, and
``adapter_model.safetensors``, in which the adapter of the linear layer NAME has the tensors
``base_model.model.NAME.lora_A.weight`` [r, in] and ``….lora_B.weight`` [out, r]. The names of the
layers are those of the base model's layout.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sedd.errors import UserError, first_line
from sedd.interop.layouts.base import reason
from sedd.interop.published import complete_directory
from sedd.networks.lora import Lora
from sedd.types import Params

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTORS = {"a": "lora_A", "b": "lora_B"}
# Keys whose other values change what adapters compute in a way that is not supported.
REQUIRED = {
    "peft_type": ["LORA"],
    "bias": ["none"],
    "use_dora": [False],
    "fan_in_fan_out": [False],
    "rank_pattern": [{}],
    "alpha_pattern": [{}],
    "layers_to_transform": [],
    "layer_replication": [],
    "modules_to_save": [[]],
    "trainable_token_indices": [],
    "target_parameters": [[]],
}


def layer_names(tensors: Mapping[str, str]) -> dict[str, str]:
    """The published name of each linear layer of a block, with {} for the number of the block.

    Args:
        tensors: published names by our parameters, as in ``Layout.tensors``.
    """
    kernels = {key.split("/")[-2]: name for key, name in tensors.items() if key.endswith("kernel")}
    return {ours: name.removesuffix(".weight") for ours, name in kernels.items() if "{}" in name}


def save_adapters(
    path: Path, tensors: Mapping[str, str], lora: Lora, adapters: Params, *, base: str
) -> None:
    """Write adapters to the directory ``path``, complete or not at all.

    The layers are named by a regular expression. PEFT also accepts a list of the ends of names, but
    the end ``ff_out`` of LLaDA's MLP is that of its output layer, too.

    Args:
        path: the directory; it must be empty or not exist.
        tensors: published names by our parameters, of the base model's layout.
        lora: rank and α.
        adapters: the entry ``adapters`` of the parameters.
        base: the base model, a name on the hub or a directory.

    Raises:
        UserError: if ``path`` is not free or cannot be written.
    """
    names = layer_names(tensors)
    arrays, patterns = {}, []
    for layer, factors in adapters["blocks"].items():
        patterns.append(re.escape(names[layer]).replace(r"\{\}", r"\d+"))
        for key, theirs in FACTORS.items():
            for number, one in enumerate(np.asarray(factors[key])):
                name = f"{PREFIX}{names[layer].format(number)}.{theirs}.weight"
                arrays[name] = np.ascontiguousarray(one.T)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.scale * lora.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": "|".join(patterns),
        "task_type": None,
    }
    with complete_directory(path) as partial:
        save_file(arrays, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """Read and check ``adapter_config.json``.

    Raises:
        UserError: it cannot be read, or has a value that is not supported; lists all of them.
    """
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({first_line(error)})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: must hold an object, got {type(config).__name__}")
    problems = []
    for key, allowed in REQUIRED.items():
        value = config.get(key)
        if value is not None and value not in allowed:
            choices = " or ".join(map(repr, allowed)) or "null"
            problems.append(f"{key} must be {choices}, got {value!r}")
    for key, kind in (("r", int), ("lora_alpha", (int, float)), ("base_model_name_or_path", str)):
        value = config.get(key)
        if not isinstance(value, kind) or not value or value is True:
            problems.append(f"{key} must be given, got {value!r}")
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    return config


def base_of(directory: Path) -> str:
    """The base model of adapters: a directory, or ``hf://OWNER/NAME``; UserError as above."""
    name = read_adapter_config(directory)["base_model_name_or_path"]
    local = name.startswith("hf://") or Path(name).expanduser().is_dir()
    return name if local else f"hf://{name}"


def load_adapters(
    directory: Path, tensors: Mapping[str, str], kernels: Mapping[str, tuple[int, ...]]
) -> tuple[Lora, Params]:
    """Read the adapters in a directory.

    Args:
        directory: the directory of ``adapter_config.json``.
        tensors: published names by our parameters, of the base model's layout.
        kernels: the shape [layers, in, out] of the kernel of each linear layer of the blocks.

    Returns:
        Rank, α and layers, and the entry ``adapters`` of the parameters, as numpy arrays.

    Raises:
        UserError: a file is missing or damaged, or tensors are missing, unexpected or of a wrong
            shape; the message lists them.
    """
    config, path = read_adapter_config(directory), directory / WEIGHTS
    try:
        arrays = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: {reason(error)}") from None
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    blocks: Params = {}
    problems = []
    for layer, template in layer_names(tensors).items():
        if layer not in kernels or not any(
            name.startswith(PREFIX + template.format(0) + ".") for name in arrays
        ):
            continue
        layers, into, out = kernels[layer]
        blocks[layer] = {}
        for key, shape in (("a", (rank, into)), ("b", (out, rank))):
            found = []
            for number in range(layers):
                name = f"{PREFIX}{template.format(number)}.{FACTORS[key]}.weight"
                one = arrays.pop(name, None)
                if one is None:
                    problems.append(f"missing {name}")
                elif one.shape != shape:
                    problems.append(f"{name} is {list(one.shape)}, not {list(shape)}")
                else:
                    found.append(one.astype(np.float32).T)
            blocks[layer][key] = found
    problems += [f"unexpected {name}" for name in sorted(arrays)]
    if not blocks and not problems:
        problems.append("no adapter of a layer of this model")
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    stacked = {
        layer: {key: np.stack(each) for key, each in factors.items()}
        for layer, factors in blocks.items()
    }
    lora = Lora(rank=rank, alpha=scale * rank, layers=",".join(blocks))
    return lora, {"blocks": stacked}
