"""Several processes, each with its own devices, as one run."""

import atexit
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec

import jax

from sedd.errors import UserError, first_line

HEARTBEAT_SECONDS = 30  # a peer that has been silent for so long is dead; JAX's default is 100
CONNECT_SECONDS = 120
GONE = (
    "error: this process did not come to its end: most likely another process of the run is gone. "
    "Start all of them again; they go on from the newest checkpoint"
)


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Where the processes of a run find each other; nothing needs saying where it can be found out.

    SLURM, Open MPI, GKE and TPU pods describe themselves in the environment. ``coordinator`` is
    HOST:PORT of process 0.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def __post_init__(self):
        given = [getattr(self, name) is not None for name in FLAGS]
        if any(given) and not all(given):
            missing = [flag for flag, there in zip(FLAGS.values(), given, strict=True) if not there]
            raise ValueError(f"{', '.join(FLAGS.values())} go together; {missing[0]} is missing")
        if self.num_processes is not None and self.process_id is not None:
            if self.num_processes < 1:
                raise ValueError(f"--num-processes must be at least 1, got {self.num_processes}")
            if not 0 <= self.process_id < self.num_processes:
                raise ValueError(
                    f"--process-id must be in [0, {self.num_processes}), got {self.process_id}"
                )
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdigit() or not 0 < int(port) < 65536:
                raise ValueError(f"--coordinator must be HOST:PORT, got {self.coordinator!r}")


FLAGS = {
    "coordinator": "--coordinator",
    "num_processes": "--num-processes",
    "process_id": "--process-id",
}


def connect(processes: Processes, *, seconds: float = CONNECT_SECONDS) -> None:
    """Join the other processes, before anything asks JAX for its devices.

    Does nothing where there is only this one. Raises UserError where the coordinator cannot be
    reached within ``seconds``, and where there are more processes than devices.
    """
    said = processes.coordinator is not None or several()
    if not said and not on_tpu():
        return
    if processes.coordinator is not None and processes.process_id != 0:
        _await(processes.coordinator, seconds)
    _explain_abort()
    try:
        jax.distributed.initialize(
            coordinator_address=processes.coordinator,
            num_processes=processes.num_processes,
            process_id=processes.process_id,
            initialization_timeout=int(seconds),
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            # With an environment of its own opinion each process would get one GPU of its host.
            cluster_detection_method=None if processes.coordinator is None else "deactivate",
        )
    except (RuntimeError, ValueError) as error:
        if not said:  # a TPU by itself
            return
        raise UserError(
            f"the processes of this run did not find each other: {first_line(error)}"
        ) from error
    _require_device()


def _require_device() -> None:
    """UserError where a host has more processes than devices, and this one is left without."""
    try:
        jax.local_devices()
    except RuntimeError as error:
        raise UserError(
            f"no device is left for this process ({first_line(error)}): start at most one process "
            "for each device of a host"
        ) from error


def _explain_abort() -> None:
    """Have another process say why this one ended, should it not come to its end.

    When a peer dies JAX aborts, from a thread of C++: no code of ours runs any more. What it prints
    is a stack trace.
    """
    watch = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if not sys.stdin.read():\n"
        f"    print({GONE!r}, file=sys.stderr, flush=True)\n"
    )
    watcher = subprocess.Popen([sys.executable, "-S", "-E", "-c", watch], stdin=subprocess.PIPE)
    assert watcher.stdin is not None
    stdin = watcher.stdin.fileno()

    def ended():
        # A collective may notice first that a peer is gone: then Python ends with JAX's error.
        if not isinstance(getattr(sys, "last_value", None), jax.errors.JaxRuntimeError):
            os.write(stdin, b".")

    atexit.register(ended)


def several() -> bool:
    """Whether the environment says that this process is one of several."""
    counts = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    if any(os.environ.get(name, "1") not in ("", "1") for name in counts):
        # A shell inside an allocation is not a task of it.
        return "SLURM_PROCID" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ
    hosts = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
    if any("," in os.environ.get(name, "") for name in hosts):
        return True
    return "MEGASCALE_COORDINATOR_ADDRESS" in os.environ


def leave_libtpu_alone() -> None:
    """Keep JAX from starting libtpu where no TPU is: have it use the CPU alone.

    Without this, JAX prints several lines of errors before it falls back to the CPU, where libtpu
    is installed to compile for TPUs. Nothing changes where the platform is chosen already, by
    ``JAX_PLATFORMS`` or in ``jax.config``, or where a plugin for GPUs is installed.
    """
    gpus = find_spec("jax_plugins")  # the package of their plugins
    if not (on_tpu() or jax.config.jax_platforms or gpus):  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_platforms", "cpu")


def on_tpu() -> bool:
    """Whether there are TPU chips; then a metadata server may know of other processes."""
    return os.environ.get("TPU_SKIP_MDS_QUERY") != "1"  # set by JAX where it found none


def _await(coordinator: str, seconds: float) -> None:
    """Until the coordinator listens: JAX would end the process without a word for the user."""
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"--coordinator {coordinator}: nothing answers there after {seconds:.0f} s "
                    f"({error.strerror or error}); is process 0 running, and the port open?"
                ) from error
            time.sleep(0.5)
