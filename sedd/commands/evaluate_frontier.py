"""``sedd evaluate --frontier``: judged quality against entropy, of a model and of a second one."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sedd.commands.evaluate_flags import EvaluateCommand
from sedd.commands.frontier_flags import TEMPERATURES
from sedd.configuration.build import build_sampler, default_sampler
from sedd.configuration.build_data import pack_split
from sedd.errors import UserError
from sedd.evaluation.datasets import DataSet
from sedd.evaluation.frontier import Frontier, JudgedPoint
from sedd.evaluation.judges import Scorer
from sedd.evaluation.ngram_judge import NgramJudge
from sedd.evaluation.report import Section
from sedd.model import Model, load
from sedd.parameterizations.mean import Mean
from sedd.progress import track
from sedd.sampling.whole import sample

ORDER = 3  # of the n-grams of the judge ``ngram``


@dataclass(frozen=True, kw_only=True)
class FrontierTask:
    """The models, the judge and the settings of ``--frontier``, checked.

    Args:
        command: the flags.
        models: the evaluated model, and that of ``--against`` if it is given, by their names.
        judge: scores the texts.
        temperatures: the temperatures to draw at.
    """

    command: EvaluateCommand
    models: dict[str, Model]
    judge: Scorer
    temperatures: tuple[float, ...]

    @classmethod
    def of(cls, command: EvaluateCommand, model: Model, judge: Scorer) -> "FrontierTask":
        """Load the second model, and check that both can draw with every setting.

        Raises:
            UserError: the second model cannot be loaded or has another tokenizer or length, or a
                model has no sampler with steps or no temperature.
        """
        flags = command.frontier
        models = {Path(command.checkpoint).name: model}
        if flags.against is not None:
            where = f"--against {flags.against}"
            try:
                other = load(flags.against)
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
            mine, theirs = (each.config.data for each in (model, other))
            for field in ("tokenizer", "length"):
                here, there = getattr(mine, field), getattr(theirs, field)
                if here != there:
                    raise UserError(f"{where}: its {field} is {there}, and here it is {here}")
            name = Path(flags.against).name
            models[name if name not in models else flags.against] = other
        sweep = flags.temperature_list
        for each in models.values():
            for steps in flags.step_counts:
                _sampler(each, steps).check(each.denoiser)
            mean = isinstance(each.denoiser.parameterization, Mean)
            if not (each.process.absorbing or mean):
                if sweep not in (None, (1.0,)):
                    raise UserError(
                        f"--temperatures {flags.temperatures}: {each.source} has no temperature: "
                        "off the absorbing process it needs the parameterization mean"
                    )
                sweep = (1.0,)
        return cls(command=command, models=models, judge=judge, temperatures=sweep or TEMPERATURES)

    def check(self, data: DataSet) -> None:
        """Check that there are enough rows of real text.

        Raises:
            UserError: there are fewer than 2.
        """
        if len(data.chosen) < 2:
            raise UserError("--frontier: at least 2 rows of text are needed, got 1")

    def section(self, data: DataSet, real: list[str], figures: dict[str, Any]) -> Section:
        """Draw the texts and judge them.

        Args:
            data: the first data set, for the length of the texts.
            real: its texts.
            figures: the result is added to it under ``frontier``.

        Raises:
            UserError: the judge scores no token of some texts.
        """
        settings = [
            (name, steps, temperature)
            for name in self.models
            for steps in self.command.frontier.step_counts
            for temperature in self.temperatures
        ]
        points = []
        try:
            reference = JudgedPoint.of(real, self.judge)
            for name, steps, temperature in track(settings, "texts of --frontier", len(settings)):
                texts, calls = self._draw(self.models[name], steps, temperature, data.length)
                setting = {"model": name, "steps": steps, "temperature": temperature}
                points.append(JudgedPoint.of(texts, self.judge, calls=calls, **setting))
        except ValueError as error:
            raise UserError(f"--frontier: {error}") from error
        model, *against = self.models
        found = Frontier(
            judge=self.judge.name,
            points=points,
            real=reference,
            model=model,
            against=against[0] if against else None,
        )
        figures["frontier"] = found.to_json()
        return found.section()

    def _draw(
        self, model: Model, steps: int, temperature: float, length: int
    ) -> tuple[list[str], float]:
        """Draw the texts of one setting; the seeds are the same in all settings."""
        keys_S = jax.random.split(jax.random.key(self.command.seed), self.command.frontier.texts)
        # A process without temperatures refuses them, 1 included.
        options: dict[str, Any] = {"temperature": temperature}
        options = {} if self.temperatures == (1.0,) else options
        sampler, texts, calls = _sampler(model, steps), [], []
        for batch in self._batches(keys_S):
            drawn = sample(model, batch, length=length, sampler=sampler, **options)
            texts += drawn.text or []
            calls.append(drawn.calls)
        return texts, float(np.concatenate(calls).mean())

    def _batches(self, keys_S: jax.Array) -> Iterator[jax.Array]:
        for start in range(0, len(keys_S), self.command.batch_size):
            yield keys_S[start : start + self.command.batch_size]


def _sampler(model: Model, steps: int):
    """The default sampler of a model, with so many steps.

    Raises:
        UserError: it has no steps.
    """
    name = default_sampler(model.parts.parameterization)
    try:
        return build_sampler(name, model.schedule, steps=steps)
    except UserError as error:
        raise UserError(f"--frontier: {model.source}: {error}") from error


def ngram_judge(model: Model) -> NgramJudge:
    """The judge ``ngram``: n-grams of the tokens that the model was trained on.

    Raises:
        UserError: the model has no tokenizer, or its corpus cannot be read.
    """
    tokenizer, data = model.text_reader.tokenizer, model.config.data
    try:
        packed, _ = pack_split(
            data.corpus, "train", tokenizer, data, cache_dir=Path(data.cache_dir).expanduser()
        )
    except UserError as error:
        raise UserError(f"--judge ngram: {error}") from error
    x0_BL, scored_BL, *_ = packed.rows(np.arange(packed.num_rows))
    return NgramJudge.of(
        x0_BL[scored_BL], model.process.num_tokens, ORDER, encode=tokenizer.encode_batch
    )
