"""Memory and time of a save and of a restore by shard, on simulated devices, for each process.

The state of a model is made in parts on the devices (``fsdp``), saved once to set everything up,
and saved again. Directly after the second save an update changes the whole state in place, as the
next training step does. The state is then restored. The columns of each process:

- ``local MB``: the shards on the devices of the process.
- ``peak MB``: how much more memory the process takes during the save than before. On simulated
  devices no copy from the device is needed; the update takes new memory instead, as long as the old
  shards are being written. ``of local`` is the same as a share of ``local MB``.
- ``stall, s``: how long the save blocks the loop, without the search for values that are not
  finite. ``check, s`` is that search, ``write, s`` the time until the checkpoint is complete.
- ``restore, s``: reading the shards of the process and verifying them.

    python benchmarks/saving.py --processes 2
"""

import ctypes
import dataclasses
import multiprocessing
import socket
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import jax
from report import report, start

from sedd.commands.cpu import prepare_cpu
from sedd.configuration.build import build_parts, build_step
from sedd.configuration.components import options
from sedd.configuration.config import Config, DataOptions, TrainingOptions
from sedd.training.checkpoint import Checkpoints
from sedd.training.parallel import FullySharded
from sedd.training.state import TrainState, first_not_finite
from sedd.training.storage import quiet_orbax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The model and the devices."""

    hidden_dim: int = 640
    num_layers: int = 10
    num_heads: int = 10
    num_tokens: int = 257
    processes: int = 1
    """Processes, which share the devices evenly."""
    devices: int = 4
    """Simulated devices in all."""


def main(settings: Settings) -> None:
    """Measure a save and a restore in new processes, and print a row for each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with (
        tempfile.TemporaryDirectory() as directory,
        ProcessPoolExecutor(
            settings.processes, mp_context=multiprocessing.get_context("spawn")
        ) as pool,
    ):
        task = partial(measure, settings, Path(directory), port)
        rows = list(pool.map(task, range(settings.processes)))
    report("saving by shard", rows, **dataclasses.asdict(settings))


def measure(settings: Settings, directory: Path, port: int, process: int) -> dict[str, float]:
    """Save and restore in one of the processes; returns its row."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", settings.devices // settings.processes)
    prepare_cpu()
    quiet_orbax()
    if settings.processes > 1:
        jax.distributed.initialize(f"localhost:{port}", settings.processes, process)
    shape = {name: getattr(settings, name) for name in ("hidden_dim", "num_layers", "num_heads")}
    config = Config(
        data=DataOptions(tokenizer="bytes"),
        network=options("networks", "ddit", **shape),
        training=TrainingOptions(batch_size=settings.devices, parallel="fsdp"),
    )
    step = build_step(config, build_parts(config, settings.num_tokens))
    parallel = FullySharded(step)
    make_state = partial(step.first_state, config.seed)
    update = jax.jit(changed, donate_argnums=0, out_shardings=parallel.shardings)
    state = jax.block_until_ready(update(parallel.init(make_state)))
    checkpoints = Checkpoints(directory)
    local = sum(s.data.nbytes for x in jax.tree.leaves(state) for s in x.addressable_shards) / 1e6
    first_not_finite(state)
    checkpoints.save(state, data={}, pending={})
    state = jax.block_until_ready(update(state))
    checkpoints.wait()
    begun = time.perf_counter()
    first_not_finite(state)
    checked = time.perf_counter()
    before = forget_peak()
    began = time.perf_counter()
    checkpoints.save(state, data={}, pending={})
    stalled = time.perf_counter()
    state = jax.block_until_ready(update(state))
    checkpoints.wait()
    written = time.perf_counter()
    peak = memory("VmHWM") - before
    checkpoints.close()
    began_reading = time.perf_counter()
    checkpoints.restore_latest(jax.eval_shape(make_state), parallel.shardings)
    read = time.perf_counter()
    row = {
        "process": process,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "local MB": local,
        "peak MB": peak,
        "of local": peak / local,
        "check, s": checked - begun,
        "stall, s": stalled - began,
        "write, s": written - began,
        "restore, s": read - began_reading,
    }
    if settings.processes > 1:
        jax.distributed.shutdown()
    return row


def changed(state: TrainState) -> TrainState:
    """The state with 1 added to every number; the random key stays."""
    return dataclasses.replace(
        jax.tree.map(lambda x: x + 1, dataclasses.replace(state, key=0)), key=state.key
    )


def memory(kind: str) -> float:
    """A figure of this process's memory in MB: ``VmRSS`` (now) or ``VmHWM`` (the highest)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(kind))


def forget_peak() -> float:
    """Start to look for a new highest memory of this process; returns the present one in MB.

    Memory that was freed, but that the C library holds for later, is given back before.
    """
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


if __name__ == "__main__":
    start(main, Settings, __doc__)
