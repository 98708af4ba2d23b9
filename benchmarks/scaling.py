"""What a device holds and sends in a training step, by the number of devices.

The step is compiled for simulated devices and not run: the figures are read from the program.
`state` and `temporaries` are a device's; `sent` are the bytes of a collective's result, the most
that a device sends or receives of it. The batch grows with the devices.

    python benchmarks/scaling.py
"""

import dataclasses

import jax
from report import report, start

from sedd.commands.compile_check import compile_step
from sedd.commands.cpu import prepare_cpu
from sedd.configuration.components import options
from sedd.configuration.config import Config, DataOptions, TrainingOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The model, and the numbers of devices."""

    hidden_dim: int = 512
    num_layers: int = 8
    num_heads: int = 8
    num_tokens: int = 8192
    length: int = 256
    sequences: int = 2
    """Of a device."""
    devices: tuple[int, ...] = (1, 2, 4, 8)


def main(settings: Settings) -> None:
    """Print a row for each way to run on each number of devices."""
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
            compiled = compile_step(config, settings.num_tokens, jax.devices()[:number])
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
    """So many devices on the CPU; before the first array."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", number)
    prepare_cpu()


if __name__ == "__main__":
    start(main, Settings, __doc__)
