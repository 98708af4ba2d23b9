"""Judged quality against entropy: the frontier of samples over temperatures.

A judge prefers sharp texts, and any model can be made sharper by its temperature. Figures of a
judge can be compared at equal entropy only (arXiv:2604.02718). For each model and each number of
steps, texts are drawn at several temperatures: a curve of judged nats against entropy. Between its
points a curve is interpolated linearly. A figure at the entropy of real text is the point of the
curve there.

The texts of equal number have the same seed at every temperature, in every model. Standard errors
are over texts, and take account of this.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from sedd.data.packing import unigram_entropy
from sedd.errors import UserError
from sedd.evaluation.judges import Scorer
from sedd.evaluation.measured import Measured, mean_of, ratio_of
from sedd.evaluation.report import Section, Table


@dataclass(frozen=True, kw_only=True)
class JudgedPoint:
    """S texts that were drawn with one setting, as a judge sees them.

    Args:
        nats_S: -log p of each text under the judge.
        tokens_S: its scored tokens.
        entropy_S: the entropy of the frequencies of its own tokens, in nats.
        model: the name of the model; empty for real text.
        steps: steps of the sampler; 0 for real text.
        temperature: the temperature of the draws.
        calls: mean network calls of a text.
    """

    nats_S: np.ndarray
    tokens_S: np.ndarray
    entropy_S: np.ndarray
    model: str = ""
    steps: int = 0
    temperature: float = 1.0
    calls: float = 0.0

    @classmethod
    def of(cls, texts: Sequence[str], judge: Scorer, **setting: Any) -> "JudgedPoint":
        """Judge texts; ``setting`` are the fields from ``model`` on.

        Raises:
            UserError: if the judge scores no token of them.
        """
        judged = judge.judge(texts)
        if not judged.tokens_S.any():
            raise UserError(f"{judge.name} scores no token of these {len(texts)} texts")
        counts = (np.unique(ids, return_counts=True)[1] for ids in judge.encode(texts))
        return cls(
            nats_S=judged.nats_S,
            tokens_S=judged.tokens_S,
            entropy_S=np.array([unigram_entropy(each) for each in counts]),
            **setting,
        )

    @property
    def nats(self) -> Measured:
        """Judged nats per token of all texts together."""
        return ratio_of(self.nats_S, self.tokens_S)

    @property
    def entropy(self) -> Measured:
        """Mean entropy of a text."""
        return mean_of(self.entropy_S)

    def shares(self) -> tuple[np.ndarray, np.ndarray]:
        """The deviation of each text from ``nats`` and ``entropy``, to first order, both [S].

        Their means are 0. A standard error is their standard deviation (ddof 1) over √S.
        """
        nats_S = (self.nats_S - self.nats.value * self.tokens_S) / self.tokens_S.mean()
        return nats_S, self.entropy_S - self.entropy.value

    def to_json(self) -> dict[str, Any]:
        """Return the setting, and the figures as [value, standard error]."""
        return {
            "model": self.model,
            "steps": self.steps,
            "temperature": self.temperature,
            "calls": self.calls,
            "entropy": list(self.entropy),
            "nats_per_token": list(self.nats),
        }


class AtEntropy(NamedTuple):
    """The point of a curve at an entropy: nats per token, calls, what each text adds, [S]."""

    nats: float
    calls: float
    share_S: np.ndarray

    @property
    def measured(self) -> Measured:
        """The nats with their standard error over texts."""
        return Measured(self.nats, mean_of(self.share_S).error)

    def above(self, other: "AtEntropy") -> Measured:
        """By how many nats this point lies above another; the texts of equal number are paired."""
        difference = mean_of(self.share_S - other.share_S)
        return Measured(self.nats - other.nats, difference.error)


def at_entropy(curve: Sequence[JudgedPoint], entropy: float) -> AtEntropy | None:
    """Interpolate judged nats at an entropy, between neighbouring temperatures of a curve.

    The error is that of the interpolation of random points, to first order. The curvature between
    the points is not in it.

    Args:
        curve: the points of a model at one number of steps, at different temperatures.
        entropy: where to interpolate.

    Returns:
        None if no two neighbouring points have the entropy between them.
    """
    for a, b in pairwise(sorted(curve, key=lambda point: point.temperature)):
        low, high = a.entropy.value, b.entropy.value
        if min(low, high) <= entropy <= max(low, high) and low != high:
            part = (entropy - low) / (high - low)
            slope = (b.nats.value - a.nats.value) / (high - low)
            share_S = np.zeros(len(a.nats_S))
            for point, weight in ((a, 1 - part), (b, part)):
                nats_S, entropy_S = point.shares()
                share_S = share_S + weight * (nats_S - slope * entropy_S)
            return AtEntropy(
                a.nats.value + part * (b.nats.value - a.nats.value),
                a.calls + part * (b.calls - a.calls),
                share_S,
            )
    return None


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """The curves of one or two models, and real text.

    Args:
        judge: the name of the judge.
        points: one for each model, number of steps and temperature.
        real: real texts under the same judge.
        model: the name of the evaluated model.
        against: the name of the model to compare with; None without one.
    """

    judge: str
    points: Sequence[JudgedPoint]
    real: JudgedPoint
    model: str
    against: str | None = None

    @property
    def steps(self) -> list[int]:
        """The numbers of steps, ascending."""
        return sorted({point.steps for point in self.points})

    def curve(self, model: str, steps: int) -> list[JudgedPoint]:
        """The points of a model at one number of steps, by temperature."""
        found = [p for p in self.points if (p.model, p.steps) == (model, steps)]
        return sorted(found, key=lambda point: point.temperature)

    def comparison(self) -> list[dict[str, Any]]:
        """Compare at the entropy of real text: a dictionary for each number of steps.

        ``steps`` and ``calls`` are numbers, all others nats with errors (``Measured``).

        - ``nats`` and ``calls`` are those of the model;
        - ``against``, with a second model, are the nats of that one with as many steps;
        - ``above`` is ``nats`` minus ``against``;
        - ``above_most`` is ``nats`` minus those of the second model with the largest number of
          steps.

        An entry is None if one of its curves does not reach the entropy. A curve of a single
        temperature reaches none.
        """
        entropy = self.real.entropy.value
        most = None
        if self.against is not None:
            most = at_entropy(self.curve(self.against, self.steps[-1]), entropy)
        rows = []
        for steps in self.steps:
            mine = at_entropy(self.curve(self.model, steps), entropy)
            row: dict[str, Any] = {"steps": steps, "calls": mine and mine.calls}
            row["nats"] = mine and mine.measured
            if self.against is not None:
                theirs = at_entropy(self.curve(self.against, steps), entropy)
                row["against"] = theirs and theirs.measured
                row["above"] = mine.above(theirs) if mine and theirs else None
                row["above_most"] = mine.above(most) if mine and most else None
            rows.append(row)
        return rows

    def to_json(self) -> dict[str, Any]:
        """Return every point and the comparison; a figure is [value, standard error]."""
        rows = self.comparison()
        return {
            "judge": self.judge,
            "model": self.model,
            "against": self.against,
            "texts": len(self.points[0].nats_S),
            "real_texts": len(self.real.nats_S),
            "real": {"entropy": list(self.real.entropy), "nats_per_token": list(self.real.nats)},
            "points": [point.to_json() for point in self.points],
            "at_real_entropy": [
                {k: list(v) if isinstance(v, Measured) else v for k, v in row.items()}
                for row in rows
            ],
        }

    def section(self) -> Section:
        """Make a part of a report: a text, two tables, and the plot."""
        entropy, nats = self.real.entropy, self.real.nats
        text = (
            f"Judged by {self.judge}. Real text has {nats.value:.3f} nats per token at an entropy "
            f"of {entropy.value:.3f} nats. Entropy is that of the frequencies of a text's own "
            "tokens. Sharper texts have fewer nats and a lower entropy, so that models are "
            "compared at equal entropy, that of real text, by linear interpolation between "
            "temperatures. A dash stands where a curve does not reach it. Errors are standard "
            f"errors over {len(self.points[0].nats_S)} texts of each setting; the entropy of real "
            "text counts as known."
        )
        return Section(
            title="Quality against entropy",
            text=text,
            tables=[self._compared(), self._settings()],
            figures=[self.figure()],
        )

    def _compared(self) -> Table:
        columns, names = ["steps", "calls", self.model], ["steps", "calls", "nats"]
        if self.against is not None:
            most = f"minus {self.against} at {self.steps[-1]} steps"
            columns += [self.against, "difference", most]
            names += ["against", "above", "above_most"]
        rows = [[row[name] for name in names] for row in self.comparison()]
        return Table(title="Nats per token at the entropy of real text", columns=columns, rows=rows)

    def _settings(self) -> Table:
        rows = [(p.model, p.steps, p.temperature, p.calls, p.entropy, p.nats) for p in self.points]
        columns = ("model", "steps", "temperature", "calls", "entropy", "nats per token")
        return Table(title="All settings", columns=columns, rows=rows)

    def figure(self):
        """Plot nats against entropy: one colour for a number of steps, dashes for ``against``."""
        from matplotlib import colormaps
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.2, 4.8), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        colors = colormaps["viridis"](np.linspace(0, 0.85, len(self.steps)))
        names = [self.model] if self.against is None else [self.model, self.against]
        for name, marker, line in zip(names, "os", ("-", "--"), strict=False):
            for steps, color in zip(self.steps, colors, strict=True):
                points = self.curve(name, steps)
                axes.errorbar(
                    [p.entropy.value for p in points],
                    [p.nats.value for p in points],
                    xerr=[p.entropy.error or 0 for p in points],
                    yerr=[p.nats.error or 0 for p in points],
                    color=color,
                    marker=marker,
                    ls=line,
                    ms=4,
                    lw=1.4,
                    elinewidth=0.8,
                    label=f"{name}, {steps} steps",
                )
        entropy, nats = self.real.entropy, self.real.nats
        axes.axvline(entropy.value, color="0.6", lw=0.8, ls=":")
        axes.errorbar(
            [entropy.value], [nats.value], yerr=[nats.error or 0], color="k", marker="*", ms=11,
            ls="", label="real text",
        )  # fmt: skip
        axes.set_xlabel("entropy of a text, nats")
        axes.set_ylabel("judged nats per token")
        axes.set_title(f"Judged by {self.judge}; lower right is better", loc="left", fontsize=10)
        axes.grid(color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(frameon=False, loc="outside right center", fontsize=8)
        return figure
