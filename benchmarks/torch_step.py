"""A training step beside RADD's published form, an eager loop in PyTorch (``torch_loop``).

Both forms have the same network, batch, loss, clipping, optimizer and average of the parameters, in
float32. Each runs in a process of its own, with its own threads and memory. The processes take one
step in turn, so that what else the machine does slows all of them.

    python benchmarks/torch_step.py                      # d 128, L 64, and d 256, L 256
    python benchmarks/torch_step.py --shapes sotu_radd_small --steps 40

`sedd` has the process settings of the commands: on a CPU, glibc keeps freed memory for the next
step. `pytorch` has glibc's defaults, and `pytorch, memory kept` the setting of the commands.
`speed` is the shortest step of `pytorch` divided by that of the form, `by medians` the same of the
median steps. The optional dependency is `pip install -e '.[judge]'`.
"""

import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Literal

import jax
import numpy as np
import train_step
from report import report, start

from sedd.commands.cpu import keep_freed_memory, prepare_cpu
from sedd.configuration.build import build_parts
from sedd.configuration.config import Config, load_config
from sedd.errors import UserError
from sedd.training.distributed import leave_libtpu_alone
from sedd.training.optimizer import make_optimizer

REST = 0.05  # seconds between two steps: idle threads of the last form still spin for some of them
Work = tuple[Callable[[], Any], int]  # a function that runs one step, and the number of parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    shapes: tuple[Literal["sotu_radd_small", "small"], ...] = ("sotu_radd_small", "small")
    """The recipe `sotu_radd_small`, and the shape `small` of train_step.py with AdamW."""
    steps: int = 20
    """Timed steps of each form, after two that are not."""


def setting(shape: str) -> tuple[Config, int]:
    """The configuration of a shape, and its number of tokens."""
    if shape == "sotu_radd_small":
        config = load_config(shape)
        return config, int(config.data.tokenizer.removeprefix("bpe:"))
    settings = train_step.Settings(shape=shape)  # pyright: ignore[reportArgumentType]
    _, layers, _, num_tokens = train_step.SHAPES[shape]
    return train_step.config_of(settings, layers), num_tokens


def sedd_work(config: Config, num_tokens: int) -> Work:
    """The step of this package, compiled."""
    leave_libtpu_alone()
    prepare_cpu()
    parts = build_parts(config, num_tokens)
    optimizer = make_optimizer(config.optimizer, config.training.steps)
    settings = train_step.Settings(batch_size=config.training.batch_size, length=config.data.length)
    compiled, state, batch, _ = train_step.compiled_step(
        settings, parts, parts.objective, optimizer
    )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))

    def step():
        nonlocal state
        state, metrics = compiled(state, batch)
        return float(metrics["loss"])

    return step, parameters


def torch_work(config: Config, num_tokens: int) -> Work:
    """The step of the published form."""
    import torch  # pyright: ignore[reportMissingImports]
    import torch_loop

    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as XLA counts them
    network: Any = build_parts(config, num_tokens).network
    loop = torch_loop.Loop(torch_loop.RADD(network, config.data.length), config.optimizer)
    x0_BL = torch.randint(num_tokens, (config.training.batch_size, config.data.length))
    return lambda: loop.step(x0_BL), sum(p.numel() for p in loop.parameters)


def torch_work_memory_kept(config: Config, num_tokens: int) -> Work:
    """The step of the published form, with the commands' setting of glibc's malloc."""
    keep_freed_memory()
    return torch_work(config, num_tokens)


FORMS = {
    "sedd": sedd_work,
    "pytorch": torch_work,
    "pytorch, memory kept": torch_work_memory_kept,
}


def worker(pipe: Connection, form: str, shape: str) -> None:
    """Run one step for each message, and answer with its seconds; None ends the process."""
    step, parameters = FORMS[form](*setting(shape))
    pipe.send(parameters)
    while pipe.recv() is not None:
        begin = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - begin)


def measure(shape: str, steps: int) -> list[dict[str, Any]]:
    """The rows of a shape, one for each form."""
    spawn = multiprocessing.get_context("spawn")
    pipes, processes, parameters = {}, [], {}
    for form in FORMS:  # one after the other: compiling would disturb the first steps
        pipes[form], theirs = spawn.Pipe()
        processes.append(spawn.Process(target=worker, args=(theirs, form, shape), daemon=True))
        processes[-1].start()
        theirs.close()  # so that the pipe breaks if the process ends
        parameters[form] = pipes[form].recv()
    times = {form: [] for form in FORMS}
    for i in range(2 + steps):
        for form, pipe in pipes.items():
            time.sleep(REST)
            pipe.send(i)
            seconds = pipe.recv()
            if i >= 2:
                times[form].append(seconds)
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(None)
        process.join()
    config, _ = setting(shape)
    tokens = config.training.batch_size * config.data.length
    return [
        {
            "shape": shape,
            "form": form,
            "optimizer": config.optimizer.name,
            "parameters": parameters[form],
            "s/step": min(times[form]),
            "median": float(np.median(times[form])),
            "tokens/s": tokens / min(times[form]),
            "speed": min(times["pytorch"]) / min(times[form]),
            "by medians": float(np.median(times["pytorch"]) / np.median(times[form])),
        }
        for form in FORMS
    ]


def main(settings: Settings) -> None:
    """Print the table of the forms."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("the published form needs PyTorch: pip install -e '.[judge]'") from error
    rows = [row for shape in settings.shapes for row in measure(shape, settings.steps)]
    about = {"steps": settings.steps, "torch": torch.__version__}
    tunables = os.environ.get("GLIBC_TUNABLES")
    report("training step beside PyTorch", rows, **about, glibc_tunables=tunables)


if __name__ == "__main__":
    start(main, Settings, __doc__)
