"""The processes of a command, and the flags of ``evaluate`` and ``sample`` that choose devices."""

from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import tyro
from jax.sharding import Mesh

from sedd.commands.cli import console, unset
from sedd.errors import FieldError, UserError
from sedd.networks.mesh import device_mesh
from sedd.progress import Activity
from sedd.training.distributed import connect


@dataclass(frozen=True, kw_only=True)
class Processes:
    """How the processes of a run find each other.

    SLURM, Open MPI, GKE and TPU pods describe the processes in the environment. Elsewhere a run of
    several processes needs all three fields; a run of one process needs none.

    Raises:
        UserError: if only some of the fields are given, or one is out of range.
    """

    coordinator: Annotated[str | None, unset("HOST:PORT")] = None
    """Address at which process 0 listens, if several processes run the command together."""
    num_processes: Annotated[int | None, unset("INT")] = None
    """The number of processes of the run."""
    process_id: Annotated[int | None, unset("INT")] = None
    """The number of this process, from 0."""

    def __post_init__(self):
        given = [getattr(self, name) is not None for name in FLAGS]
        if any(given) and not all(given):
            missing = [flag for flag, there in zip(FLAGS.values(), given, strict=True) if not there]
            raise UserError(f"{', '.join(FLAGS.values())} go together; {missing[0]} is missing")
        if self.num_processes is not None and self.process_id is not None:
            if self.num_processes < 1:
                raise UserError(f"--num-processes must be at least 1, got {self.num_processes}")
            if not 0 <= self.process_id < self.num_processes:
                raise UserError(
                    f"--process-id must be in [0, {self.num_processes}), got {self.process_id}"
                )
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdigit() or not 0 < int(port) < 65536:
                raise UserError(f"--coordinator must be HOST:PORT, got {self.coordinator!r}")


FLAGS = {
    "coordinator": "--coordinator",
    "num_processes": "--num-processes",
    "process_id": "--process-id",
}


@dataclass(frozen=True, kw_only=True)
class DeviceFlags:
    """On which devices a command runs, and what each of them holds.

    Raises:
        FieldError: ``devices`` is below 1.
    """

    devices: Annotated[int | None, unset("INT")] = None
    """Use so many devices, the first ones; by default all of all processes."""
    parallel: Literal["replicated", "fsdp"] = "replicated"
    """What each device holds: all parameters, or a part of them (fsdp). A layer's parameters are
    then gathered from all devices whenever it is computed. It changes no figure and no sample."""
    processes: Annotated[Processes, tyro.conf.arg(name="")] = Processes()

    def __post_init__(self):
        if self.devices is not None and self.devices < 1:
            raise FieldError("devices", f"must be at least 1, got {self.devices}")

    def join(self) -> Mesh | None:
        """Join the other processes, if there are any, and return the mesh of the devices.

        Returns:
            The mesh, or None for a single device, which needs none.

        Raises:
            UserError: the processes do not find each other, or there are fewer devices.
        """
        join(self.processes)
        available = jax.devices()
        count = len(available) if self.devices is None else self.devices
        if count > len(available):
            raise FieldError("devices", f"must be at most {len(available)}, got {count}")
        if count < len(available) and jax.process_count() > 1:
            raise FieldError("devices", f"is {count}; several processes use all {len(available)}")
        if count == 1:
            return None
        return device_mesh(available[:count], fsdp=None if self.parallel == "fsdp" else 1)


def join(processes: Processes) -> None:
    """Join the other processes of a run, if there are any; only the first one prints then.

    Raises:
        UserError: the processes do not find each other.
    """
    connect(processes.coordinator, processes.num_processes, processes.process_id)
    console.quiet = not is_first()
    Activity.shown = is_first()


def is_first() -> bool:
    """Whether this is the first process of the run, which prints and writes the files."""
    return jax.process_index() == 0
