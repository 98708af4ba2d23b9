"""Checkpoints that are written in the background, checked when read, and complete or not there.

A checkpoint is a directory ``<step>`` with three trees of plain, unsharded arrays (``params``,
``ema_params``, ``training``), so that it loads on any number of devices, and a JSON description:
name, type, shape and checksum of every array, where the data stream stands, and the sums of the log
window that was open.
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

from sedd.errors import UserError, first_line
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

# What asyncio's log says of other arrays whose reads and writes failed beside the first, or were
# interrupted by a signal.
LEFT_OVER = ('"zarr3" driver', "in OCDBT database", "Task was destroyed but it is pending")


@functools.cache  # once a process
def quiet_orbax() -> None:
    """Hide what is printed about a failed read or write beside the exception that it raises.

    Orbax logs the traceback once a thread. The first error closes its event loop; the arrays that
    were under way report to it all the same, through asyncio's log and ``sys.unraisablehook``.
    Commands call this; importing the package changes nothing in the process.
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
    """A checkpoint that was read and found whole; the state's arrays are numpy's."""

    state: TrainState
    step: int
    data: dict  # the loader's state
    pending: dict  # the loop's


class BadCheckpointError(Exception):
    """A checkpoint that cannot be read, or is not what was written."""


class Checkpoints:
    """The checkpoints of one run. Making one touches nothing; the first save makes the directory.

    The newest ``keep`` stay, and the one with the lowest metric.
    """

    def __init__(self, directory: str | Path, keep: int = 3):
        if keep < 1:
            raise UserError(f"keep must be at least 1, got {keep}")
        self.directory = Path(directory).absolute()
        self.keep = keep
        self._writer: ocp.training.Checkpointer | None = None
        self._saving: ocp.AsyncResponse[bool] | None = None

    def steps(self) -> list[int]:
        """The steps that have a directory, ascending; what is in it may be bad."""
        if not self.directory.is_dir():
            return []
        return sorted(
            int(path.name)
            for path in self.directory.iterdir()
            if re.fullmatch("0|[1-9][0-9]*", path.name) and path.is_dir()
        )

    def path(self, step: int) -> Path:
        return self.directory / str(step)

    def save(
        self, state: TrainState, *, data: dict, pending: dict, metric: float | None = None
    ) -> None:
        """Start writing; ``data`` and ``pending`` must be JSON, ``metric`` is better when lower.

        The arrays are copied before this returns. Waits for the save before it. Raises UserError
        when that one, or this one, could not be written: what was complete before stays.
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
        """Raises UserError if a save has failed meanwhile; does not wait."""
        if self._writer is not None and not self._writer.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Until what was saved is on disk. Raises UserError if it could not be written."""
        saving, self._saving = self._saving, None
        if saving is not None:
            try:
                saving.result()
            except Exception as error:
                raise self._failure(error) from error

    def restore_latest(self, abstract_state: TrainState) -> Restored | None:
        """The newest whole checkpoint; None where there is none.

        A bad one is named on standard error and set aside as ``<step>.bad``, so that it neither
        counts as the newest nor is overwritten. Raises UserError where a checkpoint belongs to
        another configuration, and where all are bad.
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
        if any(self.directory.glob("*.bad*")):  # also those of an earlier start
            raise UserError(
                f"no checkpoint in {self.directory} is whole; bad ones end in .bad: start anew in "
                "another directory"
            )
        return None

    def restore_params(
        self, step: int | None = None, *, ema: bool = True, abstract_params: Params | None = None
    ) -> Params:
        """Parameters as nested dictionaries of numpy arrays; see ``restore_step``."""
        return self.restore_step(step, ema=ema, abstract_params=abstract_params)[1]

    def restore_step(
        self, step: int | None = None, *, ema: bool = True, abstract_params: Params | None = None
    ) -> tuple[int, Params]:
        """The step and its parameters (numpy arrays in dictionaries), averaged ones by default.

        Without ``step``, of the newest whole checkpoint; bad ones are named on standard error.
        Raises UserError where there is none, where the one asked for is bad, and where
        ``abstract_params`` is given and differs.
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
        raise UserError(f"no checkpoint in {self.directory} is whole")

    def latest_good(self) -> int | None:
        """The newest step whose arrays are all as they were written; reads them."""
        for step in reversed(self.steps()):
            try:
                self._read(step, self._describe(step), TREES)
            except BadCheckpointError:
                continue
            return step
        return None

    def best(self) -> int | None:
        """The step with the lowest metric, among the checkpoints that have one."""
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
        """Wait, and release the threads that write."""
        self.wait()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self) -> ocp.training.Checkpointer:
        if self._writer is None:
            policies = ocp.training.preservation_policies
            best = policies.BestN(
                n=1,
                get_metric_fn=lambda metrics: metrics["metric"],
                reverse=True,  # the last of the order is kept
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
        """What to raise for a failed save: a UserError when the system refused to write."""
        code = error.errno if isinstance(error, OSError) else None
        if found := re.search(r"os_error_code='(\d+)'", str(error)):  # tensorstore's
            code = int(found[1])
        if code is None:
            return error
        if self._writer is not None:
            self._writer = None  # it would raise the same error for ever
        last = self._last_described()
        kept = f"the last complete checkpoint is {last}" if last else "no checkpoint is complete"
        reason = os.strerror(code)
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason += ", make room and start again"
        return UserError(f"cannot write a checkpoint to {self.directory}: {reason}; {kept}")

    def _last_described(self) -> Path | None:
        for step in reversed(self.steps()):
            try:
                self._describe(step)
            except BadCheckpointError:
                continue
            return self.path(step)
        return None

    def _describe(self, step: int) -> dict:
        try:
            metadata: Any = ocp.checkpointables_metadata(str(self.path(step))).custom_metadata
            description, checksum = metadata["sedd"], metadata["crc32"]
        except Exception as error:  # a damaged file can fail in any way; the reason is passed on
            raise BadCheckpointError(f"its description is unreadable ({_said(error)})") from error
        if json_checksum(description) != checksum:
            raise BadCheckpointError("its description has changed since it was written")
        return description

    def _read(self, step: int, description: dict, trees: tuple[str, ...]) -> dict[str, np.ndarray]:
        try:
            arrays = named_leaves(
                {tree: ocp.load(str(self.path(step)), checkpointable_name=tree) for tree in trees}
            )
        except Exception as error:  # as above
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
        there = {
            name: (dtype, shape)
            for name, (dtype, shape, _) in description["arrays"].items()
            if name.split("/")[0] in abstract_trees
        }
        require_same(f"checkpoint {self.path(step)}", there, kinds_of(abstract_trees))

    def _set_aside(self, step: int, bad: BadCheckpointError) -> None:
        if jax.process_count() > 1:  # nobody moves what another process is still reading
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
    """Those of a run's directory, or of its ``checkpoints`` directory itself, to read from.

    Raises UserError where there are none.
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
    print(f"warning: {message}", file=sys.stderr)
