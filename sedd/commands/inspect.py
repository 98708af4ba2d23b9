"""``sedd inspect``: describe a checkpoint by its configuration and headers, without its weights.

The command names the family of a published model, its mask, block size and shift, its parameters
with their bytes and types, its tokenizer, and everything that is not understood: keys of the
configuration, tensors, and reasons why ``sedd.load`` would refuse it. Of a checkpoint on the hub
only the small files and the headers are downloaded. Code of the repository is never run.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.table import Table

from sedd.commands.cli import console, parse
from sedd.configuration.build import build_parts
from sedd.data.tokenizers import Pretrained, Tokenizer
from sedd.errors import UserError
from sedd.interop.hub import SCHEME, fetch, fetch_headers
from sedd.interop.layouts.base import Layout, find_config, layouts, names_of, read_layout
from sedd.interop.published import check_tensors
from sedd.interop.tensor_files import TensorFiles, open_tensors
from sedd.interop.vocabulary import published_tokenizer, settle
from sedd.model import read_config, read_tokenizer

TITLE = "Describe a checkpoint by its configuration and headers, without reading its weights."
GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectCommand:
    """The flags of ``sedd inspect``."""

    checkpoint: tyro.conf.Positional[str]
    """Directory of a published checkpoint or of a run, or hf://OWNER/NAME."""
    mask_id: int | None = None
    """Id of the mask in the model's own vocabulary, if the files do not state it."""
    json: bool = False
    """Print one JSON object instead of a table."""


def main(arguments: Sequence[str]) -> None:
    """Print the description.

    Raises:
        UserError: there is no configuration, or it is of no layout that is read.
    """
    command = parse(InspectCommand, arguments, description=TITLE)
    facts = inspect(command.checkpoint, command.mask_id)
    if command.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    table = Table(title=command.checkpoint, title_justify="left", show_header=False)
    for name, value in facts.items():
        for row in value if isinstance(value, list) else [value]:
            if row is not None:
                table.add_row(name.replace("_", " "), shown(row))
                name = ""
    console.print(table)


def shown(value: Any) -> str:
    """A value as text: yes or no, digits in groups, and entries of a dictionary on one line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(one)}" for key, one in value.items() if one is not None)
    return f"{value:,}" if isinstance(value, int) else str(value)


def inspect(checkpoint: str, mask_id: int | None = None) -> dict[str, Any]:
    """Describe a checkpoint.

    Args:
        checkpoint: a directory, or ``hf://OWNER/NAME[@REVISION]``.
        mask_id: id of the mask in the model's own vocabulary, if the files do not state it.

    Returns:
        What is known, by name; lists for what may be several things.

    Raises:
        UserError: there is no configuration, or it is of no layout that is read.
    """
    path = fetch(checkpoint, weights=False)
    config = find_config(path)
    if config is None:
        return inspect_run(path, checkpoint)
    tensors = fetch_headers(checkpoint) if checkpoint.startswith(SCHEME) else open_tensors(path)
    layout = read_layout(config, () if tensors is None else tensors.shapes)
    tokenizer = published_tokenizer(path)
    problems = []
    try:
        layout, tokenizer = settle(layout, tokenizer, mask_id, config)
    except UserError as error:
        problems.append(str(error))
    facts = describe(layout, tokenizer)
    facts |= describe_tensors(layout, tensors, settled=not problems, problems=problems)
    facts["tokenizer"] = describe_tokenizer(tokenizer)
    facts["notes"] = list(layout.notes)
    understands = getattr(layouts()[layout.name], "not_understood", None)
    unknown = [] if understands is None else understands(layout.config)
    facts["keys_not_understood"] = unknown
    facts["problems"] = problems
    return facts


def describe(layout: Layout, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The family, the kind of model, its vocabulary and its network."""
    what, network = layout.description, layout.network
    mask: dict[str, Any] | str | None = None
    if what.process == "absorbing" and what.parameterization != "autoregressive":
        mask = "not stated" if what.mask_id is None and layout.config else None
        published = what.num_tokens if what.mask_id is None else what.mask_id
        if what.mask_id is not None or not hasattr(network, "spare_rows"):
            token = None
            if isinstance(tokenizer, Pretrained):
                token = tokenizer.backend.id_to_token(published)
            mask = {"published_id": published, "token": token, "id_here": what.num_tokens}
    spare = getattr(network, "spare_rows", 0)
    return {
        "layout": layout.name,
        "code": layouts()[layout.name].CODE,
        "architectures": ", ".join(map(str, layout.config.get("architectures") or [])) or None,
        "process": what.process,
        "parameterization": what.parameterization,
        "shift": what.shift,
        "block": what.block,
        "mask": mask,
        "vocabulary": {
            "rows": network.num_states + spare - layout.added_rows,
            "tokens": what.num_tokens,
            "unused": spare,
        },
        "length": what.length,
        "network": {
            "name": type(network).__name__.lower(),
            **{
                field.name: getattr(network, field.name)
                for field in dataclasses.fields(network)
                if isinstance(getattr(network, field.name), int | float | bool)
                and field.name not in ("num_states", "spare_rows", "remat", "time_conditioned")
            },
        },
    }


def describe_tensors(
    layout: Layout, tensors: TensorFiles | None, *, settled: bool, problems: list[str]
) -> dict[str, Any]:
    """The number of parameters with their bytes and types; adds what does not fit to ``problems``.

    Without tensors, the number is that of the configuration, and the bytes are those of the type
    that it states, or None.
    """
    network: Any = layout.network
    ours = jax.eval_shape(network.init, jax.random.key(0))
    shapes = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(ours)[0]:
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        names, shape = names_of(layout, key, leaf.shape)
        shapes |= dict.fromkeys(names, shape)
    if tensors is None:
        count = sum(int(np.prod(shape)) for shape in shapes.values())
        dtype = layout.description.dtype
        size = None if dtype is None else count * jax.numpy.dtype(dtype).itemsize
        return {"parameters": count, "bytes": size, "dtypes": [] if dtype is None else [dtype]}
    try:
        check_tensors(tensors, shapes)
    except UserError as error:
        problems.append(str(error))
    return {
        "parameters": sum(int(np.prod(shape)) for shape in tensors.shapes.values()),
        "bytes": tensors.nbytes,
        "dtypes": sorted({str(dtype) for dtype in tensors.dtypes.values()}),
    }


def describe_tokenizer(tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    """The size of a tokenizer, its special ids, and whether it has a chat template."""
    if tokenizer is None:
        return None
    return {
        "name": tokenizer.name,
        "tokens": tokenizer.num_tokens,
        "end_of_text": tokenizer.eos_id,
        "chat_template": tokenizer.turns.template is not None,
    }


def inspect_run(path: Path, checkpoint: str) -> dict[str, Any]:
    """Describe the directory of a run by its configuration.

    Raises:
        UserError: if it is none.
    """
    config = read_config(path)
    if config is None:
        raise UserError(f"checkpoint {checkpoint}: no config.json, so it is no checkpoint")
    tokenizer = read_tokenizer(path)
    parts = build_parts(config, tokenizer.num_tokens)
    params = jax.tree.leaves(jax.eval_shape(parts.network.init, jax.random.key(0)))
    return {
        "layout": "a run of sedd train",
        "process": config.process.name,
        "parameterization": config.parameterization.name,
        "block": getattr(parts.parameterization, "block", None),
        "length": config.data.length,
        "network": {"name": config.network.name},
        "parameters": sum(leaf.size for leaf in params),
        "bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in params),
        "dtypes": sorted({str(leaf.dtype) for leaf in params}),
        "tokenizer": describe_tokenizer(tokenizer),
    }
