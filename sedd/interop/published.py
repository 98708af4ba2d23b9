"""Published checkpoints, read and written without PyTorch and without running published code.

A checkpoint is a directory with a configuration (see ``sedd.interop.layouts``) and tensors in one
or several files (see ``sedd.interop.tensor_files``). It comes from the hub
(``louaaron/sedd-small``, ``GSAI-ML/LLaDA-8B-Instruct``) or from a run of published training code.

Reading has three steps: the configuration gives the network and the names of its tensors; the
tensors are compared with these names and shapes, so that no mistake stays unnoticed; and each
tensor is transposed and stacked into our parameters. One stacked parameter at a time is in the
memory of the host, and then moves to the devices. Writing is the reverse.
"""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError

from sedd.data.tokenizers import Tokenizer
from sedd.errors import UserError
from sedd.interop.folding import at_constant_sigma
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
from sedd.interop.tensor_files import (
    FLOATS,
    SHARD_BYTES,
    WEIGHTS,
    ShardWriter,
    TensorFiles,
    nbytes,
    open_tensors,
)
from sedd.interop.vocabulary import published_tokenizer, settle
from sedd.networks.base import Network
from sedd.networks.ddit import DDiT
from sedd.networks.mesh import Placement, put
from sedd.types import Params


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published checkpoint in the terms of this package.

    Args:
        network: the network. Its compute type is float32 for the network ``ddit`` (SEDD, RADD, MDLM
            and GIDD); for other models bfloat16 if the published embedding is, else float32.
        params: its parameters, on the devices. Those of ``ddit`` are float32; of other models each
            is bfloat16 if all of its published tensors are, else float32.
        layout: the layout, with the description of the model.
        tokenizer: the tokenizer in its directory, with the ids that tokens have here, or None.
    """

    network: Any
    params: Params
    layout: Layout
    tokenizer: Tokenizer | None = None

    @property
    def description(self) -> Description:
        """The model without its network."""
        return self.layout.description


def describe_published(
    path: str | os.PathLike, *, mask_id: int | None = None
) -> tuple[Layout, TensorFiles | None, Tokenizer | None]:
    """Read the configuration, the tokenizer and the headers of a checkpoint, but no tensor.

    Args:
        path: a local directory.
        mask_id: id of the mask in the model's own vocabulary, if its files do not state it.

    Returns:
        The layout, the files of tensors, None if there are none, and the tokenizer with the ids
        that tokens have here, or None.

    Raises:
        UserError: as ``load_published``, but for tensors that do not fit.
    """
    directory = Path(path)
    tensors = open_tensors(directory)
    config = find_config(directory) or directory / "config.json"
    layout = read_layout(config, () if tensors is None else tensors.shapes)
    layout, tokenizer = settle(layout, published_tokenizer(directory), mask_id, config)
    return layout if tensors is None else typed(layout, tensors), tensors, tokenizer


def typed(layout: Layout, tensors: TensorFiles) -> Layout:
    """The layout with the type that the tensors have, whatever the configuration states.

    The parameters of the network ``ddit`` are float32 here in any case.
    """
    dtype = tensors.dtypes.get(layout.tensors["trunk/embed/embedding"])
    if dtype is None or isinstance(layout.network, DDiT):
        return layout
    network: Any = layout.network
    kept = str(_kept_dtype({dtype}))
    return dataclasses.replace(
        layout,
        network=dataclasses.replace(network, dtype=kept, param_dtype=kept),
        description=dataclasses.replace(layout.description, dtype=str(dtype)),
    )


def load_published(
    path: str | os.PathLike,
    *,
    dtype: str | None = None,
    mask_id: int | None = None,
    mesh: Mesh | None = None,
) -> Published:
    """Read the network, the parameters and the description of the checkpoint in ``path``.

    The parameters are the averaged (EMA) ones if the checkpoint has them.

    An MDLM checkpoint without ``time_conditioning`` holds a network that is conditioned on σ but
    always runs at σ = 0. It is returned as the equal network without a condition (see
    ``at_constant_sigma``).

    Args:
        path: a local directory.
        dtype: the compute type of the network, "float32" or "bfloat16". Published code of SEDD,
            RADD, MDLM and GIDD computes in bfloat16 on a GPU; the default here is float32. The
            default of other models is the type of their parameters.
        mask_id: id of the mask in the model's own vocabulary, if its files do not state it.
        mesh: the devices that hold the parameters; by default the first device.

    Raises:
        UserError: if there is no configuration or no file of tensors, if keys of the configuration
            are missing or not understood, if the id of the mask is missing, or if tensors are
            missing, unexpected, transposed or of a wrong shape; the message lists all of them.

    Example:
        >>> from sedd.interop.published import load_published
        >>> published = load_published("exports/radd")
        >>> published.description.process, published.description.length
        ('absorbing', 12)
    """
    layout, tensors, tokenizer = describe_published(path, mask_id=mask_id)
    if tensors is None:
        raise UserError(f"{path} has no file of tensors: expected one of {', '.join(WEIGHTS)}")
    network: Any = layout.network
    if layout.constant_sigma is None:
        params = _read_params(tensors, layout, _placing(network, mesh))
    else:
        params = _read_params(tensors, layout, lambda index, leaf: leaf)
        network, params = at_constant_sigma(network, params, layout.constant_sigma)
        leaves, structure = jax.tree.flatten(params)
        place = _placing(network, mesh)
        params = structure.unflatten([place(index, leaf) for index, leaf in enumerate(leaves)])
    if dtype is not None:
        network = dataclasses.replace(network, dtype=dtype)
    return Published(network=network, params=params, layout=layout, tokenizer=tokenizer)


def _placing(network: Network, mesh: Mesh | None) -> Callable[[int, np.ndarray], jax.Array]:
    """A function that copies the parameter of this number to its devices.

    It returns when the host's copy is of no more use. Without a mesh it is the default device.
    """
    if mesh is None:
        return lambda index, leaf: jax.block_until_ready(jax.device_put(leaf))
    expected = jax.eval_shape(network.init, jax.random.key(0))
    placement = Placement.on(mesh, expected, network.stacked)
    shardings = jax.tree.leaves(placement.shardings(expected))
    copy: Any = put if jax.process_count() > 1 else jax.device_put
    return lambda index, leaf: jax.block_until_ready(copy(leaf, shardings[index]))


def save_published(
    path: Path,
    layout: Layout,
    params: Params,
    *,
    beside: Mapping[str, str],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint to the directory ``path``, complete or not at all.

    One of our parameters and one file of tensors are in the memory of the host at a time.

    Args:
        path: the directory; it must be empty or not exist.
        layout: the published layout, from ``sedd.interop.layouts.layout_for``.
        params: parameters of ``layout.network``.
        beside: texts of other files, by name.
        shard_bytes: the most bytes of tensors in a file; several files have an index.

    Raises:
        UserError: if ``path`` is not free or cannot be written.
    """
    sizes = {}
    for key, leaf in _flat(params):
        names, shape = names_of(layout, key, leaf.shape)
        sizes |= {name: nbytes(shape, np.dtype(leaf.dtype)) for name in names}
    with complete_directory(path) as partial:
        writer = ShardWriter(partial, sizes, shard_bytes)
        for key, leaf in _flat(params):
            for name, tensor in to_published(layout, key, np.asarray(leaf)):
                writer.write(name, tensor)
        writer.finish()
        texts = {"config.json": json.dumps(config_of(layout), indent=2) + "\n", **beside}
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")


@contextmanager
def complete_directory(path: Path) -> Iterator[Path]:
    """Write a directory, complete or not at all.

    The files are written into a temporary directory beside ``path``, which is yielded, and then
    renamed. If the body raises, nothing is left.

    Raises:
        UserError: if ``path`` is not free or cannot be written.
    """
    check_free(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield partial
            umask = os.umask(0)
            os.umask(umask)
            # mkdtemp and save_file allow access to the owner only: give the usual permissions.
            for file in partial.iterdir():
                file.chmod(0o666 & ~umask)
            partial.chmod(0o777 & ~umask)
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


def _flat(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree of parameters with their names, as in ``layouts.base.TENSORS``."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def _read_params(
    tensors: TensorFiles, layout: Layout, place: Callable[[int, np.ndarray], Any]
) -> Params:
    """Read our parameters, and place each where it is to be before the next one is read.

    Raises:
        UserError: lists everything that does not fit.
    """
    network: Any = layout.network
    ours = jax.eval_shape(network.init, jax.random.key(0))
    wanted = {key: names_of(layout, key, leaf.shape) for key, leaf in _flat(ours)}
    check_tensors(tensors, {name: shape for names, shape in wanted.values() for name in names})
    params = []
    for index, (key, leaf) in enumerate(_flat(ours)):
        names, _ = wanted[key]
        dtype = np.dtype(np.float32)
        if not isinstance(network, DDiT):
            dtype = _kept_dtype({tensors.dtypes[name] for name in names})
        array = from_published(layout, key, leaf.shape, dtype, tensors.read)
        params.append(place(index, array))
    return jax.tree.unflatten(jax.tree.structure(ours), params)


def _kept_dtype(dtypes: set[np.dtype]) -> np.dtype:
    """The type of a parameter whose tensors have these types: theirs, or float32."""
    only = next(iter(dtypes))
    bfloat16 = np.dtype(jnp.bfloat16)
    return only if dtypes == {bfloat16} else np.dtype(np.float32)


def check_tensors(tensors: TensorFiles, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare tensors with the names and shapes that a configuration asks for.

    Raises:
        UserError: lists what is missing, unexpected, transposed, of a wrong shape or type, and what
            is wrong with the index.
    """
    found = {name: shape for name, shape in tensors.shapes.items() if not name.endswith(IGNORED)}
    transposed, misshapen = [], []
    for name in sorted(shapes.keys() & found.keys()):
        here, there = list(shapes[name]), list(found[name])
        if there == here:
            continue
        if there == here[::-1] and len(here) > 1:
            transposed.append(f"{name} is transposed: {there}, not {here}")
        else:
            misshapen.append(f"{name} is {there}, not {here}")
    problems = list(tensors.problems)
    if missing := [name for name in shapes if name not in found]:
        problems.append("missing " + ", ".join(missing))
    if unexpected := sorted(found.keys() - shapes.keys()):
        problems.append("unexpected " + ", ".join(unexpected))
    problems += transposed
    if misshapen:
        problems.append("wrong shape: " + ", ".join(misshapen))
    if mistyped := [
        f"{name} is {tensors.dtypes[name]}"
        for name in sorted(shapes.keys() & found.keys())
        if tensors.dtypes[name] not in FLOATS
    ]:
        problems.append("no floating-point tensors of 16, 32 or 64 bits: " + ", ".join(mistyped))
    if problems:
        raise UserError(f"{tensors.path} does not fit its configuration: {'; '.join(problems)}")
