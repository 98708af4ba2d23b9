"""Published PyTorch checkpoints of SEDD, RADD and MDLM, read and written without PyTorch.

A checkpoint is a directory with a configuration (see ``sedd.interop.layouts``) and a file of
tensors. It comes from the hub (``louaaron/sedd-small``, ``JingyangOu/radd-lambda-dce``,
``kuleshov-group/mdlm-owt``) or from a run of the published training code.

Reading has three steps: the configuration gives the network and the names of its tensors; the
tensors are compared with these names and shapes, so that no mistake stays unnoticed; and each
tensor is transposed and stacked into our parameters. Writing is the reverse.
"""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from sedd.errors import UserError
from sedd.interop.layouts.base import (
    IGNORED,
    Description,
    Layout,
    config_of,
    find_config,
    from_published,
    names_of,
    read_layout,
    reason,
    to_published,
)
from sedd.interop.torch_file import Tensor, read_torch
from sedd.networks.ddit import DDiT, sigma_features
from sedd.types import Params

# Files of tensors on the hub and in runs of SEDD, RADD and MDLM; the first that exists is read.
WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
    "checkpoints-meta/checkpoint.pth",
    "checkpoint.pth",
    "checkpoints/last.ckpt",
    "last.ckpt",
)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published checkpoint in the terms of this package."""

    network: DDiT
    params: Params  # float32 numpy arrays
    description: Description


def load_published(path: str | os.PathLike) -> Published:
    """Read the network, the parameters and the description of the checkpoint in ``path``.

    ``path`` is a local directory. The parameters are the averaged (EMA) ones if the checkpoint has
    them. The network computes in float32. The published code computes in bfloat16 on a GPU, as does
    ``dataclasses.replace(network, dtype="bfloat16")``.

    An MDLM checkpoint without ``time_conditioning`` holds a network that is conditioned on σ but
    always runs at σ = 0. It is returned as the equal network without a condition (see
    ``at_constant_sigma``).

    Raises:
        UserError: if there is no configuration or no file of tensors, if keys of the configuration
            are missing or not understood, or if tensors are missing, unexpected, transposed or of a
            wrong shape; the message lists all of them.

    Example:
        >>> from sedd.interop.published import load_published
        >>> published = load_published("exports/radd")
        >>> published.description.process, published.description.length
        ('absorbing', 12)
    """
    directory = Path(path)
    found = [directory / name for name in WEIGHTS if (directory / name).is_file()]
    config = find_config(directory) or directory / "config.json"
    layout = read_layout(config, _tensor_names(found[0]) if found else ())
    if not found:
        raise UserError(f"{directory} has no file of tensors: expected one of {', '.join(WEIGHTS)}")
    network, params = layout.network, _read_params(found[0], layout)
    if layout.constant_sigma is not None:
        network, params = at_constant_sigma(network, params, layout.constant_sigma)
    return Published(network=network, params=params, description=layout.description)


def at_constant_sigma(network: DDiT, params: Params, sigma: float) -> tuple[DDiT, Params]:
    """Fold a constant σ into the parameters of a conditioned network.

    At a constant σ all modulations are constants. The modulation of a norm then is a change of its
    weight and bias, and the gate of a branch is a factor of the matrix and bias at its end.

    Args:
        network: a time-conditioned network without ``norm_bias``; ValueError for another one.
        params: its parameters.
        sigma: the total noise.

    Returns:
        An unconditioned network and its parameters, with equal outputs up to rounding.
    """
    if not network.time_conditioned or network.norm_bias:
        raise ValueError("network must be time_conditioned and have no norm_bias")
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    trunk = params["trunk"]
    # The condition, as in the network: two linear layers with SiLU.
    condition_C = np.asarray(sigma_features(jnp.full(1, sigma, jnp.float32))[0], np.float64)
    for name in ("in", "out"):
        condition_C = condition_C @ trunk["sigma_map"][name]["kernel"]
        condition_C = condition_C + trunk["sigma_map"][name]["bias"]
        condition_C = condition_C / (1 + np.exp(-condition_C))

    def modulation(layer, parts):
        """The constant shifts, scales and gates; for stacked blocks, one row a layer."""
        out = np.einsum("c,...cd->...d", condition_C, layer["kernel"]) + layer["bias"]
        return np.split(out, parts, axis=-1)

    def norm(layer, shift, scale):
        """The parameters of a norm followed by x·(1 + scale) + shift."""
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


def save_published(
    path: Path, layout: Layout, params: Params, *, beside: Mapping[str, str]
) -> None:
    """Write a checkpoint to the directory ``path``, complete or not at all.

    The files are written into a temporary directory beside ``path``, which is then renamed.

    Args:
        path: the directory; it must be empty or not exist.
        layout: the published layout, from ``sedd.interop.layouts.layout_for``.
        params: parameters of ``layout.network``.
        beside: texts of other files, by name.

    Raises:
        UserError: if ``path`` is not free or cannot be written.
    """
    check_free(path)
    tensors = {}
    for key, array in _flat(params):
        tensors |= to_published(layout, key, np.asarray(array))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
            texts = {"config.json": json.dumps(config_of(layout), indent=2) + "\n", **beside}
            for name, text in texts.items():
                (partial / name).write_text(text, encoding="utf-8")
            umask = os.umask(0)
            os.umask(umask)
            # mkdtemp and save_file allow access to the owner only: give the usual permissions.
            partial.chmod(0o777 & ~umask)
            (partial / "model.safetensors").chmod(0o666 & ~umask)
            partial.replace(path)  # replaces an empty directory, and fails for any other
        except BaseException:
            shutil.rmtree(partial)
            raise
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {reason(error)}") from error


def check_free(path: Path) -> None:
    """Raise UserError if ``path`` exists, unless it is an empty directory."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        what = "is not empty" if path.is_dir() else "is a file"
        raise UserError(f"{path}: it {what}; nothing is replaced, name another directory")


def with_norm_bias(network: DDiT, params: Params) -> tuple[DDiT, Params]:
    """Return an equal network whose norms have biases; added biases are 0."""
    if network.norm_bias:
        return network, params
    trunk, blocks = params["trunk"], params["trunk"]["blocks"]

    def biased(norm):
        """The parameters of a norm with a bias of 0."""
        return {**norm, "bias": np.zeros_like(norm["scale"])}

    blocks = blocks | {name: biased(blocks[name]) for name in ("norm_attention", "norm_mlp")}
    trunk = trunk | {"blocks": blocks, "norm": biased(trunk["norm"])}
    return dataclasses.replace(network, norm_bias=True), params | {"trunk": trunk}


def _flat(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree of parameters with their names, as in ``layouts.base.TENSORS``."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def _read_params(path: Path, layout: Layout) -> Params:
    """Read our parameters from a file of tensors; UserError lists everything that does not fit."""
    tensors = {
        name: tensor for name, tensor in _read_tensors(path).items() if not name.endswith(IGNORED)
    }
    ours = jax.eval_shape(layout.network.init, jax.random.key(0))
    wanted = {key: names_of(layout, key, leaf.shape) for key, leaf in _flat(ours)}
    shapes = {name: shape for names, shape in wanted.values() for name in names}
    transposed, misshapen = [], []
    for name in sorted(shapes.keys() & tensors.keys()):
        here, there = list(shapes[name]), list(tensors[name].shape)
        if there == here:
            continue
        if there == here[::-1] and len(here) > 1:
            transposed.append(f"{name} is transposed: {there}, not {here}")
        else:
            misshapen.append(f"{name} is {there}, not {here}")
    problems = []
    if missing := [name for name in shapes if name not in tensors]:
        problems.append("missing " + ", ".join(missing))
    if unexpected := sorted(tensors.keys() - shapes.keys()):
        problems.append("unexpected " + ", ".join(unexpected))
    problems += transposed
    if misshapen:
        problems.append("wrong shape: " + ", ".join(misshapen))
    if problems:
        raise UserError(f"{path} does not fit its configuration: {'; '.join(problems)}")
    params = [
        from_published(
            layout, key, [np.asarray(tensors[name]).astype(np.float32) for name in names]
        )
        for key, (names, _) in wanted.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(ours), params)


def _tensor_names(path: Path) -> list[str]:
    """The names in the header of a safetensors file; an empty list for other files."""
    if path.suffix != ".safetensors":
        return []
    try:
        with safe_open(path, "np") as tensors:
            return list(tensors.keys())
    except (OSError, SafetensorError):  # ``_read_tensors`` will report it
        return []


def _read_tensors(path: Path) -> Mapping[str, np.ndarray | Tensor]:
    """The tensors of a file by name, averaged (EMA) if the checkpoint holds an average."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: {reason(error)}") from None
    saved = read_torch(path)
    tensors = saved
    if isinstance(saved, dict):
        # A checkpoint of SEDD's and RADD's code ("model") or of Lightning ("state_dict"), or the
        # state dict itself.
        tensors = next((saved[key] for key in ("model", "state_dict") if key in saved), saved)
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise UserError(
            f"{path} is neither a state dict (tensors by name) nor a checkpoint of a training run "
            "(with the key model or state_dict)"
        )
    if tensors is saved or not saved.get("ema"):  # MDLM's code can be run without an average
        return tensors
    return _averaged(path, tensors, saved["ema"])


def _averaged(path: Path, tensors: dict[str, Tensor], ema: Any) -> dict[str, Tensor]:
    """The averaged (EMA) parameters by name.

    The checkpoint holds them as a list without names, in the order of PyTorch's ``parameters()``.
    This is the order of the state dict without its buffers.
    """
    shadow = ema.get("shadow_params") if isinstance(ema, dict) else None
    names = [name for name in tensors if not name.endswith(IGNORED)]
    if not isinstance(shadow, list) or not all(isinstance(each, Tensor) for each in shadow):
        raise UserError(
            f"{path}: the averaged parameters (ema) are unreadable: ema.shadow_params must be a "
            "list of tensors"
        )
    if len(shadow) != len(names):
        raise UserError(
            f"{path}: the averaged parameters (ema.shadow_params) are {len(shadow)} tensors, but "
            f"the model has {len(names)} parameters"
        )
    if wrong := [
        f"{name} is {list(tensors[name].shape)}, its average is {list(each.shape)}"
        for name, each in zip(names, shadow, strict=True)
        if each.shape != tensors[name].shape
    ]:
        raise UserError(f"{path}: the averaged parameters do not fit the model: {', '.join(wrong)}")
    return dict(zip(names, shadow, strict=True))
