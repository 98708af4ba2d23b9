"""What ``sedd train`` does before the first step: checks of the directory, and the run's objects.

``prepare`` reads and builds everything and writes nothing. A directory with checkpoints is resumed:
its configuration, its corpus and its parameters have to be those that the flags name. Without
checkpoints a new run begins, from random weights or from those of ``--init-from``.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax

from sedd.commands.cli import note
from sedd.commands.train_control import check_weights
from sedd.commands.train_from import first_params, lora_of, source_of, trains_a_part
from sedd.configuration.build import (
    Parts,
    build_parallel,
    build_parts,
    build_step,
    check_padding,
    check_whole_rows,
)
from sedd.configuration.build_data import Data, build_data
from sedd.configuration.components import maker
from sedd.configuration.config import Config, differences
from sedd.configuration.position_weights import measure_weights, weights_of, with_weights
from sedd.data.loader import Batches
from sedd.data.tokenizers import Tokenizer
from sedd.errors import FieldError, UserError
from sedd.model import Model, read_config, read_tokenizer
from sedd.networks.base import Network
from sedd.objectives.base import Objective
from sedd.objectives.latent_distill import LatentDistill
from sedd.objectives.self_distill import SelfDistill
from sedd.progress import Activity
from sedd.schedules.by_position import CORPUS
from sedd.training.checkpoint import Checkpoints, Restored
from sedd.training.parallel import DataParallel, FullySharded
from sedd.training.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """The objects of a run that is about to begin or to go on.

    Args:
        config: the configuration. For a resumed run, ``init_from`` and ``teacher`` are those with
            which the run was started.
        data: the tokenizer and the packed corpus.
        parts: the components of the model.
        parallel: the training step on the devices.
        checkpoints: the checkpoints of the run.
        restored: the newest whole checkpoint; None for a new run.
        state: the first state, on the devices.
        batches: the batches from the state's step on.
    """

    config: Config
    data: Data
    parts: Parts
    parallel: DataParallel | FullySharded
    checkpoints: Checkpoints
    restored: Restored | None
    state: TrainState
    batches: Batches


def prepare(workdir: Path, config: Config) -> Prepared:
    """Build everything that the configuration names, and make or restore the first state.

    Writes nothing into ``workdir``.

    Raises:
        UserError: the directory holds a run of another configuration or corpus, the weights of
            ``init_from`` do not fit, or something cannot be read.
    """
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.training.keep)
    tokenizer = source = None
    if checkpoints.steps():
        config, tokenizer = check_same_run(workdir, config)
    elif config.start is not None:
        source = source_of(config)
        tokenizer = source.tokenizer
    else:
        check_needs_no_model(config)

    data = read_data(config, tokenizer)
    config = measure_weights(config, [packed for packed, _ in data.train])
    parts = build_parts(config, data.tokenizer.num_tokens)
    check_padding(config, parts, segmented=any(packed.segmented for packed, _ in data.train))
    check_whole_rows(config, parts, [packed for packed, _ in data.train])
    check_weights(config, parts, data)
    step = build_step(config, parts)
    parallel = build_parallel(config, step)
    make_state = partial(step.first_state, config.seed)
    with Activity("making the first state"):
        restored = checkpoints.restore_latest(jax.eval_shape(make_state), parallel.shardings)
        if restored:
            state = restored.state
        else:
            state = _new_state(config, source, parts.network, parallel, make_state)
    batches = Batches(
        data.train,
        batch_size=config.training.batch_size,
        seed=config.seed,
        start_step=restored.step if restored else 0,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    if restored:
        check_same_data(workdir, restored, batches)
    return Prepared(
        config=config,
        data=data,
        parts=parts,
        parallel=parallel,
        checkpoints=checkpoints,
        restored=restored,
        state=state,
        batches=batches,
    )


def _new_state(
    config: Config,
    source: Model | None,
    network: Network,
    parallel: DataParallel | FullySharded,
    make_state: Callable[..., TrainState],
) -> TrainState:
    """The first state of a new run, on the devices: random parameters, or those of ``source``."""
    if source is None:
        return parallel.init(make_state)
    params = first_params(config.start_flag, source, network, convert=config.convert is not None)
    return parallel.place(make_state(params=params))


def check_needs_no_model(config: Config) -> None:
    """Check that a run can begin from random weights.

    Raises:
        UserError: the configuration converts or distils a trained model, or trains a part of one.
        FieldError: it trains adapters.
    """
    if maker("objectives", config.objective.name) in (SelfDistill, LatentDistill):
        raise UserError(
            f"--objective {config.objective.name} has no teacher: name a trained model by --teacher"
        )
    if config.convert is not None:
        raise UserError(f"--convert {config.convert} needs a model to convert: --init-from")
    if rank := lora_of(config.network).rank:
        raise FieldError(
            "network.lora.rank",
            f"is {rank}: adapters are trained beside a trained network, name one by --init-from",
        )
    if trains_a_part(config.network):
        causal = maker("networks", config.network.name).has_causal_head
        together = ", or train both with --network.no-freeze" if causal else ""
        raise UserError(
            f"--network {config.network.name} trains a part of the network on a frozen trunk: name "
            f"a trained one by --init-from RUN{together}"
        )


def check_student(config: Config, objective: Objective) -> None:
    """Check that a teacher has a student, and that the steps of the run are those of the rounds.

    Raises:
        FieldError: they are not.
    """
    if not objective.teacher_calls:
        if config.teacher is not None:
            raise FieldError(
                "teacher",
                f"is {config.teacher}: a teacher goes with --objective self_distill or "
                f"latent_distill, got {config.objective.name}",
            )
        return
    if isinstance(objective, SelfDistill):
        steps = objective.rounds * objective.round_steps
        if config.training.steps != steps:
            raise FieldError(
                "training.steps",
                f"is {config.training.steps}, and must be --objective.rounds × "
                f"--objective.round-steps = {objective.rounds} × {objective.round_steps} = {steps}",
            )
    if config.init_from is not None:
        raise FieldError("init_from", f"is {config.init_from}: name the model by --teacher instead")


def read_data(config: Config, tokenizer: Tokenizer | None) -> Data:
    """Read, tokenise and pack the corpus, with its progress on the terminal.

    Args:
        config: the configuration; its ``data`` is used.
        tokenizer: the tokenizer of the run that is resumed or started from; None to build one.
    """
    with Activity("reading the corpus") as activity:

        def progress(documents: int, tokens: int) -> None:
            activity.update(f"tokenising: {documents:,} documents, {tokens:,} tokens")

        return build_data(config, tokenizer=tokenizer, progress=progress)


def check_is_run(workdir: Path) -> None:
    """Check that a run may write into ``workdir``: a new, an empty or a run's directory.

    Other files may be there, as long as the run would not overwrite them.

    Raises:
        UserError: it is a directory of the system, or holds a model or a configuration that is not
            a run's.
    """
    where = f"--workdir {workdir}"
    resolved = Path(os.path.realpath(workdir))
    whole = ("/tmp", "/var", "/opt", "/srv", "/mnt", "/media", "/run", "/home", "/root")
    roots = {Path(resolved.anchor), Path.home().resolve(), *map(Path, whole)}
    system = [Path(p) for p in ("/bin", "/boot", "/dev", "/etc", "/lib", "/proc", "/sys", "/usr")]
    if resolved in roots or any(p == resolved or p in resolved.parents for p in system):
        raise UserError(f"{where}: it is a directory of the system; give the name of a new one")
    if (workdir / "checkpoints").is_dir():
        return
    try:
        is_run = read_config(workdir) is not None
    except UserError:
        is_run = False  # the config.json of something else
    weights = ("model.safetensors", "pytorch_model.bin")
    names = weights if is_run else ("config.json", "tokenizer.json", *weights)
    if found := [name for name in names if (workdir / name).exists()]:
        raise UserError(
            f"{where}: it holds {' and '.join(found)} and no run of this project; a run would "
            "overwrite files there: choose another directory"
        )


def check_same_run(workdir: Path, config: Config) -> tuple[Config, Tokenizer]:
    """Check that ``config`` may go on with the run in ``workdir``.

    Only the fields in ``RESUMABLE`` may differ: the number of steps, what to do about an update
    that is not finite, and fields that affect at most rounding, memory and output.

    Returns:
        The configuration with the run's own ``init_from`` and ``teacher``, and its tokenizer.

    Raises:
        UserError: the run was started with another configuration, or has saved none.
    """
    saved = read_config(workdir)
    if saved is None:
        raise UserError(f"--workdir {workdir}: it holds checkpoints but no config.json")
    if weights_of(config) == CORPUS and weights_of(saved):
        config = with_weights(config, weights_of(saved))
    if found := differences(saved, config):
        raise UserError(
            f"--workdir {workdir}: it holds a run of another configuration: {'; '.join(found)}. "
            "Choose another directory, or the same values"
        )
    if config.start not in (None, saved.start):
        flag = config.start_flag.split()[0]
        note(f"{flag} has no effect: the run has begun already, and is resumed")
    config = dataclasses.replace(
        config, init_from=saved.init_from, teacher=saved.teacher, mask_id=saved.mask_id
    )
    return config, read_tokenizer(workdir)


def check_same_data(workdir: Path, restored: Restored, batches: Batches) -> None:
    """Check that the corpus is the one that the run was trained on.

    A checkpoint records the position in the data by numbers of rows, which mean something else in
    another corpus. Each part of the mixture must have the same name, number of rows, number of
    scored tokens, and digest of its packed tokens.

    Raises:
        UserError: one of these differs.
    """
    # Through JSON, as the checkpoint's were: tuples become lists.
    here = json.loads(json.dumps(batches.state()["parts"]))
    for there, now in zip(restored.data["parts"], here, strict=True):
        if there != now[: len(there)]:  # runs of older versions recorded no digest
            sizes = (
                "its size is the same, but its text differs"
                if there[:3] == now[:3]
                else f"{there[0]} had {there[1]:,} sequences with {there[2]:,} tokens in all, "
                f"{now[0]} has {now[1]:,} with {now[2]:,}"
            )
            raise UserError(
                f"--workdir {workdir}: the corpus has changed since this run began: {sizes}. Bring "
                f"it back, or use another directory and --init-from {workdir}"
            )


def is_complete(workdir: Path, prepared: Prepared) -> bool:
    """Whether nothing is left to do: no step, no validation and no plot of the curves.

    A run that was killed between its last checkpoint and the plot has no ``curves.png``, or one
    that is older than its last record: it goes on, and draws the plot.
    """
    restored = prepared.restored
    if restored is None or restored.step < prepared.config.training.steps:
        return False
    if restored.pending.get("held") is not None:  # the last validation failed or was interrupted
        return False
    curves, records = workdir / "curves.png", workdir / "metrics.jsonl"
    return curves.is_file() and (
        not records.is_file() or curves.stat().st_mtime_ns >= records.stat().st_mtime_ns
    )
