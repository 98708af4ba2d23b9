"""Files of tensors by name: safetensors, alone or in shards with an index, and PyTorch's files.

``open_tensors`` knows the shape and the type of every tensor from the headers, and reads contents
one tensor at a time. ``ShardWriter`` writes a checkpoint whose files have at most ``SHARD_BYTES``.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sedd.errors import UserError
from sedd.interop.layouts.base import IGNORED, reason
from sedd.interop.torch_file import Tensor, read_torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Files of tensors on the hub and in runs of SEDD, RADD and MDLM; the first that exists is read.
WEIGHTS = (
    SINGLE,
    INDEX,
    "pytorch_model.bin",
    "checkpoints-meta/checkpoint.pth",
    "checkpoint.pth",
    "checkpoints/last.ckpt",
    "last.ckpt",
)
SHARD_BYTES = 5 * 10**9  # the most bytes of tensors in a written file, as on the hub
DTYPES = {  # names of types in the header of a safetensors file
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
FLOATS = frozenset(DTYPES[name] for name in ("F64", "F32", "F16", "BF16"))  # those that are read


@dataclass(frozen=True, kw_only=True)
class TensorFiles:
    """The tensors of a checkpoint.

    Args:
        path: the file, or the index of several files.
        shapes: the shape of each tensor, by name.
        dtypes: the type of each tensor, by name.
        read: reads one tensor by its name.
        problems: what is wrong with the index: missing tensors, or a wrong total.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype]
    read: Callable[[str], np.ndarray]
    problems: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(nbytes(self.shapes[name], self.dtypes[name]) for name in self.shapes)


def nbytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Bytes of a tensor."""
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def open_tensors(directory: Path) -> TensorFiles | None:
    """Open the file of tensors, or the files with an index, in a directory; None without one.

    Of safetensors files only the headers are read.

    Raises:
        UserError: if a file or the index cannot be read, or the index names a file outside of the
            directory.
    """
    path = next((directory / name for name in WEIGHTS if (directory / name).is_file()), None)
    if path is None:
        return None
    if path.name == INDEX:
        return _open_shards(path)
    if path.suffix == ".safetensors":
        headers = _header(path)
        return TensorFiles(
            path=path,
            shapes={name: shape for name, (shape, _) in headers.items()},
            dtypes={name: dtype for name, (_, dtype) in headers.items()},
            read=lambda name: _read(path, name),
        )
    tensors = _torch_tensors(path)
    return TensorFiles(
        path=path,
        shapes={name: tensor.shape for name, tensor in tensors.items()},
        dtypes={name: tensor.dtype for name, tensor in tensors.items()},
        read=lambda name: np.asarray(tensors[name]),
    )


def headers_only(path: Path, headers: Mapping[str, tuple[tuple[int, ...], str]]) -> TensorFiles:
    """Tensors of which only shapes and types are known; types are named as in safetensors files."""

    def read(name: str) -> np.ndarray:
        raise UserError(f"{path}: {name} is not here, only its header")

    return TensorFiles(
        path=path,
        shapes={name: shape for name, (shape, _) in headers.items()},
        dtypes={name: DTYPES.get(kind, np.dtype(np.void)) for name, (_, kind) in headers.items()},
        read=read,
    )


def _open_shards(path: Path) -> TensorFiles:
    """The tensors of the files that an index names; a disagreement is one of the ``problems``."""
    total, files = read_index(path)
    found: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    problems = []
    for file in sorted(set(files.values())):
        if not (path.parent / file).is_file():
            problems.append(f"the file {file} is missing")
            continue
        header = _header(path.parent / file)
        unmapped = [name for name in header if files.get(name) != file]
        if unmapped:
            problems.append(f"{file} holds {', '.join(unmapped)}, which the index does not map")
        lacking = [name for name in files if files[name] == file and name not in header]
        if lacking:
            problems.append(f"{file} lacks {', '.join(lacking)}")
        found |= {name: header[name] for name in header if files.get(name) == file}
    size = sum(nbytes(shape, dtype) for shape, dtype in found.values())
    if not problems and total is not None and size != total:
        problems.append(f"the index states {total:,} bytes in total, and its tensors have {size:,}")
    return TensorFiles(
        path=path,
        shapes={name: shape for name, (shape, _) in found.items()},
        dtypes={name: dtype for name, (_, dtype) in found.items()},
        read=lambda name: _read(path.parent / files[name], name),
        problems=tuple(problems),
    )


def read_index(path: Path) -> tuple[int | None, dict[str, str]]:
    """Read the index of several safetensors files.

    Returns:
        The bytes of all tensors, None if it does not state them, and the file of each tensor.

    Raises:
        UserError: if it cannot be read, or a file is not in the directory of the index.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        files = data["weight_map"]
        names = list(files.items())
        total = (data.get("metadata") or {}).get("total_size")
        if not all(isinstance(part, str) for pair in names for part in pair):
            raise ValueError("weight_map must map names of tensors to names of files")
        if total is not None and not isinstance(total, int | float):
            raise ValueError(f"total_size must be a number, got {total!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} is not an index of safetensors files: {what}") from None
    for name, file in names:
        parts = PurePosixPath(file.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or ":" in file:
            raise UserError(
                f"{path}: {name} is mapped to {file!r}; the files must be in the directory of the "
                "index"
            )
    return None if total is None else int(total), files


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """The shape and the type of each tensor of a safetensors file."""
    header = {}
    try:
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118, the file is no dictionary
                one = file.get_slice(name)
                kind = one.get_dtype()
                if kind not in DTYPES:
                    raise UserError(f"{path}: {name} has the type {kind}, which is not read")
                header[name] = (tuple(one.get_shape()), DTYPES[kind])
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: {reason(error)}") from None
    return header


def _read(path: Path, name: str) -> np.ndarray:
    """One tensor of a safetensors file.

    The file is opened for each tensor: its pages then do not stay in the memory of the process.
    """
    try:
        with safe_open(path, "np") as file:
            return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: {name}: {reason(error)}") from None


def _torch_tensors(path: Path) -> Mapping[str, Tensor]:
    """The tensors of PyTorch's file by name, averaged (EMA) if the checkpoint holds an average."""
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


@dataclass
class ShardWriter:
    """Writes tensors to a directory as one safetensors file, or as several with an index.

    Tensors are written in the order in which they come. A file is full when the next tensor would
    make it larger than ``limit``. Call ``finish`` at the end.

    Args:
        directory: an existing directory.
        sizes: the bytes of each tensor, by name, in the order in which they come.
        limit: the most bytes of tensors in a file.
    """

    directory: Path
    sizes: Mapping[str, int]
    limit: int = SHARD_BYTES
    _files: dict[str, str] = field(default_factory=dict)
    _waiting: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        shard, room = 0, 0
        shards = {}
        for name, size in self.sizes.items():
            if size > room:
                shard, room = shard + 1, self.limit
            shards[name] = shard
            room -= size
        for name, number in shards.items():
            self._files[name] = (
                SINGLE if shard == 1 else f"model-{number:05d}-of-{shard:05d}.safetensors"
            )

    def write(self, name: str, tensor: np.ndarray) -> None:
        """Add a tensor; the file before it is written if the tensor begins a new one."""
        if self._waiting and self._files[next(iter(self._waiting))] != self._files[name]:
            self._flush()
        self._waiting[name] = tensor

    def finish(self) -> None:
        """Write the last file, and the index of several."""
        self._flush()
        if len(set(self._files.values())) > 1:
            index = {
                "metadata": {"total_size": sum(self.sizes.values())},
                "weight_map": dict(sorted(self._files.items())),
            }
            text = json.dumps(index, indent=2) + "\n"
            (self.directory / INDEX).write_text(text, encoding="utf-8")

    def _flush(self) -> None:
        file = self.directory / self._files[next(iter(self._waiting))]
        save_file(self._waiting, file, metadata={"format": "pt"})
        self._waiting = {}
