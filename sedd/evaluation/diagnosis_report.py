"""The figures of a ``Diagnosis`` in a report: text, tables and plot."""

import math

import numpy as np

from sedd.evaluation.diagnosis import FIGURES, LEAST_TEXTS, Diagnosis
from sedd.evaluation.report import Cell, Section, Table, plain_axes


def diagnosis_section(diagnosis: Diagnosis, *, commonest: str) -> Section:
    """Make a part of a report: an explanation, two tables and a plot.

    Args:
        diagnosis: the figures.
        commonest: the text of the commonest token.
    """
    return Section(
        title="Predictions by distance to the nearest revealed token",
        text=_text(diagnosis, commonest),
        tables=[_by_distance(diagnosis), _by_rate(diagnosis)],
        figures=[diagnosis_figure(diagnosis)],
    )


def diagnosis_figure(diagnosis: Diagnosis):
    """Plot every figure against the distance, with a line for each mask rate."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.8), dpi=150, layout="constrained")
    *panels, last = figure.subplots(2, 4).flat
    bins = [bin for bin in diagnosis.distances if bin[0]]
    colors = colormaps["viridis"](np.linspace(0.05, 0.85, len(diagnosis.rates)))
    for panel, (name, label) in zip(panels, FIGURES.items(), strict=True):
        for rate, color in zip(diagnosis.rates, colors, strict=True):
            found = [diagnosis.mean(name, rate=rate, distance=first) for first, _ in bins]
            points = [(x, *each) for x, each in enumerate(found) if each.error is not None]
            if not points:
                continue
            x, value, error = np.array(points).T
            panel.errorbar(
                *(x, value, 2 * error),
                **{
                    "color": color,
                    "lw": 1.5,
                    "marker": "o",
                    "ms": 3.5,
                    "label": f"{rate:.3g} masked",
                },
            )
        panel.axhline(
            diagnosis.without_context()[name],
            **{"color": "#555555", "lw": 1, "ls": "--", "label": "frequencies alone"},
        )
        panel.set_title(label, loc="left", fontsize=10)
        panel.set_xticks(range(len(bins)), map(_name, bins), fontsize=8)
        panel.tick_params(labelsize=8)
        plain_axes(panel)
    last.set_axis_off()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    last.legend(handles, labels, frameon=False, loc="center")
    figure.supxlabel("distance to the nearest revealed token", fontsize=10)
    return figure


def _by_distance(diagnosis: Diagnosis) -> Table:
    rows = [
        (_name(bin), diagnosis.count(distance=bin[0]), *_cells(diagnosis, distance=bin[0]))
        for bin in diagnosis.distances
    ]
    baseline = ("frequencies", None, *diagnosis.without_context().values())
    return Table(
        title="Masked positions by distance, all mask rates",
        columns=("distance", "positions", *FIGURES.values()),
        rows=[*rows, ("all", diagnosis.count(), *_cells(diagnosis)), baseline],
    )


def _by_rate(diagnosis: Diagnosis) -> Table:
    rows = [
        (f"{rate:.3g}", diagnosis.count(rate=rate), *_cells(diagnosis, rate=rate))
        for rate in diagnosis.rates
    ]
    return Table(
        title="Masked positions by mask rate, all distances",
        columns=("mask rate", "positions", *FIGURES.values()),
        rows=rows,
    )


def _cells(diagnosis: Diagnosis, **of) -> list[Cell]:
    means = [diagnosis.mean(figure, **of) for figure in FIGURES]
    return [None if math.isnan(mean.value) else mean for mean in means]


def _name(bin: tuple[int, int]) -> str:
    first, last = bin
    if not first:
        return "none revealed"
    return str(first) if first == last else f"{first}–{last}"


def _text(diagnosis: Diagnosis, commonest: str) -> str:
    """The explanation that stands above the tables."""
    rates = ", ".join(f"{rate:.3g}" for rate in diagnosis.rates)
    whose = "training" if diagnosis.trained else "evaluated"
    share = np.exp(diagnosis.log_unigram_N[diagnosis.commonest])
    return (
        f"{diagnosis.num_sequences} sequences, {diagnosis.repeats} masks of each for each mask "
        f"rate ({rates}): every position is masked with this probability, and the model predicts "
        "it. The distance is that to the nearest token that is not masked; that of a pair of "
        "neighbours is the smaller one of the two.\n\n"
        "Accuracy is the share of positions whose most likely token is the true one. KL is that of "
        f"the prediction from the frequencies of tokens in the {whose} text, in nats. The "
        f"commonest token there is {commonest!r}, {share:.1%} of the tokens; the column has the "
        "share of positions at which it is the most likely token. A model that knew no more than "
        "the frequencies would have the last row of the first table.\n\n"
        "TV of neighbours is the total variation between the predictions of two masked "
        "neighbours: 0 if they are the same. Pair TV is that between the joint distribution of the "
        "two, when the right one is drawn in a further network call given the left one, and the "
        "product of both predictions: at least this share of pairs comes out differently if both "
        "are drawn in one call. One pair of each mask is drawn for it.\n\n"
        f"Errors are standard errors over sequences, given from {LEAST_TEXTS} sequences on."
    )
