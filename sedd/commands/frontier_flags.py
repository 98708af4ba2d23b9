"""The flags of ``sedd evaluate --frontier``."""

import math
from dataclasses import dataclass
from typing import Annotated

from sedd.commands.cli import unset
from sedd.errors import UserError
from sedd.evaluating.frontier import STEPS, TEXTS


@dataclass(frozen=True, kw_only=True)
class FrontierFlags:
    """Judged quality against entropy; see docs/students.md."""

    frontier: bool = False
    """Draw texts at several numbers of steps and temperatures, and compare their nats under --judge
    at equal entropy, that of the text of the first data set."""
    against: Annotated[str | None, unset("RUN")] = None
    """With --frontier: a second model to compare with, such as the teacher of a student."""
    steps: Annotated[str | None, unset("INT,…")] = None
    """With --frontier: the steps of the sampler; by default 1,2,4,8,16,32,64."""
    temperatures: Annotated[str | None, unset("FLOAT,…")] = None
    """With --frontier: the temperatures; by default 0.6,0.7,0.8,0.9,1,1.1, and 1 alone for a model
    that has none."""
    texts: Annotated[int | None, unset("INT")] = None
    """With --frontier: texts of each setting, and real texts; by default 128."""

    @property
    def num_texts(self) -> int:
        """The number of texts of each setting."""
        return TEXTS if self.texts is None else self.texts

    @property
    def step_counts(self) -> tuple[int, ...]:
        """The numbers of steps, ascending.

        Raises:
            UserError: one of them is no whole number above 0.
        """
        if self.steps is None:
            return STEPS
        found = []
        for word in self.steps.split(","):
            if not word.strip().isdecimal() or int(word) < 1:
                raise UserError(
                    f"--steps {self.steps}: {word.strip()!r} is no number of steps, such as 8"
                )
            found.append(int(word))
        return tuple(sorted(set(found)))

    @property
    def temperature_list(self) -> tuple[float, ...] | None:
        """The temperatures, ascending; None if none were given.

        Raises:
            UserError: one of them is no finite number above 0.
        """
        if self.temperatures is None:
            return None
        found = []
        for word in self.temperatures.split(","):
            try:
                value = float(word)
            except ValueError:
                value = math.nan
            if not 0 < value < math.inf:
                raise UserError(
                    f"--temperatures {self.temperatures}: {word.strip()!r} is no number above 0"
                )
            found.append(value)
        return tuple(sorted(set(found)))


def check_frontier(flags: FrontierFlags) -> None:
    """Check the flags of ``--frontier`` against each other.

    Raises:
        UserError: a flag needs --frontier, or is out of its range.
    """
    if not flags.frontier:
        for name in ("against", "steps", "temperatures", "texts"):
            if getattr(flags, name) is not None:
                raise UserError(f"--{name} {getattr(flags, name)}: it is a flag of --frontier")
        return
    _ = flags.step_counts, flags.temperature_list
    if flags.num_texts < 2:
        raise UserError(f"--texts must be at least 2, got {flags.texts}")
