"""Tests whether samples have the statistics of real text; see ``docs/sample_quality.md``.

After Meister and Cotterell, "Language Model Evaluation Beyond Perplexity", arXiv:2106.00085. The
steps are in modules of their own: ``documents`` counts words and sentences, ``permutation`` tests
the distances between samples and real text, and ``quantities`` computes the numbers that are shown
beside the tests. This module puts them together and reports the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sedd.evaluation.documents import Documents, measure
from sedd.evaluation.measured import Measured
from sedd.evaluation.permutation import distances_of, holm, permutation_test
from sedd.evaluation.quantities import curves_of, quantities_of
from sedd.evaluation.report import Section, Table, plain_axes


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """One statistic of two sets of texts, with its test.

    Args:
        name: the statistic, such as "sentence length".
        quantity: a number that summarises it, such as "words a sentence".
        samples: that number for the samples, with its standard error over documents.
        reference: that number for real text.
        distance: the distance that is tested; see ``docs/sample_quality.md``.
        p: the p-value of the permutation test.
        p_holm: the p-value, corrected for the number of tests.
    """

    name: str
    quantity: str
    samples: Measured | None
    reference: Measured | None
    distance: float
    p: float
    p_holm: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The comparison of samples with real text.

    Args:
        statistics: every statistic with its test.
        alpha: the family-wise level of the tests.
        permutations: random labellings of each test.
        documents: counts of all documents, samples and real text.
        is_sample_S: which of the documents are samples.
    """

    statistics: Sequence[Statistic]
    alpha: float
    permutations: int
    documents: Documents
    is_sample_S: np.ndarray

    @property
    def differs(self) -> bool:
        """Whether any statistic differs significantly, at the family-wise level ``alpha``."""
        return any(s.p_holm <= self.alpha for s in self.statistics)

    @property
    def num_samples(self) -> int:
        """The number of samples."""
        return int(self.is_sample_S.sum())

    @property
    def num_reference(self) -> int:
        """The number of real texts."""
        return self.documents.size - self.num_samples

    @cached_property
    def curves(self) -> dict[str, Any]:
        """The curves of ``quantities.curves_of``, for "samples" and "reference"."""
        return {
            name: curves_of(self.documents, chosen)
            for name, chosen in (("samples", self.is_sample_S), ("reference", ~self.is_sample_S))
        }

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers for ``json.dump``; an estimate is [value, standard error]."""
        return {
            "alpha": self.alpha,
            "permutations": self.permutations,
            "num_samples": self.num_samples,
            "num_reference": self.num_reference,
            "differs": self.differs,
            "statistics": {
                s.name: {
                    "quantity": s.quantity,
                    "samples": s.samples and list(s.samples),
                    "reference": s.reference and list(s.reference),
                    "distance": s.distance,
                    "p": s.p,
                    "p_holm": s.p_holm,
                }
                for s in self.statistics
            },
            "growth": {name: curves["growth"] for name, curves in self.curves.items()},
        }

    def section(self) -> Section:
        """Make a part of a report: the verdict, a table of the tests, and a plot."""
        found = [s.name for s in self.statistics if s.p_holm <= self.alpha]
        verdict = "No statistic differs significantly."
        if found:
            verdict = f"These differ significantly: {', '.join(found)}."
        return Section(
            title="Statistics of the text",
            text=f"{self.num_samples} samples against {self.num_reference} documents of real text. "
            f"{verdict} Tests permute whole documents ({self.permutations} times) and are "
            "corrected by Holm's method: if the samples were real text, the probability of any "
            f"significant difference would be at most {self.alpha:g}. Errors are standard errors "
            "over documents.",
            tables=[self.table()],
            figures=[self.figure()],
        )

    def table(self) -> Table:
        """Make a table with a row for each statistic."""
        columns = ("statistic", "quantity", "samples ± s.e.", "reference ± s.e.")
        rows = [
            (
                s.name,
                s.quantity,
                s.samples,
                s.reference,
                s.distance,
                s.p,
                s.p_holm,
                "yes" if s.p_holm <= self.alpha else "no",
            )
            for s in self.statistics
        ]
        return Table(columns=(*columns, "distance", "p", "p (Holm)", "differs"), rows=rows)

    def figure(self):
        """Plot six panels: rank–frequency, growth, and four cumulative distributions."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 6.6), dpi=130, layout="constrained")
        panels = figure.subplots(2, 3)
        for name, colour, curves in (
            ("reference", "#555555", self.curves["reference"]),
            ("samples", "#d1602b", self.curves["samples"]),
        ):
            line = {"color": colour, "linewidth": 1.8, "label": name}
            panels[0, 0].plot(*curves["rank_frequency"], **line)
            for what, style in (("types", "-"), ("bigram_types", "--")):
                n, mean, error = (
                    np.array(curves["growth"][k]) for k in ("words", what, f"{what}_error")
                )
                panels[0, 1].plot(n, mean, linestyle=style, **line)
                panels[0, 1].fill_between(
                    n, mean - error, mean + error, color=colour, alpha=0.15, lw=0
                )
            for panel, what in zip(panels.flat[2:], LAWS, strict=True):
                panel.plot(*curves[what], drawstyle="steps-post", **line)
        for panel, (title, x) in zip(panels.flat, TITLES, strict=True):
            panel.set_title(title, loc="left", fontsize=10)
            panel.set_xlabel(x, fontsize=9)
            panel.tick_params(labelsize=8)
            plain_axes(panel)
        for panel in panels.flat[:2]:
            if not any(len(line.get_xdata()) for line in panel.lines):  # all texts are too short
                continue
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
            panel.yaxis.set_major_formatter(lambda y, _: f"{y:,g}")
        for panel in panels.flat[2:]:
            panel.set_ylim(0, 1.02)
            panel.locator_params(axis="x", nbins=6)
        panels[0, 2].set_xlim(0, 100)
        panels[1, 0].set_xlim(0, 10)
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=2)
        return figure


# The last four panels of the plot, then the title and the x label of all six.
LAWS = ("sentence_length", "stop_runs", "stop_words", "symbols")
TITLES = (
    ("Rank–frequency: share of the words", "rank"),
    ("Distinct words (—) and pairs (– –)", "words from the start of a document"),
    ("Sentence length, cumulative", "words"),
    ("Runs of stop words, cumulative", "stop words in a run"),
    ("Stop words of documents, cumulative", "share of the words"),
    ("Symbols of documents, cumulative", "share of the characters"),
)


def compare(
    samples: Sequence[str],
    reference: Sequence[str],
    *,
    permutations: int = 999,
    alpha: float = 0.01,
    seed: int = 0,
) -> Comparison:
    """Test whether samples differ from held-out real text.

    Args:
        samples: the samples, at least two.
        reference: real texts, at least two, cut in the same way as the samples.
        permutations: random labellings of each test.
        alpha: the family-wise level: if the samples were real text, the probability of any
            significant difference would be at most ``alpha``.
        seed: determines the labellings.

    Raises:
        ValueError: see ``compare_documents``.
    """
    is_sample_S = np.arange(len(samples) + len(reference)) < len(samples)
    return compare_documents(
        measure([*samples, *reference]),
        is_sample_S,
        permutations=permutations,
        alpha=alpha,
        seed=seed,
    )


def compare_documents(
    documents: Documents,
    is_sample_S: np.ndarray,
    *,
    permutations: int = 999,
    alpha: float = 0.01,
    seed: int = 0,
) -> Comparison:
    """Test documents that have been measured together; see ``compare``.

    Args:
        documents: counts of samples and real texts.
        is_sample_S: which of the documents are samples.
        permutations: random labellings of each test.
        alpha: the family-wise level.
        seed: determines the labellings.

    Raises:
        ValueError: if a set has fewer than two documents, or if the smallest p-value that so few
            permutations can give is not significant.
    """
    for name, number in (("samples", is_sample_S.sum()), ("reference", (~is_sample_S).sum())):
        if number < 2:
            raise ValueError(f"{name}: at least 2 documents are needed, got {number}")
    distances = distances_of(documents)
    if (needed := int(np.ceil(len(distances) / alpha)) - 1) > permutations:
        raise ValueError(
            f"permutations must be at least {needed} to reject at alpha {alpha}, got {permutations}"
        )
    observed, p = permutation_test(
        distances, is_sample_S, permutations, seed, width=documents.num_types
    )
    quantities = quantities_of(documents, is_sample_S)
    statistics = [
        Statistic(
            name=name,
            quantity=quantities[name][0],
            samples=quantities[name][1],
            reference=quantities[name][2],
            distance=observed[i],
            p=p[i],
            p_holm=corrected,
        )
        for i, (name, corrected) in enumerate(zip(distances, holm(p), strict=True))
    ]
    return Comparison(
        statistics=statistics,
        alpha=alpha,
        permutations=permutations,
        documents=documents,
        is_sample_S=is_sample_S,
    )
