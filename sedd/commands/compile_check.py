"""Compile a training step for a TPU slice without having one, and print whether it fits.

    sedd compile_check --config owt_radd_small --topology v5e:4x4

The compiled program is the one that training would run on the slice; the printed figures are read
from it. This needs the package libtpu (``pip install libtpu``) and no TPU.
"""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import NamedSharding, PartitionSpec
from rich.table import Table

from sedd.commands.cli import console, parse_config
from sedd.configuration.build import build_parallel, build_parts, build_step
from sedd.configuration.config import Config
from sedd.errors import UserError
from sedd.files import check_writable, write_whole
from sedd.networks.attention import refusal
from sedd.progress import Activity
from sedd.training.flops import step_flops
from sedd.training.parallel import DataParallel, FullySharded
from sedd.training.state import init_state

GIB = 2**30
HBM = {"v4": 32 * GIB, "v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB}  # a chip, by its maker
TOKENS = {"gpt2": 50257, "text8": 27, "bytes": 257, "bert-base-uncased": 30522}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
KINDS = {"i1": "pred", "i8": "s8", "i32": "s32", "ui32": "u32", "i64": "s64"}  # StableHLO's names
WIDTH = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileCheckCommand:
    """The flags, those of the configuration among them."""

    topology: str
    """GENERATION:SHAPE, such as v5e:16x16, v6e:16x16, v5p:8x8x8 or v4:4x4x4."""
    config: Annotated[Config, tyro.conf.arg(name="")]
    num_tokens: int | None = None
    """Size of the vocabulary, where the tokenizer's name does not tell."""
    program: Path | None = None
    """Write the compiled program (HLO) here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """Memory, FLOPs and collectives of a compiled step; figures of one device unless noted."""

    num_devices: int
    arguments: int  # bytes: the state and the batch
    temporaries: int  # bytes
    peak: int  # bytes in use at the same time, at most
    flops: float  # as the compiler counts them
    collectives: dict[str, tuple[int, int]]  # kind: how many a step, and their bytes
    text: str


def main(arguments: Sequence[str]) -> None:
    """Compile the step and print its figures; UserError (exit code 2) if it does not fit."""
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
        compiled = compile_step(config, num_tokens, devices)
    if command.program is not None:
        write_whole(command.program, compiled.text.encode())
    show(command, compiled, num_tokens)
    if compiled.peak > HBM[generation]:
        raise UserError(
            f"it does not fit: {gib(compiled.peak)} of {gib(HBM[generation])} a device. "
            + advice(config)
        )


def vocabulary_of(config: Config) -> int:
    """The vocabulary size, by the tokenizer's name; UserError if the name does not determine it."""
    name = config.data.tokenizer
    if name.startswith("bpe:"):
        return int(name.removeprefix("bpe:"))
    if name not in TOKENS:
        raise UserError(
            f"data.tokenizer {name} does not tell the size of its vocabulary: --num-tokens does"
        )
    return TOKENS[name]


def devices_of(topology: str) -> list[Any]:
    """Descriptions of the devices of a TPU slice; UserError where there is no such slice."""
    # No TPU is contacted: no metadata server is queried and no lock is taken. libtpu complains if
    # the last two are missing; their values do not matter, since the topology decides.
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


def compile_step(config: Config, num_tokens: int, devices: Sequence[Any]) -> Compiled:
    """The configuration's step for these devices. UserError where their memory is too small."""
    parts = build_parts(with_attention(config, num_tokens), num_tokens)
    step = build_step(config, parts)
    parallel = build_parallel(config, step, devices)
    state = jax.eval_shape(lambda: init_state(step.network, step.optimizer, 0))
    lowered = parallel.run.lower(*abstract_inputs(config, parallel, state, devices))
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"it does not fit: {exhausted(str(error), lowered.as_text())}. {advice(config)}"
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


def with_attention(config: Config, num_tokens: int) -> Config:
    """Replace attention ``auto`` by its choice on a TPU; here it would choose for this machine."""
    network: Any = config.network
    if getattr(network, "attention", None) != "auto":
        return config
    length, heads = config.data.length, network.num_heads
    query: Any = jax.ShapeDtypeStruct((1, length, heads, network.hidden_dim // heads), jnp.float32)
    backend = "xla" if refusal("splash", query, None) else "splash"
    return dataclasses.replace(config, network=dataclasses.replace(network, attention=backend))


def abstract_inputs(config: Config, parallel: DataParallel | FullySharded, state, devices):
    """The shapes that the step is compiled for."""
    size, length = config.training.batch_size, config.data.length
    accumulate = config.training.accumulate
    if isinstance(parallel, FullySharded):
        rows = NamedSharding(parallel.mesh, PartitionSpec(None, ("data", "fsdp")))
        lead = (accumulate, size // accumulate)
        state = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            parallel.shardings,
        )
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


def collectives_of(text: str) -> dict[str, tuple[int, int]]:
    """The number of collectives of each kind in a compiled program, and the bytes of their results.

    A collective in a loop counts once an iteration, or once if the trip count is unknown.
    """
    found: dict[str, tuple[int, int]] = dict.fromkeys(COLLECTIVES, (0, 0))
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = lines
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            lines = computations.setdefault(head[2], [])
            entry = lines if head[1] else entry
        lines.append(line)

    chains = set()

    def visit(lines: Sequence[str], times: int) -> None:
        for line in lines:
            if moved := re.search(rf"= (.+?) ({'|'.join(COLLECTIVES)})(-start)?\(", line):
                if re.search(r"replica_groups=(\{\{\d+\}|\[\d+,1\])", line):
                    continue  # each device alone
                # Beginning, middle and end of one that runs beside other work.
                if chain := re.search(r'chain_id="(\d+)"', line):
                    if chain[1] in chains:
                        continue
                    chains.add(chain[1])
                result, kind, starts = moved.groups()
                arrays = [size for size in sizes(result) if size]
                if (
                    starts and kind != "all-reduce"
                ):  # then what goes in stands before what comes out
                    arrays = arrays[len(arrays) // 2 :]
                count, total = found[kind]
                found[kind] = (count + times, total + times * sum(arrays))
            loops = trips(line, computations) if " while(" in line else 1
            for name in called(line):
                visit(computations.get(name, ()), times * loops)

    visit(entry, 1)
    return {kind: figures for kind, figures in found.items() if figures[0]}


def trips(loop: str, computations: dict[str, list[str]]) -> int:
    """The trip count of a loop: as annotated, or the constant in its condition; 1 if unknown."""
    if said := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop):
        return int(said[1])
    condition = re.search(r"condition=%?([\w.-]+)", loop)
    lines = computations.get(condition[1], []) if condition else []
    bounds = re.findall(r"= s32\[\]\S* constant\((\d+)\)", "\n".join(lines))
    return int(bounds[0]) if len(bounds) == 1 else 1


def called(line: str) -> list[str]:
    """Names of the computations that an instruction calls, without scalar reducers."""
    names = re.findall(r"(?:body|calls|(?:true|false)_computation)=%?([\w.-]+)", line)
    if branches := re.search(r"branch_computations=\{(.*?)\}", line):
        names += [name.strip().lstrip("%") for name in branches[1].split(",")]
    if " call(" in line:
        names += re.findall(r"to_apply=%?([\w.-]+)", line)
    return names


def sizes(result: str) -> list[int]:
    """Bytes of every array in the type of a result, such as ``(f32[8,16]{1,0}, u32[])``."""
    found = []
    for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
        count = 1
        for size in filter(None, shape.split(",")):
            count *= int(size)
        found.append(count * WIDTH.get(kind, 4))
    return found


def exhausted(message: str, program: str) -> str:
    """The compiler's out-of-memory message, and the largest arrays of the program."""
    first = " ".join(message.splitlines()[0].split()).removeprefix("RESOURCE_EXHAUSTED: ")
    shapes = set(re.findall(r"tensor<((?:\d+x)+[a-z]+\d+)>", program))
    largest = sorted(shapes, key=tensor_bytes, reverse=True)[:4]
    named = ", ".join(f"{shape} ({gib(tensor_bytes(shape))})" for shape in largest)
    return f"{first.rstrip('.')}; the largest arrays are {named}"


def tensor_bytes(shape: str) -> int:
    """Bytes of an array written as ``8x1024xbf16``."""
    *dimensions, kind = shape.split("x")
    return math.prod(map(int, dimensions)) * WIDTH.get(KINDS.get(kind, kind), 4)


def advice(config: Config) -> str:
    """Settings that lower the memory use, in the order in which to try them."""
    options = []
    if config.training.parallel != "fsdp":
        options.append("--training.parallel fsdp")
    if not getattr(config.network, "remat", True):
        options.append("--network.remat")
    accumulate = config.training.accumulate * 2
    options += [f"--training.accumulate {accumulate}", "more devices"]
    return f"Try {', '.join(options)}"


def show(command: CompileCheckCommand, compiled: Compiled, num_tokens: int):
    """The figures as a table."""
    config = command.config
    hbm = HBM[command.topology.partition(":")[0]]
    parts = build_parts(config, num_tokens)
    params = jax.eval_shape(parts.network.init, jax.random.key(0))
    size, length = config.training.batch_size, config.data.length
    model = step_flops(parts.network, size, length, read=size * length / 2) / compiled.num_devices
    table = Table(title=f"{command.topology}, {config.training.parallel}", title_justify="left")
    table.add_column("of one device")
    table.add_column("", justify="right")
    fits = "fits" if compiled.peak <= hbm else "does not fit"
    rows = [
        ("devices", f"{compiled.num_devices:,}"),
        ("parameters (whole model)", f"{sum(x.size for x in jax.tree.leaves(params)):,}"),
        ("sequences a step", f"{size / compiled.num_devices:g} of {length:,} tokens"),
        ("state and batch", gib(compiled.arguments)),
        ("temporaries", gib(compiled.temporaries)),
        ("peak", f"{gib(compiled.peak)} of {gib(hbm)}: {fits}"),
        ("model FLOPs a step (half of the positions read out)", f"{model:.3g}"),
        ("compiler's FLOPs (a loop's body once)", f"{compiled.flops:.3g}"),
    ]
    for kind, (count, total) in compiled.collectives.items():
        rows.append((kind, f"{count} a step, {gib(total)}"))
    for row in rows:
        table.add_row(*row)
    console.print(table)


def gib(size: float) -> str:
    """A number of bytes as text in MiB or GiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
