"""Reading one checkpoint: its description, its arrays, and the checksums that verify them.

If several processes read a checkpoint together, each reads its own shards. One of them may find
damage that the others do not see. They therefore exchange the result of every stage, so that all
fail, or all go on to the next one.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Sharding

from sedd.errors import first_line
from sedd.networks.mesh import on_host
from sedd.training.distributed import first_message
from sedd.training.named_arrays import (
    Kinds,
    json_checksum,
    kinds_of,
    named_leaves,
    nested,
    require_same,
    trees_of,
)
from sedd.training.state import TrainState
from sedd.training.storage import read_tree
from sedd.training.sums import changed_part, crc32, read_sums
from sedd.types import Params

METADATA = "_CHECKPOINT_METADATA"  # Orbax's file of what was passed as ``custom_metadata``
PARAMS: tuple[str, ...] = ("params", "ema_params")  # the trees of parameters, averages last
SUMS = "checksums"  # the directory of the checksums in that of a checkpoint


class BadCheckpointError(Exception):
    """A checkpoint cannot be read, or its content has changed; the message is the reason."""


def describe(path: Path) -> dict:
    """Read and verify the description of a checkpoint; raises BadCheckpointError."""
    try:
        # Orbax's own function would also open every array.
        metadata = json.loads((path / METADATA).read_text())["custom_metadata"]
        description, checksum = metadata["sedd"], metadata["crc32"]
    except Exception as error:  # a damaged file can raise any exception
        raise BadCheckpointError(f"its description is unreadable ({_said(error)})") from error
    if json_checksum(description) != checksum:
        raise BadCheckpointError("its description has changed since it was written")
    return description


def load(
    path: Path,
    trees: tuple[str, ...],
    expected: dict[str, Any],
    shardings: Sharding | TrainState | Params | None,
    *,
    together: bool,
) -> tuple[dict, dict[str, Any]]:
    """Read and verify some trees of a checkpoint.

    Args:
        path: the directory of the checkpoint.
        trees: the names of the trees.
        expected: abstract trees that must have the same arrays.
        shardings: where to put the arrays: one sharding for all, a state of shardings, or a tree of
            them for each tree that is read; None for numpy arrays.
        together: whether all processes call this function, and fail together.

    Returns:
        The description and the arrays by name.

    Raises:
        BadCheckpointError: something is damaged, in one of the processes if ``together``.
        UserError: the arrays are not the expected ones.
    """
    call = _call_together if together else _call
    description = call(lambda: describe(path))
    kinds = {
        name: (kind[0], kind[1])
        for name, kind in description["arrays"].items()
        if name.split("/")[0] in trees
    }
    if expected:
        require_same(f"checkpoint {path}", kinds, kinds_of(expected))
    where = _by_name(shardings, trees, kinds)
    arrays = call(lambda: _read(path, trees, kinds, where))
    old = {name: kind[2] for name, kind in description["arrays"].items() if len(kind) > 2}
    if old:
        call(lambda: _verify_whole(arrays, old))
    else:
        parts = call(lambda: _sums(path, kinds))
        call(lambda: _verify(arrays, parts))
    return description, arrays


def load_params(
    path: Path,
    *,
    ema: bool,
    expected: Params | None,
    shardings: Sharding | Params | None,
    together: bool,
) -> Params:
    """Read and verify the parameters of a checkpoint.

    Args:
        path: the directory of the checkpoint.
        ema: read averages; frozen parameters have none, and are read as they are.
        expected: abstract parameters that must have the same arrays; None for no such check.
        shardings: where to put the arrays, one sharding or a tree of them; None for numpy arrays.
        together: whether all processes call this function, and fail together.

    Raises:
        BadCheckpointError: something is damaged, in one of the processes if ``together``.
        UserError: the arrays are not the expected ones.
    """
    call = _call_together if together else _call
    names = [name.split("/") for name in call(lambda: describe(path))["arrays"]]
    entries = {tree: {entry for first, entry, *_ in names if first == tree} for tree in PARAMS}
    if not ema:
        trees = ("params",)
    elif entries["params"] == entries["ema_params"]:
        trees = ("ema_params",)
    else:
        trees = PARAMS
    wanted: dict[str, Any] = {}
    if expected is not None:
        wanted = dict.fromkeys(trees, expected)
        if trees == PARAMS:
            averaged = {k: v for k, v in expected.items() if k in entries["ema_params"]}
            wanted["ema_params"] = averaged
    _, arrays = load(path, trees, wanted, shardings, together=together)
    found = nested(arrays)
    return {name: tree for each in trees for name, tree in found[each].items()}


def _by_name(shardings: Any, trees: tuple[str, ...], kinds: Kinds) -> dict[str, Sharding] | None:
    """The sharding of each array by name; ``shardings`` is that of ``load``."""
    if shardings is None:
        return None
    if isinstance(shardings, Sharding):
        return dict.fromkeys(kinds, shardings)
    if isinstance(shardings, TrainState):
        return named_leaves(trees_of(shardings))
    return named_leaves(dict.fromkeys(trees, shardings))


def _read(
    path: Path,
    trees: tuple[str, ...],
    kinds: Kinds,
    shardings: dict[str, Sharding] | None,
) -> dict[str, Any]:
    """Read some trees; returns their arrays by name, or raises BadCheckpointError."""
    try:
        arrays = named_leaves({tree: read_tree(path, tree, kinds, shardings) for tree in trees})
    except Exception as error:  # a damaged file can raise any exception
        raise BadCheckpointError(f"its arrays are unreadable ({_said(error)})") from error
    if missing := kinds.keys() - arrays.keys():
        raise BadCheckpointError(f"it lacks {min(missing)}")
    return {name: arrays[name] for name in kinds}


def _sums(path: Path, kinds: Kinds) -> dict:
    """Read the checksums of all shards of some arrays; raises BadCheckpointError."""
    try:
        return read_sums(path / SUMS, kinds)
    except Exception as error:  # a damaged file can raise any exception
        raise BadCheckpointError(f"its checksums are unreadable ({_said(error)})") from error


def _call(function: Callable[[], Any]) -> Any:
    return function()


def _call_together(function: Callable[[], Any]) -> Any:
    """Call a function in every process; if it fails in one, raise BadCheckpointError in all."""
    result = problem = None
    try:
        result = function()
    except BadCheckpointError as bad:
        problem = str(bad)
    problem = first_message(problem)
    if problem is not None:
        raise BadCheckpointError(problem)
    return result


def _verify(arrays: dict[str, Any], parts: dict) -> None:
    """Raise BadCheckpointError if a part of an array differs from its checksum."""
    if (name := changed_part(arrays, parts)) is not None:
        raise BadCheckpointError(f"{name} has changed since it was written")


def _verify_whole(arrays: dict[str, Any], checksums: dict[str, int]) -> None:
    """The same for a checkpoint of an older version, which has the CRC-32 of whole arrays."""
    for name, array in arrays.items():
        if crc32(on_host(array)) != checksums[name]:
            raise BadCheckpointError(f"{name} has changed since it was written")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
