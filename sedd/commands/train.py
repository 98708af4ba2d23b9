"""``sedd train``: train a model, or go on with a run.

The command works in this order, so that a mistake costs neither time nor a file:

1. Read the flags. They change the recipe of --config, or the configuration that the run has saved.
2. Check everything that needs no data (components, batch size, devices, directory), and lock the
   directory against a second run.
3. Read the corpus, build the model, and restore the newest whole checkpoint if there is one.
4. Write ``config.json``, ``tokenizer.json`` and the token counts, which ``sedd.load`` needs.
5. Train. The loop writes ``checkpoints/``, ``metrics.jsonl``, ``samples/``, ``tensorboard/`` and
   ``curves.png``, and prints its progress.
6. Print the last validation beside two baselines on the same tokens.
"""

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
from sedd.commands.devices import Processes, join
from sedd.commands.train_control import divergence_line
from sedd.commands.train_from import started_from
from sedd.commands.train_start import (
    Prepared,
    check_is_run,
    check_student,
    is_complete,
    prepare,
)
from sedd.commands.train_validate import validator
from sedd.configuration.build import Parts, build_parts
from sedd.configuration.build_data import Data, ValidationRows
from sedd.configuration.config import Config
from sedd.configuration.position_weights import read_weights
from sedd.configuration.user_function import UserLogProb
from sedd.data.baselines import CharacterTrigram, joined_text, unigram_nats
from sedd.data.tokenizers import Tokenizer
from sedd.errors import UserError, fields_within
from sedd.evaluation.estimators import is_exact, resolve
from sedd.files import check_writable, only_writer, write_text, write_whole
from sedd.model import TRAIN_COUNTS, read_config
from sedd.networks.mesh import device_mesh
from sedd.objectives.energy import Energy
from sedd.objectives.marginal import Marginal
from sedd.progress import Activity
from sedd.training.flops import step_flops
from sedd.training.loop import Run, train
from sedd.training.metrics import read_metrics
from sedd.training.optimizer import make_schedule
from sedd.training.parallel import check_batch_size
from sedd.training.signals import leave_on_signals

SAMPLES = 4  # texts drawn each time during training
TRIGRAM_TOKENS = 8_000_000  # of each part of the training text, to fit the trigram baseline to
TITLE = "Train a discrete diffusion language model; run again, it goes on where it stopped."


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """The flags of ``sedd train``; every field of the configuration is one of them."""

    workdir: Path
    """Directory of the run. If it holds a run already, that run is resumed, and --config may be
    left out: the saved configuration is used."""
    config: Annotated[Config, tyro.conf.arg(name="")]
    profile: int | None = None
    """Number of steps to record for a profiler (TensorBoard, XProf, Perfetto), after the first ten
    steps, into WORKDIR/profile. By default none."""
    processes: Annotated[Processes, tyro.conf.arg(name="")] = Processes()

    def __post_init__(self):
        if self.profile is not None and self.profile < 1:
            raise ValueError(f"--profile must be at least 1, got {self.profile}")


@leave_on_signals()
def main(arguments: Sequence[str]) -> None:
    """Read the flags, check what can be checked before any work, lock the directory, and train.

    SIGTERM or Ctrl-C before the first step ends the command with code 0; during training the loop
    answers them with a checkpoint.

    Raises:
        UserError: a flag is wrong, the directory belongs to something else or to a run that is
            under way, or training cannot go on (a diverged loss, a full disk).
    """
    # Only without --config does the saved configuration of the directory matter here. It is read
    # from the raw arguments, since it gives the defaults of the flags that are still to be parsed.
    saved = None
    if take(arguments, "--config")[0] is None:
        workdir, _ = take(arguments, "--workdir")
        saved = None if workdir is None else read_config(Path(workdir).expanduser())
    command = parse_config(arguments, TrainCommand, TITLE, saved=saved, complete=started_from)
    join(command.processes)
    command = dataclasses.replace(command, config=read_weights(command.config))
    config, workdir = command.config, command.workdir
    # The real vocabulary is known only after the corpus was read, which may take hours. Components
    # for two tokens show every other mistake at once.
    objective = build_parts(config, num_tokens=2).objective
    if isinstance(objective, Energy):
        UserLogProb(objective.function).load()
    check_student(config, objective)
    check_batch_size(config.training.batch_size, jax.device_count(), config.training.accumulate)
    with fields_within("training"):
        device_mesh(fsdp=config.training.fsdp or 1)
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
        denoiser = prepared.parts.denoiser(None)
        exact = is_exact(resolve("auto", denoiser))
        conclude(workdir, data, rows, frequencies, exact=exact)


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
    unit = "nats per token"
    if isinstance(parts.objective, Marginal):
        unit = "loss in nats², validation in nats per token"
    elif parts.objective.teacher_calls:
        unit = "nats per token; the loss is that against the teacher"
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
        unigram_nats=None if parts.objective.trains_marginal_head else frequencies,
        unit=unit,
        flops=partial(
            step_flops,
            parts.network,
            config.training.batch_size,
            parts.objective.rows(config.data.length),
            teacher_calls=parts.objective.teacher_calls,
        ),
        profile=profile,
        wandb={"project": config.training.wandb} if config.training.wandb else None,
    )


def save_description(workdir: Path, config: Config, data: Data) -> None:
    """Write ``config.json``, ``tokenizer.json`` and the token counts, which ``sedd.load`` reads.

    The counts (``train_frequencies``, as a numpy file) are a baseline in ``sedd evaluate``. Of
    several processes the first one writes.
    """
    if jax.process_index() == 0:
        described = (("config", config.to_json()), ("tokenizer", data.tokenizer.to_json()))
        for name, content in described:
            indent = 2 if name == "config" else None
            text = json.dumps(content, indent=indent, ensure_ascii=False)
            write_text(workdir / f"{name}.json", text)
        counts = io.BytesIO()
        np.save(counts, train_frequencies(data))
        write_whole(workdir / TRAIN_COUNTS, counts.getvalue())


def introduce(workdir: Path, prepared: Prepared, *, complete: bool) -> None:
    """Print the sizes of the run, and where it resumes or that it is complete."""
    config, data, restored = prepared.config, prepared.data, prepared.restored
    params = prepared.state.params
    trained = prepared.parts.network.trainable(params)
    parameters, training = (sum(x.size for x in jax.tree.leaves(t)) for t in (params, trained))
    frozen = f" ({training:,} of them trained)" if training < parameters else ""
    rows = sum(packed.num_rows for packed, _ in data.train)
    console.print(
        f"{parameters:,} parameters{frozen} · "
        f"{data.tokenizer.num_tokens:,} tokens in the vocabulary · "
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
            f"nothing to do: {workdir} is complete at {steps}; to train further, give a larger "
            "--training.steps"
        )
    else:
        console.print(f"{workdir} is at {steps}: its last validation or its plot is still missing")


def text_sampler(config: Config, parts: Parts, tokenizer: Tokenizer):
    """Make the loop's ``sample``: a function from averaged parameters to ``SAMPLES`` texts.

    The key is the run's seed each time, so that texts of different steps can be compared.
    """

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
    """Counts of each token in the training text, [N], with the weights of the mixture.

    A part of the mixture with weight w contributes its relative counts times w / Σw, and the sum is
    scaled to the number of rows of all parts. For one corpus these are its plain counts.
    """
    total = sum(weight for _, weight in data.train)
    rows = sum(packed.num_rows for packed, _ in data.train)
    shares = (
        rows * weight / total / packed.num_rows * packed.counts for packed, weight in data.train
    )
    return np.sum(list(shares), axis=0)


def trigram_bits(data: Data, rows: ValidationRows) -> float | None:
    """Bits per character of a character trigram model on the validation rows.

    It is a baseline for the model's bits per character: the trigram model sees only the two
    previous characters. It is fitted to the first ``TRIGRAM_TOKENS`` tokens of each part of the
    training text. Returns None if the tokenizer does not tell the bytes of its tokens.
    """
    try:
        pieces = data.tokenizer.token_bytes()
    except UserError:
        return None
    text = "".join(
        joined_text(pieces, packed.first_tokens(TRIGRAM_TOKENS)) for packed, _ in data.train
    )
    texts = (
        joined_text(pieces, x0_L[scored_L])
        for batch in rows
        for x0_L, scored_L, *_ in zip(*batch, strict=True)
    )
    nats, characters = CharacterTrigram.fit(text).nats(texts)
    return nats / characters / math.log(2)


def figures_of_head(last: dict[str, Any]) -> str | None:
    """The last validation of a head, or of a model of an energy; None for a bound."""
    nats, error = last["validation_nats_per_token"], last["validation_standard_error"]
    if (gain := last.get("validation_gain")) is not None:
        return (
            "nats per masked token, ± standard error\n"
            f"  {nats:.4f} ± {error:.4f} of the tokens of a call jointly\n"
            f"  {nats + gain:.4f} of each token independently\n"
            f"  difference: {gain:.4f} ± {last['validation_gain_error']:.4f}"
        )
    if (bias := last.get("validation_bias")) is not None:
        return (
            "nats per token, ± standard error\n"
            f"  {nats:.4f} ± {error:.4f} root mean square difference of the head and one order\n"
            f"  {bias:.4f} ± {last['validation_bias_error']:.4f} mean difference"
        )
    if (log_z := last.get("validation_log_z")) is not None:
        free, error = last["validation_free_energy"], last["validation_free_energy_error"]
        return (
            f"{last['validation_texts']} texts of the model, ± standard error\n"
            f"  log Z = {log_z:.4f} ± {last['validation_log_z_error']:.4f} by importance weights, "
            f"which are worth {last['validation_effective_texts']:.0f} texts\n"
            f"  log Z ≥ {-free:.4f} ± {error:.4f} by the free energy"
        )
    return None


def conclude(
    workdir: Path, data: Data, rows: ValidationRows, frequencies: float, *, exact: bool
) -> None:
    """Print the last validation beside two baselines on the same tokens, and list the files.

    Heads and models of an energy have other figures, see ``figures_of_head``.

    Args:
        workdir: the directory of the run, whose ``metrics.jsonl`` holds the validation.
        data: the corpus, for the trigram model.
        rows: the validation rows.
        frequencies: nats per validation token of the training frequencies, the first baseline.
        exact: whether the figures are likelihoods, of an autoregressive model or of one order, or
            upper bounds.
    """
    files = f"written to {workdir}: checkpoints/, curves.png, metrics.jsonl, samples/, tensorboard/"
    validated = [r for r in read_metrics(workdir) if r.get("validation_nats_per_token") is not None]
    if not validated:
        console.print(
            f"\nfinished; the run was not validated, because --training.eval-every is None\n{files}"
        )
        return
    last = validated[-1]
    nats, error = last["validation_nats_per_token"], last["validation_standard_error"]
    if (figures := figures_of_head(last)) is not None:
        console.print(f"\nvalidation at step {last['step']:,}, {figures}\n{files}")
        return
    sign = "=" if exact else "≤"
    console.print(
        f"\nvalidation {'NLL' if exact else 'bound'} at step {last['step']:,}, ± standard error\n"
        f"  {sign} {nats:.4f} ± {error:.4f} nats per token, perplexity {sign} "
        f"{last['validation_perplexity']:.3f}\n"
        f"    baseline: {frequencies:.4f} for a model that knows only the token frequencies of the "
        "training text"
    )
    if line := divergence_line(last):
        console.print(line)
    bits = last.get("validation_bits_per_character")
    if bits is not None:
        console.print(f"  {sign} {bits:.4f} ± {bits * error / nats:.4f} bits per character")
        with Activity("fitting a trigram model"):
            trigram = trigram_bits(data, rows)
        if trigram is not None:
            console.print(
                f"    baseline: {trigram:.4f} for a character trigram model of the training text"
            )
    console.print(files)
