"""The arrays of a training state by name: what a checkpoint stores and checks.

A checkpoint has three trees, ``TREES``. Each array has a name, the path from its tree down to it,
such as ``params/embed``. Checkpoints, the checks of a configuration against a checkpoint, and error
messages all use these names.
"""

import json
import zlib
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from sedd.errors import UserError
from sedd.training.state import TrainState, from_host

TREES = ("params", "ema_params", "training")

Kinds = dict[str, tuple[str, list[int]]]  # name -> type and shape


def kinds_of(tree: Any) -> Kinds:
    """Return the type and the shape of every array of a tree, by name; arrays may be abstract."""
    return {name: kind_of(array) for name, array in named_leaves(tree).items()}


def require_same(source: str, there: Kinds, here: Kinds) -> None:
    """Check that two trees have the same arrays.

    Args:
        source: where ``there`` comes from, for the message: "checkpoint runs/x/checkpoints/9".
        there: the arrays that were found.
        here: the arrays that the configuration makes.

    Raises:
        UserError: names the first array that is missing or has another type or shape. Parameters
            come before the optimizer's state, whose differences follow from theirs.
    """
    rank = {tree: place for place, tree in enumerate(TREES)}
    for name in sorted({**here, **there}, key=lambda name: rank.get(name.split("/")[0], 0)):
        if here.get(name) != there.get(name):
            raise UserError(
                f"{source} is of another configuration: {name} is {_spelt(there.get(name))} in it, "
                f"and {_spelt(here.get(name))} in the configuration of this run"
            )


def trees_of(state: TrainState) -> dict[str, Any]:
    """Return the trees of a checkpoint as nested dictionaries of arrays.

    The random key is replaced by its uint32 data, since a checkpoint holds plain arrays. The state
    may be abstract, or a state of shardings.
    """
    key = state.key
    if not isinstance(key, Sharding) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        state = replace(state, key=jax.eval_shape(jax.random.key_data, key))
    training = {"step": state.step, "key": state.key, "opt_state": state.opt_state}
    training["teacher"] = state.teacher  # no array, and no name, if there is none
    trees = {"params": state.params, "ema_params": state.ema_params, "training": training}
    return nested(named_leaves(trees))


def state_like(abstract_state: TrainState, arrays: dict[str, Any]) -> TrainState:
    """Return a state of the structure of ``abstract_state`` with the named ``arrays``."""

    def fill(tree, prefix):
        paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
        return treedef.unflatten([arrays[f"{prefix}/{name_of(path)}"] for path, _ in paths])

    state = replace(
        abstract_state,
        step=arrays["training/step"],
        params=fill(abstract_state.params, "params"),
        opt_state=fill(abstract_state.opt_state, "training/opt_state"),
        ema_params=fill(abstract_state.ema_params, "ema_params"),
        key=arrays["training/key"],
        teacher=fill(abstract_state.teacher, "training/teacher"),
    )
    return from_host(state)


def name_of(path) -> str:
    """Spell the path of a leaf: ``params/embed``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by name; ``nested`` is the inverse for trees of dictionaries."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def nested(arrays: dict[str, Any]) -> dict[str, Any]:
    """Return nested dictionaries of named arrays, a level for each part of a name."""
    tree = {}
    for name, array in arrays.items():
        *above, last = name.split("/")
        branch = tree
        for part in above:
            branch = branch.setdefault(part, {})
        branch[last] = array
    return tree


def kind_of(array) -> tuple[str, list[int]]:
    """Return the type and the shape of an array, in a form that JSON keeps."""
    return str(array.dtype), list(array.shape)


def _spelt(kind: tuple[str, list[int]] | None) -> str:
    return "absent" if kind is None else f"{kind[0]}{list(kind[1])}"


def json_checksum(value: Any) -> int:
    """Return the CRC-32 of a JSON value, whatever the order of its keys."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())
