"""Shared by all layouts: find and read configurations, name tensors, choose a layout.

``sedd.interop.layouts.ddit`` has what the layouts of the network ``ddit`` share, and
``sedd.interop.layouts.decoder`` what those of large models share.
"""

import functools
import importlib
import json
import pkgutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sedd.errors import UserError
from sedd.networks.base import Network

CONFIGS = ("config.json", ".hydra/config.yaml")
MARKS = ("model", "model_type", "architectures")  # every published config.json has one of them
# Constants among the saved tensors, by the ends of their names.
IGNORED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
VOCABULARY = ("trunk/embed/embedding", "head/kernel")  # have a row, or a column, for each id

# Classes of published code that are known and not read, and why.
MIXTURE = "is a mixture of experts, which is not read"
REFUSED = {
    "LLaDAMoEModel": MIXTURE,
    "LLaDAMoEModelLM": MIXTURE,
    "LLaDA2MoeModelLM": MIXTURE,
    "SDARMoeForCausalLM": MIXTURE,
    "DiffusionGemmaForBlockDiffusion": "is a uniform diffusion with a canvas, which is not read",
    "WeDLMForCausalLM": "reorders its rows under causal attention, which is not read",
}
CODE_NOT_RUN = "the repository has code of its own (auto_map), which is not run"
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")  # keys of mixtures of experts


@dataclass(frozen=True, kw_only=True)
class Description:
    """A published model without its network, in the terms of this package."""

    process: str  # "absorbing", "uniform" or "hybrid"
    parameterization: str  # "score", "conditional", "mean" or "autoregressive"
    schedule: dict[str, Any]  # its name under "name", and its options
    num_tokens: int  # N, the real tokens, without the mask
    length: int  # tokens in a training sequence
    corpus: str | None  # training data; None if the configuration does not state it
    mask_id: int | None = None  # the mask in the publication; None if it is N, as here
    shift: bool = False  # whether position i is read at row i - 1
    block: int | None = None  # tokens in a block of a block diffusion model
    first: int | None = None  # published id of the token that opens a text of an autoregressive one
    dtype: str | None = None  # type of the published parameters, if it is known
    process_options: Mapping[str, Any] = field(default_factory=dict)
    condition: str = "sigma"  # what a network that is conditioned on the noise is told


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The network of a published checkpoint, its description, and the names of its tensors.

    Our parameters of the blocks are stacked, and published ones are one tensor a block. Our kernels
    are [in, out], and PyTorch's linear weights [out, in].
    """

    name: str
    network: Network
    description: Description
    tensors: Mapping[str, str]  # our parameter: its published name, with {} for the block's number
    constant_sigma: float | None = None  # the σ at which a conditioned network always runs
    config: Mapping[str, Any] = field(default_factory=dict)  # the configuration, if it was read
    # Two rows of the vocabulary that change places here, so that the mask follows the tokens.
    swap: tuple[int, int] | None = None
    added_rows: int = 0  # rows of zeros at the end of the vocabulary that the publication lacks
    notes: tuple[str, ...] = ()  # what a user should know about the configuration


def find_config(directory: Path) -> Path | None:
    """Find the published configuration in a directory; None if there is none.

    A ``config.json`` that cannot be read counts as none, because a run has a file of this name too.
    Only published code writes ``.hydra/config.yaml``: UserError if that file cannot be read.
    """
    for path in (directory / name for name in CONFIGS):
        if path.is_file():
            try:
                data = _parse(path)
            except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
                if path.suffix != ".json":
                    raise _unreadable(path, error) from None
                return None
            if isinstance(data, dict) and any(mark in data for mark in MARKS):
                return path
            return None
    return None


def read_layout(path: Path, names: Collection[str] = ()) -> Layout:
    """Read a configuration in the first layout that matches.

    Args:
        path: the configuration.
        names: names of the checkpoint's tensors, if they are known.

    Raises:
        UserError: if no layout matches, or keys are missing or not understood; lists all of them.
    """
    try:
        data = _parse(path)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise _unreadable(path, error) from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(data).__name__}")
    config = PublishedConfig(path, data, frozenset(names))
    refuse_by_name(config)
    for layout in layouts().values():
        if layout.matches(config, names):
            found = layout.read(config)
            notes = (*found.notes, CODE_NOT_RUN) if "auto_map" in data else found.notes
            return replace(found, config=data, notes=notes)
    architectures = ", ".join(map(str, config.architectures))
    what = f"architectures {architectures}" if architectures else "no architectures"
    raise UserError(
        f"{path}: an unknown layout, with the model_type {data.get('model_type')!r} and {what}: "
        f"expected the configuration of {_names()}"
    )


def refuse_by_name(config: "PublishedConfig") -> None:
    """Raise UserError for a kind of model that is known and not read."""
    for name in config.architectures:
        if reason_against := REFUSED.get(name):
            raise UserError(f"{config.path}: {name} {reason_against}")
    experts = next((key for key in EXPERTS if config.data.get(key)), None)
    if experts is not None:
        raise UserError(
            f"{config.path}: a mixture of experts ({experts} is {config.data[experts]}), which is "
            "not read"
        )


@functools.cache
def layouts() -> dict[str, Any]:
    """Every layout of the modules of ``sedd.interop.layouts``, by its ``NAME``."""
    package = importlib.import_module("sedd.interop.layouts")
    found: list[Any] = []
    for info in pkgutil.iter_modules(package.__path__):
        module: Any = importlib.import_module(f"{package.__name__}.{info.name}")
        if hasattr(module, "matches"):
            found.append(module)
        found += getattr(module, "LAYOUTS", ())
        found += [module.LAYOUT] if hasattr(module, "LAYOUT") else []
    return {layout.NAME: layout for layout in found}


def _names() -> str:
    """The names of all layouts as a phrase: ``MDLM, RADD or SEDD``."""
    return _phrase(layouts())


def _phrase(names: Collection[str]) -> str:
    *most, last = sorted(names, key=str.lower)
    return f"{', '.join(most)} or {last}" if most else last


def reason(error: Exception) -> str:
    """The message of an error in one line, without the path that an ``OSError`` adds."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200]


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: {reason(error)}; expected a published configuration")


def _parse(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)


class PublishedConfig:
    """A published configuration, with access to nested keys by dotted names (``model.length``).

    Args:
        path: its file, for messages.
        data: its content.
        names: names of the checkpoint's tensors; empty if they are not known.
    """

    def __init__(self, path: Path, data: dict[str, Any], names: Collection[str] = ()):
        self.path, self.data, self.names = path, data, names

    @property
    def architectures(self) -> list[Any]:
        """The names of the classes of the published code; an empty list without any."""
        value = self.data.get("architectures")
        return value if isinstance(value, list) else []

    def has(self, name: str) -> bool:
        """Whether the key ``name`` is there."""
        value = self.data
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                return False
            value = value[part]
        return True

    def read(self, **keys: Any) -> dict[str, Any]:
        """Read keys, each given as ``our_field=(dotted name, kind)``; returns values by our fields.

        A kind is ``bool``, ``float``, "size" for a positive integer, "id" for one that may be 0, or
        a dictionary from published choices to ours. A third entry is the value of a key that is
        missing or null. UserError lists all keys that are missing or have a wrong value.
        """
        values, problems = {}, []
        for ours, (name, kind, *default) in keys.items():
            if default and (not self.has(name) or self._value(name) is None):
                values[ours] = default[0]
                continue
            try:
                values[ours] = self._get(name, kind)
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise UserError(f"{self.path}: {'; '.join(problems)}")
        return values

    def _get(self, name: str, kind: Any) -> Any:
        """The value of one key; ValueError if it is missing or not of its kind."""
        if not self.has(name):
            raise ValueError(f"the key {name} is missing")
        value = self._value(name)
        if isinstance(kind, dict):
            if not isinstance(value, str) or value not in kind:
                raise ValueError(f"{name} must be one of {', '.join(kind)}, got {value!r}")
            return kind[value]
        if kind is bool and not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}")
        if kind is float:
            try:
                return float(value)  # YAML reads 1e-4 as a string, and some files contain that
            except (TypeError, ValueError):
                raise ValueError(f"{name} must be a number, got {value!r}") from None
        if kind == "size" and not (type(value) is int and value > 0):
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if kind == "id" and not (type(value) is int and value >= 0):
            raise ValueError(f"{name} must be an id, got {value!r}")
        return value

    def _value(self, name: str) -> Any:
        """The value of a key that is there."""
        value: Any = self.data
        for part in name.split("."):
            value = value[part]
        return value

    def build(self, make: Callable[..., Any], /, **options) -> Any:
        """``make(**options)``; UserError that names the configuration if it refuses an option."""
        try:
            return make(**options)
        except ValueError as error:
            raise UserError(f"{self.path}: {error}") from None


def layout_for(network: Network, description: Description) -> Layout:
    """Choose the layout that can hold a model; UserError with all reasons if there is none."""
    refused = {}
    for name, layout in layouts().items():
        if type(network) is not layout.NETWORK:  # a subclass has parameters that no layout holds
            continue
        refused[name] = layout.refusals(network, description)
        if refused[name] == []:
            tensors = layout.tensors(network)
            return Layout(name=name, network=network, description=description, tensors=tensors)
    for name, problems in refused.items():
        if problems:
            raise UserError(f"the layout of {name} cannot hold this model: {'; '.join(problems)}")
    if not refused:
        raise UserError(f"no published layout holds the network {type(network).__name__}")
    raise UserError(
        f"this model is {description.parameterization}, and has no published layout: "
        f"{_phrase(refused)} hold other kinds"
    )


def config_of(layout: Layout) -> dict[str, Any]:
    """The content of a ``config.json`` from which ``read_layout`` makes this layout."""
    if layout.config:
        return dict(layout.config)
    return layouts()[layout.name].write(layout.network, layout.description)


def names_of(layout: Layout, key: str, shape: tuple[int, ...]) -> tuple[list[str], tuple[int, ...]]:
    """The published names of one of our parameters, and the shape of each of these tensors.

    A parameter of the blocks has one name for each block; its first axis is the block.
    """
    template = layout.tensors[key]
    stacked = "{}" in template
    names = [template.format(i) for i in range(shape[0])] if stacked else [template]
    shape = shape[1:] if stacked else shape
    shape = shape[::-1] if key.endswith("kernel") else shape
    if key in VOCABULARY:
        shape = (shape[0] - layout.added_rows, *shape[1:])
    return names, shape


def to_published(layout: Layout, key: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Split one of our parameters into its published tensors; yields their names and contents."""
    names, _ = names_of(layout, key, array.shape)
    each = array if "{}" in layout.tensors[key] else [array]
    for name, one in zip(names, each, strict=True):
        tensor = one.T if key.endswith("kernel") else one
        if key in VOCABULARY:
            tensor = _swapped(layout, tensor[: len(tensor) - layout.added_rows])
        yield name, np.ascontiguousarray(tensor)


def from_published(
    layout: Layout,
    key: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    read: Callable[[str], np.ndarray],
) -> np.ndarray:
    """Read the published tensors of one of our parameters into a new array, one at a time.

    Args:
        layout: the layout.
        key: our parameter.
        shape: its shape.
        dtype: the type of the result.
        read: reads a tensor by its published name.
    """
    names, _ = names_of(layout, key, shape)
    array = np.empty(shape, dtype)
    slots = array if "{}" in layout.tensors[key] else array[None]
    for slot, name in zip(slots, names, strict=True):
        tensor = read(name)
        if key in VOCABULARY:
            tensor = _swapped(layout, tensor)
            if layout.added_rows:
                tensor = np.pad(tensor, ((0, layout.added_rows), (0, 0)))
        tensor = tensor.T if key.endswith("kernel") else tensor
        if tensor.dtype == dtype and dtype.itemsize == 2:  # numpy copies its own types faster
            slot, tensor = slot.view(np.uint16), tensor.view(np.uint16)
        slot[...] = tensor
    return array


def _swapped(layout: Layout, tensor: np.ndarray) -> np.ndarray:
    """A tensor of the vocabulary with the rows of ``layout.swap`` exchanged; else unchanged."""
    if layout.swap is None:
        return tensor
    tensor = np.array(tensor)
    tensor[list(layout.swap)] = tensor[list(layout.swap[::-1])]
    return tensor
