"""Training, evaluation and sampling by the number of devices: memory, communication, throughput.

The programs are compiled for simulated CPU devices. The figures of the first table are read from
the compiled programs, which are not run. The batch grows with the number of devices. Its columns:

- ``what``: a training step, the bound of a batch (evaluate), or a batch of samples.
- ``parallel``: ``pmap`` (a copy of the state on each device) or ``fsdp`` (a part of it).
- ``inputs MB``: the state, or the parameters, and the batch of one device.
- ``temporaries MB``: the intermediate arrays of one device.
- ``all-reduce MB``, ``all-gather MB``, ``reduce-scatter MB``: the results of all collectives of
  this kind, on one device. A loop whose length is not known when compiling counts once: these are
  the figures of one network call of a sampler.

The second table has the sequences that are evaluated and drawn in a second. The batch is the same
for all numbers of devices, which share the cores of this machine.

    python benchmarks/scaling.py
"""

import dataclasses
from functools import partial
from typing import Any, get_args

import jax
import numpy as np
from report import report, seconds, start

import sedd
from sedd.commands.compile_check import What, compile_for
from sedd.commands.cpu import prepare_cpu
from sedd.configuration.build import build_parts
from sedd.configuration.components import options
from sedd.configuration.config import Config, DataOptions, TrainingOptions
from sedd.evaluation.protocols import Protocol
from sedd.networks.mesh import Placement, device_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The model, the batch and the numbers of devices."""

    hidden_dim: int = 512
    num_layers: int = 8
    num_heads: int = 8
    num_tokens: int = 8192
    length: int = 256
    sequences: int = 2
    """Sequences in the batch for each device."""
    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of devices to compile for."""
    run_devices: tuple[int, ...] = (1, 2, 4)
    """Numbers of devices on which to evaluate and sample; empty for no second table."""
    steps: int = 16
    """Steps of the sampler, and draws of the bound, in the second table."""


def config_of(settings: Settings, parallel: Any, batch_size: int) -> Config:
    """The configuration of a model and a batch."""
    return Config(
        data=DataOptions(tokenizer="bytes", length=settings.length),
        parameterization=options("parameterizations", "conditional"),
        objective=options("objectives", "lambda_dce"),
        network=options(
            "networks",
            "ddit",
            hidden_dim=settings.hidden_dim,
            num_layers=settings.num_layers,
            num_heads=settings.num_heads,
            attention="xla",
        ),
        training=TrainingOptions(batch_size=batch_size, parallel=parallel),
        sampler=options("samplers", "event_jump", steps=settings.steps),
    )


def main(settings: Settings) -> None:
    """Compile each program for each number of devices, run some of them, and print the tables."""
    simulate(max(*settings.devices, *settings.run_devices))
    rows = []
    for what in get_args(What):
        for parallel in ("pmap", "fsdp"):
            for number in settings.devices:
                config = config_of(settings, parallel, settings.sequences * number)
                devices = jax.devices()[:number]
                compiled = compile_for(what, config, settings.num_tokens, devices)
                row = {
                    "what": what,
                    "parallel": parallel,
                    "devices": number,
                    "inputs MB": compiled.arguments / 1e6,
                    "temporaries MB": compiled.temporaries / 1e6,
                }
                for kind in ("all-reduce", "all-gather", "reduce-scatter"):
                    row[f"{kind} MB"] = compiled.collectives.get(kind, (0, 0))[1] / 1e6
                rows.append(row)
    shown = ("hidden_dim", "num_layers", "num_tokens", "length", "sequences")
    report("scaling", rows, **{name: getattr(settings, name) for name in shown})
    if settings.run_devices:
        throughput(settings)


def throughput(settings: Settings) -> None:
    """Evaluate and sample one batch on each number of devices, and print the second table."""
    batch = settings.sequences * max(settings.run_devices)
    config = config_of(settings, "pmap", batch)
    parts = build_parts(config, settings.num_tokens)
    params = parts.network.init(jax.random.key(0))
    shape = (batch, settings.length)
    x0_BL = np.random.default_rng(0).integers(0, settings.num_tokens, shape)
    protocol = Protocol(draws=settings.steps)
    rows = []
    for parallel in ("replicated", "fsdp"):
        for number in settings.run_devices:
            mesh = device_mesh(jax.devices()[:number], fsdp=number if parallel == "fsdp" else 1)
            placed = Placement.on(mesh, params, parts.network.stacked).place(params)
            model = sedd.Model(
                denoiser=parts.denoiser(placed),
                parts=parts,
                config=config,
                tokenizer=None,
                source="random",
            )
            evaluating = seconds(
                partial(sedd.evaluate, model, x0_BL, protocol=protocol, batch_size=batch)
            )
            sampling = seconds(partial(sedd.sample, model, 0, num=batch, sampler=parts.sampler))
            rows.append(
                {
                    "parallel": parallel,
                    "devices": number,
                    "evaluated, sequences/s": batch / evaluating,
                    "drawn, sequences/s": batch / sampling,
                }
            )
    report("throughput", rows, batch=batch, steps=settings.steps, length=settings.length)


def simulate(number: int) -> None:
    """Make JAX simulate ``number`` devices on the CPU. Call it before the first array is made."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", number)
    prepare_cpu()


if __name__ == "__main__":
    start(main, Settings, __doc__)
