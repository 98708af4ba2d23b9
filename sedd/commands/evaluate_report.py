"""The parts of ``sedd evaluate`` beside perplexity: comparisons, and the HTML report.

``Comparisons`` holds the tests that the flags ask for. They compare with the first data set only:

- ``--samples``: statistics of samples against those of as many evaluated rows, or all if there are
  fewer.
- ``--judge``: generative perplexity of both under another model, and MAUVE of its features.
- ``--price``: nats per token if several tokens are revealed in a network call.
- ``--diagnose``: predictions by distance to the nearest revealed token, and the price.
- ``--marginals``, ``--marginal-check``: log marginals by a marginal head.
- ``--frontier``: judged quality against entropy, of texts that are drawn here.
- ``--consistency``: whether the model's conditionals at pairs of positions belong to one joint
  distribution.
"""

import datetime
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sedd.commands.cli import note
from sedd.commands.evaluate_diagnosis import check_diagnosis, diagnosis_of_data, priced_calls
from sedd.commands.evaluate_flags import EvaluateCommand
from sedd.commands.evaluate_frontier import FrontierTask
from sedd.commands.evaluate_judges import judge_of, offline_judge
from sedd.commands.evaluate_marginals import RankedTexts
from sedd.errors import UserError
from sedd.evaluating.inputs import texts_of
from sedd.evaluating.price import price_of
from sedd.evaluation.consistency import consistency, draw_pairs
from sedd.evaluation.datasets import DataSet
from sedd.evaluation.generative_perplexity import generative_perplexity
from sedd.evaluation.judges import Judge
from sedd.evaluation.mauve import mauve
from sedd.evaluation.price_draws import check_model, check_scored
from sedd.evaluation.price_report import price_figures, price_section
from sedd.evaluation.report import Section, write_html
from sedd.evaluation.scoring import EvaluationResult
from sedd.evaluation.statistics import compare
from sedd.evaluation.tables import detail_table, summary_table, title
from sedd.model import Model
from sedd.progress import Activity, track

# Consistency is computed on all pairs of tokens if the vocabulary has at most this many tokens, and
# on the 128 most likely tokens otherwise.
EXACT_GRID = 512
MAUVE_TEXTS = 50  # fewer would make at most five buckets, and a score that is mostly noise
SHOWN = 3  # samples printed in the report


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """The tests that the flags ask for beside perplexity.

    ``of`` reads their inputs, ``check`` tests these inputs before hours of scoring, and ``compute``
    runs the tests afterwards.

    Args:
        command: the flags.
        model: the evaluated model.
        samples: the texts of ``--samples``; None without the flag.
        judge: the model of ``--judge``; None without the flag.
        marginals: the texts of ``--marginals``; None without it and without ``--marginal-check``.
        frontier: the models of ``--frontier``; None without the flag.
    """

    command: EvaluateCommand
    model: Model
    samples: list[str] | None
    judge: Judge | None
    marginals: RankedTexts | None = None
    frontier: FrontierTask | None = None

    @classmethod
    def of(cls, command: EvaluateCommand, model: Model) -> "Comparisons":
        """Read the files of samples and of texts to rank, and load the judge and a second model.

        Raises:
            UserError: a file cannot be read, there is no such judge, or the model has no marginal
                head.
        """
        samples = None if command.samples is None else read_samples(command.samples)
        judge = None if command.judge in (None, "ngram") else judge_of(command.judge)
        frontier = None
        if command.frontier.frontier:
            frontier = FrontierTask.of(command, model, judge or offline_judge(command, model))
        return cls(
            command=command,
            model=model,
            samples=samples,
            judge=judge,
            marginals=RankedTexts.of(command, model),
            frontier=frontier,
        )

    def check(self, data: DataSet) -> None:
        """Check that there are enough texts and pairs of positions for the tests.

        Raises:
            UserError: there are fewer than 2 samples or rows of ``data``, or fewer pairs of
                neighbouring scored positions than ``--consistency`` asks for; or the price or the
                diagnosis does not exist for the model, the rows or a number of calls.
        """
        if self.command.price is not None:
            self._check_price(self.command.price, data)
        if self.command.diagnose is not None:
            check_diagnosis(self.command, self.model)
        if self.marginals is not None:
            self.marginals.check(data)
        if self.frontier is not None:
            self.frontier.check(data)
        if self.samples is not None and min(len(self.samples), len(data.chosen)) < 2:
            raise UserError(
                f"--samples {self.command.samples}: at least 2 samples and 2 rows of text are "
                f"needed, got {len(self.samples)} and {len(data.chosen)}"
            )
        pairs = self.command.consistency
        if pairs is not None:
            try:
                _, scored_BL = data.spread(pairs)
                draw_pairs(self.model.denoiser, scored_BL, self._key, pairs=pairs, distance=1)
            except ValueError as error:
                raise UserError(f"--consistency {pairs}: {error}") from error

    def compute(
        self, data: DataSet, result: EvaluationResult
    ) -> tuple[list[Section], dict[str, Any]]:
        """Run all tests against the text of ``data``, of which ``result`` are the figures.

        Returns:
            The sections of the report with their tables, and the figures for the JSON file.

        Raises:
            UserError: a test cannot be computed from these samples.
        """
        sections, figures = [], {}
        calls = self.command.price
        if self.command.diagnose is not None:
            sections.append(diagnosis_of_data(self.command, self.model, data, figures))
            if calls is None:
                calls, why = priced_calls(self.model, data)
                if why:
                    note(f"--diagnose: without a price: {why}")
        if calls:
            sections.append(self._of_parallelism(data, calls, figures))
        if self.marginals is not None:
            sections.append(self.marginals.section(data, result, figures))
        if self.frontier is not None:
            sections.append(self.frontier.section(data, figures))
        with Activity("comparing samples and conditionals"):
            if self.samples is not None:
                try:
                    sections += self._of_samples(self.samples, data, figures)
                except ValueError as error:
                    raise UserError(f"--samples {self.command.samples}: {error}") from error
            if self.command.consistency is not None:
                sections.append(self._of_conditionals(data, self.command.consistency, figures))
        return sections, figures

    @property
    def _key(self) -> jax.Array:
        return jax.random.key(self.command.seed)

    def _of_samples(
        self, samples: list[str], data: DataSet, figures: dict[str, Any]
    ) -> list[Section]:
        """Compare the samples with as many real texts, also by the judge; adds to ``figures``."""
        real = texts_of(self.model, data, len(samples))
        compared = compare(samples, real, seed=self.command.seed)
        figures["samples"] = {"file": str(self.command.samples), **compared.to_json()}
        sections = [compared.section()]
        if self.judge is not None:
            judged = generative_perplexity(samples, self.judge, reference=real)
            figures["generative_perplexity"] = judged.to_json()
            sections += [judged.section(), mauve_section(self.judge, samples, real, figures)]
        return [*sections, Section(title="Samples", samples=samples[:SHOWN])]

    def _check_price(self, calls: Sequence[int], data: DataSet) -> None:
        """Check that the price of each number of calls can be measured on the rows of ``data``."""
        try:
            check_model(self.model.denoiser)
            check_scored(data.counts.sum() == len(data.chosen) * data.length)
        except UserError as error:
            raise UserError(f"--price: {error}") from error
        for number in calls:
            if not 1 <= number <= data.length:
                raise UserError(
                    f"--price {number}: calls must be from 1 to {data.length}, the tokens of a row"
                )

    def _of_parallelism(
        self, data: DataSet, calls: Sequence[int], figures: dict[str, Any]
    ) -> Section:
        """Measure the price of parallelism; adds the figures and the profile to ``figures``."""
        price = price_of(
            self.model,
            data,
            self._key,
            draws=self.command.protocol.draws,
            batch_size=self.command.batch_size,
            track=track,
        )
        rows = price_figures(price, self.model.schedule, calls)
        figures["price"] = {**price.to_json(), "figures": [row.to_json() for row in rows]}
        return price_section(price, rows)

    def _of_conditionals(self, data: DataSet, pairs: int, figures: dict[str, Any]) -> Section:
        """Test at pairs of adjacent positions whether the conditionals belong to one joint."""
        x0_BL, scored_BL = data.spread(pairs)
        found = consistency(
            self.model.denoiser,
            jnp.asarray(x0_BL),
            jnp.asarray(scored_BL),
            self._key,
            pairs=pairs,
            top=None if self.model.process.num_tokens <= EXACT_GRID else 128,
        )
        figures["consistency"] = found.to_json()
        return found.section()


def mauve_section(
    judge: Judge, samples: Sequence[str], real: Sequence[str], figures: dict[str, Any]
) -> Section:
    """Compute MAUVE (arXiv:2102.01454) between samples and real texts, on the judge's features.

    Args:
        judge: its last hidden state at the last token of a text is the feature.
        samples: the model's texts.
        real: texts to compare with.
        figures: the result is added to it under ``mauve``.

    Returns:
        A section with the score. If there are fewer than ``MAUVE_TEXTS`` samples or real texts, the
        section says so, and ``figures`` is left as it is.
    """
    if min(len(samples), len(real)) < MAUVE_TEXTS:
        text = f"Needs {MAUVE_TEXTS} samples and as many real texts: there are {len(samples)} and "
        return Section(title="MAUVE", text=f"{text}{len(real)}.")
    found = mauve(
        judge.features(samples),
        judge.features(real),
        features=f"last state of {judge.name}, of the last token",
    )
    figures["mauve"] = found.to_json()
    return found.section()


def read_samples(path: Path) -> list[str]:
    """Read the texts of a file that ``sedd sample --output`` wrote.

    Raises:
        UserError: the file cannot be read, or a line, which is named, has no text.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # where JSON Lines end, alone
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"--samples {path}: {reason}") from error
    texts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip(" \t\r"):
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f'--samples {path}, line {number}: no JSON with a "text"') from error
        if not isinstance(text, str):
            raise UserError(f'--samples {path}, line {number}: "text" must be a string')
        texts.append(text)
    return texts


def write_report(
    command: EvaluateCommand,
    results: Sequence[EvaluationResult],
    more: Sequence[Section],
    *,
    model: Model,
    versions: dict[str, str],
) -> None:
    """Write the report of ``--report``, one HTML page without other files.

    Args:
        command: the flags.
        results: the figures of the data sets. The page begins with their tables and the command
            that computed them.
        more: the comparisons, at the end of the page.
        model: the evaluated model; the curves of its training run are shown if they are there.
        versions: packages and their versions.
    """
    assert command.report is not None
    curves = Path(command.checkpoint) / "curves.png"
    step = "" if model.step is None else f", step {model.step}"
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    how = (
        f"Model: {command.checkpoint}{step}. Written {now} by "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f".\n\nCommand: evaluate.py {shlex.join(command.arguments)}"
    )
    details = map(detail_table, results)
    sections = [
        Section(
            title=title(results[0]),
            text=f"{how}\n\n{FIGURES}",
            tables=[*([summary_table(results)] if len(results) > 1 else []), *details],
        )
    ]
    if curves.is_file():
        sections.append(Section(title="Training", figures=[curves]))
    write_html(command.report, f"Evaluation of {command.checkpoint}", [*sections, *more])


FIGURES = (
    "Nats per token are the total nats divided by the scored tokens; perplexity is their "
    "exponential. Errors are standard errors over sequences and contain the error of the draws. "
    "The cross entropy of training frequencies is what a model without context attains; the "
    "entropy of the tokens' own frequencies is fitted to them, and lower. Perplexities under "
    "different tokenizers cannot be compared; bits per byte can. The page docs/evaluation.md of "
    "the project explains every figure."
)
