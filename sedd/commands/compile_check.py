"""Compile a program for a TPU slice without having one, and print whether it fits.

    sedd compile_check --config owt_radd_small --topology v5e:4x4
    sedd compile_check --config owt_radd_7b --topology v5e:16x16 --what sample

The compiled program is the one that would run on the slice: a training step, the evaluation of a
batch, or the recipe's sampler. The printed figures are read from it. This needs the package libtpu
(``pip install libtpu``) and no TPU.
"""

# The docstring above is the beginning of the command's help. The program is built as the other
# commands build it, for devices that only libtpu's description of the slice knows, and lowered with
# the shapes of its inputs instead of arrays: no parameter is made. The memory is the compiler's own
# analysis. ``program_text`` counts the collectives.

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import NamedSharding, PartitionSpec
from rich.table import Table

from sedd.commands.cli import console, parse_config
from sedd.commands.program_text import GIB, collectives_of, exhausted, gib
from sedd.configuration.build import Parts, build_parallel, build_parts, build_step
from sedd.configuration.config import Config
from sedd.errors import UserError
from sedd.evaluation.bound import batch_nats
from sedd.evaluation.monte_carlo import MonteCarlo
from sedd.files import check_writable, write_whole
from sedd.networks.attention import refusal
from sedd.networks.mesh import SEQUENCES, Placement, abstract, device_mesh
from sedd.progress import Activity
from sedd.sampling.batch import run_sampler
from sedd.training.flops import step_flops
from sedd.training.parallel import DataParallel, FullySharded

# Memory of a chip, as its maker states it.
HBM = {"v4": 32 * GIB, "v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB}
# Sizes of the vocabularies of tokenizers that do not depend on the corpus.
TOKENS = {"gpt2": 50257, "text8": 27, "bytes": 257, "bert-base-uncased": 30522}


What = Literal["train", "evaluate", "sample"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileCheckCommand:
    """The flags of ``sedd compile_check``; every field of the configuration is one of them."""

    topology: str
    """The TPU slice as GENERATION:SHAPE, such as v5e:16x16, v6e:16x16, v5p:8x8x8 or v4:4x4x4."""
    config: Annotated[Config, tyro.conf.arg(name="")]
    what: What = "train"
    """The program: a step of training, the bound of a batch (evaluate), or a batch of samples by
    the sampler of the configuration (sample). --training.batch-size, --training.parallel and
    --training.fsdp apply to all three."""
    num_tokens: int | None = None
    """Size of the vocabulary. Needed for a tokenizer whose size depends on the corpus, such as
    characters."""
    program: Path | None = None
    """Write the text of the compiled program (HLO) to this file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """The figures of a compiled program.

    Args:
        num_devices: devices of the slice. All other figures are those of one device.
        arguments: bytes of the inputs: the state, or the parameters, and the batch.
        temporaries: bytes of intermediate arrays.
        peak: the most bytes that are in use at the same time.
        flops: FLOPs of a run as the compiler counts them: the body of a loop once.
        collectives: for each kind, how many run and the bytes of their results. Those of a loop
            count once for each iteration, or once if the number of iterations is not known.
        text: the compiled program.
    """

    num_devices: int
    arguments: int
    temporaries: int
    peak: int
    flops: float
    collectives: dict[str, tuple[int, int]]
    text: str


def main(arguments: Sequence[str]) -> None:
    """Compile the program and print its figures.

    Raises:
        UserError: the program does not fit into the memory of a device (the message says what
            lowers its use), there is no such slice, or libtpu is missing.
    """
    command = parse_config(arguments, CompileCheckCommand, __doc__ or "")
    config = command.config
    if command.program is not None:
        check_writable(command.program, f"--program {command.program}")
    generation = command.topology.partition(":")[0]
    if generation not in HBM:
        raise UserError(
            f"--topology {command.topology}: the generation must be one of {', '.join(HBM)}"
        )
    num_tokens = command.num_tokens or vocabulary_of(config)
    devices = devices_of(command.topology)
    with Activity(f"compiling for {len(devices)} devices"):
        compiled = compile_for(command.what, config, num_tokens, devices)
    if command.program is not None:
        write_whole(command.program, compiled.text.encode())
    show(command, compiled, num_tokens)
    if compiled.peak > HBM[generation]:
        raise UserError(
            f"it does not fit: it needs {gib(compiled.peak)} on each device, which has "
            f"{gib(HBM[generation])}. {advice(command.what, config)}"
        )


def vocabulary_of(config: Config) -> int:
    """Return the size of the vocabulary by the name of the tokenizer, without reading a corpus.

    Raises:
        UserError: the size depends on the corpus or on a file.
    """
    name = config.data.tokenizer
    if name.startswith("bpe:"):
        return int(name.removeprefix("bpe:"))
    if name not in TOKENS:
        raise UserError(
            f"data.tokenizer {name}: the size of its vocabulary depends on the corpus or a file; "
            "give it with --num-tokens"
        )
    return TOKENS[name]


def devices_of(topology: str) -> list[Any]:
    """Describe the devices of a TPU slice, for which programs can be compiled but not run.

    Raises:
        UserError: libtpu knows no such slice, or is not installed.
    """
    # The first two keep libtpu from asking a metadata server and from taking the lock of a TPU.
    # Without the last two it prints warnings; their values do not matter, since the topology
    # decides.
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
    ):
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except ModuleNotFoundError as error:
        raise UserError("compiling for TPUs needs libtpu: pip install libtpu") from error
    # The plugin raises exceptions of many classes for an unknown name and for its own absence.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        hint = "pip install libtpu" if "libtpu" in reason else "a shape is such as 4x4 or 4x4x4"
        raise UserError(f"--topology {topology}: {reason}; {hint}") from error


def compile_for(what: What, config: Config, num_tokens: int, devices: Sequence[Any]) -> Compiled:
    """Compile a program of a configuration for the devices of a slice.

    Args:
        what: the program.
        config: the configuration.
        num_tokens: size of the vocabulary.
        devices: descriptions of the devices, from ``devices_of``.

    Raises:
        UserError: the compiler finds no program that fits into the memory of a device.
    """
    parts = build_parts(with_attention(config, num_tokens), num_tokens)
    if what == "train":
        step = build_step(config, parts)
        parallel = build_parallel(config, step, devices)
        state = jax.eval_shape(lambda: step.first_state(0))
        lowered = parallel.run.lower(*abstract_inputs(config, parallel, state, devices))
    else:
        lowered = lower_inference(what, config, parts, devices)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            "it does not fit into the memory of a device: "
            f"{exhausted(str(error), lowered.as_text())}. {advice(what, config)}"
        ) from error
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    cost = compiled.cost_analysis() or {}
    return Compiled(
        num_devices=len(devices),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        flops=cost.get("flops", float("nan")),
        collectives=collectives_of(text),
        text=text,
    )


def lower_inference(what: What, config: Config, parts: Parts, devices: Sequence[Any]) -> Any:
    """Lower the evaluation of a batch, or its sampling, for the devices of a slice."""
    fsdp = config.training.fsdp if config.training.parallel == "fsdp" else 1
    mesh = device_mesh(devices, fsdp=fsdp)
    params = jax.eval_shape(parts.network.init, jax.random.key(0))
    placement = Placement.on(mesh, params, parts.network.stacked)
    size, length = config.training.batch_size, config.data.length

    def row(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, SEQUENCES))

    denoiser = parts.denoiser(abstract(params, placement.shardings(params)))
    tokens_BL, flags_BL = row((size, length), jnp.int32), row((size, length), bool)
    if what == "evaluate":
        estimate = MonteCarlo(draws=config.evaluation.draws)
        key = jax.eval_shape(jax.random.key, 0)
        index_B = row((size,), jnp.int32)
        return batch_nats.lower(
            denoiser,
            parts.schedule,
            (key,),
            index_B,
            tokens_BL,
            flags_BL,
            placement=placement,
            estimate=estimate,
        )
    keys_B = row((size,), jax.eval_shape(jax.random.key, 0).dtype)
    rows = (dataclasses.replace(denoiser, params={}), keys_B, tokens_BL, flags_BL)
    return run_sampler.lower(parts.sampler, denoiser.params, rows, placement=placement, trace=False)


def with_attention(config: Config, num_tokens: int) -> Config:
    """Replace attention ``auto`` by its choice on a TPU.

    ``auto`` looks at the default backend of this process, which is the CPU.
    """
    network: Any = config.network
    if getattr(network, "attention", None) != "auto":
        return config
    # Whether splash takes the queries depends on their length only, and on their type.
    query: Any = jax.ShapeDtypeStruct((1, config.data.length, 1, 1), jnp.float32)
    backend = "xla" if refusal("splash", query, None) else "splash"
    return dataclasses.replace(config, network=dataclasses.replace(network, attention=backend))


def abstract_inputs(config: Config, parallel: DataParallel | FullySharded, state, devices):
    """Describe the inputs of the step by shape, dtype and sharding, without making an array.

    Args:
        config: for batch size, micro-batches and length.
        parallel: how the step runs on the devices; its mesh and shardings are used under fsdp.
        state: the shapes of one copy of the training state.
        devices: the devices of the slice.

    Returns:
        The state, and a batch. Its leading axes are (micro-batch, sequence) under fsdp, and
        (device, micro-batch, sequence) under pmap.
    """
    size, length = config.training.batch_size, config.data.length
    accumulate = config.training.accumulate
    if isinstance(parallel, FullySharded):
        rows = NamedSharding(parallel.mesh, PartitionSpec(None, ("data", "fsdp")))
        lead = (accumulate, size // accumulate)
        state = abstract(state, parallel.shardings)
    else:
        rows = None
        lead = (len(devices), accumulate, size // (accumulate * len(devices)))

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    return state, {
        "x0": array((*lead, length), jnp.int32),
        "scored": array((*lead, length), bool),
        "index": array(lead, jnp.int32),
    }


def advice(what: What, config: Config) -> str:
    """Settings that lower the memory use, in the order in which to try them."""
    options = []
    if config.training.parallel != "fsdp":
        options.append("--training.parallel fsdp")
    if what == "train":
        if not getattr(config.network, "remat", True):
            options.append("--network.remat")
        options.append(f"--training.accumulate {config.training.accumulate * 2}")
    else:
        options.append("a smaller --training.batch-size")
    return f"Try {', '.join([*options, 'more devices'])}"


def show(command: CompileCheckCommand, compiled: Compiled, num_tokens: int):
    """Print the figures as a table.

    "Model FLOPs" are those that the mathematics needs (``sedd.training.flops``), with the output
    layer at half of the positions: on average that many are masked.
    """
    config = command.config
    hbm = HBM[command.topology.partition(":")[0]]
    parts = build_parts(config, num_tokens)
    params = jax.eval_shape(parts.network.init, jax.random.key(0))
    size, length = config.training.batch_size, config.data.length
    rows = parts.objective.rows(length)
    model = step_flops(parts.network, size, rows, read=size * length / 2) / compiled.num_devices
    title = f"{command.what} on {command.topology}, {config.training.parallel}"
    table = Table(title=title, title_justify="left")
    table.add_column("of one device")
    table.add_column("", justify="right")
    fits = "fits" if compiled.peak <= hbm else "does not fit"
    rows = [
        ("devices", f"{compiled.num_devices:,}"),
        ("parameters (whole model)", f"{sum(x.size for x in jax.tree.leaves(params)):,}"),
        ("sequences of a batch", f"{size / compiled.num_devices:g} of {length:,} tokens"),
        ("inputs", gib(compiled.arguments)),
        ("temporaries", gib(compiled.temporaries)),
        ("peak", f"{gib(compiled.peak)} of {gib(hbm)}: {fits}"),
    ]
    if command.what == "train":
        rows += [
            ("model FLOPs a step (half of the positions read out)", f"{model:.3g}"),
            ("compiler's FLOPs (a loop's body once)", f"{compiled.flops:.3g}"),
        ]
    for kind, (count, total) in compiled.collectives.items():
        rows.append((kind, f"{count}, {gib(total)}"))
    for row in rows:
        table.add_row(*row)
    console.print(table)
