"""Read files of ``torch.save`` without PyTorch and without running code from them.

Such a file is a zip archive. Its entry ``data.pkl`` is a pickle of the saved object, and every
storage (the memory behind tensors) is another entry of raw bytes. A pickle is a program that can
call any function by its name. The unpickler here resolves only the names in ``CLASSES`` and
``STORAGES`` (tensors, parameters, ordered dictionaries) and refuses all others.

Training checkpoints of Lightning also contain the configuration and the tokenizer of the run, as
objects of the libraries in ``PASSED_OVER``. Each of these objects is replaced by an ``_Inert``,
whose methods do nothing.
"""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sedd.errors import UserError

STORAGES = {  # name in the pickle: type of the numbers
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
PASSED_OVER = ("omegaconf", "transformers", "tokenizers")  # libraries of objects to ignore
# Python's own classes and functions that occur in the pickles of these objects (protocol 2).
BUILTINS = ("dict", "list", "tuple", "set", "int", "long", "float", "str", "unicode")
PASSED_OVER_NAMES = {
    "typing.Any",
    "collections.defaultdict",
    "_codecs.encode",
    *(f"__builtin__.{name}" for name in BUILTINS),
}
LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # start of files before 1.6


def read_torch(path: Path) -> Any:
    """Read the saved object.

    Returns:
        Dictionaries, lists, numbers and strings as they were saved, with a ``Tensor`` for each
        tensor. Its numbers are read from the file when it is converted to an array.

    Raises:
        UserError: if the file is damaged, is not of the zip format of ``torch.save``, or its pickle
            names any function or class beside those of tensors and their containers.
    """
    try:
        archive = _Archive(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (zipfile.BadZipFile, NotImplementedError):  # NotImplementedError: of a later zip version
        _refuse(path)
    return _unpickle(_Unpickler(io.BytesIO(archive.read("data.pkl")), path, archive), path)


# The instruction BUILD of a pickle sets attributes of any object or class, unless the object has a
# method __setstate__. Each class below therefore has this method, and none has a __dict__.


class Tensor:
    """A tensor whose numbers are still in the file; ``np.asarray`` reads them into a new array."""

    __slots__ = ("_offset", "_storage", "_strides", "shape")

    def __init__(self, storage, offset, shape, strides, *ignored):  # gradients and hooks
        shape, strides = tuple(shape), tuple(strides)
        if not isinstance(storage, _Storage) or not all(
            isinstance(number, int) and number >= 0 for number in (offset, *shape, *strides)
        ):
            raise pickle.UnpicklingError("a tensor is not described by whole numbers")
        self._storage, self._offset, self.shape, self._strides = storage, offset, shape, strides

    @property
    def dtype(self) -> np.dtype:
        """The type of the numbers."""
        return self._storage.dtype

    def __setstate__(self, state):
        raise pickle.UnpicklingError("a tensor has a state")

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """Read the numbers; UserError if the tensor reaches beyond its storage."""
        path, kind = self._storage.archive.path, self._storage.dtype
        data = self._storage.archive.read(f"data/{self._storage.key}")
        strides = [stride * kind.itemsize for stride in self._strides]
        try:
            array = np.ndarray(self.shape, kind, data, self._offset * kind.itemsize, strides)
        except (ValueError, TypeError, OverflowError):  # numpy checks the bounds
            raise UserError(f"{path} is damaged: a tensor reaches beyond its storage") from None
        return np.array(array, dtype or kind)


class _Storage:
    """Numbers of one type in the entry ``data/KEY`` of the archive."""

    __slots__ = ("archive", "dtype", "key")

    def __init__(self, archive: "_Archive", dtype: np.dtype, key: str):
        self.archive, self.dtype, self.key = archive, dtype, key

    def __setstate__(self, state):
        raise pickle.UnpicklingError("a storage has a state")


class _Parameter:
    """Stands for PyTorch's parameter, whose constructor gets a tensor; returns that tensor."""

    __slots__ = ()

    def __new__(cls, data, *ignored):
        return data

    def __setstate__(self, state):
        raise pickle.UnpicklingError("a parameter has a state")


class _Dict(dict):
    """An ordered dictionary; the attributes that PyTorch adds to a state dict are ignored."""

    __slots__ = ()

    def __setstate__(self, state):
        pass


class _Inert:
    """Placeholder for an object of a library in ``PASSED_OVER``; ignores all operations."""

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
    """An unpickler that resolves only the names of tensors and their containers."""

    def __init__(self, stream, path: Path, archive: "_Archive | None" = None):
        super().__init__(stream)
        self.path, self.archive = path, archive

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Resolve a name in the pickle; UserError for any name that is not expected."""
        name = f"{module_name}.{global_name}"
        if name in STORAGES:
            return name  # a string, which a pickle cannot change, unlike a numpy dtype
        if name in CLASSES:
            return CLASSES[name]
        if name in PASSED_OVER_NAMES or module_name.split(".")[0] in PASSED_OVER:
            return _Inert
        raise UserError(
            f"{self.path} is refused: loading it would call {name}, which is not needed to read "
            "tensors and may be harmful. Nothing was executed"
        )

    def persistent_load(self, pid: Any) -> Any:
        """Resolve a reference to a storage, (kind, type, key, device, size)."""
        kind, name, key, _, _, *_ = pid
        if kind != "storage" or name not in STORAGES or self.archive is None:
            raise pickle.UnpicklingError(f"it refers to {kind!r} of {name!r}")
        return _Storage(self.archive, STORAGES[name], str(key))


def _unpickle(unpickler: _Unpickler, path: Path) -> Any:
    """Load the pickle; UserError for everything that a damaged one can raise."""
    try:
        return unpickler.load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(f"{path} is damaged: its pickle cannot be read ({reason})") from None


def _refuse(path: Path):
    """Raise the UserError for a file that is not a zip archive.

    A plain pickle or a file of PyTorch before 1.6 is read by the restricted unpickler first. If it
    names a function or class, the error says which one was refused.
    """
    with path.open("rb") as file:
        legacy = file.read(len(LEGACY)) == LEGACY
        file.seek(0)
        for _ in range(4 if legacy else 1):  # the object is the fourth pickle of a file before 1.6
            try:
                _Unpickler(file, path).load()
            except UserError:
                raise
            except Exception:  # no pickle, or a damaged one: refused below
                break
    if legacy:
        raise UserError(
            f"{path} is in the format of torch.save before PyTorch 1.6, which is not read; with "
            "PyTorch, torch.save(torch.load(FILE, weights_only=True), FILE) writes it anew"
        )
    raise UserError(
        f"{path} is not a file of torch.save: it is not a zip archive, or it is incomplete"
    )


class _Archive:
    """The entries of a zip archive, each read completely and compared with its checksum.

    The entry that was read last is cached, because tensors that share a storage follow each other.
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
        """The content of an entry; UserError if it is missing and there is no ``default``."""
        if self._last[0] == name:
            return self._last[1]
        try:
            with zipfile.ZipFile(self.path) as archive:
                info = archive.getinfo(self._top + name)
                if info.compress_type != zipfile.ZIP_STORED:  # could unpack to any size
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
