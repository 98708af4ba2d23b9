"""Train a discrete diffusion language model; run again, it goes on where it stopped."""

import dataclasses
import json
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

import sedd
from sedd.commands.cli import console, note, parse_config
from sedd.configuration.build import (
    Data,
    HeldOut,
    Parts,
    build_data,
    build_parallel,
    build_parts,
    build_step,
)
from sedd.configuration.config import Config, differences
from sedd.data.loader import Batches
from sedd.data.tokenizers import Tokenizer
from sedd.errors import UserError
from sedd.evaluation.bound import evaluate_bound
from sedd.files import check_writable, only_writer, write_whole
from sedd.model import read_config, read_tokenizer, text_counter
from sedd.training.checkpoint import Checkpoints, Restored, kinds_of, require_same
from sedd.training.distributed import Processes, connect
from sedd.training.flops import step_flops
from sedd.training.loop import leave_on_signals, train
from sedd.training.metrics import read_metrics
from sedd.training.optimizer import make_schedule
from sedd.training.parallel import check_batch_size, check_mesh
from sedd.training.state import TrainState, init_state

SAMPLES = 4  # texts drawn each time during training


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """The flags of ``train.py``, those of the configuration among them."""

    workdir: Path
    """Everything is written here; a run that is there already is resumed."""
    config: Annotated[Config, tyro.conf.arg(name="")]
    init_from: str | None = None
    """Start from the weights of another run's newest checkpoint, or of a published one."""
    profile: int | None = None
    """Record so many steps for a profiler's viewer, into WORKDIR/profile."""
    processes: Annotated[Processes, tyro.conf.arg(name="")] = Processes()

    def __post_init__(self):
        if self.profile is not None and self.profile < 1:
            raise ValueError(f"--profile must be at least 1, got {self.profile}")


@leave_on_signals()
def main(arguments: Sequence[str]) -> None:
    """Check what can be checked before any work, and train as the directory's only writer."""
    command = parse_config(arguments, TrainCommand, __doc__ or "")
    connect(command.processes)
    console.quiet = jax.process_index() > 0  # one of several speaks for all
    config, workdir = command.config, command.workdir
    build_parts(config, num_tokens=2)  # mistakes in the configuration come before any work
    check_batch_size(config.training.batch_size, jax.device_count(), config.training.accumulate)
    check_mesh(jax.device_count(), config.training.fsdp or 1)
    check_writable(workdir / "config.json", f"--workdir {workdir}")
    with ExitStack() as closes:
        if jax.process_index() == 0 and not closes.enter_context(
            only_writer(workdir, f"--workdir {workdir}")
        ):
            note(f"{workdir} is on a file system without locks: start no second run in it")
        train_in(workdir, command)


def train_in(workdir: Path, command: TrainCommand) -> None:
    """Build what the configuration says, train it, and say where everything is."""
    config = command.config
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.training.keep)
    tokenizer = source = None
    if checkpoints.steps():
        tokenizer = check_same_run(workdir, config)
    elif command.init_from is not None:
        source = source_of(command.init_from, config)
        tokenizer = source.tokenizer

    with console.status("reading the corpus") as status:
        data = build_data(
            config,
            tokenizer=tokenizer,
            progress=lambda documents, tokens: status.update(
                f"tokenising: {documents:,} documents, {tokens:,} tokens"
            ),
        )
    parts = build_parts(config, data.tokenizer.num_tokens)
    step = build_step(config, parts)
    parallel = build_parallel(config, step)
    make_state = partial(init_state, step.network, step.optimizer, config.seed)
    restored = checkpoints.restore_latest(jax.eval_shape(make_state))
    if restored:
        state = parallel.place(restored.state)
    elif source is not None:
        expected = kinds_of(jax.eval_shape(parts.network.init, jax.random.key(0)))
        require_same(f"--init-from {command.init_from}", kinds_of(source.denoiser.params), expected)
        state = parallel.place(make_state(params=source.denoiser.params))
        del source  # its copy of the parameters would stay on the device
    else:
        state = parallel.init(make_state)
    save_description(workdir, config, data.tokenizer)
    introduce(command, data, state, restored)

    held_out = HeldOut(
        parts=[packed for packed, _ in data.validation],
        max_sequences=config.evaluation.max_sequences,
        batch_size=config.evaluation.batch_size,
    )
    entropy = held_out.unigram_entropy()
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
    result = train(
        workdir=workdir,
        state=state,
        parallel=parallel,
        batches=batches,
        checkpoints=checkpoints,
        steps=config.training.steps,
        cadence=config.training.cadence,
        pending=restored.pending if restored else None,
        learning_rate=make_schedule(config.optimizer, config.training.steps),
        validate=validator(config, parts, data.tokenizer, held_out),
        sample=text_sampler(config, parts, data.tokenizer),
        unigram_entropy=entropy,
        flops=partial(step_flops, parts.network, config.training.batch_size, config.data.length),
        profile=command.profile,
        wandb={"project": config.training.wandb} if config.training.wandb else None,
    )
    if not result.stopped:
        conclude(workdir, entropy, "NLL" if parts.parameterization.causal else "bound")


def check_same_run(workdir: Path, config: Config) -> Tokenizer:
    """The tokenizer of the run that is there; UserError when it is not this configuration's."""
    saved = read_config(workdir)
    if saved is None:
        raise UserError(f"--workdir {workdir}: it holds checkpoints but no config.json")
    if found := differences(saved, config):
        raise UserError(
            f"--workdir {workdir}: it holds a run of another configuration: {'; '.join(found)}. "
            "Choose another directory, or the same values"
        )
    return read_tokenizer(workdir)


def check_same_data(workdir: Path, restored: Restored, batches: Batches) -> None:
    """UserError when the corpus has changed since the checkpoint: its place would mean nothing."""
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
    """The model to start from, with the same tokenizer: without it the weights mean nothing."""
    try:
        source = sedd.load(init_from)
    except UserError as error:
        raise UserError(f"--init-from {init_from}: {error}") from None
    there = source.config.data.tokenizer
    if source.tokenizer is None or there != config.data.tokenizer:
        raise UserError(
            f"--init-from {init_from}: its tokenizer is {there}, and --data.tokenizer is "
            f"{config.data.tokenizer}; weights go with their tokenizer"
        )
    return source


def save_description(workdir: Path, config: Config, tokenizer: Tokenizer) -> None:
    """What ``sedd.load`` needs beside the checkpoints."""
    if jax.process_index() == 0:
        for name, content in (("config", config.to_json()), ("tokenizer", tokenizer.to_json())):
            text = json.dumps(content, indent=2 if name == "config" else None)
            write_whole(workdir / f"{name}.json", text.encode())


def introduce(
    command: TrainCommand, data: Data, state: TrainState, restored: Restored | None
) -> None:
    """Say what is about to happen."""
    config = command.config
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    rows = sum(packed.num_rows for packed, _ in data.train)
    console.print(
        f"{parameters:,} parameters · {data.tokenizer.num_tokens:,} tokens in the vocabulary · "
        f"{rows:,} sequences of {config.data.length} · {jax.device_count()} "
        f"{jax.devices()[0].device_kind} · batch {config.training.batch_size}"
    )
    if restored:
        steps = f"step {restored.step:,} of {config.training.steps:,}"
        if restored.step < config.training.steps:
            console.print(f"resuming {command.workdir} at {steps}")
        else:
            console.print(
                f"{command.workdir} is complete at {steps}; a larger --training.steps goes on"
            )
        if command.init_from is not None:
            console.print("--init-from was used when this run began; it changes nothing now")


def validator(config: Config, parts: Parts, tokenizer: Tokenizer, held_out: HeldOut):
    """From averaged parameters to the validation bound."""
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
    """From averaged parameters to a few texts."""

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


def conclude(workdir: Path, entropy: float, what: str) -> None:
    """The last validation beside what a model without context would reach, and the files.

    ``what`` was validated: a bound on the NLL, or the NLL itself.
    """
    validated = [r for r in read_metrics(workdir) if r.get("validation_nats_per_token") is not None]
    if not validated:
        console.print(f"\n{workdir} has no validation in its metrics.jsonl")
        return
    last = validated[-1]
    bound, error = last["validation_nats_per_token"], last["validation_standard_error"]
    console.print(
        f"\n{f'validation {what}':18}{bound:.4f} ± {error:.4f} nats per token (standard error), "
        f"perplexity {'≤' if what == 'bound' else '='} {last['validation_perplexity']:.3f}\n"
        f"unigram entropy   {entropy:.4f} nats per token of the same tokens; the {what} plus three "
        f"standard errors is {(bound + 3 * error) / entropy:.3f} of it\n"
        f"written to {workdir}: checkpoints/, curves.png, metrics.jsonl, samples/, tensorboard/"
    )
