"""Infilling of a sentence of a story, or of a line of code, by the tasks of arXiv:2504.20456.

- `rocstories`: the CSV file of the cloze test's validation stories of 2016, each with its right
  ending. `--sentences 1` hides the third of the five sentences, `--sentences 3` the second to the
  fourth. A draw is compared with the hidden text: F-measures of ROUGE by `rouge_score`, without
  stemming, × 100. The error is that of the mean over stories.
- `humaneval`: the single-line file of openai's human-eval-infilling, JSON lines, also with gzip.
  One draw for each task; it passes if the program with it passes the task's tests. The programs are
  run, see `benchmarks/sandbox.py`.

Temperature 1. The text before the gap, the hidden text and the text behind it are tokenised apart,
and the gap has the true number of tokens.

    python benchmarks/infill.py --checkpoint RUN --task rocstories --data FILE.csv --sentences 1
    python benchmarks/infill.py --checkpoint RUN --task humaneval --data FILE.jsonl.gz --run-code
"""

import csv
import dataclasses
import gzip
import json
import sys
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import jax
import numpy as np
import tyro
from report import report
from sandbox import Outcome, described, run_code

import sedd
from sedd.commands.asking import check_order
from sedd.commands.cli import note, run
from sedd.commands.sample_flags import parse_with_sampler
from sedd.commands.sampler_flags import check_integers, fields_of, sampler_options
from sedd.configuration.build import build_sampler
from sedd.configuration.components import Options
from sedd.constraints.clamp import Clamp, from_hidden
from sedd.errors import FieldError, UserError
from sedd.progress import Activity

STORY = [f"InputSentence{number}" for number in range(1, 5)]
ENDINGS = {"1": "RandomFifthSentenceQuiz1", "2": "RandomFifthSentenceQuiz2"}
RIGHT = "AnswerRightEnding"
TASK = ("prompt", "canonical_solution", "suffix", "test", "entry_point")
ROUGE = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The task, the model and the sampler."""

    checkpoint: str
    """Directory of a run or of a published checkpoint."""
    step: int | Literal["best"] | None = None
    """Checkpoint of a run; by default the newest."""
    task: Literal["rocstories", "humaneval"]
    data: Path
    """The CSV file of the stories, or the JSON Lines file of the tasks."""
    sentences: Literal[1, 3] | None = None
    """Of rocstories: how many sentences are hidden."""
    trials: int | None = None
    """Of rocstories: draws for each story; by default 5."""
    run_code: bool = False
    """Of humaneval: permit that programs are run which the model wrote."""
    timeout: float = 10.0
    """Of humaneval: seconds after which a program is stopped."""
    num: int | None = None
    """Take the first stories or tasks only; by default all."""
    seed: int = 0
    """Seed of the noise. A draw depends neither on the batch nor on the other stories or tasks."""
    batch_size: int = 32
    """Sequences that are drawn at the same time."""
    sampler: Annotated[Options, tyro.conf.arg(name="")]

    def __post_init__(self):
        for name in ("trials", "num", "batch_size", "timeout"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise FieldError(name, f"must be above 0, got {value}")
        if not 0 <= self.seed < 2**32:
            raise FieldError("seed", f"must be in [0, 2**32), got {self.seed}")
        for need in fields_of(self.sampler.name) & {"verifier", "profile"}:
            name = self.sampler.name
            raise FieldError("sampler", f"{name} needs a {need}, and this benchmark has none")
        if self.task == "rocstories" and self.sentences is None:
            raise FieldError("sentences", "is missing: rocstories hides 1 or 3 sentences")
        if self.task == "humaneval":
            for name in ("sentences", "trials"):
                if getattr(self, name) is not None:
                    raise FieldError(name, ": humaneval has one draw of one line for each task")
            if not self.run_code:
                raise FieldError("run_code", "is missing: humaneval runs code that a model wrote")


def read_settings(arguments: Sequence[str]) -> Settings:
    """Parse the flags, those of the sampler among them; UserError if one is wrong."""
    required = dict.fromkeys(("checkpoint", "task", "data"), tyro.MISSING)
    return parse_with_sampler(Settings, arguments, __doc__ or "", **required)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hidden:
    """A text with a hidden stretch."""

    before: str
    hidden: str
    after: str
    test: str = ""
    """Python code that follows the text of a task and tests it."""

    def program(self, line: str) -> str:
        """The program of a task and its test, with ``line`` in the place of the hidden one."""
        return f"{self.before}{line}{self.after}\n{self.test}"


def read_stories(path: Path, sentences: int) -> list[Hidden]:
    """Read the stories of the cloze test, and hide one sentence or three.

    Raises:
        UserError: the file cannot be read, lacks a column, or has a story without a sentence or a
            right ending; the message names the line.
    """
    stories = []
    first, last = {1: (2, 3), 3: (1, 4)}[sentences]
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = [*STORY, *ENDINGS.values(), RIGHT]
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise UserError(f"no column {missing[0]}: not the CSV file of the cloze test")
            for row in reader:
                story = _story(row, reader.line_num)
                stories.append(
                    Hidden(
                        before=" ".join(story[:first]),
                        hidden=" " + " ".join(story[first:last]),
                        after=" " + " ".join(story[last:]),
                    )
                )
    except (OSError, UnicodeDecodeError, csv.Error, UserError) as error:
        raise _unread(path, error) from error
    return stories


def _story(row: Mapping[str, str | None], line: int) -> list[str]:
    """The five sentences of a story; UserError if one is missing."""
    right = (row[RIGHT] or "").strip()
    if right not in ENDINGS:
        raise UserError(f"line {line}: {RIGHT} must be 1 or 2, got {right!r}")
    story = {name: (row[name] or "").strip() for name in (*STORY, ENDINGS[right])}
    for name, sentence in story.items():
        if not sentence:
            raise UserError(f"line {line}: {name} is empty")
    return list(story.values())


def read_tasks(path: Path) -> list[Hidden]:
    """Read the tasks of human-eval-infilling.

    Raises:
        UserError: the file cannot be read, or a line is no task; the message names the line.
    """
    tasks = []
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        for number, line in enumerate(content.decode("utf-8-sig").split("\n"), 1):
            if line.strip():
                tasks.append(_task(line, number))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, UserError) as error:
        raise _unread(path, error) from error
    return tasks


def _task(line: str, number: int) -> Hidden:
    """The task of a line; UserError if it has not all fields."""
    try:
        task = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"line {number}: not JSON ({error})") from None
    for name in TASK:
        if not isinstance(task, dict) or not isinstance(task.get(name), str):
            raise UserError(f"line {number}: a task is an object with the text {name!r}")
    before, hidden, after, test, entry = (task[name] for name in TASK)
    if not hidden:
        raise UserError(f"line {number}: canonical_solution is empty, so there is nothing to hide")
    return Hidden(before=before, hidden=hidden, after=after, test=f"{test}\ncheck({entry})")


def _unread(path: Path, error: Exception) -> UserError:
    """The error of ``--data``."""
    if isinstance(error, UnicodeDecodeError):
        return UserError(f"--data {path}: not UTF-8 text")
    strerror = error.strerror if isinstance(error, OSError) else None
    return UserError(f"--data {path}: {strerror or error}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draws:
    """What a model drew into the gaps."""

    texts: dict[int, list[str]]
    """The texts of each gap, by the place in the list of all; one for each trial."""
    left_out: Counter[str]
    """How many were left out, by the reason."""
    tokens: int
    """Drawn tokens."""
    calls: int
    """Network calls for them, summed over the draws."""
    rows: int
    """Rows of the batches of these calls."""


def draw(settings: Settings, hidden: Sequence[Hidden], trials: int) -> Draws:
    """Load the model, and draw the hidden texts.

    Args:
        settings: checkpoint, sampler, batch size and seed.
        hidden: the texts. Those that the model cannot read or that are too long are left out.
        trials: draws for each.

    Raises:
        UserError: the model does not support the sampler, or every text is left out.
    """
    model = sedd.load(settings.checkpoint, step=settings.step)
    if model.tokenizer is None:
        raise UserError(f"--checkpoint {settings.checkpoint}: no tokenizer to read text with")
    clamps, left_out = gaps(model.tokenizer, hidden, model.length)
    if not clamps:
        reasons = "; ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise UserError(f"--data {settings.data}: nothing to draw: {reasons or 'it is empty'}")
    options = sampler_options(settings.sampler)
    check_integers(options)
    sampler = build_sampler(options, model.schedule)
    check_order(sampler, min(clamp.length for clamp in clamps.values()))
    if sampler.caveat:
        note(sampler.caveat)
    # In the order of their lengths: a batch is padded to its longest sequence, and there are few
    # lengths of batches, each with its compiled program.
    order = sorted(clamps, key=lambda place: -clamps[place].length)
    draws = [(place, trial) for place in order for trial in range(trials)]
    size = max(settings.batch_size // sampler.width, 1)
    texts: dict[int, list[str]] = {place: [] for place in sorted(clamps)}
    calls = rows = 0
    with Activity("compiling and drawing", total=len(draws)) as activity:
        for start in range(0, len(draws), size):
            batch = draws[start : start + size]
            given = [clamps[place] for place, _ in batch]
            keys_B = _keys(settings.seed, np.array(batch, np.uint32))
            result = sedd.sample(model, keys_B, clamp=given, sampler=sampler)
            for row, (place, _) in enumerate(batch):
                texts[place].append(gap_text(model.tokenizer, result.tokens[row], clamps[place]))
            calls, rows = calls + int(result.calls.sum()), rows + int(result.rows.sum())
            activity.update("drawing", completed=start + len(batch))
    tokens = trials * sum(int((~clamp.fixed_L).sum()) for clamp in clamps.values())
    return Draws(texts=texts, left_out=left_out, tokens=tokens, calls=calls, rows=rows)


def gaps(
    tokenizer: Any, hidden: Sequence[Hidden], length: int
) -> tuple[dict[int, Clamp], Counter[str]]:
    """The given tokens and the gap of each text, by its place, and why others are left out.

    Args:
        tokenizer: encodes the texts.
        hidden: the texts.
        length: the most tokens of a text, its gap included.
    """
    clamps: dict[int, Clamp] = {}
    left_out: Counter[str] = Counter()
    for place, text in enumerate(hidden):
        try:
            clamp = from_hidden(tokenizer, text.before, text.hidden, text.after)
        except UserError:
            left_out["with characters that the tokenizer lacks"] += 1
            continue
        if clamp.fixed_L.all():
            left_out["whose hidden text has no token"] += 1
        elif clamp.length > length:
            left_out[f"longer than the model's {length} tokens"] += 1
        else:
            clamps[place] = clamp
    return clamps, left_out


def _keys(seed: int, draws_B2: np.ndarray) -> jax.Array:
    """A key for each draw, from the seed, the place of its text and the number of the trial."""
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), draws_B2[:, 0])
    return jax.vmap(jax.random.fold_in)(keys_B, draws_B2[:, 1])


def gap_text(tokenizer: Any, tokens_L: np.ndarray, clamp: Clamp) -> str:
    """The text of the gap, as it reads behind the text before it."""
    ((start, size),) = clamp.gaps
    before, whole = (tokenizer.decode(tokens_L[:end]) for end in (start, start + size))
    if whole.startswith(before):
        return whole[len(before) :]
    return tokenizer.decode(tokens_L[start : start + size])


def rouge(targets: Sequence[str], drawn: Sequence[Sequence[str]]) -> np.ndarray:
    """F-measures × 100 of drawn texts, averaged over the draws of each target.

    Args:
        targets: the hidden texts.
        drawn: for each target, the texts drawn in its place.

    Returns:
        ROUGE-1, ROUGE-2 and ROUGE-L of each target, [S, 3].
    """
    scorer = _rouge_scorer()
    scores = [
        np.mean([[s.fmeasure for s in scorer.score(target, text).values()] for text in texts], 0)
        for target, texts in zip(targets, drawn, strict=True)
    ]
    return 100 * np.array(scores)


def _rouge_scorer() -> Any:
    """The scorer of ``rouge_score``; UserError if the package is not installed."""
    try:
        from rouge_score import rouge_scorer  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "--task rocstories needs the package rouge-score: pip install -e '.[rouge]'"
        ) from None
    return rouge_scorer.RougeScorer(list(ROUGE), use_stemmer=False)


def mean_and_error(values: np.ndarray) -> tuple[float, float | None]:
    """The mean and its standard error; None for the error of one value."""
    many = len(values) > 1
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5) if many else None


def rocstories(settings: Settings) -> None:
    """Draw the hidden sentences of the stories, and report ROUGE."""
    assert settings.sentences is not None  # ``Settings`` demands it
    _rouge_scorer()  # before the model is loaded
    stories = read_stories(settings.data, settings.sentences)[: settings.num]
    trials = settings.trials or 5
    draws = draw(settings, stories, trials)
    scores_S3 = rouge([stories[place].hidden for place in draws.texts], [*draws.texts.values()])
    rows = []
    for name, scores_S in zip(ROUGE.values(), scores_S3.T, strict=True):
        mean, error = mean_and_error(scores_S)
        rows.append({"measure": name, "F × 100": mean, "±": error})
    conclude(settings, draws, rows, hidden_sentences=settings.sentences, trials=trials)


def humaneval(settings: Settings) -> None:
    """Draw the hidden lines of the tasks, run the programs, and report how many pass."""
    tasks = read_tasks(settings.data)[: settings.num]
    guards = checked_guards()
    note(described(guards, settings.timeout))
    draws = draw(settings, tasks, 1)
    outcomes = []
    with Activity("running the programs", total=len(draws.texts)) as activity:
        for place, (line,) in draws.texts.items():
            program = tasks[place].program(line)
            outcomes.append(run_code(program, seconds=settings.timeout).outcome)
            activity.update("running the programs", completed=len(outcomes))
    mean, error = mean_and_error(100 * np.array([outcome == "passed" for outcome in outcomes]))
    counts = {name: outcomes.count(name) for name in get_args(Outcome)}
    conclude(settings, draws, [{"pass@1, %": mean, "±": error, **counts}], guards=sorted(guards))


def checked_guards() -> frozenset[str]:
    """What the kernel guards; UserError if the sandbox cannot run a program of one import."""
    if sys.platform != "linux":
        raise UserError(f"--run-code: the sandbox is for Linux, and this is {sys.platform}")
    verdict = run_code("import math", seconds=60)
    if verdict.outcome != "passed":
        raise UserError("--run-code: the sandbox does not work here: a program of one import fails")
    return verdict.guards


def conclude(settings: Settings, draws: Draws, rows: list[dict[str, Any]], **about: Any) -> None:
    """Print the figures, and what limits them."""
    for reason, count in draws.left_out.items():
        print(f"Left out: {count} {reason}.")
    print(
        "Every gap has the true number of tokens. This tells the model how long the hidden text\n"
        "is, and flatters the figures."
    )
    num_draws = sum(map(len, draws.texts.values()))
    report(
        settings.task,
        rows,
        checkpoint=settings.checkpoint,
        sampler=settings.sampler.name,
        **about,
        drawn=len(draws.texts),
        left_out=draws.left_out.total(),
        tokens_a_gap=round(draws.tokens / num_draws, 2),
        tokens_a_call=round(draws.tokens / draws.calls, 3),
        rows_a_token=round(draws.rows / draws.tokens, 3),
    )


def main(settings: Settings) -> None:
    """Run one of the two tasks."""
    (rocstories if settings.task == "rocstories" else humaneval)(settings)


if __name__ == "__main__":
    run(lambda arguments: main(read_settings(arguments)))
