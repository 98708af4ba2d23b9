"""The training loop: steps, and between them logging, validation, samples and checkpoints."""

import math
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sedd.errors import FieldError, UserError
from sedd.training.checkpoint import Checkpoints
from sedd.training.flops import peak_flops
from sedd.training.metrics import Metrics, ProgressReport, plot_curves
from sedd.training.parallel import DataParallel, FullySharded
from sedd.training.state import TrainState, to_host
from sedd.types import Params

IN_FLIGHT = 8  # steps that the host runs ahead of the devices
MAX_SKIPS = 100  # updates left out in a row, after which nothing can be hoped for


class TrainingDiverged(UserError):  # noqa: N818
    """A loss, a gradient norm or a parameter is not finite; nothing of it has been saved."""


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """Every how many steps; None is never. A checkpoint ends a run, and what is not never does too.

    Raises FieldError on a number below 1.
    """

    log_every: int = 100
    eval_every: int | None = 1000
    sample_every: int | None = None
    checkpoint_every: int | None = 1000

    def __post_init__(self):
        for name in ("log_every", "eval_every", "sample_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FieldError(name, f"must be at least 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended; ``state`` is replicated over the devices."""

    state: TrainState
    step: int
    stopped: bool  # by a signal, before the last step; starting again goes on
    validation: dict[str, Any] | None  # of the last step, if it was validated


def train(
    *,
    workdir: str | Path,
    state: TrainState,
    parallel: DataParallel | FullySharded,
    batches: Any,
    checkpoints: Checkpoints,
    steps: int,
    cadence: Cadence,
    pending: dict | None = None,
    learning_rate: Callable[[int], Any] | None = None,
    validate: Callable[[Params], dict[str, Any]] | None = None,
    sample: Callable[[Params], list[str]] | None = None,
    unigram_entropy: float | None = None,
    flops: Callable[..., float] | None = None,
    profile: int | None = None,
    wandb: dict[str, Any] | None = None,
) -> TrainResult:
    """Run updates ``state.step + 1 … steps``.

    ``state`` is placed by ``parallel``. It and ``pending`` are a checkpoint's when resuming, and
    ``batches`` must be at its step.
    ``learning_rate`` is the schedule, to be logged. ``validate`` and ``sample`` get the averaged
    parameters as ``parallel.for_evaluation`` has them; ``validate`` returns at least
    ``nats_per_token``, and is logged under ``validation_…``. ``flops(read=…)`` are those of a step
    that reads out so many positions. ``profile`` steps after the first ones are recorded for a
    profiler's viewer. In ``workdir``: ``metrics.jsonl``, ``tensorboard/``, ``samples/``,
    ``curves.png``, ``profile/``.

    SIGTERM and SIGINT end the run after the step under way, with a checkpoint of it; so does the
    preemption of one of several processes. A second signal acts as usual. Raises TrainingDiverged,
    and UserError where something cannot be written. What ``batches``, ``validate`` or ``sample``
    raise ends the run too, with a checkpoint of what was learned before.
    """
    step = int(state.step)
    pending = pending or {}
    with ExitStack() as closes:
        metrics = report = None
        if jax.process_index() == 0:
            report = closes.enter_context(closing(ProgressReport(start=step, steps=steps)))
            keep_last = pending.get("held") is None
            metrics = closes.enter_context(
                closing(Metrics(workdir, step=step, keep_last=keep_last, wandb=wandb))
            )
        run = _Run(
            metrics=metrics,
            report=report,
            parallel=parallel,
            batches=batches,
            checkpoints=checkpoints,
            steps=steps,
            cadence=cadence,
            learning_rate=learning_rate,
            validate=validate,
            sample=sample,
            window=_Window(**pending.get("window", {})),
            skips=_Skips(**pending.get("skips", {})),
            held=pending.get("held"),
            saved=step,
            clock=_Clock(flops, parallel.num_devices),
            profile=None if profile is None else _Profile(Path(workdir) / "profile", step, profile),
        )
        stop = closes.enter_context(stop_requests())  # until all is written
        try:
            state, step = run.go(state, step, stop)
            checkpoints.wait()
        except BaseException:
            # What is being written is still to be completed, and one error is enough.
            with suppress(Exception):
                checkpoints.wait()
            raise
        if jax.process_index() == 0:
            plot_curves(workdir, unigram_entropy=unigram_entropy)
    return TrainResult(
        state=state, step=step, stopped=step < steps, validation=run.validations.get(step)
    )


@contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Yields ``stop(step) -> bool``: whether SIGTERM or SIGINT has come.

    The second signal acts as it does in any program. With several processes the signal is the
    coordinator's to see, so that all stop after the same step. Outside the main thread, where no
    handler can be set, it is never true.
    """
    if jax.process_count() > 1:
        with _handlers({signal.SIGINT: USUAL[signal.SIGINT]}):
            yield multihost_utils.reached_preemption_sync_point
        return
    requested = threading.Event()

    def request(number, frame):
        requested.set()
        for number, handler in USUAL.items():
            signal.signal(number, handler)

    with _handlers(dict.fromkeys(USUAL, request)):
        yield lambda step: requested.is_set()


@contextmanager
def leave_on_signals() -> Iterator[None]:
    """SIGTERM and SIGINT end the program with exit code 0; for what comes before ``train``.

    What is half-written by then is removed on the way out. ``train`` has handlers of its own.
    """

    def leave(number, frame):
        print("stopped before the first step; start again to go on", flush=True)
        sys.exit(0)

    with _handlers(dict.fromkeys(USUAL, leave)):
        yield


USUAL = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}


@contextmanager
def _handlers(handlers: dict[signal.Signals, Any]) -> Iterator[None]:
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, new) for number, new in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None is one that was not set from Python
                signal.signal(number, handler)


@dataclass(kw_only=True)
class _Run:
    metrics: Metrics | None
    report: ProgressReport | None
    parallel: DataParallel | FullySharded
    batches: Any
    checkpoints: Checkpoints
    steps: int
    cadence: Cadence
    learning_rate: Callable[[int], Any] | None
    validate: Callable[[Params], dict[str, Any]] | None
    sample: Callable[[Params], list[str]] | None
    window: "_Window"
    skips: "_Skips"
    held: dict | None  # the record of a step that is still to be validated
    saved: int  # the last step that was
    clock: "_Clock"
    profile: "_Profile | None"

    def __post_init__(self):
        self.in_flight: deque[_InFlight] = deque()
        self.validations: dict[int, dict] = {}

    def go(self, state: TrainState, step: int, stop: Callable[[int], bool]):
        """Steps until the last one or a stop; returns the state and its step."""
        if self.held is not None:  # the run was stopped before it could validate this step
            self.evaluate(state, step)
        while step < self.steps:
            if self.profile is not None and self.profile.due(step):
                self.collect_all()
                self.profile.toggle()
            with self.kept(state, step), self.clock.waiting():
                batch = next(self.batches)
            step += 1
            if batch["step"] != step - 1:
                raise ValueError(f"the loader gave batch {batch['step']} for batch {step - 1}")
            state, metrics = self.parallel(state, batch)
            self.in_flight.append(_InFlight(step, metrics))
            for flight in self.in_flight:
                flight.look()
            if len(self.in_flight) >= IN_FLIGHT:
                self.collect()
            stopping = stop(step) and step < self.steps
            if self.validates(step) or self.samples(step):
                self.collect_all()
                if not stopping:
                    self.evaluate(state, step)
            if stopping or self.due(self.cadence.checkpoint_every, step):
                self.collect_all()
                with self.clock.paused():
                    self.save(state, step)
            if stopping:
                if self.report is not None:
                    self.report.say(f"stopped after step {step}; start again to go on")
                break
        if self.profile is not None and self.profile.running:
            self.collect_all()
            self.profile.toggle()
        return state, step

    def due(self, every: int | None, step: int) -> bool:
        return step == self.steps or (every is not None and step % every == 0)

    def validates(self, step: int) -> bool:
        every = self.cadence.eval_every
        return self.validate is not None and every is not None and self.due(every, step)

    def samples(self, step: int) -> bool:
        every = self.cadence.sample_every
        return self.sample is not None and every is not None and self.due(every, step)

    def collect_all(self) -> None:
        while self.in_flight:
            self.collect()

    def collect(self) -> None:
        """Look at the oldest step's metrics, which waits for them, and log where it is due."""
        flight = self.in_flight.popleft()
        step, metrics = flight.step, flight.metrics
        loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
        tokens = int(metrics["tokens"])
        figures = (("loss", loss), ("gradient norm", grad_norm))
        wild = next(((name, x) for name, x in figures if not math.isfinite(x)), None)
        if wild is None:
            self.skips.in_a_row = 0
            self.window.add(loss, grad_norm, tokens)
        else:
            self.skip(step, *wild, skipped=bool(metrics.get("skipped", False)))
            self.window.skip(tokens)
        self.clock.tick(tokens, int(metrics["read"]), flight.done or time.perf_counter())
        if self.report is not None:
            self.report.advance(step)
        record = None
        if self.due(self.cadence.log_every, step):
            record = self.window.close()
            if self.learning_rate is not None:
                updates = step - self.skips.total  # the schedule counts these
                record["learning_rate"] = float(self.learning_rate(max(updates - 1, 0)))
            record |= self.clock.speeds()
        if self.validates(step) or self.samples(step):
            self.held = record or {}
        elif record is not None:
            self.write(step, record)

    def evaluate(self, state: TrainState, step: int) -> None:
        """Validate and sample with the averaged parameters, and write the held record with it."""
        record = dict(self.held or {})
        with self.kept(state, step), self.clock.paused():
            params = self.parallel.for_evaluation(state.ema_params)
            if self.validate is not None and self.validates(step):
                self.validations[step] = self.validate(params)
                record |= {f"validation_{k}": v for k, v in self.validations[step].items()}
            if self.sample is not None and self.samples(step):
                texts = self.sample(params)
                if self.metrics is not None:
                    self.metrics.write_samples(step, texts)
        self.held = None
        self.write(step, record)

    def write(self, step: int, record: dict) -> None:
        if self.metrics is not None:
            self.metrics.write(step, record)
        if self.report is not None:
            self.report.report(step, record)
        self.checkpoints.check()

    def save(self, state: TrainState, step: int) -> None:
        if self.metrics is not None:
            self.metrics.check()  # a directory that is gone would be made again, without the rest
        host = to_host(state)
        for path, array in jax.tree_util.tree_flatten_with_path(host)[0]:
            if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise self.diverged(step, name, float(array[~np.isfinite(array)].flat[0]))
        self.checkpoints.save(
            host,
            data=self.batches.state(),
            pending={
                "window": dict(vars(self.window)),
                "skips": dict(vars(self.skips)),
                "held": self.held,
            },
            metric=self.validations.get(step, {}).get("nats_per_token"),
        )
        self.saved = step

    @contextmanager
    def kept(self, state: TrainState, step: int) -> Iterator[None]:
        """What has been learned outlives the failure of anything but the step itself.

        A single process can save alone; of several the others know nothing of the failure.
        """
        try:
            yield
        except Exception:
            if step > self.saved and jax.process_count() == 1:
                with suppress(Exception):  # the first error is the one to report
                    self.collect_all()
                    self.save(state, step)
                    self.checkpoints.wait()
            raise

    def skip(self, step: int, name: str, value: float, *, skipped: bool) -> None:
        """Count an update that was left out; raises TrainingDiverged where it was not."""
        if not skipped:
            raise self.diverged(step, name, value)
        self.skips.total += 1
        self.skips.in_a_row += 1
        if self.skips.in_a_row == MAX_SKIPS:
            raise self.diverged(step, f"{MAX_SKIPS} updates in a row were skipped; {name}", value)
        if self.skips.in_a_row == 1 and self.report is not None:
            self.report.say(f"step {step}: {name} is {value}; its update is skipped")

    def diverged(self, step: int, name: str, value: float) -> TrainingDiverged:
        self.checkpoints.wait()
        good = self.checkpoints.latest_good()
        place = "no checkpoint was written before"
        if good is not None:
            place = f"the last good checkpoint is {self.checkpoints.path(good)}"
        return TrainingDiverged(f"training diverged at step {step}: {name} is {value}; {place}")


@dataclass
class _InFlight:
    """A step that was dispatched; ``done`` is when it was first seen to be over."""

    step: int
    metrics: dict[str, Any]
    done: float | None = None

    def look(self) -> None:
        if self.done is None and self.metrics["loss"].is_ready():
            self.done = time.perf_counter()


@dataclass
class _Window:
    """Sums since the last log; a checkpoint carries them, so that a resume changes no mean."""

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
class _Skips:
    """Updates that were left out since the run began, and without one between them."""

    total: int = 0
    in_a_row: int = 0


class _Profile:
    """A recording of ``steps`` steps, from the tenth on after the start at ``first``.

    The first one compiles, and those after it find the devices idle.
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


class _Clock:
    """Speed between two logs; the first step, which compiles, and pauses do not count."""

    def __init__(self, flops: Callable[..., float] | None = None, num_devices: int = 1):
        self.flops, self.num_devices = flops, num_devices
        self.since: float | None = None  # the end of the last step before those that are counted
        self.last = 0.0  # the end of the last one of them
        self._zero()

    def _zero(self) -> None:
        self.steps = self.tokens = self.read = 0
        self.waited = 0.0

    def tick(self, tokens: int, read: int, done: float) -> None:
        """A step over at ``done``: its scored tokens, and how many positions were read out."""
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
        """For data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def speeds(self) -> dict[str, float]:
        """Of all devices together, but FLOPs, which are one's; ``mfu`` where its peak is known."""
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
