"""``sedd evaluate --frontier``: judged quality against entropy, of a model and of a second one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax

from sedd.commands.evaluate_flags import EvaluateCommand
from sedd.errors import FieldError, UserError
from sedd.evaluating.frontier import check_rows, check_settings, frontier_of, named_models
from sedd.evaluation.datasets import DataSet
from sedd.evaluation.judges import Scorer
from sedd.evaluation.report import Section
from sedd.model import Model, load
from sedd.progress import track


@dataclass(frozen=True, kw_only=True)
class FrontierTask:
    """The models, the judge and the settings of ``--frontier``, checked.

    Args:
        command: the flags.
        models: the evaluated model, and that of ``--against`` if it is given, by their names.
        judge: scores the texts.
        steps: the numbers of steps.
        temperatures: the temperatures to draw at.
    """

    command: EvaluateCommand
    models: dict[str, Model]
    judge: Scorer
    steps: tuple[int, ...]
    temperatures: tuple[float, ...]

    @classmethod
    def of(cls, command: EvaluateCommand, model: Model, judge: Scorer) -> "FrontierTask":
        """Load the second model, and check that both can draw with every setting.

        Raises:
            UserError: the second model cannot be loaded or has another tokenizer or length, or a
                model has no sampler with steps or no temperature.
        """
        flags = command.frontier
        other = None
        if flags.against is not None:
            try:
                other = load(flags.against)
            except UserError as error:
                raise UserError(f"--against {flags.against}: {error}") from error
        with _flags_named(command):
            models = named_models(model, other)
            steps, temperatures = check_settings(
                models, flags.step_counts, flags.temperature_list, flags.num_texts
            )
        return cls(
            command=command, models=models, judge=judge, steps=steps, temperatures=temperatures
        )

    def check(self, data: DataSet) -> None:
        """Raise UserError if there are fewer than 2 rows of real text."""
        with _flags_named(self.command):
            check_rows(data)

    def section(self, data: DataSet, figures: dict[str, Any]) -> Section:
        """Draw the texts and judge them.

        Args:
            data: the first data set, for the real text and the length of the texts.
            figures: the result is added to it under ``frontier``.

        Raises:
            UserError: the judge scores no token of some texts.
        """
        with _flags_named(self.command):
            found = frontier_of(
                self.models,
                data,
                jax.random.key(self.command.seed),
                judge=self.judge,
                steps=self.steps,
                temperatures=self.temperatures,
                texts=self.command.frontier.num_texts,
                batch_size=self.command.batch_size,
                track=track,
            )
        figures["frontier"] = found.to_json()
        return found.section()


@contextmanager
def _flags_named(command: EvaluateCommand) -> Iterator[None]:
    """Name the flag and its value in a UserError of the block."""
    try:
        yield
    except FieldError as error:
        given = getattr(command.frontier, error.field)
        raise UserError(error.named(f"--{error.field} {given}")) from error
    except UserError as error:
        raise UserError(f"--frontier: {error}") from error
