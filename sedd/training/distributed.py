"""Runs of several processes, each with devices of its own.

``connect`` joins the processes before JAX looks for devices. When a peer dies or never starts, JAX
aborts in C++ with a stack trace; most of this module is there to print one plain line instead.
"""

import atexit
import os
import socket
import subprocess
import sys
import time
from importlib.util import find_spec

import jax
import numpy as np
from jax.experimental import multihost_utils

from sedd.errors import UserError, first_line

MESSAGE_BYTES = 512  # of a message that processes tell each other
HEARTBEAT_SECONDS = 30  # of silence after which a peer counts as dead; JAX's default is 100
CONNECT_SECONDS = 120
GONE = (
    "error: this process was aborted, most likely because another process of the run died. Start "
    "all processes again; they resume from the newest checkpoint"
)


def connect(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    seconds: float = CONNECT_SECONDS,
) -> None:
    """Join the other processes of the run; does nothing if there are no others.

    Call it before anything asks JAX for its devices. Without the first three arguments the
    environment describes the processes: SLURM, Open MPI, GKE and TPU pods do.

    Args:
        coordinator: HOST:PORT at which process 0 listens.
        num_processes: the number of processes of the run.
        process_id: the number of this process, from 0.
        seconds: how long to wait for the coordinator.

    Raises:
        UserError: if the processes do not find each other in time, or if a host has more processes
            than devices.
    """
    said = coordinator is not None or several()
    if not said and not on_tpu():
        return
    if coordinator is not None and process_id != 0:
        _await(coordinator, seconds)
    _explain_abort()
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            initialization_timeout=int(seconds),
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            # If JAX found a cluster in the environment, it would give each process only one GPU.
            cluster_detection_method=None if coordinator is None else "deactivate",
        )
    except (RuntimeError, ValueError) as error:
        if not said:  # a single TPU host
            return
        raise UserError(
            f"the processes of this run did not find each other: {first_line(error)}"
        ) from error
    _require_device()


def _require_device() -> None:
    """Raise UserError if this process has no device: its host has fewer devices than processes."""
    try:
        jax.local_devices()
    except RuntimeError as error:
        raise UserError(
            f"no device is left for this process ({first_line(error)}): start at most one process "
            "for each device of a host"
        ) from error


def _explain_abort() -> None:
    """Start a watcher process that explains the end of this one if JAX aborts it.

    When a peer dies, a C++ thread of JAX aborts this process: it prints a stack trace, and no
    Python code runs any more. The watcher reads from a pipe that only this process holds open. At a
    normal exit this process writes a byte into it; if the pipe closes without a byte, the process
    was aborted and the watcher prints ``GONE``. It ignores signals, and so outlives this process.
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
        # If a collective notices first that a peer is gone, Python ends with an error of JAX. That
        # exit counts as aborted.
        if not isinstance(getattr(sys, "last_value", None), jax.errors.JaxRuntimeError):
            os.write(stdin, b".")

    atexit.register(ended)


def several() -> bool:
    """Whether the environment describes this process as one of several."""
    counts = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    if any(os.environ.get(name, "1") not in ("", "1") for name in counts):
        # A shell inside an allocation has the first variables but is not one of its tasks.
        return "SLURM_PROCID" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ
    hosts = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
    if any("," in os.environ.get(name, "") for name in hosts):
        return True
    return "MEGASCALE_COORDINATOR_ADDRESS" in os.environ


def leave_libtpu_alone() -> None:
    """Make JAX use the CPU, and not start libtpu, on a machine without TPUs and GPUs.

    libtpu may be installed there to compile for TPUs. JAX would try to start it and print several
    lines of errors before it falls back to the CPU. Nothing changes if the platform is chosen
    already, by ``JAX_PLATFORMS`` or in ``jax.config``, or if a plugin for GPUs is installed.
    """
    gpus = find_spec("jax_plugins")  # the package that holds the plugins for GPUs
    if not (on_tpu() or jax.config.jax_platforms or gpus):  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_platforms", "cpu")


def on_tpu() -> bool:
    """Whether this machine has TPU chips. If so, a metadata server may know of other processes."""
    return os.environ.get("TPU_SKIP_MDS_QUERY") != "1"  # JAX sets it if it finds no chip


def _await(coordinator: str, seconds: float) -> None:
    """Wait until the coordinator listens; raises UserError after ``seconds``.

    JAX itself ends the process in this case, without a message for the user.
    """
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


def first_message(message: str | None) -> str | None:
    """Return the message of the first process that has one; all processes call this together.

    Args:
        message: this process's message; None for none.

    Returns:
        The same message in all processes, with the number of the process unless all say the same.
        None if no process has a message.
    """
    if jax.process_count() == 1:
        return message
    mine = np.zeros(MESSAGE_BYTES, np.uint8)
    spelt = np.frombuffer((message or "").encode()[:MESSAGE_BYTES], np.uint8)
    mine[: len(spelt)] = spelt
    rows = np.asarray(multihost_utils.process_allgather(mine))
    for process, row in enumerate(rows):
        if row.any():
            said = row.tobytes().rstrip(b"\0").decode(errors="replace")
            return said if (rows == row).all() else f"{said}, in process {process}"
    return None
