"""What ``evaluate.py`` adds to perplexity: tests of samples, consistency, and the HTML report."""

import datetime
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sedd.commands.evaluate_flags import EvaluateCommand
from sedd.errors import UserError, did_you_mean
from sedd.evaluation.consistency import consistency, draw_pairs
from sedd.evaluation.datasets import DataSet
from sedd.evaluation.generative_perplexity import generative_perplexity
from sedd.evaluation.judges import Judge, WindowJudge, hugging_face_judge
from sedd.evaluation.mauve import mauve
from sedd.evaluation.monte_carlo import REPLICATES, sequence_nats
from sedd.evaluation.report import Section, write_html
from sedd.evaluation.scoring import EvaluationResult
from sedd.evaluation.smollm2 import load_smollm2
from sedd.evaluation.statistics import compare
from sedd.evaluation.tables import detail_table, summary_table, title
from sedd.model import Model, load

EXACT_GRID = 512  # with at most so many tokens all are compared; beyond it, the 128 most likely
MAUVE_TEXTS = 50  # fewer would make at most five buckets, and a score that is mostly noise
SHOWN = 3  # samples printed in the report


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """The tests that the flags ask for beside perplexity, with their inputs read and checked.

    Args:
        command: the flags.
        model: the evaluated model.
        samples: the texts of ``--samples``; None without the flag.
        judge: the model of ``--judge``; None without the flag.
    """

    command: EvaluateCommand
    model: Model
    samples: list[str] | None
    judge: Judge | None

    @classmethod
    def of(cls, command: EvaluateCommand, model: Model) -> "Comparisons":
        """Read the samples and load the judge, before any figure is computed.

        Raises:
            UserError: if there are no such samples, or no such judge.
        """
        samples = None if command.samples is None else read_samples(command.samples)
        judge = None if command.judge is None else judge_of(command.judge)
        return cls(command=command, model=model, samples=samples, judge=judge)

    def check(self, data: DataSet) -> None:
        """Raise UserError if ``data`` has too few texts or pairs of positions for the flags."""
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

    def compute(self, data: DataSet) -> tuple[list[Section], dict[str, Any]]:
        """All tests against the text of ``data``: sections of the report, and figures as JSON."""
        sections, figures = [], {}
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
        real = real_texts(self.model, data, len(samples))
        compared = compare(samples, real, seed=self.command.seed)
        figures["samples"] = {"file": str(self.command.samples), **compared.to_json()}
        sections = [compared.section()]
        if self.judge is not None:
            judged = generative_perplexity(samples, self.judge, reference=real)
            figures["generative_perplexity"] = judged.to_json()
            sections += [judged.section(), mauve_section(self.judge, samples, real, figures)]
        return [*sections, Section(title="Samples", samples=samples[:SHOWN])]

    def _of_conditionals(self, data: DataSet, pairs: int, figures: dict[str, Any]) -> Section:
        """Whether the conditionals belong to one joint, at pairs of adjacent positions."""
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
    """MAUVE of the judge's states; with too few texts, a section that says so."""
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
    """The texts of a file of ``sample.py --output``; UserError naming a bad line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"--samples {path}: {reason}") from error
    texts = []
    for number, line in enumerate(lines, start=1):
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'--samples {path}, line {number}: no JSON with a "text"') from error
        if not isinstance(text, str):
            raise UserError(f'--samples {path}, line {number}: "text" must be a string')
        texts.append(text)
    return texts


def real_texts(model: Model, data: DataSet, number: int) -> list[str]:
    """The text of ``number`` evaluated rows, evenly spread: real text of the samples' length."""
    tokenizer = model.text_reader.tokenizer
    x0_BL, scored_BL = data.spread(number)
    return [
        tokenizer.decode(x0_L[scored_L]) for x0_L, scored_L in zip(x0_BL, scored_BL, strict=True)
    ]


def judge_of(name: str) -> Judge:
    """The judge of that name: smollm2, hf:NAME, or the directory of an autoregressive run.

    Raises:
        UserError: if there is none; a name of neither form gets a hint.
    """
    if name == "smollm2":
        return load_smollm2().judge()
    if name.startswith("hf:"):
        return hugging_face_judge(name.removeprefix("hf:").removeprefix("//"))
    if not Path(name).is_dir():
        near = did_you_mean(name, ["smollm2"])
        raise UserError(
            f"--judge {name}: no such directory{near or f'; did you mean hf:{name}?'} A judge is "
            "smollm2, hf:NAME (a causal model of the Hugging Face hub), or the directory of an "
            "autoregressive run"
        )
    model = load(name)
    if not model.denoiser.causal or model.tokenizer is None:
        raise UserError(
            f"--judge {name}: a judge is an autoregressive model with a tokenizer, and this is not "
            "one; smollm2 and hf:NAME are judges too"
        )
    tokenizer = model.tokenizer

    def hidden(ids_BL):
        # The input of position i + 1 is token i, so that the state there is the one that has seen
        # tokens 0..i. One column of padding would do, but cuDNN wants an even length.
        return model.denoiser.hidden(jnp.pad(ids_BL, ((0, 0), (0, 2))))[0][:, 1:-1]

    def nats(ids_BL, scored_BL):
        keys_B = jax.random.split(jax.random.key(0), len(ids_BL))  # nothing is drawn
        scored = sequence_nats(
            model.denoiser, model.schedule, keys_B, ids_BL, scored_BL, draws=REPLICATES
        )
        return scored.diffusion_BR[:, 0]

    return WindowJudge(
        name=name,
        encode=tokenizer.encode_batch,
        nats=jax.jit(nats),
        hidden=jax.jit(hidden),
        context=model.length,
        scores_first=True,
    )


def write_report(
    command: EvaluateCommand,
    results: Sequence[EvaluationResult],
    more: Sequence[Section],
    *,
    model: Model,
    versions: dict[str, str],
) -> None:
    """Write one HTML page: the tables, how they were computed, the run's curves, and ``more``."""
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
