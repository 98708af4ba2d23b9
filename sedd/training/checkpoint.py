"""Checkpoints: written in the background, verified when read, never half visible.

A checkpoint is a directory named after its step. It holds three trees of arrays (``params``,
``ema_params``, ``training``), a JSON description (the name, type and shape of every array, the
position of the data stream, and the sums of the log window that was open), and the checksums of all
shards. Each process writes the shards that its devices hold. A checkpoint can be read by any number
of devices and processes, each of which reads only the parts that its own devices are to hold.

Orbax writes a checkpoint under a temporary name and renames it when it is complete, so a process
that is killed leaves no partial checkpoint. Storage can still damage one. Every read therefore
recomputes the checksums, which are of the arrays and not of files: they stay valid whatever files
Orbax writes. A damaged checkpoint is reported, and an older one is used. Several processes agree on
that: what one of them finds, all of them act on.
"""

import errno
import os
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from orbax.checkpoint import v1 as ocp

from sedd.errors import UserError, printable
from sedd.training.named_arrays import (
    TREES,
    json_checksum,
    kinds_of,
    named_leaves,
    state_like,
    trees_of,
)
from sedd.training.reading import SUMS, BadCheckpointError, describe, load, load_params
from sedd.training.state import TrainState
from sedd.training.storage import shard_bytes, writable, writing
from sedd.training.sums import ShardSums
from sedd.types import Params


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A checkpoint that was read and verified.

    ``data`` and ``pending`` are the states of the data loader and of the training loop. The arrays
    of ``state`` are where ``restore_latest`` was told to put them, or numpy arrays.
    """

    state: TrainState
    step: int
    data: dict
    pending: dict


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
        self._largest = 0  # bytes of a shard that the writer is set up for
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
        """Copy the local shards of the state and start to write them.

        A save in progress is completed first. If there are several processes, all must call this
        method together; no array is gathered.

        Args:
            state: the state; a step may donate it as soon as this method returns.
            data: the state of the data loader, as JSON values.
            pending: the state of the training loop, as JSON values.
            metric: the validation figure that decides about the best checkpoint; lower is better.

        Raises:
            UserError: if this save or the one before cannot be written. Complete checkpoints stay.
        """
        self.wait()
        if jnp.issubdtype(state.key.dtype, jax.dtypes.prng_key):
            state = replace(state, key=jax.random.key_data(state.key))
        trees = jax.tree.map(writable, trees_of(state))
        description = {
            "data": data,
            "pending": pending,
            "metric": metric,
            "arrays": kinds_of(trees),
        }
        largest = max(map(shard_bytes, jax.tree.leaves(trees)))
        try:
            self._saving = self._open(largest).save_checkpointables_async(
                int(state.step),
                {**trees, SUMS: ShardSums(named_leaves(trees))},
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

    def restore_latest(
        self, abstract_state: TrainState, shardings: Sharding | TrainState | None = None
    ) -> Restored | None:
        """Read the newest undamaged checkpoint; returns None if there is no checkpoint.

        Damaged checkpoints are reported on standard error and renamed to ``<step>.bad``, so that
        they neither count as the newest nor are overwritten. If there are several processes, all
        must call this method together, and a checkpoint that is damaged for one is so for all.

        Args:
            abstract_state: the shapes and types of the state that is expected, from
                ``jax.eval_shape``.
            shardings: where to put the arrays, one sharding or a state of them (``shardings`` of
                ``DataParallel`` and ``FullySharded``); each process then reads its own shards only.
                None for whole numpy arrays.

        Raises:
            UserError: if the checkpoint belongs to another configuration, all are damaged, or the
                processes do not see the same checkpoints.
        """
        expected = trees_of(abstract_state)
        for step in reversed(self._common_steps()):
            try:
                description, arrays = load(
                    self.path(step), TREES, expected, shardings, together=True
                )
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
        self,
        step: int | None = None,
        *,
        ema: bool = True,
        abstract_params: Params | None = None,
        shardings: Sharding | Params | None = None,
    ) -> tuple[int, Params]:
        """Read the parameters of a step, as nested dictionaries of arrays.

        Args:
            step: the step; by default that of the newest undamaged checkpoint. Damaged ones are
                then reported on standard error.
            ema: read the averaged parameters (EMA), not those of the last update. Frozen ones have
                no average, and are read as they are.
            abstract_params: shapes and types that the parameters must have.
            shardings: where to put the arrays, one sharding or a tree of them. If there are several
                processes, all must then call this method together; each reads its own shards only.
                None for whole numpy arrays.

        Returns:
            The step and its parameters.

        Raises:
            UserError: if there is no undamaged checkpoint, if the requested one is missing or
                damaged, or if its parameters differ from ``abstract_params``.
        """
        together = shardings is not None
        steps = self._common_steps() if together else self.steps()
        if not steps:
            raise UserError(f"no checkpoint in {self.directory}")
        if step is not None and step not in steps:
            raise UserError(f"no checkpoint of step {step} in {self.directory}; there are {steps}")
        for candidate in reversed(steps) if step is None else [step]:
            try:
                params = load_params(
                    self.path(candidate),
                    ema=ema,
                    expected=abstract_params,
                    shardings=shardings,
                    together=together,
                )
            except BadCheckpointError as bad:
                if step is not None:
                    raise UserError(f"checkpoint {self.path(step)} is bad: {bad}") from bad
                if not together or jax.process_index() == 0:
                    _say(f"checkpoint {self.path(candidate)} is bad: {bad}; using an older one")
                continue
            return candidate, params
        raise UserError(f"all checkpoints in {self.directory} are damaged")

    def latest_good(self, shardings: Sharding | TrainState | None = None) -> int | None:
        """Return the step of the newest undamaged checkpoint, or None if there is none.

        Reads and verifies all arrays. With ``shardings``, as in ``restore_latest``, each process
        reads its own shards only, and all must call this method together.
        """
        together = shardings is not None
        for step in reversed(self._common_steps() if together else self.steps()):
            try:
                load(self.path(step), TREES, {}, shardings, together=together)
            except BadCheckpointError:
                continue
            return step
        return None

    def best(self) -> int | None:
        """Return the step with the lowest metric; None if no checkpoint has a metric."""
        metrics = {}
        for step in self.steps():
            try:
                metric = describe(self.path(step))["metric"]
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

    def _open(self, largest: int) -> ocp.training.Checkpointer:
        """The Orbax checkpointer, made at the first save; the largest shard has so many bytes."""
        if largest > self._largest:
            self.close()
            self._largest = largest
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
                context=writing(self._largest),
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
                describe(self.path(step))
            except BadCheckpointError:
                continue
            return self.path(step)
        return None

    def _common_steps(self) -> list[int]:
        """The steps, which must be the same for all processes; raises UserError.

        Another run may be writing there, and a file system may show a new file late: processes that
        differ look again twice.
        """
        for wait in (0, 1, 5):
            time.sleep(wait)
            steps = self.steps()
            if jax.process_count() == 1:
                return steps
            digests = multihost_utils.process_allgather(np.uint32(json_checksum(steps)))
            if len(set(np.asarray(digests).tolist())) == 1:
                return steps
        raise UserError(
            f"{self.directory}: process {jax.process_index()} sees the checkpoints {steps} there, "
            "and another process sees others; all must see the same directory"
        )

    def _set_aside(self, step: int, bad: BadCheckpointError) -> None:
        """Rename a damaged checkpoint to ``<step>.bad``, or ``.bad2`` and so on, and report it."""
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


def _say(message: str) -> None:
    print(printable(f"warning: {message}"), file=sys.stderr)
