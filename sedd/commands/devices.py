"""The processes of a command, and the flags of ``evaluate`` and ``sample`` that choose devices."""

from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import tyro
from jax.sharding import Mesh

from sedd.commands.cli import console, unset
from sedd.errors import FieldError
from sedd.networks.mesh import device_mesh
from sedd.progress import Activity
from sedd.training.distributed import Processes, connect


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
    connect(processes)
    console.quiet = not is_first()
    Activity.shown = is_first()


def is_first() -> bool:
    """Whether this is the first process of the run, which prints and writes the files."""
    return jax.process_index() == 0
