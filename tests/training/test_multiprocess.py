"""Two processes are one run: the same losses, checkpoints that move, and an end when one dies."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiers import nightly
from training_toy import SGD, history, run

from sedd.commands.devices import Processes
from sedd.errors import UserError
from sedd.networks import mesh
from sedd.training import distributed
from sedd.training.checkpoint import Checkpoints
from sedd.training.distributed import connect
from sedd.training.loop import Cadence
from sedd.training.metrics import read_metrics

SCRIPT = Path(__file__).with_name("one_of_two.py")
EACH = Cadence(log_every=1, eval_every=None, checkpoint_every=25)


def start(workdir, steps, fsdp):
    return start_two(SCRIPT, workdir, steps, fsdp)


def start_two(script, *arguments):
    """Two processes with two devices each: ``script ID PORT ARGUMENTS``."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, script, str(i), str(port), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(os.environ, JAX_NUM_CPU_DEVICES="2"),
        )
        for i in range(2)
    ]


def finish(processes, seconds=300):
    try:
        return [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture
def tiny_parts(monkeypatch):
    monkeypatch.setattr(mesh, "LEAST_SPLIT", 16)


@pytest.mark.usefixtures("tiny_parts")
@pytest.mark.parametrize(
    "places",  # devices of this process, or of each of two by the fsdp of the script
    [
        (0, {"devices": 1}),
        nightly(({"devices": 4, "fsdp": 2}, 0, {"devices": 1})),
        nightly(({"devices": 4}, 2, {"devices": 4, "fsdp": 2}, 0, {"devices": 1})),
    ],
    ids=len,
)
def test_a_run_moves_between_devices_and_processes(tmp_path, places):
    """One device, four, parts on two by two, two processes of two: the losses are one run's."""
    each = 20 if len(places) == 2 else 60  # steps
    last = each * len(places)
    reference, _ = history(last, SGD)
    for steps, where in zip(range(each, last + 1, each), places, strict=True):
        if isinstance(where, dict):
            run(tmp_path, steps, SGD, of_steps=last, cadence=EACH, **where)
            continue
        processes = start(tmp_path, steps, where)
        outputs = finish(processes)
        assert [process.returncode for process in processes] == [0, 0], outputs
    losses = [record["loss"] for record in read_metrics(tmp_path)]
    np.testing.assert_allclose(losses, reference["loss"], rtol=1e-5)


def wait_for(workdir, step, seconds=120):
    end = time.monotonic() + seconds
    while not any(s >= step for s in Checkpoints(workdir / "checkpoints").steps()):
        assert time.monotonic() < end, "no checkpoint came"
        time.sleep(0.1)


@pytest.mark.nightly
def test_a_signal_to_one_process_stops_both(tmp_path):
    processes = start(tmp_path, 1_000_000, 0)
    try:
        wait_for(tmp_path, 25)
        processes[1].send_signal(signal.SIGTERM)
    finally:
        outputs = finish(processes, 60)
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "stopped after step" in outputs[0][0]
    step = int(outputs[0][0].rsplit("stopped after step", 1)[1].split(";")[0])
    assert Checkpoints(tmp_path / "checkpoints").latest_good() == step


@pytest.mark.nightly
@pytest.mark.parametrize("dies", [0, 1])
def test_the_death_of_one_process_ends_the_other(tmp_path, dies):
    processes = start(tmp_path, 1_000_000, 0)
    try:
        wait_for(tmp_path, 25)
        processes[dies].kill()
        before = time.monotonic()
        processes[1 - dies].wait(60)
        assert time.monotonic() - before < 60
    finally:
        outputs = finish(processes)
    other = processes[1 - dies]
    assert other.returncode not in (0, None)
    assert "another process of the run died" in outputs[1 - dies][1], outputs[1 - dies]
    assert Checkpoints(tmp_path / "checkpoints").latest_good() >= 25


def test_a_coordinator_that_is_not_there_is_waited_for_and_named():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    before = time.monotonic()
    with pytest.raises(UserError, match=f"{address}: nothing answers there after 2 s"):
        connect(address, 2, 1, seconds=2)
    assert time.monotonic() - before < 20


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coordinator": "host:1234"}, "go together; --num-processes is missing"),
        ({"coordinator": "host", "num_processes": 2, "process_id": 0}, "must be HOST:PORT"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": 2}, r"must be in \[0, 2\)"),
        ({"coordinator": "h:1", "num_processes": 0, "process_id": 0}, "at least 1, got 0"),
    ],
)
def test_processes_say_what_is_wrong(fields, message):
    with pytest.raises(ValueError, match=message):
        Processes(**fields)


CLUSTERS = {
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "3",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "0",
    "TPU_WORKER_HOSTNAMES": "a,b",
    "TPU_PROCESS_ADDRESSES": "a:1,b:1",
    "MEGASCALE_COORDINATOR_ADDRESS": "a:1",
}


@pytest.fixture
def alone(monkeypatch):
    """No cluster's environment, and no TPU; what ``jax.distributed`` is asked is recorded."""
    for name in CLUSTERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setattr(distributed, "_explain_abort", lambda: None)
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: asked.append(options))
    return asked


def test_a_process_alone_connects_to_nobody(alone):
    connect()
    assert not alone


@pytest.mark.parametrize(
    ("names", "joins"),
    [
        (["SLURM_NTASKS", "SLURM_PROCID"], True),
        (["SLURM_NTASKS"], False),  # a shell inside an allocation
        (["OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"], True),
        (["TPU_WORKER_HOSTNAMES"], True),
        (["TPU_PROCESS_ADDRESSES"], True),
        (["MEGASCALE_COORDINATOR_ADDRESS"], True),
    ],
)
def test_clusters_are_found_in_the_environment(alone, monkeypatch, names, joins):
    for name in names:
        monkeypatch.setenv(name, CLUSTERS[name])
    connect()
    assert len(alone) == joins
    assert all(options["coordinator_address"] is None for options in alone)


def test_a_tpu_asks_its_metadata_server_and_may_be_alone(alone, monkeypatch):
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    connect()
    assert len(alone) == 1

    def nobody(**options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nobody)
    connect()
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    with pytest.raises(UserError, match="did not find each other"):
        connect()


def test_flags_leave_every_gpu_of_the_host_to_the_process(alone, monkeypatch):
    for name in ("SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.setenv(name, CLUSTERS[name])
    connect("h:1", 2, 0)
    assert alone[0]["cluster_detection_method"] == "deactivate"


def test_more_processes_than_devices_are_refused(alone, monkeypatch):
    def none():
        raise RuntimeError("Unable to initialize backend 'cuda': no such ordinal\nmore")

    monkeypatch.setattr(jax, "local_devices", none)
    connect()  # alone, a process asks for no device here
    with pytest.raises(UserError, match=r"'cuda': no such ordinal\): start at most one process"):
        connect("h:1", 2, 0)
