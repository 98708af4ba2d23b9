"""The loop: a run that is stopped and goes on is the run that was not; and how runs end badly."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_toy
from tiers import nightly
from training_toy import ADAMW, Toy, ToyBatches, fake_validation, records, run, to_host

from sedd.errors import UserError
from sedd.objectives.t_dce import TDCE
from sedd.training.checkpoint import Checkpoints
from sedd.training.loop import Cadence, TrainingDiverged, stop_requests
from sedd.training.metrics import read_metrics
from sedd.training.optimizer import OptimizerOptions

STEPS = 60


class StopsAt(ToyBatches):
    """Sends the process a signal while a step is under way."""

    def __init__(self, step, number=signal.SIGTERM):
        super().__init__()
        self.step, self.number = step, number

    def __next__(self):
        if self.next_step + 1 == self.step:
            signal.raise_signal(self.number)
        return super().__next__()


def bits(state):
    return [x.tobytes() for x in jax.tree.leaves(to_host(state))]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run(workdir, STEPS, validate=fake_validation)


def test_what_a_run_leaves(uninterrupted):
    workdir, result = uninterrupted
    assert (result.step, result.stopped) == (STEPS, False)
    assert result.validation == fake_validation(result.state.ema_params)
    assert Checkpoints(workdir / "checkpoints").steps() == [25, 50, 60]
    lines = read_metrics(workdir)
    steps = [line["step"] for line in lines]
    assert steps == sorted({*range(7, 61, 7), 20, 40, 60})
    assert {"loss", "grad_norm", "tokens", "learning_rate"} < lines[0].keys()
    assert "loss" not in next(line for line in lines if line["step"] == 40)
    assert {"loss", "validation_nats_per_token", "validation_standard_error"} < lines[-1].keys()
    np.testing.assert_allclose(lines[0]["learning_rate"], ADAMW.learning_rate * 0.7, rtol=1e-6)
    assert (workdir / "curves.png").stat().st_size > 10_000
    assert list((workdir / "tensorboard").iterdir())


def test_the_logged_loss_is_the_mean_of_the_window(uninterrupted):
    workdir, _ = uninterrupted
    seen, _ = training_toy.history(14, ADAMW, steps=STEPS)
    by_step = {line["step"]: line for line in read_metrics(workdir)}
    np.testing.assert_allclose(by_step[14]["loss"], seen["loss"][7:14].mean(), rtol=1e-6)
    assert by_step[14]["tokens"] == seen["tokens"][7:14].sum()


# 31: anywhere; 40: a step that is validated, but not before the stop; 21: between a validation and
# a log; 25: a checkpoint is due anyway.
@pytest.mark.parametrize(
    ("stop_at", "number"),
    [
        (31, signal.SIGTERM),
        nightly(40, signal.SIGINT),
        nightly(21, signal.SIGTERM),
        nightly(25, signal.SIGTERM),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, capsys, uninterrupted, stop_at, number):
    whole, expected = uninterrupted
    handler = signal.getsignal(number)
    first = run(tmp_path, STEPS, batches=StopsAt(stop_at, number), validate=fake_validation)
    assert (first.step, first.stopped) == (stop_at, True)
    assert signal.getsignal(number) is handler
    assert f"stopped after step {stop_at}" in capsys.readouterr().out
    assert Checkpoints(tmp_path / "checkpoints").latest_good() == stop_at

    second = run(tmp_path, STEPS, validate=fake_validation)
    assert records(tmp_path) == records(whole)
    assert bits(second.state) == bits(expected.state)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, uninterrupted):
    """Killed some steps after its last checkpoint, with half a line written."""
    whole, expected = uninterrupted

    class Dies(ToyBatches):
        def __next__(self):
            if self.next_step == 47:
                raise KeyboardInterrupt
            return super().__next__()

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, STEPS, batches=Dies(), validate=fake_validation)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 49, "lo')
    result = run(tmp_path, STEPS, validate=fake_validation)
    assert records(tmp_path) == records(whole)
    assert bits(result.state) == bits(expected.state)


def test_a_signal_during_the_last_save_does_not_end_it(tmp_path, monkeypatch, uninterrupted):
    wait = Checkpoints.wait

    def signalled(self):
        if 60 not in self.steps() and self._saving is not None and (tmp_path / "last").exists():
            (tmp_path / "last").unlink()
            signal.raise_signal(signal.SIGTERM)
        wait(self)

    class Last(ToyBatches):
        def __next__(self):
            if self.next_step == STEPS - 1:
                checkpoints_of_before = Checkpoints(tmp_path / "checkpoints")
                while 50 not in checkpoints_of_before.steps():
                    time.sleep(0.01)
                (tmp_path / "last").touch()
            return super().__next__()

    monkeypatch.setattr(Checkpoints, "wait", signalled)
    result = run(tmp_path, STEPS, batches=Last(), validate=fake_validation)
    assert not (tmp_path / "last").exists()
    assert not result.stopped
    assert Checkpoints(tmp_path / "checkpoints").latest_good() == STEPS
    assert records(tmp_path) == records(uninterrupted[0])


def test_what_was_learned_outlives_data_that_cannot_be_read(tmp_path, uninterrupted):
    class Vanishes(ToyBatches):
        def __next__(self):
            if self.next_step == 33:
                raise UserError("the data are gone")
            return super().__next__()

    with pytest.raises(UserError, match="the data are gone"):
        run(tmp_path, STEPS, batches=Vanishes(), validate=fake_validation)
    assert Checkpoints(tmp_path / "checkpoints").latest_good() == 33
    result = run(tmp_path, STEPS, validate=fake_validation)
    assert records(tmp_path) == records(uninterrupted[0])
    assert bits(result.state) == bits(uninterrupted[1].state)


def test_what_was_learned_outlives_a_failed_validation(tmp_path, uninterrupted):
    def fails(params):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path, STEPS, validate=fails)
    assert Checkpoints(tmp_path / "checkpoints").latest_good() == 20
    result = run(tmp_path, STEPS, validate=fake_validation)
    assert records(tmp_path) == records(uninterrupted[0])
    assert bits(result.state) == bits(uninterrupted[1].state)


# 25: a checkpoint is being written, and may make its folders again; 30: none is.
@pytest.mark.parametrize("at", [25, 30])
def test_a_directory_that_vanishes_ends_the_run(tmp_path, at):
    workdir = tmp_path / "run"
    checkpoints = Checkpoints(workdir / "checkpoints")

    class Removes(ToyBatches):
        def __next__(self):
            if self.next_step == at:
                while at == 30 and checkpoints.steps() != [25]:
                    time.sleep(0.01)
                workdir.rename(tmp_path / "elsewhere")
            return super().__next__()

    with pytest.raises(UserError, match=f"cannot write .*{workdir}.*: No such file or directory"):
        run(workdir, STEPS, batches=Removes(), validate=fake_validation)
    assert not (workdir / "metrics.jsonl").exists()
    assert at == 25 or not workdir.exists()
    assert Checkpoints(tmp_path / "elsewhere" / "checkpoints").latest_good() in (None, 25)


class Poisoned(TDCE):
    """Batches of nothing but zeros have an infinite loss."""

    def corrupt(self, keys_B, u_B, x0_BL, scored_BL):
        corrupted = super().corrupt(keys_B, u_B, x0_BL, scored_BL)
        poison_BL = (x0_BL == 0).all() & (corrupted.weight_BL > 0)
        return replace(corrupted, weight_BL=jnp.where(poison_BL, jnp.inf, corrupted.weight_BL))


def poisoned():
    return Poisoned(**vars(training_toy.objective()))


class Poison(StopsAt):
    def __init__(self, poisoned_steps, stop_at=0):
        super().__init__(stop_at)
        self.poisoned_steps = poisoned_steps

    def __next__(self):
        batch = super().__next__()
        if batch["step"] + 1 in self.poisoned_steps:
            batch["x0"] = np.zeros_like(batch["x0"])
        return batch


def test_a_step_that_is_not_finite_can_be_skipped(tmp_path, capsys):
    def go(name, batches):
        return run(
            *(tmp_path / name, 21),
            batches=batches,
            objective=poisoned,
            skip_nonfinite=True,
            cadence=Cadence(log_every=7, eval_every=None, checkpoint_every=3),
            keep=100,
        )

    steps = {5, 6, *range(8, 15), 20}
    whole = go("whole", Poison(steps))
    said = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert said == [f"step {n}: loss is inf; its update is skipped" for n in (5, 8, 20)]
    lines = read_metrics(tmp_path / "whole")
    assert [line.get("skipped") for line in lines] == [2, 7, 1]
    assert "loss" not in lines[1]
    assert all(np.isfinite(lines[n]["loss"]) and lines[n]["tokens"] for n in (0, 2))
    # The optimizer has made 21 - 10 updates, and its warm-up is that far.
    assert lines[2]["learning_rate"] == pytest.approx(ADAMW.learning_rate)
    assert lines[0]["learning_rate"] == pytest.approx(ADAMW.learning_rate * 0.5)
    checkpoints = Checkpoints(tmp_path / "whole" / "checkpoints")
    for ema in (True, False):  # from step 7 on none is applied until 15
        a, b, c = (checkpoints.restore_params(step, ema=ema) for step in (9, 12, 15))
        assert jax.tree.all(jax.tree.map(np.array_equal, a, b))
        assert not jax.tree.all(jax.tree.map(np.array_equal, b, c))

    assert go("halves", Poison(steps, stop_at=10)).stopped
    second = go("halves", Poison(steps))
    assert records(tmp_path / "halves") == records(tmp_path / "whole")
    assert bits(second.state) == bits(whole.state)


def test_too_many_skips_in_a_row_end_the_run(tmp_path):
    with pytest.raises(TrainingDiverged, match=r"at step 103: 100 updates in a row were skipped"):
        run(
            *(tmp_path, 300),
            batches=Poison(range(4, 300)),
            objective=poisoned,
            skip_nonfinite=True,
            cadence=Cadence(log_every=7, eval_every=None, checkpoint_every=None),
        )


@pytest.mark.nightly
def test_a_run_goes_on_with_another_number_of_devices(tmp_path, uninterrupted):
    whole, _ = uninterrupted
    run(tmp_path, STEPS, batches=StopsAt(30), validate=fake_validation)
    run(tmp_path, STEPS, devices=2, validate=fake_validation)
    for ours, theirs in zip(read_metrics(tmp_path), read_metrics(whole), strict=True):
        assert ours["step"] == theirs["step"]
        np.testing.assert_allclose(ours.get("loss", 0), theirs.get("loss", 0), rtol=1e-4)


def test_a_finished_run_is_left_as_it_is(tmp_path):
    run(tmp_path, 5, validate=fake_validation)
    before = (tmp_path / "metrics.jsonl").read_text()
    result = run(tmp_path, 5, validate=fake_validation)
    assert (result.step, result.stopped, result.validation) == (5, False, None)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_samples_are_written(tmp_path):
    run(tmp_path, 5, cadence=Cadence(sample_every=3), sample=lambda params: ["α one", "two"])
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        "00000003.txt",
        "00000005.txt",
    ]
    assert "α one" in (tmp_path / "samples" / "00000003.txt").read_text()


@pytest.mark.parametrize("every", [nightly(1), 1000])
def test_divergence_saves_nothing_and_names_step_and_checkpoint(tmp_path, every):
    workdir = tmp_path / "run"
    run(workdir, 10)
    files = {p: p.read_bytes() for p in (workdir / "checkpoints").rglob("*") if p.is_file()}
    huge = OptimizerOptions(learning_rate=3e38, warmup_steps=0)
    with pytest.raises(TrainingDiverged) as caught:
        run(workdir, 40, huge, cadence=Cadence(checkpoint_every=every), keep=100)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("training diverged at step ")
    assert " is nan" in message or " is inf" in message
    last = Checkpoints(workdir / "checkpoints").latest_good()
    assert message.endswith(f"the last good checkpoint is {workdir / 'checkpoints' / str(last)}")
    params = Checkpoints(workdir / "checkpoints").restore_params(ema=False)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
    if every == 1000:
        assert last == 10
        assert all(p.read_bytes() == content for p, content in files.items())


def test_divergence_before_any_checkpoint(tmp_path):
    huge = OptimizerOptions(name="sgd", learning_rate=3e38, warmup_steps=0, clip_norm=None)
    with pytest.raises(TrainingDiverged, match="no checkpoint was written before"):
        run(tmp_path, 40, huge)


def test_a_loader_at_another_step_is_refused(tmp_path):
    class Ahead(ToyBatches):
        def __next__(self):
            batch = super().__next__()
            return batch | {"step": batch["step"] + 1}

    with pytest.raises(ValueError, match="the loader gave batch 1 for batch 0"):
        run(tmp_path, 5, batches=Ahead())


def test_the_host_stays_close_to_the_devices(monkeypatch, tmp_path):
    waiting = []
    collect = training_toy.train.__globals__["_Loop"].collect

    def counting(self):
        waiting.append(len(self.in_flight))
        collect(self)

    monkeypatch.setattr(training_toy.train.__globals__["_Loop"], "collect", counting)
    run(tmp_path, 30)
    assert max(waiting) == 8


def test_a_step_ends_when_it_is_over_and_not_when_it_is_looked_at():
    """Where the host waits for each dispatch, the last steps are collected all at once."""
    names = training_toy.train.__globals__
    clock = names["Clock"]()
    for done in (10.0, 12.0, 14.0):
        clock.tick(100, 100, done)
    assert clock.speeds()["tokens_per_second"] == 50
    assert clock.speeds() == {}  # nothing since
    clock.tick(100, 100, 15.0)
    assert clock.speeds()["steps_per_second"] == 1

    class Loss:
        ready = False

        def is_ready(self):
            return self.ready

    flight = names["InFlight"](3, {"loss": Loss()})
    flight.look()
    assert flight.done is None
    flight.metrics["loss"].ready = True
    flight.look()
    first = flight.done
    flight.look()
    assert flight.done == first is not None


def test_signals_outside_the_main_thread_are_not_handled():
    seen = []

    def body():
        with stop_requests() as stop:
            seen.append(stop(1))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [False]


def test_a_second_signal_acts_as_usual():
    with pytest.raises(KeyboardInterrupt), stop_requests() as stop:  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        assert stop(1)
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("name", ["log_every", "eval_every", "sample_every", "checkpoint_every"])
def test_a_cadence_below_one_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Cadence(**{name: 0})


def start(*arguments, **environment):
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, Path(training_toy.__file__), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"} | environment,
    )


@pytest.mark.nightly
def test_sigterm_ends_the_command_with_a_checkpoint(tmp_path):
    process = start(tmp_path, 10**7)
    deadline = time.monotonic() + 120
    while not (tmp_path / "metrics.jsonl").exists() or not records(tmp_path):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    told = "note: stopping after the current step; send the signal (Ctrl-C) again to stop at once"
    assert err == f"\n{told}\n"
    step = int(out.rpartition("stopped after step ")[2].split(";")[0])
    assert Checkpoints(tmp_path / "checkpoints").latest_good() == step


@pytest.mark.nightly
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    """The limit on the size of a file stands for a full disk: it refuses writes in the same way."""
    # The limit would cut the files of the compilation cache, too.
    process = start(tmp_path, STEPS, 10_000, JAX_ENABLE_COMPILATION_CACHE="0")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    directory = tmp_path / "checkpoints"
    assert err == (
        f"error: cannot write a checkpoint to {directory}: File too large, make room and start "
        f"again; the last complete checkpoint is {directory / '25'}\n"
    )
    assert Checkpoints(tmp_path / "checkpoints").latest_good() == 25
    assert [line["step"] for line in read_metrics(tmp_path)][:4] == [7, 14, 20, 21]
    # With room again:
    result = run(tmp_path, STEPS, validate=fake_validation, network=Toy(width=64))
    assert result.step == STEPS
