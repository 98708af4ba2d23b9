"""What the training loop counts between two records: losses, skipped updates, time, profiles."""

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
    """Sums of loss, gradient norm and tokens since the last record.

    A checkpoint stores them, so that a resumed run records the same means as a run without a stop.
    """

    steps: int = 0
    loss: float = 0.0
    grad_norm: float = 0.0
    tokens: int = 0
    skipped: int = 0

    def add(self, loss: float, grad_norm: float, tokens: int) -> None:
        """Count a step: its loss in nats per token, its gradient norm, its scored tokens."""
        self.steps += 1
        self.loss += loss
        self.grad_norm += grad_norm
        self.tokens += tokens

    def skip(self, tokens: int) -> None:
        """Count a step whose update was skipped; it has no part in the means."""
        self.skipped += 1
        self.tokens += tokens

    def close(self) -> dict[str, Any]:
        """Return a record of the window, and start an empty window.

        ``loss`` and ``grad_norm`` are means over the steps that were not skipped; they are absent
        if all were skipped. ``tokens`` is the sum over all steps. ``skipped`` is the number of
        skipped steps, absent if it is 0.
        """
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
    """Skipped updates: all since the run began, and those in a row up to the last step."""

    total: int = 0
    in_a_row: int = 0


@dataclass
class InFlight:
    """A dispatched step, and the time at which the host first saw that it was complete."""

    step: int
    metrics: dict[str, Any]
    done: float | None = None

    def look(self) -> None:
        """Note the time if the step is complete by now; does not wait."""
        if self.done is None and self.metrics["loss"].is_ready():
            self.done = time.perf_counter()


class Profile:
    """Records some steps for a profiler's viewer.

    The recording starts ten steps after the start of the run, since the first steps are not
    typical: they compile, and find the devices idle.

    Args:
        directory: where the recording is written.
        first: the step that the run starts from.
        steps: how many steps are recorded.
    """

    def __init__(self, directory: Path, first: int, steps: int):
        self.directory = directory
        self.between = (first + 10, first + 10 + steps)
        self.running = False

    def due(self, step: int) -> bool:
        """Whether the recording starts or ends before the next step."""
        return step in self.between

    def toggle(self) -> None:
        """Start the recording, or end it and write its files."""
        if self.running:
            jax.profiler.stop_trace()
        else:
            jax.profiler.start_trace(self.directory)
        self.running = not self.running


class Clock:
    """Measures the speed between two records, without pauses and without the first step.

    The first step is left out because it compiles.

    Args:
        flops: ``flops(read=rows)``, the FLOPs of a step whose output layer runs at ``rows``
            positions; None if they are not known.
        num_devices: the devices of the run.
    """

    def __init__(self, flops: Callable[..., float] | None = None, num_devices: int = 1):
        self.flops, self.num_devices = flops, num_devices
        self.since: float | None = None  # when the counted steps began
        self.last = 0.0  # when the last one of them ended
        self._zero()

    def _zero(self) -> None:
        self.steps = self.tokens = self.read = 0
        self.waited = 0.0

    def tick(self, tokens: int, read: int, done: float) -> None:
        """Count a step.

        Args:
            tokens: its scored tokens.
            read: positions at which its output layer ran.
            done: when it ended, by ``time.perf_counter``.
        """
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
        """Leave out the time of the block, such as a validation."""
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
        """Return the speeds since the last call, and start to count anew.

        The result is empty if no step was counted. ``tokens_per_second`` and ``steps_per_second``
        are of all devices. ``waiting_for_data`` is the share of the time spent waiting for data.
        ``tflops_per_second`` is of one device, present if the FLOPs are known. ``mfu`` is in
        [0, 1], present if the device's peak is known too.
        """
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
