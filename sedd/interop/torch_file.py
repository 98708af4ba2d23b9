"""Read files of ``torch.save`` without PyTorch and without running code from them.

Such a file is a zip archive of ``data.pkl``, a pickle of what was saved, and one entry of raw bytes
for each storage. A pickle is a program that may call any function by name. The unpickler here knows
only the classes below (tensors, parameters, ordered dictionaries) and refuses every other name.

Training checkpoints of Lightning also hold the run's configuration and tokenizer, as objects of the
libraries in ``PASSED_OVER``. Each of them is replaced by an ``_Inert``, whose methods do nothing.
"""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sedd.errors import UserError

STORAGES = {
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}
PASSED_OVER = ("omegaconf", "transformers", "tokenizers")
# What the objects of those libraries are made of in a pickle of protocol 2.
BUILTINS = ("dict", "list", "tuple", "set", "int", "long", "float", "str", "unicode")
PASSED_OVER_NAMES = {
    "typing.Any",
    "collections.defaultdict",
    "_codecs.encode",
    *(f"__builtin__.{name}" for name in BUILTINS),
}
LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # how files before 1.6 begin


def read_torch(path: Path) -> Any:
    """Read the saved object: dictionaries, lists, numbers and text; tensors become ``Tensor``.

    Tensors are read when they are converted to arrays. Raises ``UserError`` where the file is
    damaged, is not of ``torch.save``'s zip format, or names anything but tensors and what holds
    them.
    """
    try:
        archive = _Archive(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (zipfile.BadZipFile, NotImplementedError):  # of a version that there is not yet
        _refuse(path)
    return _unpickle(_Unpickler(io.BytesIO(archive.read("data.pkl")), path, archive), path)


# The pickle's BUILD sets attributes of whatever object or class it is given, unless that has a
# __setstate__: hence one in each of these. None has a __dict__ that it could fill.


class Tensor:
    """A tensor whose numbers are still in the file. ``np.asarray`` reads them, into a new array."""

    __slots__ = ("_offset", "_storage", "_strides", "shape")

    def __init__(self, storage, offset, shape, strides, *ignored):  # gradients and hooks
        shape, strides = tuple(shape), tuple(strides)
        if not isinstance(storage, _Storage) or not all(
            isinstance(number, int) and number >= 0 for number in (offset, *shape, *strides)
        ):
            raise pickle.UnpicklingError("a tensor is not described by whole numbers")
        self._storage, self._offset, self.shape, self._strides = storage, offset, shape, strides

    def __setstate__(self, state):
        raise pickle.UnpicklingError("a tensor has a state")

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        path, kind = self._storage.archive.path, self._storage.dtype
        data = self._storage.archive.read(f"data/{self._storage.key}")
        strides = [stride * kind.itemsize for stride in self._strides]
        try:
            array = np.ndarray(self.shape, kind, data, self._offset * kind.itemsize, strides)
        except (ValueError, TypeError, OverflowError):  # numpy checks the bounds
            raise UserError(f"{path} is damaged: a tensor reaches beyond its storage") from None
        return np.array(array, dtype or kind)


class _Storage:
    """Numbers of one type, by the name of their entry."""

    __slots__ = ("archive", "dtype", "key")

    def __init__(self, archive: "_Archive", dtype: np.dtype, key: str):
        self.archive, self.dtype, self.key = archive, dtype, key

    def __setstate__(self, state):
        raise pickle.UnpicklingError("a storage has a state")


class _Parameter:
    """Constructor of a parameter in a pickle; it returns the tensor."""

    __slots__ = ()

    def __new__(cls, data, *ignored):
        return data

    def __setstate__(self, state):
        raise pickle.UnpicklingError("a parameter has a state")


class _Dict(dict):
    """An ordered dictionary; a state dict's has attributes, which say nothing of its tensors."""

    __slots__ = ()

    def __setstate__(self, state):
        pass


class _Inert:
    """Placeholder for an object of ``PASSED_OVER``."""

    __slots__ = ()

    def __new__(cls, *ignored):
        return object.__new__(cls)

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, item):
        pass

    extend = add = append


CLASSES: dict[str, Any] = {
    "torch._utils._rebuild_tensor": Tensor,
    "torch._utils._rebuild_tensor_v2": Tensor,
    "torch._utils._rebuild_parameter": _Parameter,
    "torch._utils._rebuild_parameter_with_state": _Parameter,
    "collections.OrderedDict": _Dict,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream, path: Path, archive: "_Archive | None" = None):
        super().__init__(stream)
        self.path, self.archive = path, archive

    def find_class(self, module_name: str, global_name: str) -> Any:
        name = f"{module_name}.{global_name}"
        if name in STORAGES:
            return name  # a string: nothing can be done to it, unlike to a numpy dtype
        if name in CLASSES:
            return CLASSES[name]
        if name in PASSED_OVER_NAMES or module_name.split(".")[0] in PASSED_OVER:
            return _Inert
        raise UserError(
            f"{self.path}: its pickle asks for {name}, which no file of tensors needs: it is "
            "refused, and nothing of it was run"
        )

    def persistent_load(self, pid: Any) -> Any:
        kind, name, key, _, _, *_ = pid
        if kind != "storage" or name not in STORAGES or self.archive is None:
            raise pickle.UnpicklingError(f"it refers to {kind!r} of {name!r}")
        return _Storage(self.archive, STORAGES[name], str(key))


def _unpickle(unpickler: _Unpickler, path: Path) -> Any:
    try:
        return unpickler.load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(f"{path} is damaged: its pickle cannot be read ({reason})") from None


def _refuse(path: Path):
    """UserError for a file that is no zip archive; one that names a global is refused for that."""
    with path.open("rb") as file:
        legacy = file.read(len(LEGACY)) == LEGACY
        file.seek(0)
        for _ in range(4 if legacy else 1):  # two numbers and a description come before the object
            try:
                _Unpickler(file, path).load()
            except UserError:
                raise
            except Exception:  # whatever else it is, it is refused below
                break
    if legacy:
        raise UserError(
            f"{path} is in the format of torch.save before PyTorch 1.6, which is not read; with "
            "PyTorch, torch.save(torch.load(FILE, weights_only=True), FILE) writes it anew"
        )
    raise UserError(f"{path} is not a file of torch.save: it is no whole zip archive")


class _Archive:
    """The entries of a zip archive, read whole and checked by its checksums.

    The last one is kept: tensors may share a storage, and then they come one after the other.
    """

    def __init__(self, path: Path):
        self.path = path
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(
                f"{path} is not a file of torch.save: it is a zip archive with {len(pickles)} "
                "entries data.pkl"
            )
        self._top = pickles[0].removesuffix("data.pkl")
        self._last: tuple[str, bytes] = ("", b"")
        if self.read("byteorder", b"little") != b"little":
            raise UserError(f"{path} was written on a big-endian machine, which is not read")

    def read(self, name: str, default: bytes | None = None) -> bytes:
        if self._last[0] == name:
            return self._last[1]
        try:
            with zipfile.ZipFile(self.path) as archive:
                info = archive.getinfo(self._top + name)
                if info.compress_type != zipfile.ZIP_STORED:  # it could be of any size
                    raise UserError(
                        f"{self.path}: {info.filename} is compressed, which is not read"
                    )
                data = archive.read(info)
        except KeyError:
            if default is not None:
                return default
            raise UserError(f"{self.path} is damaged: it lacks {self._top}{name}") from None
        except (OSError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.path} is damaged: {error}") from None
        self._last = (name, data)
        return data
