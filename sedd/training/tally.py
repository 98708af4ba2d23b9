"""What the training loop counts between two logs: losses, skipped updates, time, profiles."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from sedd.training.flops import peak_flops


@dataclass
class Window:
    """Sums of loss, gradient norm and tokens since the last log.

    A checkpoint stores them, so that the means of a resumed run are those of one without a stop.
    """

    steps: int = 0
    loss: float = 0.0
    grad_norm: float = 0.0
    tokens: int = 0
    skipped: int = 0

    def add(self, loss: float, grad_norm: float, tokens: int) -> None:
        self.steps += 1
        self.loss += loss
        self.grad_norm += grad_norm
        self.tokens += tokens

    def skip(self, tokens: int) -> None:
        self.skipped += 1
        self.tokens += tokens

    def close(self) -> dict[str, Any]:
        """The means over the steps that were not skipped, and an empty window."""
        record: dict[str, Any] = {"tokens": self.tokens}
        if self.steps:
            means = {"loss": self.loss / self.steps, "grad_norm": self.grad_norm / self.steps}
            record = means | record
        if self.skipped:
            record["skipped"] = self.skipped
        self.__init__()
        return record


@dataclass
class Skips:
    """Skipped updates: since the run began, and the latest ones in a row."""

    total: int = 0
    in_a_row: int = 0


class Profile:
    """Record ``steps`` steps for a profiler's viewer, beginning ten steps after ``first``.

    The first step compiles and the next ones find the devices idle: neither is typical.
    """

    def __init__(self, directory: Path, first: int, steps: int):
        self.directory = directory
        self.between = (first + 10, first + 10 + steps)
        self.running = False

    def due(self, step: int) -> bool:
        return step in self.between

    def toggle(self) -> None:
        if self.running:
            jax.profiler.stop_trace()
        else:
            jax.profiler.start_trace(self.directory)
        self.running = not self.running


class Clock:
    """Measures the speed between two logs, without the first step (it compiles) and pauses."""

    def __init__(self, flops: Callable[..., float] | None = None, num_devices: int = 1):
        self.flops, self.num_devices = flops, num_devices
        self.since: float | None = None  # the end of the last step before those that are counted
        self.last = 0.0  # the end of the last one of them
        self._zero()

    def _zero(self) -> None:
        self.steps = self.tokens = self.read = 0
        self.waited = 0.0

    def tick(self, tokens: int, read: int, done: float) -> None:
        """Count a step that ended at ``done``: its scored tokens and the positions read out."""
        self.last = done
        if self.since is None:
            self.since = done
            self._zero()
        else:
            self.steps += 1
            self.tokens += tokens
            self.read += read

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.since is not None:
            self.since += time.perf_counter() - start

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def speeds(self) -> dict[str, float]:
        """Tokens and steps a second of all devices; TFLOP/s of one; MFU where its peak is known."""
        if self.since is None or self.last <= self.since:
            return {}
        seconds = self.last - self.since
        speeds = {
            "tokens_per_second": self.tokens / seconds,
            "steps_per_second": self.steps / seconds,
            "waiting_for_data": self.waited / seconds,
        }
        if self.flops is not None:
            flops = self.flops(read=self.read / self.steps) * self.steps / seconds
            speeds["tflops_per_second"] = flops / self.num_devices / 1e12
            if (peak := peak_flops()) is not None:
                speeds["mfu"] = flops / self.num_devices / peak
        self.since = self.last
        self._zero()
        return speeds
