"""The costs of a training run beside its steps: reading data, saving, and resuming.

First the loader is measured alone: ``Mtokens/s`` are millions of tokens per second. Then the
training loop runs on the embedded corpus and writes ``saves`` checkpoints. Its rows:

- ``s/step``: the median time of a step.
- ``stall of a save, s``: how long a save blocks the loop after the steps are finished, at the
  median; the checkpoint itself is written in the background. ``in steps`` is the same in steps.
- ``waiting for data``: the share of the run's time.
- ``read and verify, s``, ``compile and step, s``: the parts of resuming: reading the checkpoint
  onto the device, and compiling and running the first step.

    python benchmarks/training_run.py
"""

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import jax
import numpy as np
from report import report, start

from sedd.configuration.build import build_parallel, build_parts, build_step
from sedd.configuration.build_data import build_data
from sedd.configuration.components import options
from sedd.configuration.config import Config, DataOptions, TrainingOptions
from sedd.data.loader import Batches
from sedd.training import loop
from sedd.training.checkpoint import Checkpoints
from sedd.training.loop import Cadence, Run, train
from sedd.training.metrics import read_metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The model, the length of the run, and the batches of the loader."""

    hidden_dim: int = 640
    num_layers: int = 10
    num_heads: int = 10
    length: int = 256
    batch_size: int = 16
    steps_between: int = 6
    """Steps between two saves."""
    saves: int = 3
    """Checkpoints of the run."""
    corpus: str = "sotu"
    loader_length: int = 1024
    """Tokens in a sequence when the loader is measured alone."""
    loader_batch_size: int = 512
    loader_batches: int = 200


def main(settings: Settings) -> None:
    """Measure the loader and a run, and print both tables."""
    config = Config(
        data=DataOptions(corpus=settings.corpus, tokenizer="bytes", length=settings.length),
        network=options(
            "networks",
            "ddit",
            hidden_dim=settings.hidden_dim,
            num_layers=settings.num_layers,
            num_heads=settings.num_heads,
        ),
        training=TrainingOptions(
            batch_size=settings.batch_size, steps=settings.steps_between * settings.saves
        ),
    )
    measure_loader(config, settings)
    with tempfile.TemporaryDirectory() as workdir:
        measure_run(config, settings, Path(workdir))


def measure_loader(config: Config, settings: Settings) -> None:
    """Measure how many tokens per second the loader yields to a loop that does nothing else."""
    longer = dataclasses.replace(config.data, length=settings.loader_length)
    data = build_data(dataclasses.replace(config, data=longer))
    batches = Batches(data.train, batch_size=settings.loader_batch_size, seed=0)
    next(batches)
    start = time.perf_counter()
    tokens = sum(batch["x0"].size for batch in islice(batches, settings.loader_batches))
    rate = tokens / (time.perf_counter() - start)
    row = {"batch": settings.loader_batch_size, "length": settings.loader_length}
    report("loader", [row | {"Mtokens/s": rate / 1e6}], corpus=settings.corpus)


@contextmanager
def timed_saves() -> Iterator[list[float]]:
    """Within the block, time every save of the training loop.

    Before a save is timed, the dispatched steps and the save before it are completed.

    Yields:
        A list, to which the seconds of each save are appended.
    """
    stalls, save = [], loop._Loop.save

    def timed(self, state, step):
        self.run.checkpoints.wait()
        jax.block_until_ready(state.params)
        start = time.perf_counter()
        save(self, state, step)
        stalls.append(time.perf_counter() - start)

    loop._Loop.save = timed
    try:
        yield stalls
    finally:
        loop._Loop.save = save


def measure_run(config: Config, settings: Settings, workdir: Path) -> None:
    """Train in ``workdir``, resume from its last checkpoint, and print the table of the times."""
    data = build_data(config)
    parts = build_parts(config, data.tokenizer.num_tokens)
    step = build_step(config, parts)
    make_state = partial(step.first_state, config.seed)
    parallel = build_parallel(config, step)
    state = parallel.init(make_state)
    checkpoints = Checkpoints(workdir / "checkpoints")
    batch = partial(Batches, data.train, batch_size=settings.batch_size, seed=0)
    begun = time.perf_counter()
    with timed_saves() as stalls:
        run = Run(
            workdir=workdir,
            parallel=parallel,
            batches=batch(),
            checkpoints=checkpoints,
            steps=config.training.steps,
            cadence=Cadence(log_every=1, eval_every=None, checkpoint_every=settings.steps_between),
        )
        result = train(run, state)
    took = time.perf_counter() - begun
    checkpoints.close()
    lines = [line for line in read_metrics(workdir) if "steps_per_second" in line]
    seconds = np.array([1 / line["steps_per_second"] for line in lines])
    waiting = sum(s * line["waiting_for_data"] for s, line in zip(seconds, lines, strict=True))
    del state

    begun = time.perf_counter()
    restored = Checkpoints(workdir / "checkpoints").restore_latest(
        jax.eval_shape(make_state), parallel.shardings
    )
    assert restored is not None
    assert restored.step == result.step
    state = jax.block_until_ready(restored.state)
    read = time.perf_counter()
    jax.clear_caches()
    rebuilt = build_parallel(config, step)
    state, metrics = rebuilt(state, next(batch(start_step=restored.step)))
    jax.block_until_ready(metrics)
    stepped = time.perf_counter()

    typical = float(np.median(seconds))
    size = sum(f.stat().st_size for f in checkpoints.path(result.step).rglob("*") if f.is_file())
    row = {
        "parameters": sum(x.size for x in jax.tree.leaves(result.state.params)),
        "checkpoint MB": size / 1e6,
        "s/step": typical,
        "stall of a save, s": float(np.median(stalls)),
        "in steps": float(np.median(stalls)) / typical,
        "waiting for data": waiting / took,
        "read and verify, s": read - begun,
        "compile and step, s": stepped - read,
    }
    report(
        "a training run beside its steps",
        [{"what": name, "figure": figure} for name, figure in row.items()],
        length=settings.length,
        batch_size=settings.batch_size,
    )


if __name__ == "__main__":
    start(main, Settings, __doc__)
