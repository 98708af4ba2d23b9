"""The parts of ``campaign.py`` that use this package; each runs in a process of its own.

    python benchmarks/device/stages.py steps '{"width": 64, …}'

The sizes are JSON. Lines that begin with ``ROW`` are results.
"""

import functools
import importlib.util
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))  # the other benchmarks

import sampling
import train_step

import sedd
from sedd.configuration.build import build_sampler
from sedd.schedules import LogLinear
from sedd.training.checkpoint import find_checkpoints
from sedd.training.flops import peak_flops, step_flops
from sedd.training.metrics import read_metrics

OBJECTIVES: dict[str, Any] = {
    "sedd": "score_entropy",
    "radd": "lambda_dce",
    "ar": "autoregressive",
}
COOLDOWN = 0.05  # share of the steps at a low learning rate, at the end
WEIGHTS_BYTES = 16e6  # the most that the exported weights may have
SPEEDS = ("tokens_per_second", "mfu")  # of a run's metrics: their medians, and the newest of others


def emit(row: dict[str, Any]) -> None:
    """Print a result."""
    print("ROW " + json.dumps(row), flush=True)


def about(shape: dict) -> None:
    """The device, and the versions."""
    device = jax.devices()[0]
    emit(
        {
            "device": device.device_kind,
            "platform": device.platform,
            "platform version": " ".join(device.client.platform_version.split()),
            "peak bf16 FLOP/s": peak_flops(),
            "cores": os.cpu_count(),
            "python": sys.version.split()[0],
            "jax": jax.__version__,
            "sedd": sedd.__version__,
        }
    )


def steps(shape: dict) -> None:
    """Time the training step of each kind of model."""
    sizes = tuple(shape[name] for name in ("width", "layers", "heads", "tokens"))
    train_step.SHAPES["campaign"] = sizes
    for kind in shape["models"]:
        emit(attempt({"model": kind}, lambda kind=kind: time_step(kind, shape)))


def attempt(case: dict, measure) -> dict:
    """The row of a case; an error is a row, too, so that the next case is measured."""
    try:
        return case | measure()
    except Exception as error:
        traceback.print_exc()
        return case | {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def time_step(kind: str, shape: dict) -> dict[str, Any]:
    """The figures of a training step, in bfloat16 with AdamW, clipping and EMA."""
    settings = train_step.Settings(
        shape="campaign",  # pyright: ignore[reportArgumentType]
        objective=OBJECTIVES[kind],
        length=shape["length"],
        batch_size=shape["batch"],
        dtype="bfloat16",
    )
    parts = train_step.parts_of(settings, shape["layers"])
    compiled, state, batch, compile_seconds = train_step.compiled_step(
        settings, parts, parts.objective
    )
    memory: Any = compiled.memory_analysis()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    losses, times = [], []
    for _ in range(2 + shape["steps"]):
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        losses.append(float(metrics["loss"]))
        times.append(time.perf_counter() - start)
    seconds, tokens = statistics.median(times[2:]), shape["batch"] * shape["length"]
    read = tokens if kind == "ar" else tokens / 2
    flops = step_flops(
        parts.network, shape["batch"], parts.objective.rows(shape["length"]), read=read
    )
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "s/step": seconds,
        "tokens/s": tokens / seconds,
        "FLOPs": flops,
        "peak FLOP/s": peak_flops(),
        "compile, s": compile_seconds,
        "memory, GB": (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )
        / 1e9,
        "device peak so far, GB": stats.get("peak_bytes_in_use", 0) / 1e9 or None,
        "cuDNN attention": "fmha" in (compiled.as_text() or "").lower(),
        "first loss": losses[0],
        "parameters": parameters,
    }


def sample(shape: dict) -> None:
    """Time event-jump sampling at each batch size."""
    for batch in shape["batches"]:
        emit(attempt({"batch": batch}, lambda batch=batch: time_sampling(batch, shape)))


def time_sampling(batch: int, shape: dict) -> dict[str, Any]:
    """The figures of one batch of samples from a network of random weights."""
    settings = sampling.Settings(
        length=shape["length"],
        batch=batch,
        hidden_dim=shape["width"],
        num_layers=shape["layers"],
        num_heads=shape["heads"],
        vocabulary=shape["tokens"],
        dtype="bfloat16",
    )
    denoiser = sampling.model(settings)
    sampler = build_sampler("event_jump", LogLinear(), steps=shape["sampling_steps"])
    arguments = (
        denoiser,
        jax.random.split(jax.random.key(2), batch),
        jnp.zeros((batch, shape["length"]), jnp.int32),
        jnp.zeros((batch, shape["length"]), bool),
    )
    start = time.perf_counter()
    run = jax.jit(functools.partial(sampling._draw, sampler)).lower(*arguments).compile()
    compile_seconds = time.perf_counter() - start
    start = time.perf_counter()
    drawn = jax.block_until_ready(run(*arguments))
    seconds = time.perf_counter() - start
    return {
        "s/sample": seconds / batch,
        "calls of a sequence": float(drawn.calls_B.mean()),
        "calls of the batch": int(drawn.rounds),
        "compile, s": compile_seconds,
    }


def training(shape: dict) -> None:
    """Train for about ``shape["seconds"]``, and export the weights.

    The run has no last step: a SIGTERM of this process to itself ends it with a checkpoint. A
    second call of the command trains for another ``COOLDOWN`` of its steps, with a last step and
    hence at the end of the schedule of the learning rate; then it validates and draws texts. The
    weights are written in bfloat16, in RADD's layout.
    """
    from sedd.commands import train  # the other stages start sooner without it

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # outside of the loop a signal would lose the run
    workdir, output = Path(shape["workdir"]), Path(shape["output"]) / "model"
    if importlib.util.find_spec("matplotlib") is None:
        from sedd.training import loop

        print("matplotlib is not installed: no curves are drawn")
        loop.plot_curves = lambda *args, **kwargs: None
    where, seconds = ["--workdir", str(workdir)], shape["seconds"] * (1 - COOLDOWN)
    threading.Thread(target=stop_later, args=(workdir, seconds), daemon=True).start()
    train.main([*where, "--training.steps", str(10**9), *shape["flags"]])
    step = newest_step(workdir)
    size = write_weights(workdir, output)
    emit({"step": step, **figures(workdir), "weights, MB": size / 1e6})  # should time run out
    train.main([*where, "--training.steps", str(step + max(1, int(COOLDOWN * step)))])
    size = write_weights(workdir, output)
    model = sedd.load(output)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.denoiser.params))
    texts = sorted((workdir / "samples").glob("*.txt"))
    emit(
        {
            "step": newest_step(workdir),
            "parameters": parameters,
            **figures(workdir),
            "weights, MB": size / 1e6,
            "samples": texts[-1].read_text("utf-8") if texts else None,
        }
    )


def newest_step(workdir: Path) -> int:
    """The step of the newest whole checkpoint; 0 without one."""
    return find_checkpoints(str(workdir)).latest_good() or 0


def stop_later(workdir: Path, seconds: float) -> None:
    """Send this process SIGTERM after some seconds, but not before the first record of the run."""
    deadline = time.monotonic() + seconds
    metrics = workdir / "metrics.jsonl"
    while time.monotonic() < deadline or not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)


def figures(workdir: Path) -> dict[str, Any]:
    """The newest loss and validation in the run's metrics, and the medians of ``SPEEDS``."""
    found: dict[str, list] = {}
    for record in read_metrics(workdir):
        for name, value in record.items():
            if name.startswith(("loss", "validation", *SPEEDS)) and value is not None:
                found.setdefault(name, []).append(value)
    return {k: statistics.median(v) if k in SPEEDS else v[-1] for k, v in found.items()}


def write_weights(workdir: Path, output: Path) -> int:
    """Export the newest checkpoint in bfloat16, over an earlier export; returns the bytes."""
    from sedd.commands import export

    with tempfile.TemporaryDirectory() as folder:
        export.main(["--checkpoint", str(workdir), "--output", folder])
        size = to_bfloat16(Path(folder) / "model.safetensors")
        shutil.copytree(folder, output, dirs_exist_ok=True)
    return size


def to_bfloat16(path: Path) -> int:
    """Round the tensors of a file to bfloat16; returns its size in bytes.

    Raises:
        ValueError: the file has more than ``WEIGHTS_BYTES``; it is removed.
    """
    tensors = {name: np.asarray(x).astype(jnp.bfloat16) for name, x in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)
    size = path.stat().st_size
    if size > WEIGHTS_BYTES:
        path.unlink()
        raise ValueError(f"the weights have {size / 1e6:.1f} MB, more than {WEIGHTS_BYTES / 1e6}")
    return size


STAGES = {"about": about, "steps": steps, "sampling": sample, "training": training}


if __name__ == "__main__":
    STAGES[sys.argv[1]](json.loads(sys.argv[2]))
