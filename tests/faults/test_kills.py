"""A run that is killed, stopped and damaged at random, again and again, is the run that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from faults.campaign import KILLS, SIGNALS, chance
from tiny_run import ROOT, TINY, text

from sedd.training.checkpoint import Checkpoints
from sedd.training.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.nightly]  # test_loop has one kill and one signal

SCRIPT = Path(__file__).with_name("train_in_parts.py")
EVERY = 2  # steps between checkpoints: most moments are near one that is being written
STEPS = 20 * max(2, KILLS + SIGNALS)
FLAGS = [
    *TINY,
    *("--network.dropout", "0.1", "--optimizer.learning-rate", "1e-2"),
    *("--optimizer.warmup-steps", "2", "--training.steps", STEPS, "--training.log-every", "7"),
    *("--training.eval-every", "20", "--training.sample-every", "None"),
    *("--training.checkpoint-every", EVERY, "--evaluation.max-sequences", "8"),
    *("--training.parallel", "fsdp"),
    *("--evaluation.batch-size", "8", "--evaluation.draws", "4", "--sampler.steps", "2"),
]
SPEEDS = (
    "tokens_per_second",
    "steps_per_second",
    "waiting_for_data",
    "tflops_per_second",
)


@dataclass(kw_only=True)
class Run:
    """``train.py`` in a process of its own with two devices, in ``place/name``."""

    place: Path
    name: str
    start_seconds: float = 0.0  # that a start took lately until its first checkpoint

    def __post_init__(self):
        self.workdir = self.place / self.name
        self.checkpoints = Checkpoints(self.workdir / "checkpoints")

    def start(self) -> subprocess.Popen:
        command = [sys.executable, SCRIPT, *FLAGS, "--data.corpus", self.place / "text.txt"]
        return subprocess.Popen(
            [str(part) for part in [*command, "--workdir", self.workdir]],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "JAX_NUM_CPU_DEVICES": "2",
                "PYTHONPATH": str(ROOT),
                "SEDD_CACHE": str(self.place / f"{self.name}-cache"),
                # A kill may leave a part of a program, which is not to stay for other tests.
                "JAX_COMPILATION_CACHE_DIR": str(self.place / "programs"),
            },
        )

    def wait_for_checkpoint(self, process) -> None:
        """The first of a process that has just been started."""
        began, before = time.monotonic(), self.newest()
        until(process, lambda: self.newest() > before)
        self.start_seconds = time.monotonic() - began

    def records(self):
        lines = read_metrics(self.workdir)
        return [{k: v for k, v in line.items() if k not in SPEEDS} for line in lines]

    def saving(self) -> bool:
        directory = self.checkpoints.directory
        return directory.is_dir() and any("tmp" in path.name for path in directory.iterdir())

    def newest(self) -> int:
        return max(self.checkpoints.steps(), default=-1)

    def description(self) -> dict:
        """Of the newest checkpoint: where the data stand, and every array's checksum."""
        path = self.checkpoints.path(self.newest())
        metadata = json.loads((path / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
        sums = json.loads((path / "checksums" / "process_0.json").read_text())["sums"]
        assert sums.keys() == metadata["sedd"]["arrays"].keys()
        assert any(len(shards) == 2 for shards in sums.values())
        return metadata["sedd"] | {"sums": sums}


def until(process, happened, seconds=600.0):
    """Wait, at most until the process ends."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and not happened():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def wait_for_moment(kind: str, draw: random.Random, run: Run, process: subprocess.Popen) -> None:
    """Until a random moment of the start, of a save or of the steps."""
    if kind == "start":
        time.sleep(draw.uniform(0.05, 1) * run.start_seconds)
        return
    run.wait_for_checkpoint(process)
    if kind == "save":
        until(process, run.saving)
        time.sleep(draw.uniform(0, 0.05))
    else:
        time.sleep(draw.uniform(0, 0.3))


def test_a_run_survives_kills_signals_and_damage(tmp_path):
    draw = chance("a run")
    (tmp_path / "text.txt").write_text(text())
    whole, run = Run(place=tmp_path, name="whole"), Run(place=tmp_path, name="run")
    uninterrupted = whole.start()
    whole.wait_for_checkpoint(uninterrupted)  # and the others need not compile
    run.start_seconds = whole.start_seconds
    kinds = ("save", "start", "save", "step")
    events = [(signal.SIGKILL, kinds[n % 4]) for n in range(KILLS)]
    events += [(signal.SIGTERM, kinds[n % 4]) for n in range(SIGNALS)]
    draw.shuffle(events)
    counts: dict[str, int] = {}
    for event, kind in events:
        good = run.newest()
        process = run.start()
        wait_for_moment(kind, draw, run, process)
        process.send_signal(event)
        out, err = process.communicate(timeout=600)
        assert not trouble(err)
        saving = run.saving()
        if event == signal.SIGKILL:
            assert process.returncode in (-signal.SIGKILL, 0)
            # Before the first step it may be what an earlier kill left.
            kind += ", within a save" if saving and kind != "start" else ""
        else:
            # Until Python has loaded it, the command has no say in how it ends.
            assert process.returncode == (-signal.SIGTERM if out == "" else 0), out
            if "stopped after step " in out:
                assert not saving
                assert run.newest() == int(out.rpartition("stopped after step ")[2].split(";")[0])
            else:
                kind += ", before the first step"
                assert out == "" or "stopped before the first step" in out or run.newest() == STEPS
        if process.returncode == 0 and run.newest() == STEPS:
            kind = "after the end"
        assert run.newest() >= good
        counts[f"{event.name} {kind}"] = counts.get(f"{event.name} {kind}", 0) + 1

    if len(run.checkpoints.steps()) < 2:  # the run was killed early, and needs one to fall back on
        process = run.start()
        until(process, lambda: len(run.checkpoints.steps()) >= 2)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=600)
    damaged = run.newest()
    for path in run.checkpoints.path(damaged).rglob("d/*"):
        os.truncate(path, path.stat().st_size // 2)
    process = run.start()
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    [warning] = trouble(err)
    assert warning.startswith(f"warning: checkpoint {run.checkpoints.path(damaged)} is bad: ")
    assert "validation bound" in out

    out, err = uninterrupted.communicate(timeout=600)
    assert (uninterrupted.returncode, trouble(err)) == (0, [])
    assert run.checkpoints.latest_good() == whole.checkpoints.latest_good() == STEPS
    assert run.description() == whole.description()
    assert run.records() == whole.records()
    print(json.dumps(counts, indent=1, sort_keys=True))
    late = [n for what, n in counts.items() if what.endswith("after the end")]
    assert sum(late) <= max(1, len(events) // 4)  # or little was tried


def trouble(err: str) -> list[str]:
    """The lines on standard error but for notes: what it is doing, and that a signal was heard."""
    return [line for line in err.splitlines() if line and not line.startswith("note: ")]
