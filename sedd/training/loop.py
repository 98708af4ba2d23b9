"""The training loop: steps, and between them logging, validation, samples and checkpoints.

JAX dispatches a step and returns before the device has computed it. The loop dispatches up to
``IN_FLIGHT`` steps ahead, so that the device never waits for the host, and reads the loss of a step
only when the step leaves that queue. It therefore notices a diverged step a few steps late, but
before the next checkpoint, since the queue is emptied first.

A run that is stopped and resumed writes the same records as a run without a stop. Checkpoints
therefore store the open log window, the counts of skipped updates, and a record whose validation is
still to come.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from sedd.errors import FieldError, UserError
from sedd.training.checkpoint import Checkpoints
from sedd.training.metrics import Metrics, ProgressReport, plot_curves
from sedd.training.parallel import DataParallel, FullySharded
from sedd.training.signals import stop_requests
from sedd.training.state import TrainState, first_not_finite
from sedd.training.tally import Clock, InFlight, Profile, Skips, Window
from sedd.types import Params

IN_FLIGHT = 8  # steps that the host dispatches ahead of the devices
MAX_SKIPS = 100  # skipped updates in a row after which the run ends


class TrainingDiverged(UserError):  # noqa: N818
    """A loss, a gradient norm or a parameter is not finite; no checkpoint has such values."""


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """Periods of the loop's actions in steps; ``None`` disables.

    Enabled actions also run at the last step, and a checkpoint is always written there.

    Args:
        log_every: write a record of the means since the last one.
        eval_every: validate with the averaged parameters.
        sample_every: draw texts with the averaged parameters.
        checkpoint_every: write a checkpoint.

    Raises:
        FieldError: on a period below 1.
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
    """How a run ended."""

    state: TrainState
    """The state after the last update, on the devices."""
    step: int
    stopped: bool
    """Whether a signal ended the run before its last step. The next start resumes it."""
    validation: dict[str, Any] | None
    """The figures of the validation at ``step``; None if it was not validated."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that a training run needs, except for its state.

    ``train`` writes ``metrics.jsonl``, ``tensorboard/``, ``samples/``, ``curves.png`` and
    ``profile/`` into ``workdir``, and checkpoints by ``checkpoints``.
    """

    workdir: str | Path
    parallel: DataParallel | FullySharded
    """The training step on the devices."""
    batches: Any
    """An iterator over batches from the state's step on, with a method ``state()`` for checkpoints;
    see ``sedd.data.Batches``."""
    checkpoints: Checkpoints
    steps: int
    """The last step of the run."""
    cadence: Cadence = Cadence()
    learning_rate: Callable[[int], Any] | None = None
    """Given the number of updates so far (0, 1, …), returns the learning rate of the next update.
    It is used for the log."""
    validate: Callable[[Params], dict[str, Any]] | None = None
    """Maps averaged parameters to figures, which are logged as ``validation_NAME``. The figure
    ``nats_per_token`` is required: it decides about the best checkpoint."""
    sample: Callable[[Params], list[str]] | None = None
    """Maps averaged parameters to texts, which are written to ``samples/``."""
    unigram_nats: float | None = None
    """Cross entropy of the validation tokens under the frequencies of the training tokens, in nats
    per token; a dashed line in ``curves.png``."""
    unit: str = "nats per token"
    """The unit of loss and validation in ``curves.png``."""
    flops: Callable[..., float] | None = None
    """``flops(read=rows)`` gives the FLOPs of a step whose output layer runs at ``rows`` positions.
    """
    profile: int | None = None
    """The number of steps to record for a profiler's viewer; None for no recording."""
    wandb: dict[str, Any] | None = None
    """Arguments of ``wandb.init``; None if the run is not logged there."""


def train(run: Run, state: TrainState, *, pending: dict | None = None) -> TrainResult:
    """Run the updates ``state.step + 1 … run.steps``.

    SIGTERM and, in a run of one process, SIGINT end the run with a checkpoint after the current
    step; a second signal acts as it does by default. SIGTERM to one of several processes ends all
    of them. Signals are caught in the main thread only.

    In a run of one process, if ``batches``, ``validate`` or ``sample`` raises, a checkpoint of the
    last completed step is written and the exception is raised again. With several processes there
    is no checkpoint.

    Args:
        run: the parts of the run.
        state: the state to start from, placed on the devices by ``run.parallel``. Its arrays are
            donated to the first step and cannot be used afterwards.
        pending: the loop's state from the checkpoint of ``state``; None at the start of a run.

    Returns:
        The state after the last update, its step, and whether a signal ended the run early.

    Raises:
        TrainingDiverged: a loss, a gradient norm or a parameter is not finite. If the step skips
            such updates (``Step.skip_nonfinite``), only after ``MAX_SKIPS`` skipped updates in a
            row, or if a parameter is not finite at a checkpoint.
        UserError: if a file cannot be written.
    """
    step, pending = int(state.step), pending or {}
    with ExitStack() as closes:
        metrics = report = None
        if jax.process_index() == 0:
            report = closes.enter_context(closing(ProgressReport(start=step, steps=run.steps)))
            keep_last = pending.get("held") is None
            metrics = closes.enter_context(
                closing(Metrics(run.workdir, step=step, keep_last=keep_last, wandb=run.wandb))
            )
        loop = _Loop(
            run=run,
            metrics=metrics,
            report=report,
            window=Window(**pending.get("window", {})),
            skips=Skips(**pending.get("skips", {})),
            held=pending.get("held"),
            saved=step,
            clock=Clock(run.flops, run.parallel.num_devices),
            profile=_profile(run, step),
        )
        stop = closes.enter_context(stop_requests())  # until all is written
        try:
            state, step = loop.go(state, step, stop)
            run.checkpoints.wait()
        except BaseException:
            # Complete a checkpoint that is being written, but report the first error.
            with suppress(Exception):
                run.checkpoints.wait()
            raise
        if jax.process_index() == 0:
            plot_curves(run.workdir, unigram_nats=run.unigram_nats, unit=run.unit)
    return TrainResult(
        state=state, step=step, stopped=step < run.steps, validation=loop.validations.get(step)
    )


def _profile(run: Run, step: int) -> Profile | None:
    """The recording for a profiler's viewer that the run asks for."""
    if run.profile is None:
        return None
    return Profile(Path(run.workdir) / "profile", step, run.profile)


@dataclass(kw_only=True)
class _Loop:
    """The mutable part of a run: counts, dispatched steps, and a record that is not written yet.

    ``metrics`` and ``report`` are None in all processes but the first. ``held`` is the record of a
    step whose validation is still to come; it is written with the validation. ``saved`` is the
    newest step that has a checkpoint.
    """

    run: Run
    metrics: Metrics | None
    report: ProgressReport | None
    window: Window
    skips: Skips
    held: dict | None
    saved: int
    clock: Clock
    profile: Profile | None

    def __post_init__(self):
        self.in_flight: deque[InFlight] = deque()
        self.validations: dict[int, dict] = {}

    def go(self, state: TrainState, step: int, stop: Callable[[int], bool]):
        """Run until the last step, or until ``stop(step)`` is true; returns state and step."""
        run = self.run
        if self.held is not None:  # the run was stopped before it could validate this step
            self.evaluate(state, step)
        while step < run.steps:
            if self.profile is not None and self.profile.due(step):
                self.collect_all()
                self.profile.toggle()
            state, step = self.step(state, step)
            stopping = stop(step) and step < run.steps
            if self.validates(step) or self.samples(step):
                self.collect_all()
                if not stopping:
                    self.evaluate(state, step)
            if stopping or self.due(run.cadence.checkpoint_every, step):
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

    def step(self, state: TrainState, step: int) -> tuple[TrainState, int]:
        """Dispatch the next step, and collect the oldest one if the queue is full."""
        with self.kept(state, step), self.clock.waiting():
            batch = next(self.run.batches)
        step += 1
        if batch["step"] != step - 1:
            raise ValueError(f"the loader gave batch {batch['step']} for batch {step - 1}")
        if self.clock.since is None:
            self.doing("compiling the training step")
        state, metrics = self.run.parallel(state, batch)
        self.in_flight.append(InFlight(step, metrics))
        for flight in self.in_flight:
            flight.look()
        if len(self.in_flight) >= IN_FLIGHT:
            self.collect()
        return state, step

    def due(self, every: int | None, step: int) -> bool:
        """Whether an action of this period runs after the step; all run after the last one."""
        return step == self.run.steps or (every is not None and step % every == 0)

    def validates(self, step: int) -> bool:
        """Whether the run is validated after this step."""
        every = self.run.cadence.eval_every
        return self.run.validate is not None and every is not None and self.due(every, step)

    def samples(self, step: int) -> bool:
        """Whether texts are drawn after this step."""
        every = self.run.cadence.sample_every
        return self.run.sample is not None and every is not None and self.due(every, step)

    def collect_all(self) -> None:
        """Wait for all dispatched steps."""
        while self.in_flight:
            self.collect()

    def collect(self) -> None:
        """Wait for the metrics of the oldest dispatched step, count them, and log if it is due."""
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
        if self.due(self.run.cadence.log_every, step):
            record = self.window.close()
            if self.run.learning_rate is not None:
                updates = step - self.skips.total  # the schedule does not count skipped ones
                record["learning_rate"] = float(self.run.learning_rate(max(updates - 1, 0)))
            record |= self.clock.speeds()
        if self.validates(step) or self.samples(step):
            self.held = record or {}
        elif record is not None:
            self.write(step, record)

    def evaluate(self, state: TrainState, step: int) -> None:
        """Validate and sample with the averaged parameters, and write the held record."""
        record = dict(self.held or {})
        with self.kept(state, step), self.clock.paused():
            params = self.run.parallel.for_evaluation(state.averaged)
            if self.run.validate is not None and self.validates(step):
                self.doing("validating")
                self.validations[step] = self.run.validate(params)
                record |= {f"validation_{k}": v for k, v in self.validations[step].items()}
            if self.run.sample is not None and self.samples(step):
                self.doing("drawing samples")
                texts = self.run.sample(params)
                if self.metrics is not None:
                    self.metrics.write_samples(step, texts)
        self.held = None
        self.write(step, record)

    def doing(self, what: str) -> None:
        """Show the user what is being done."""
        if self.report is not None:
            self.report.doing(what)

    def write(self, step: int, record: dict) -> None:
        """Write and show a record, and raise if a checkpoint in the background has failed."""
        if self.metrics is not None:
            self.metrics.write(step, record)
        if self.report is not None:
            self.report.report(step, record)
        self.run.checkpoints.check()

    def save(self, state: TrainState, step: int) -> None:
        """Start to write a checkpoint; raises TrainingDiverged if a parameter is not finite."""
        if self.metrics is not None:
            self.metrics.check()  # if the directory is gone, do not make it anew with a part only
        if (wild := first_not_finite(state)) is not None:
            raise self.diverged(step, *wild)
        self.run.checkpoints.save(
            state,
            data=self.run.batches.state(),
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
        """If the block raises, write a checkpoint of this step, then re-raise.

        This happens only in a run of one process. Several processes must write a checkpoint
        together, and the others do not know of the failure.
        """
        try:
            yield
        except Exception:
            if step > self.saved and jax.process_count() == 1:
                with suppress(Exception):  # the first error is the one to report
                    self.collect_all()
                    self.save(state, step)
                    self.run.checkpoints.wait()
            raise

    def skip(self, step: int, name: str, value: float, *, skipped: bool) -> None:
        """Count a skipped update; raise TrainingDiverged if the bad update was applied.

        Args:
            step: the step of the update.
            name: the figure that is not finite.
            value: its value.
            skipped: whether the step left the parameters as they were (``skip_nonfinite``).
        """
        if not skipped:
            raise self.diverged(step, name, value)
        self.skips.total += 1
        self.skips.in_a_row += 1
        if self.skips.in_a_row == MAX_SKIPS:
            raise self.diverged(step, f"{MAX_SKIPS} updates in a row were skipped; {name}", value)
        if self.skips.in_a_row == 1 and self.report is not None:
            self.report.say(f"step {step}: {name} is {value}; its update is skipped")

    def diverged(self, step: int, name: str, value: float) -> TrainingDiverged:
        """Make the exception, which names the last undamaged checkpoint."""
        self.run.checkpoints.wait()
        good = self.run.checkpoints.latest_good(self.run.parallel.shardings)
        place = "no checkpoint was written before"
        if good is not None:
            place = f"the last good checkpoint is {self.run.checkpoints.path(good)}"
        return TrainingDiverged(f"training diverged at step {step}: {name} is {value}; {place}")
