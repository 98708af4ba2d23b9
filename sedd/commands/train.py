"""Train a discrete diffusion language model; run again, it goes on where it stopped."""

import dataclasses
import io
import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

import sedd
from sedd.commands.cli import console, note, parse_config, take
from sedd.configuration.build import (
    Data,
    Parts,
    ValidationRows,
    build_data,
    build_parallel,
    build_parts,
    build_step,
)
from sedd.configuration.components import values
from sedd.configuration.config import Config, differences
from sedd.data.baselines import CharacterTrigram, joined_text, unigram_nats
from sedd.data.loader import Batches
from sedd.data.tokenizers import Tokenizer
from sedd.errors import UserError
from sedd.evaluating import text_counter
from sedd.evaluation.bound import evaluate_bound
from sedd.files import check_writable, only_writer, write_whole
from sedd.model import TRAIN_COUNTS, read_config, read_tokenizer
from sedd.progress import Activity
from sedd.training.checkpoint import Checkpoints, Restored, kinds_of, require_same
from sedd.training.distributed import Processes, connect
from sedd.training.flops import step_flops
from sedd.training.loop import Run, train
from sedd.training.metrics import read_metrics
from sedd.training.optimizer import make_schedule
from sedd.training.parallel import (
    DataParallel,
    FullySharded,
    check_batch_size,
    check_mesh,
)
from sedd.training.signals import leave_on_signals
from sedd.training.state import TrainState, init_state

SAMPLES = 4  # texts drawn each time during training
TRIGRAM_TOKENS = 8_000_000  # of each part of the training text
FREE = ("dropout", "remat", "dtype", "attention")  # options that change no parameter


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """The flags of ``sedd train``, those of the configuration among them."""

    workdir: Path
    """Directory of the run. A run that is there already is resumed, with its configuration where no
    --config is given."""
    config: Annotated[Config, tyro.conf.arg(name="")]
    profile: int | None = None
    """Record so many steps for a profiler's viewer, into WORKDIR/profile."""
    processes: Annotated[Processes, tyro.conf.arg(name="")] = Processes()

    def __post_init__(self):
        if self.profile is not None and self.profile < 1:
            raise ValueError(f"--profile must be at least 1, got {self.profile}")


@leave_on_signals()
def main(arguments: Sequence[str]) -> None:
    """Check everything that can be checked before any work, lock the directory, and train."""
    saved = None
    if take(arguments, "--config")[0] is None:
        workdir, _ = take(arguments, "--workdir")
        saved = None if workdir is None else read_config(Path(workdir).expanduser())
    command = parse_config(arguments, TrainCommand, __doc__ or "", saved=saved)
    connect(command.processes)
    console.quiet = jax.process_index() > 0  # one of several speaks for all
    config, workdir = command.config, command.workdir
    build_parts(config, num_tokens=2)  # mistakes in the configuration come before any work
    check_batch_size(config.training.batch_size, jax.device_count(), config.training.accumulate)
    check_mesh(jax.device_count(), config.training.fsdp or 1)
    check_is_run(workdir)
    check_writable(workdir / "config.json", f"--workdir {workdir}")
    with ExitStack() as closes:
        if jax.process_index() == 0 and not closes.enter_context(
            only_writer(workdir, f"--workdir {workdir}")
        ):
            note(f"{workdir} is on a file system without locks: start no second run in it")
        train_in(workdir, command)


def train_in(workdir: Path, command: TrainCommand) -> None:
    """Start or resume the run in ``workdir``, train it, and print the result.

    Everything is read and checked before the first file is written; the configuration is written
    before the first step, so that a run that is stopped early can be resumed. A run that is
    complete is left as it is.
    """
    prepared = prepare(workdir, command.config)
    complete = is_complete(workdir, prepared)
    introduce(workdir, prepared, complete=complete)
    if complete:
        return
    config, data, restored = prepared.config, prepared.data, prepared.restored
    save_description(workdir, config, data)
    rows = ValidationRows(
        parts=[packed for packed, _ in data.validation],
        max_sequences=config.evaluation.max_sequences,
        batch_size=config.evaluation.batch_size,
    )
    frequencies = unigram_nats(train_frequencies(data), rows.counts())
    run = run_of(workdir, prepared, rows, frequencies, profile=command.profile)
    result = train(run, prepared.state, pending=restored.pending if restored else None)
    if not result.stopped and jax.process_index() == 0:
        exact = prepared.parts.parameterization.causal
        conclude(workdir, data, rows, frequencies, exact=exact)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """The objects of a run that is about to begin or to go on.

    Args:
        config: the configuration; of a resumed run, with the weights that it was started from.
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
    elif config.init_from is not None:
        source = source_of(config.init_from, config)
        tokenizer = source.tokenizer

    data = read_data(config, tokenizer)
    parts = build_parts(config, data.tokenizer.num_tokens)
    step = build_step(config, parts)
    parallel = build_parallel(config, step)
    make_state = partial(init_state, step.network, step.optimizer, config.seed)
    restored = checkpoints.restore_latest(jax.eval_shape(make_state))
    if restored:
        state = parallel.place(restored.state)
    elif source is not None:
        expected = kinds_of(jax.eval_shape(parts.network.init, jax.random.key(0)))
        require_same(f"--init-from {config.init_from}", kinds_of(source.denoiser.params), expected)
        state = parallel.place(make_state(params=source.denoiser.params))
    else:
        state = parallel.init(make_state)
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


def run_of(
    workdir: Path,
    prepared: Prepared,
    rows: ValidationRows,
    frequencies: float,
    *,
    profile: int | None,
) -> Run:
    """The description of the run that ``sedd.training.train`` takes.

    Args:
        workdir: the directory of the run.
        prepared: its objects.
        rows: the sequences to validate on.
        frequencies: nats per validation token of the training frequencies, for the plot.
        profile: steps to record for a profiler; None for none.
    """
    config, parts, tokenizer = prepared.config, prepared.parts, prepared.data.tokenizer
    return Run(
        workdir=workdir,
        parallel=prepared.parallel,
        batches=prepared.batches,
        checkpoints=prepared.checkpoints,
        steps=config.training.steps,
        cadence=config.training.cadence,
        learning_rate=make_schedule(config.optimizer, config.training.steps),
        validate=validator(config, parts, tokenizer, rows),
        sample=text_sampler(config, parts, tokenizer),
        unigram_nats=frequencies,
        flops=partial(step_flops, parts.network, config.training.batch_size, config.data.length),
        profile=profile,
        wandb={"project": config.training.wandb} if config.training.wandb else None,
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


def read_data(config: Config, tokenizer: Tokenizer | None) -> Data:
    """Read, tokenise and pack the corpus, and show how far it is."""
    if console.quiet:  # the first process speaks
        return build_data(config, tokenizer=tokenizer)
    with Activity("reading the corpus") as activity:

        def progress(documents: int, tokens: int) -> None:
            activity.update(f"tokenising: {documents:,} documents, {tokens:,} tokens")

        return build_data(config, tokenizer=tokenizer, progress=progress)


def check_is_run(workdir: Path) -> None:
    """UserError where ``workdir`` belongs to something else, whose files a run would overwrite."""
    where = f"--workdir {workdir}"
    resolved = workdir.resolve()
    roots = {Path(resolved.anchor), Path.home().resolve(), *map(Path, ("/tmp", "/home", "/root"))}
    system = [Path(p) for p in ("/bin", "/boot", "/dev", "/etc", "/lib", "/proc", "/sys", "/usr")]
    if resolved in roots or any(p == resolved or p in resolved.parents for p in system):
        raise UserError(f"{where}: it is a directory of the system; name a new one in it or beside")
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
    """The configuration to go on with, and the run's tokenizer.

    UserError where the run in ``workdir`` was started with another configuration. The run keeps the
    weights it was initialised from on record.
    """
    saved = read_config(workdir)
    if saved is None:
        raise UserError(f"--workdir {workdir}: it holds checkpoints but no config.json")
    if found := differences(saved, config):
        raise UserError(
            f"--workdir {workdir}: it holds a run of another configuration: {'; '.join(found)}. "
            "Choose another directory, or the same values"
        )
    if config.init_from not in (None, saved.init_from):
        note("--init-from is read when a run begins; this one has begun, and is resumed")
    config = dataclasses.replace(config, init_from=saved.init_from)
    return config, read_tokenizer(workdir)


def check_same_data(workdir: Path, restored: Restored, batches: Batches) -> None:
    """UserError where the corpus is not the one that the checkpoint's position belongs to."""
    here = json.loads(json.dumps(batches.state()["parts"]))
    for there, now in zip(restored.data["parts"], here, strict=True):
        if there != now[: len(there)]:  # runs of older versions recorded no digest
            sizes = (
                "its size is the same, its text is not"
                if there[:3] == now[:3]
                else f"{there[0]} had {there[1]:,} sequences of {there[2]:,} tokens, {now[0]} has "
                f"{now[1]:,} of {now[2]:,}"
            )
            raise UserError(
                f"--workdir {workdir}: the corpus has changed since this run began: {sizes}. Bring "
                f"it back, or use another directory and --init-from {workdir}"
            )


def source_of(init_from: str, config: Config) -> sedd.Model:
    """The model to start from; UserError where its tokenizer or its network is another one."""
    where = f"--init-from {init_from}"
    try:
        source = sedd.load(init_from)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    there = source.config.data.tokenizer
    if source.tokenizer is None or there != config.data.tokenizer:
        raise UserError(
            f"{where}: its tokenizer is {there}, and --data.tokenizer is {config.data.tokenizer}; "
            "weights go with their tokenizer"
        )
    here = values(config.network)
    other = [
        f"its network.{name} is {value} and --network.{name.replace('_', '-')} is {here[name]}"
        for name, value in values(source.config.network).items()
        if name in here and here[name] != value and name not in FREE
    ]
    if other:
        raise UserError(f"{where} is of another configuration: {'; '.join(other)}")
    return source


def save_description(workdir: Path, config: Config, data: Data) -> None:
    """Write the configuration, the tokenizer and the token counts, which ``sedd.load`` reads."""
    if jax.process_index() == 0:
        described = (("config", config.to_json()), ("tokenizer", data.tokenizer.to_json()))
        for name, content in described:
            text = json.dumps(content, indent=2 if name == "config" else None)
            write_whole(workdir / f"{name}.json", text.encode())
        counts = io.BytesIO()
        np.save(counts, train_frequencies(data))
        write_whole(workdir / TRAIN_COUNTS, counts.getvalue())


def introduce(workdir: Path, prepared: Prepared, *, complete: bool) -> None:
    """Print the sizes of the run, and where it resumes or that it is complete."""
    config, data, restored = prepared.config, prepared.data, prepared.restored
    parameters = sum(x.size for x in jax.tree.leaves(prepared.state.params))
    rows = sum(packed.num_rows for packed, _ in data.train)
    console.print(
        f"{parameters:,} parameters · {data.tokenizer.num_tokens:,} tokens in the vocabulary · "
        f"{rows:,} sequences of {config.data.length} · {jax.device_count()} "
        f"{jax.devices()[0].device_kind} · batch {config.training.batch_size}"
    )
    if restored is None:
        return
    steps = f"step {restored.step:,} of {config.training.steps:,}"
    if restored.step < config.training.steps:
        console.print(f"resuming {workdir} at {steps}")
    elif complete:
        console.print(
            f"nothing to do: {workdir} is complete at {steps}; a larger --training.steps goes on"
        )
    else:
        console.print(f"{workdir} is at {steps}: its last validation or its plot is still missing")


def validator(config: Config, parts: Parts, tokenizer: Tokenizer, held_out: ValidationRows):
    """The function from averaged parameters to the figures of the validation bound."""
    count_text = text_counter(tokenizer)

    def validate(params) -> dict[str, Any]:
        result = evaluate_bound(
            parts.denoiser(params),
            parts.schedule,
            jax.random.key(config.seed),
            held_out,
            draws=config.evaluation.draws,
            count_text=count_text,
        )
        wanted = ("nats_per_token", "standard_error", "standard_error_draws", "perplexity")
        figures = {name: getattr(result, name) for name in wanted}
        return figures | {k: v for k, v in result.to_json().items() if k.startswith("bits") and v}

    return validate


def text_sampler(config: Config, parts: Parts, tokenizer: Tokenizer):
    """The function from averaged parameters to a few texts."""

    def sample(params) -> list[str]:
        model = sedd.Model(
            denoiser=parts.denoiser(params),
            parts=parts,
            config=config,
            tokenizer=tokenizer,
            source="training",
        )
        key = jax.random.key(config.seed)
        return sedd.sample(model, key, num=SAMPLES, sampler=parts.sampler).text or []

    return sample


def train_frequencies(data: Data):
    """Expected counts of the tokens in as many training examples as there are rows, [N]."""
    total = sum(weight for _, weight in data.train)
    rows = sum(packed.num_rows for packed, _ in data.train)
    shares = (
        rows * weight / total / packed.num_rows * packed.counts for packed, weight in data.train
    )
    return np.sum(list(shares), axis=0)


def trigram_bits(data: Data, rows: ValidationRows) -> float | None:
    """Bits per character of a character trigram model on the validation rows.

    It is fitted to the beginning of the training text, ``TRIGRAM_TOKENS`` tokens of each part. None
    where the tokenizer does not say which text its tokens spell.
    """
    try:
        pieces = data.tokenizer.token_bytes()
    except UserError:
        return None
    text = "".join(joined_text(pieces, packed.tokens[:TRIGRAM_TOKENS]) for packed, _ in data.train)
    texts = (
        joined_text(pieces, x0_L[scored_L])
        for batch in rows
        for x0_L, scored_L in zip(*batch, strict=True)
    )
    nats, characters = CharacterTrigram.fit(text).nats(texts)
    return nats / characters / math.log(2)


def conclude(
    workdir: Path, data: Data, rows: ValidationRows, frequencies: float, *, exact: bool
) -> None:
    """Print the last validation beside two baselines on the same tokens, and the files.

    ``frequencies`` are the nats per token of the training frequencies. ``exact`` says that the
    figures are likelihoods, not bounds.
    """
    files = f"written to {workdir}: checkpoints/, curves.png, metrics.jsonl, samples/, tensorboard/"
    validated = [r for r in read_metrics(workdir) if r.get("validation_nats_per_token") is not None]
    if not validated:
        console.print(f"\nfinished without a validation, as --training.eval-every asks\n{files}")
        return
    last = validated[-1]
    nats, error = last["validation_nats_per_token"], last["validation_standard_error"]
    sign = "=" if exact else "≤"
    console.print(
        f"\nvalidation {'NLL' if exact else 'bound'} at step {last['step']:,}, ± standard error\n"
        f"  {sign} {nats:.4f} ± {error:.4f} nats per token, perplexity {sign} "
        f"{last['validation_perplexity']:.3f}\n"
        f"    {frequencies:.4f} by the frequencies of the training tokens alone"
    )
    bits = last.get("validation_bits_per_character")
    if bits is not None:
        console.print(f"  {sign} {bits:.4f} ± {bits * error / nats:.4f} bits per character")
        trigram = trigram_bits(data, rows)
        if trigram is not None:
            console.print(f"    {trigram:.4f} by a character trigram model of the training text")
    console.print(files)
