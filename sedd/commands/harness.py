"""``sedd harness``: evaluate a model on tasks of lm-evaluation-harness, with Monte-Carlo errors.

The flags are read and the model is loaded first. ``sedd.harness`` then runs the tasks, and the
table of their metrics is printed. ``--json`` and ``--records`` keep everything.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sedd.commands.cli import Terminal, unset
from sedd.commands.devices import DeviceFlags, is_first
from sedd.commands.load_flags import LoadFlags
from sedd.commands.sample_flags import parse_with_sampler
from sedd.commands.sampler_flags import sampler_options
from sedd.configuration.build import build_sampler
from sedd.configuration.components import Options
from sedd.errors import UserError
from sedd.evaluation.measured import Measured
from sedd.evaluation.report import Table
from sedd.files import check_writable, is_stdout, write_text
from sedd.harness.answering import Harness
from sedd.harness.tasks import GENERATION, evaluate_tasks
from sedd.progress import Activity, track

TITLE = "Evaluate a model on tasks of lm-evaluation-harness, with Monte-Carlo errors."
WIDTH = 160  # columns of the table if standard output is no terminal


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarnessCommand:
    """The flags of ``sedd harness``; options of the sampler, such as ``--steps``, are flags too."""

    checkpoint: Annotated[str, unset("DIR|hf://OWNER/NAME")]
    """Directory of a run or of a published checkpoint."""
    step: Annotated[int | Literal["best"] | None, unset("INT|best")] = None
    """Checkpoint of a run: the one of this step, or the best by validation; by default the newest.
    """
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME|FILE.yaml [...]")]
    """Tasks, groups or tags of lm-eval by name, separated by spaces or commas, or YAML files."""
    include_path: Annotated[Path | None, unset("DIR")] = None
    """A folder with further tasks."""
    num_fewshot: Annotated[int | None, unset("INT")] = None
    """Examples before each question; by default the task's number."""
    limit: Annotated[int | None, unset("INT")] = None
    """Evaluate only so many documents of each task."""
    likelihood: Literal["bound", "ordered"] = "bound"
    """How answers are scored: bound estimates an upper bound on the negative log likelihood, and
    ordered computes it for the tokens revealed from left to right, with a network call for each
    token. Autoregressive models are scored exactly."""
    draws: int = 128
    """Network calls for each bound; a multiple of 4. An answer of one token is exact and takes one
    call if the model is time-independent."""
    max_length: Annotated[int | None, unset("INT")] = None
    """The most tokens of a request, context and answer together; by default the length of the
    model's training. A longer request is refused."""
    gen_kwargs: Annotated[tuple[str, ...], unset("KEY=VALUE [...]")] = ()
    """Options of generation that replace those of the tasks: until, max_gen_toks, do_sample,
    temperature, top_k, top_p."""
    chat: bool = False
    """Write requests by the chat template of the model's tokenizer, examples as earlier turns."""
    system: Annotated[str | None, unset("TEXT")] = None
    """A system message."""
    seed: int = 0
    """Seed of all draws. A request depends on its tokens and the seed, not on its batch."""
    batch_size: int = 32
    """Sequences in a batch, over all devices."""
    json: Annotated[Path | None, unset("FILE.json")] = None
    """Write the results to this file; - is standard output, and then no table is printed."""
    records: Annotated[Path | None, unset("FILE.jsonl")] = None
    """Write a line for each request: the score with its error, or the answer with its calls."""
    confirm_run_unsafe_code: bool = False
    """Allow tasks that run code which the model has written."""
    how: Annotated[LoadFlags, tyro.conf.arg(name="")] = LoadFlags()
    on: Annotated[DeviceFlags, tyro.conf.arg(name="")] = DeviceFlags()
    sampler: Annotated[Options, tyro.conf.arg(name="")]

    def __post_init__(self):
        for flag, value in (("--num-fewshot", self.num_fewshot), ("--limit", self.limit)):
            least = 0 if flag == "--num-fewshot" else 1
            if value is not None and value < least:
                raise ValueError(f"{flag} must be at least {least}, got {value}")

    @property
    def names(self) -> list[str]:
        """The tasks, one by one."""
        return [name for part in self.tasks for name in part.split(",") if name]


def main(arguments: Sequence[str]) -> None:
    """Evaluate the tasks, write the files and print the table.

    Raises:
        UserError: a flag is wrong, lm-eval is not installed, a task or its data cannot be read, or
            a request does not fit the model.
    """
    command = read_command(arguments)
    quiet()
    mesh = command.on.join()
    with Activity(f"loading {command.checkpoint}"):
        model = command.how.load(command.checkpoint, step=command.step, mesh=mesh)
        sampler = build_sampler(sampler_options(command.sampler), model.schedule)
        harness = Harness(
            model=model,
            likelihood=command.likelihood,
            draws=command.draws,
            seed=command.seed,
            batch_size=command.batch_size,
            max_length=command.max_length,
            sampler=sampler,
            chat=command.chat,
            track=track,
        )
    results, records = evaluate_tasks(
        harness,
        command.names,
        include_path=command.include_path,
        num_fewshot=command.num_fewshot,
        limit=command.limit,
        gen_kwargs=generation_options(command.gen_kwargs),
        system=command.system,
        confirm_run_unsafe_code=command.confirm_run_unsafe_code,
    )
    if not is_first():
        return
    if command.records is not None:
        lines = (json.dumps(record, ensure_ascii=False) for record in records)
        write_text(command.records, "".join(f"{line}\n" for line in lines))
    if command.json is not None:
        text = json.dumps(results, indent=2, ensure_ascii=False, default=str)
        write_text(command.json, f"{text}\n")
    if command.json is None or not is_stdout(command.json):
        console = Terminal(soft_wrap=False)
        console = console if console.is_terminal else Terminal(width=WIDTH, soft_wrap=False)
        console.print(metrics_table(results))


def read_command(arguments: Sequence[str]) -> HarnessCommand:
    """Parse the flags, the options of the picked sampler among them.

    Raises:
        UserError: a flag is wrong, or a file cannot be written.
    """
    command = parse_with_sampler(
        HarnessCommand, arguments, TITLE, checkpoint=tyro.MISSING, tasks=tyro.MISSING
    )
    generation_options(command.gen_kwargs)
    for flag, path in (("--json", command.json), ("--records", command.records)):
        if path is not None and not is_stdout(path):
            check_writable(path, f"{flag} {path}")
    return command


def quiet() -> None:
    """Show lm-eval's warnings as notes, and none of the progress bars beside those of the command.

    The bars' packages read the environment when they are imported, later.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings = logging.StreamHandler()
    warnings.setFormatter(logging.Formatter("note: lm-eval: %(message)s"))
    warnings.setLevel(logging.WARNING)
    logger = logging.getLogger("lm_eval")
    logger.handlers, logger.propagate = [warnings], False


def generation_options(given: Sequence[str]) -> dict[str, Any]:
    """Read ``KEY=VALUE`` pairs, whose values are JSON or plain text.

    Raises:
        UserError: a pair has no ``=``, or its key is unknown.
    """
    options = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or name not in GENERATION:
            known = ", ".join(sorted(GENERATION))
            raise UserError(f"--gen-kwargs {pair}: must be KEY=VALUE, where KEY is one of {known}")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def metrics_table(results: Mapping[str, Any]) -> Table:
    """A table with a row for each metric of each task or group.

    ``± s.e.`` is lm-eval's error over documents; the part of it that other draws of the model's
    noise would change stands in a column of its own.
    """
    rows = []
    for name, figures in results["results"].items():
        about = results["sedd"]["tasks"].get(name, {})
        for key, value in figures.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = figures.get(f"{metric}_stderr,{kind}")
            error = error if isinstance(error, int | float) else None
            rows.append(
                (
                    figures.get("alias", name),
                    metric if kind == "none" else f"{metric} ({kind})",
                    Measured(value, error) if isinstance(value, int | float) else str(value),
                    figures.get(f"{metric}_mc_stderr,{kind}"),
                    about.get("nats_error"),
                    about.get("calls_per_answer"),
                )
            )
    how = results["sedd"]
    scores = {
        "exact": "exact log likelihoods",
        "ordered": "exact log likelihoods from left to right",
    }.get(how["estimator"], f"bounds ({how['estimator']}, {how['draws']} draws)")
    return Table(
        columns=("task", "metric", "value ± s.e.", "s.e. of draws", "nats s.e.", "calls/answer"),
        rows=rows,
        title=f"{how['checkpoint']}: scores are {scores}",
    )
