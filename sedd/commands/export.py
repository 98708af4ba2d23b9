"""``sedd export``: write a model in the published layout that can hold it.

The command loads the averaged parameters of a run (or of a published checkpoint), finds the layout
whose network, process and schedule are the model's, and writes ``config.json``, the tensors, the
tokenizer and a model card. Tensors of more than 5 GB are written as several files with an index.
The published code of the layout and ``sedd.load`` read the result. Options that the layout does not
hold, such as the dtype of the computation, are printed as notes; a model that no layout can hold is
refused. A published model of the network ``decoder`` is written in its own layout, with the files
of its tokenizer and its configuration as they were; so is a run that was trained from one.

Adapters are added to the weights. With ``--adapters`` they are written alone, in the files of PEFT.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

import sedd
from sedd.commands.cli import console, note, parse
from sedd.configuration.components import Options, values
from sedd.data.tokenizers import Pretrained, Tokenizer
from sedd.errors import UserError
from sedd.interop.folding import with_norm_bias, without_embed_norm
from sedd.interop.hub import SCHEME, TOKENIZER, fetch
from sedd.interop.layouts.base import Description, Layout, find_config, layout_for, layouts
from sedd.interop.peft import save_adapters
from sedd.interop.published import (
    check_free,
    describe_published,
    save_published,
)
from sedd.model import UNKNOWN, read_config
from sedd.networks.ddit import DDiT
from sedd.networks.decoder import Decoder
from sedd.networks.lora import merged
from sedd.progress import Activity
from sedd.training.checkpoint import find_checkpoints
from sedd.training.metrics import read_metrics

TITLE = "Write a model as a published checkpoint: model.safetensors, config.json, a model card."
CODE_LEFT_OUT = (
    "config.json names code of the repository (auto_map), which is not copied: other programs look "
    "for it beside the configuration"
)
FIGURES = ("validation_nats_per_token", "validation_standard_error", "validation_perplexity")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """The flags of ``sedd export``."""

    checkpoint: str
    """Directory of a run or of a published checkpoint."""
    output: Path
    """Directory to write: a new one, or an empty one."""
    step: int | Literal["best"] | None = None
    """Checkpoint of a run: the one of this step, or the best by validation; by default the newest.
    """
    mask_id: int | None = None
    """Id of the mask in a published model's own vocabulary, if its files do not state it."""
    adapters: bool = False
    """Write the adapters alone, as PEFT does: adapter_config.json, adapter_model.safetensors."""


def main(arguments: Sequence[str]) -> None:
    """Load the model, write it in the layout that fits, and print what the layout cannot hold.

    Raises:
        UserError: the directory is not empty, there is no such checkpoint, or no layout fits.
    """
    command = parse(ExportCommand, arguments, description=TITLE)
    try:
        check_free(command.output)
    except UserError as error:
        raise UserError(f"--output {error}") from error
    with Activity(f"loading {command.checkpoint}"):
        model, step = load_weights(command)
    layout, params, notes = publishable(model)
    if command.adapters:
        write_adapters(command.output, model, layout)
        return
    bound = validation(Path(command.checkpoint).expanduser(), step)
    beside = {**tokenizer_texts(model), "README.md": card(model, layout, step, bound)}
    with Activity(f"writing {command.output}"):
        save_published(command.output, layout, params, beside=beside)
    for line in notes:
        note(line)
    console.print(f"wrote {command.output} in the layout of {layout.name}")


def write_adapters(output: Path, model: sedd.Model, layout: Layout) -> None:
    """Write the adapters of a model alone; UserError if it has none."""
    network: Any = model.denoiser.network
    if not network.lora.rank:
        raise UserError(f"--adapters: {model.source} has no adapters; they are trained by --lora")
    base = model.config.start or ""
    tensors = layouts()[layout.name].tensors(layout.network)
    save_adapters(
        output,
        tensors,
        network.lora,
        model.denoiser.params["adapters"],
        base=base.removeprefix(SCHEME),
    )
    console.print(f"wrote the adapters to {output}, with the names of {layout.name}")


def origin(model: sedd.Model) -> tuple[Layout, Path] | None:
    """The published model from which a run was trained, if the run still has its layout.

    Returns:
        The layout and the directory; None if there is no such model, it cannot be read, or the run
        has another network, vocabulary or parameterization.
    """
    start = model.config.start
    while start is not None:
        try:
            path = fetch(start, weights=False)
            if find_config(path) is not None:
                layout, *_ = describe_published(
                    path, mask_id=getattr(model.tokenizer, "mask", None)
                )
                return (layout, path) if has_layout(model, layout) else None
            config = read_config(path)
        except UserError:
            return None
        start = None if config is None else config.start
    return None


def has_layout(model: sedd.Model, layout: Layout) -> bool:
    """Whether a model has the network and the meaning of a published one."""
    network, what = model.denoiser.network, layout.description
    reading: Any = model.config.parameterization
    if not isinstance(network, Decoder) or not isinstance(layout.network, Decoder):
        return False
    free = ("dtype", "param_dtype", "remat", "attention", "lora")
    same = {name: getattr(layout.network, name) for name in free}
    kind = "block" if what.block is not None else what.parameterization
    return (
        dataclasses.replace(network, **same) == layout.network
        and (reading.name, getattr(reading, "shift", False)) == (kind, what.shift)
        and getattr(reading, "block", None) == what.block
    )


def load_weights(command: ExportCommand) -> tuple[sedd.Model, int | None]:
    """Load the model of ``--checkpoint``.

    Returns:
        The model, and the step of its checkpoint; None for a published one, which has no steps.
    """
    step = command.step
    if step is None or step == "best":
        try:
            checkpoints = find_checkpoints(command.checkpoint)
            step = checkpoints.latest_good() if step is None else checkpoints.best()
        except UserError:  # a published checkpoint has no steps; ``sedd.load`` reports the others
            pass
    model = sedd.load(
        command.checkpoint,
        step=command.step if step is None else step,
        mask_id=command.mask_id,
    )
    return model, step if isinstance(step, int) else None


def publishable(model: sedd.Model) -> tuple[Layout, Any, list[str]]:
    """Find the published layout that can hold the model, and convert the parameters for it.

    Returns:
        The layout, the parameters of the layout's network, and notes on options that the layout
        does not hold.

    Raises:
        UserError: no layout can hold the model; the message lists the reasons.
    """
    network, params = merged(model.denoiser.network, model.denoiser.params)
    if model.layout is not None and isinstance(network, Decoder):
        code = "auto_map" in model.layout.config
        return model.layout, params, [CODE_LEFT_OUT] if code else []
    if (found := origin(model)) is not None:
        layout, _ = found
        kind = layout.network.param_dtype  # pyright: ignore[reportAttributeAccessIssue]
        params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(kind), params)
        return layout, params, [CODE_LEFT_OUT] if "auto_map" in layout.config else []
    schedule = model.config.schedule
    reading: Any = model.config.parameterization
    description = Description(
        process=model.config.process.name,
        process_options=values(model.config.process),
        condition=getattr(reading, "condition", "sigma"),
        parameterization=reading.name,
        shift=getattr(reading, "shift", False),
        first=getattr(reading, "first", None),
        mask_id=getattr(model.tokenizer, "mask", None),
        schedule={"name": schedule.name, **values(schedule)},
        num_tokens=model.process.num_tokens,
        length=model.length,
        corpus=None if model.config.data.corpus == UNKNOWN else model.config.data.corpus,
    )
    notes = []
    kept = getattr(network, "param_dtype", "float32")
    if network.dtype != kept:
        notes.append(
            f"network.dtype {network.dtype} is not kept: sedd.load computes in {kept} what it "
            "reads from this layout"
        )
    if network.attention != "auto" or network.remat:
        notes.append("network.attention and network.remat are not kept: they change no result")
    if getattr(reading, "normalise", "real") != "real":
        notes.append(
            "parameterization.normalise is not kept: sedd.load normalises over real tokens"
        )
    if isinstance(network, Decoder) and network.embed_norm:
        network, params = without_embed_norm(network, params)
        notes.append(
            "network.embed_norm is written as a table of normed embeddings and an output layer of "
            "its own, which changes results by rounding only"
        )
    layout = layout_for(network, description)
    if description.mask_id is not None:
        layout = dataclasses.replace(layout, swap=(description.mask_id, description.num_tokens))
    if layout.name == "RADD" and isinstance(network, DDiT) and not network.norm_bias:
        notes.append("RADD's norms have biases: they are written as 0, which changes no result")
        network, params = with_norm_bias(network, params)
        layout = dataclasses.replace(layout, network=network)
    return layout, params, notes


def tokenizer_texts(model: sedd.Model) -> dict[str, str]:
    """The files of the tokenizer by name: those of a published model, or a ``tokenizer.json``."""
    directory = None
    if model.layout is not None and isinstance(model.denoiser.network, Decoder):
        directory = fetch(model.source, weights=False)
    elif (found := origin(model)) is not None:
        _, directory = found
    if directory is not None:
        found = [name for name in TOKENIZER if (directory / name).is_file()]
        return {name: (directory / name).read_text(encoding="utf-8") for name in found}
    return {} if model.tokenizer is None else {"tokenizer.json": written(model.tokenizer)}


def written(tokenizer: Tokenizer) -> str:
    """The content of ``tokenizer.json``.

    It is the original file of a Hugging Face tokenizer, else the result of ``Tokenizer.to_json``.
    """
    return (
        tokenizer.source if isinstance(tokenizer, Pretrained) else json.dumps(tokenizer.to_json())
    )


def validation(directory: Path, step: int | None) -> dict[str, Any] | None:
    """Find the validation of a run at exactly this step, for the model card.

    Args:
        directory: the directory of the run.
        step: the step of the exported checkpoint; None for a published one.

    Returns:
        The record of ``metrics.jsonl`` with the figures ``FIGURES``; None without a validation.
    """
    if step is None or not (directory / "metrics.jsonl").is_file():
        return None
    for record in reversed(read_metrics(directory)):
        figures = [record.get(name) for name in FIGURES]
        if record["step"] == step and None not in figures:
            return record
    return None


def card(model: sedd.Model, layout: Layout, step: int | None, bound: dict[str, Any] | None) -> str:
    """Write the model card, a Markdown text with the metadata of the Hugging Face hub.

    Args:
        model: the exported model.
        layout: its layout.
        step: the step of the checkpoint; None for a published one, whose training is not known.
        bound: the record of its validation, or None.

    Returns:
        A table of the components, the validation bound, how to load the model, and the training
        configuration.
    """
    config = model.config
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.denoiser.params))
    rows = {
        "process": described(config.process),
        "schedule": described(config.schedule),
        "parameterization": described(config.parameterization),
        "network": described(config.network),
        "parameters": f"{parameters:,}",
        "vocabulary": f"{model.process.num_tokens:,} tokens"
        + ("" if model.process.mask_id is None else " and the mask, the last id"),
        "tokenizer": "none" if model.tokenizer is None else model.tokenizer.name,
    }
    if model.layout is None or not isinstance(model.denoiser.network, Decoder):
        rows["trained on sequences of"] = f"{model.length} tokens"
    if step is not None:
        rows["training step"] = f"{step:,}, averaged (EMA) parameters"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    parts = [
        "---\nlibrary_name: sedd\npipeline_tag: text-generation\ntags:\n- discrete-diffusion\n"
        f"- {layout.name.lower()}\n---",
        "# A discrete diffusion language model",
        f"Exported by sedd {sedd.__version__} in the layout of {layouts()[layout.name].CODE}.",
        f"| | |\n|---|---|\n{table}",
    ]
    if bound is not None:
        parts.append(
            "## Validation\n\nAn upper bound on the negative log likelihood of the corpus's "
            f"validation split, after this step: {bound['validation_nats_per_token']:.4f} ± "
            f"{bound['validation_standard_error']:.4f} nats per token (standard error over "
            f"sequences), perplexity at most {bound['validation_perplexity']:.3f}."
        )
    parts.append(
        '## Use\n\n```python\nimport sedd\n\nmodel = sedd.load("DIRECTORY")  # or hf://OWNER/NAME\n'
        "```\n\n```\npython sample.py --checkpoint DIRECTORY\n```"
    )
    if step is not None:  # the configuration of a published checkpoint lacks how it was trained
        plain = config.to_json()
        del plain["data"]["cache_dir"]  # a path of this machine, not a property of the model
        dump = json.dumps(plain, indent=2, ensure_ascii=False)
        parts.append(f"## Training configuration\n\n```json\n{dump}\n```")
    return "\n\n".join(parts) + "\n"


def described(options: Options) -> str:
    """A component's name and its options, on one line."""
    each = ", ".join(f"{name} {value}" for name, value in values(options).items())
    return f"{options.name} ({each})" if each else options.name
