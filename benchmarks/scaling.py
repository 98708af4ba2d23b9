"""The memory and the communication of a training step on one device, by the number of devices.

The step is compiled for simulated CPU devices and not run; all figures are read from the compiled
program. The batch grows with the number of devices. The columns:

- ``parallel``: ``pmap`` (a copy of the state on each device) or ``fsdp`` (a part of it).
- ``state MB``: the state and the batch of one device.
- ``temporaries MB``: the intermediate arrays of one device.
- ``all-reduce MB``, ``all-gather MB``, ``reduce-scatter MB``: the results of all collectives of
  this kind in a step, on one device.

    python benchmarks/scaling.py
"""

import dataclasses

import jax
from report import report, start

from sedd.commands.compile_check import compile_for
from sedd.commands.cpu import prepare_cpu
from sedd.configuration.components import options
from sedd.configuration.config import Config, DataOptions, TrainingOptions


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


def main(settings: Settings) -> None:
    """Compile the step with pmap and fsdp for each number of devices, and print the table."""
    simulate(max(settings.devices))
    rows = []
    for parallel in ("pmap", "fsdp"):
        for number in settings.devices:
            config = Config(
                data=DataOptions(tokenizer="bytes", length=settings.length),
                network=options(
                    "networks",
                    "ddit",
                    hidden_dim=settings.hidden_dim,
                    num_layers=settings.num_layers,
                    num_heads=settings.num_heads,
                    attention="xla",
                ),
                training=TrainingOptions(batch_size=settings.sequences * number, parallel=parallel),
            )
            compiled = compile_for("train", config, settings.num_tokens, jax.devices()[:number])
            row = {
                "parallel": parallel,
                "devices": number,
                "state MB": compiled.arguments / 1e6,
                "temporaries MB": compiled.temporaries / 1e6,
            }
            for kind in ("all-reduce", "all-gather", "reduce-scatter"):
                row[f"{kind} MB"] = compiled.collectives.get(kind, (0, 0))[1] / 1e6
            rows.append(row)
    shown = ("hidden_dim", "num_layers", "num_tokens", "length", "sequences")
    report("scaling", rows, **{name: getattr(settings, name) for name in shown})


def simulate(number: int) -> None:
    """Make JAX simulate ``number`` devices on the CPU. Call it before the first array is made."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", number)
    prepare_cpu()


if __name__ == "__main__":
    start(main, Settings, __doc__)
