"""Checkpoints: written in the background, verified when read, never half visible.

A checkpoint is a directory named after its step. It holds three trees of plain, unsharded arrays
(``params``, ``ema_params``, ``training``), so it loads on any number of devices, and a JSON
description: the name, type, shape and checksum of every array, the position of the data stream, and
the sums of the log window that was open.

Orbax writes a checkpoint under a temporary name and renames it when it is complete, so a process
that is killed leaves no partial checkpoint. Storage can still damage one. Every read therefore
recomputes the checksums, which are of the arrays and not of files: they stay valid whatever files
Orbax writes. A damaged checkpoint is reported, and an older one is used.
"""

import errno
import functools
import logging
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from sedd.errors import UserError, first_line, printable
from sedd.training.named_arrays import (
    TREES,
    checksums,
    json_checksum,
    kind_of,
    kinds_of,
    named_leaves,
    nested,
    require_same,
    state_like,
    trees_of,
)
from sedd.training.state import TrainState, to_host
from sedd.types import Params

# Parts of asyncio's messages about further arrays whose reads or writes failed after the first one,
# or were interrupted by a signal.
LEFT_OVER = ('"zarr3" driver', "in OCDBT database", "Task was destroyed but it is pending")


@functools.cache  # once a process
def quiet_orbax() -> None:
    """Suppress the messages that Orbax prints beside the exception of a failed read or write.

    Orbax logs one traceback per thread. The first error closes its event loop, and the arrays still
    in progress then report errors through asyncio's log and ``sys.unraisablehook``. The exception
    itself says all that a user needs. Only commands call this function: importing the package
    changes nothing in the process.
    """
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    logging.getLogger("asyncio").addFilter(
        lambda record: not any(words in record.getMessage() for words in LEFT_OVER)
    )
    report = sys.unraisablehook

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = hook


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A checkpoint that was read and verified; the arrays of ``state`` are numpy arrays.

    ``data`` and ``pending`` are the states of the data loader and of the training loop.
    """

    state: TrainState
    step: int
    data: dict
    pending: dict


class BadCheckpointError(Exception):
    """A checkpoint cannot be read, or its content has changed; the message is the reason."""


class Checkpoints:
    """The checkpoints of one run.

    Creating an instance changes no file; the first save creates the directory.

    Args:
        directory: the directory of the checkpoints.
        keep: how many of the newest checkpoints are kept, beside the one with the lowest metric.

    Raises:
        UserError: if ``keep`` is below 1.
    """

    def __init__(self, directory: str | Path, keep: int = 3):
        if keep < 1:
            raise UserError(f"keep must be at least 1, got {keep}")
        self.directory = Path(directory).absolute()
        if re.search("[\ud800-\udfff]", str(self.directory)):  # Orbax can neither write nor read it
            raise UserError(f"{self.directory}: its name is no UTF-8; rename the directory")
        self.keep = keep
        self._writer: ocp.training.Checkpointer | None = None
        self._saving: ocp.AsyncResponse[bool] | None = None

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, ascending, damaged ones included."""
        if not self.directory.is_dir():
            return []
        return sorted(
            int(path.name)
            for path in self.directory.iterdir()
            if re.fullmatch("0|[1-9][0-9]*", path.name) and path.is_dir()
        )

    def path(self, step: int) -> Path:
        """Return the directory of the checkpoint of a step."""
        return self.directory / str(step)

    def save(
        self, state: TrainState, *, data: dict, pending: dict, metric: float | None = None
    ) -> None:
        """Copy the state and start to write it; a save in progress is completed first.

        Args:
            state: the state; a step may donate it as soon as this method returns.
            data: the state of the data loader, as JSON values.
            pending: the state of the training loop, as JSON values.
            metric: the validation figure that decides about the best checkpoint; lower is better.

        Raises:
            UserError: if this save or the one before cannot be written. Complete checkpoints stay.
        """
        self.wait()
        trees = trees_of(to_host(state))
        arrays = named_leaves(trees)
        description = {
            "data": data,
            "pending": pending,
            "metric": metric,
            "arrays": {
                name: [*kind_of(array), checksum]
                for (name, array), checksum in zip(
                    arrays.items(), checksums(arrays.values()), strict=True
                )
            },
        }
        try:
            self._saving = self._open().save_checkpointables_async(
                int(state.step),
                trees,
                force=True,
                metrics=None if metric is None else {"metric": metric},
                custom_metadata={"sedd": description, "crc32": json_checksum(description)},
            )
        except Exception as error:
            raise self._failure(error) from error

    def check(self) -> None:
        """Raise UserError if a save in the background has failed; does not wait for one."""
        if self._writer is not None and not self._writer.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is complete; raises UserError if it cannot be written."""
        saving, self._saving = self._saving, None
        if saving is not None:
            try:
                saving.result()
            except Exception as error:
                raise self._failure(error) from error

    def restore_latest(self, abstract_state: TrainState) -> Restored | None:
        """Read the newest undamaged checkpoint; returns None if there is no checkpoint.

        ``abstract_state`` has the shapes and types of the state that is expected, from
        ``jax.eval_shape``. Damaged checkpoints are reported on standard error and renamed to
        ``<step>.bad``, so that they neither count as the newest nor are overwritten.

        Raises:
            UserError: if the checkpoint belongs to another configuration, or all are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                description = self._describe(step)
                self._require_same(step, description, trees_of(abstract_state))
                arrays = self._read(step, description, TREES)
            except BadCheckpointError as bad:
                self._set_aside(step, bad)
                continue
            return Restored(
                state=state_like(abstract_state, arrays),
                step=step,
                data=description["data"],
                pending=description["pending"],
            )
        if any(self.directory.glob("*.bad*")):  # renamed now or at an earlier start
            raise UserError(
                f"all checkpoints in {self.directory} are damaged (renamed to *.bad); start a new "
                "run in another directory"
            )
        return None

    def restore_params(
        self, step: int | None = None, *, ema: bool = True, abstract_params: Params | None = None
    ) -> Params:
        """Read parameters as nested dictionaries of numpy arrays; see ``restore_step``."""
        return self.restore_step(step, ema=ema, abstract_params=abstract_params)[1]

    def restore_step(
        self, step: int | None = None, *, ema: bool = True, abstract_params: Params | None = None
    ) -> tuple[int, Params]:
        """Read the parameters of a step, as nested dictionaries of numpy arrays.

        Args:
            step: the step; by default that of the newest undamaged checkpoint. Damaged ones are
                then reported on standard error.
            ema: read the averaged parameters (EMA), not those of the last update.
            abstract_params: shapes and types that the parameters must have.

        Returns:
            The step and its parameters.

        Raises:
            UserError: if there is no undamaged checkpoint, if the requested one is missing or
                damaged, or if its parameters differ from ``abstract_params``.
        """
        tree = "ema_params" if ema else "params"
        steps = self.steps()
        if not steps:
            raise UserError(f"no checkpoint in {self.directory}")
        if step is not None and step not in steps:
            raise UserError(f"no checkpoint of step {step} in {self.directory}; there are {steps}")
        for candidate in reversed(steps) if step is None else [step]:
            try:
                description = self._describe(candidate)
                if abstract_params is not None:
                    self._require_same(candidate, description, {tree: abstract_params})
                arrays = self._read(candidate, description, (tree,))
            except BadCheckpointError as bad:
                if step is not None:
                    raise UserError(f"checkpoint {self.path(step)} is bad: {bad}") from bad
                _say(f"checkpoint {self.path(candidate)} is bad: {bad}; using an older one")
                continue
            return candidate, nested(arrays)[tree]
        raise UserError(f"all checkpoints in {self.directory} are damaged")

    def latest_good(self) -> int | None:
        """Return the step of the newest undamaged checkpoint, or None if there is none.

        Reads and verifies all arrays.
        """
        for step in reversed(self.steps()):
            try:
                self._read(step, self._describe(step), TREES)
            except BadCheckpointError:
                continue
            return step
        return None

    def best(self) -> int | None:
        """Return the step with the lowest metric; None if no checkpoint has a metric."""
        metrics = {}
        for step in self.steps():
            try:
                metric = self._describe(step)["metric"]
            except BadCheckpointError:
                continue
            if metric is not None:
                metrics[step] = metric
        return min(metrics, key=metrics.__getitem__, default=None)

    def close(self) -> None:
        """Wait for the last save and stop the writing threads."""
        self.wait()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self) -> ocp.training.Checkpointer:
        """The Orbax checkpointer, made at the first save."""
        if self._writer is None:
            policies = ocp.training.preservation_policies
            best = policies.BestN(
                n=1,
                get_metric_fn=lambda metrics: metrics["metric"],
                reverse=True,  # Orbax keeps the last of the order: the lowest
                keep_checkpoints_without_metrics=False,
            )
            kept = policies.AnyPreservationPolicy([policies.LatestN(self.keep), best])
            self._writer = ocp.training.Checkpointer(
                str(self.directory),
                preservation_policy=kept,  # pyright: ignore[reportArgumentType]
                cleanup_tmp_directories=True,
            )
        return self._writer

    def _failure(self, error: Exception) -> Exception:
        """Return the exception of a failed save: a UserError if the system refused to write."""
        code = error.errno if isinstance(error, OSError) else None
        if found := re.search(r"os_error_code='(\d+)'", str(error)):  # tensorstore's
            code = int(found[1])
        if code is None:
            return error
        if self._writer is not None:
            self._writer = None  # it would raise the same error at every later save
        last = self._last_described()
        kept = f"the last complete checkpoint is {last}" if last else "no checkpoint is complete"
        reason = os.strerror(code)
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason += ", make room and start again"
        return UserError(f"cannot write a checkpoint to {self.directory}: {reason}; {kept}")

    def _last_described(self) -> Path | None:
        """The newest checkpoint with a valid description; its arrays are not read."""
        for step in reversed(self.steps()):
            try:
                self._describe(step)
            except BadCheckpointError:
                continue
            return self.path(step)
        return None

    def _describe(self, step: int) -> dict:
        """Read and verify the description of a checkpoint; raises BadCheckpointError."""
        try:
            metadata: Any = ocp.checkpointables_metadata(str(self.path(step))).custom_metadata
            description, checksum = metadata["sedd"], metadata["crc32"]
        except Exception as error:  # a damaged file can raise any exception
            raise BadCheckpointError(f"its description is unreadable ({_said(error)})") from error
        if json_checksum(description) != checksum:
            raise BadCheckpointError("its description has changed since it was written")
        return description

    def _read(self, step: int, description: dict, trees: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Read some trees and verify every array; raises BadCheckpointError."""
        try:
            arrays = named_leaves(
                {tree: ocp.load(str(self.path(step)), checkpointable_name=tree) for tree in trees}
            )
        except Exception as error:  # a damaged file can raise any exception
            raise BadCheckpointError(f"its arrays are unreadable ({_said(error)})") from error
        written = {
            name: checksum
            for name, (_, _, checksum) in description["arrays"].items()
            if name.split("/")[0] in trees
        }
        if missing := written.keys() - arrays.keys():
            raise BadCheckpointError(f"it lacks {min(missing)}")
        arrays = {name: np.asarray(arrays[name]) for name in written}
        for name, checksum in zip(arrays, checksums(arrays.values()), strict=True):
            if checksum != written[name]:
                raise BadCheckpointError(f"{name} has changed since it was written")
        return arrays

    def _require_same(self, step: int, description: dict, abstract_trees: dict) -> None:
        """Raise UserError unless the checkpoint has the arrays of ``abstract_trees``."""
        there = {
            name: (dtype, shape)
            for name, (dtype, shape, _) in description["arrays"].items()
            if name.split("/")[0] in abstract_trees
        }
        require_same(f"checkpoint {self.path(step)}", there, kinds_of(abstract_trees))

    def _set_aside(self, step: int, bad: BadCheckpointError) -> None:
        """Rename a damaged checkpoint to ``<step>.bad``, or ``.bad2`` and so on, and report it."""
        if jax.process_count() > 1:  # the others may still be reading it
            multihost_utils.sync_global_devices(f"set checkpoint {step} aside")
        if jax.process_index() == 0:
            aside = self.path(step).with_suffix(".bad")
            number = 2
            while aside.exists():
                aside = self.path(step).with_suffix(f".bad{number}")
                number += 1
            self.path(step).rename(aside)
            _say(f"checkpoint {self.path(step)} is bad: {bad}; set aside as {aside.name}")


def find_checkpoints(path: str | Path) -> Checkpoints:
    """Return the checkpoints of a run, given its directory or its ``checkpoints`` directory.

    Raises:
        UserError: if there is no checkpoint.
    """
    path = Path(path)
    for directory in (path / "checkpoints", path):
        checkpoints = Checkpoints(directory)
        if checkpoints.steps():
            return checkpoints
    raise UserError(f"no checkpoint in {path}")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _say(message: str) -> None:
    print(printable(f"warning: {message}"), file=sys.stderr)
