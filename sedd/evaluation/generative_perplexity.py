"""Perplexity of samples under another model (the judge), with their diversity beside it.

Repetitive text has a low perplexity, so the perplexity alone can be improved by making samples
worse. It is therefore shown beside diversity, and beside real text under the same judge. See
``docs/sample_quality.md``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sedd.data.packing import unigram_entropy
from sedd.evaluation.diversity import Diversity, measure_diversity
from sedd.evaluation.judges import Judge, Judgement
from sedd.evaluation.measured import Measured, mean_of, ratio_of
from sedd.evaluation.report import Cell, Section, Table, plain_axes


@dataclass(frozen=True, kw_only=True)
class JudgedTexts:
    """Perplexities of S texts, with standard errors over texts, and their diversity.

    Args:
        mean_of_nats: exp(all nats / all tokens), the perplexity of the texts as one corpus.
        mean_of_perplexities: the mean of the texts' own perplexities. It is larger, and a few bad
            texts dominate it.
        num_tokens: scored tokens of all texts.
        num_unscored: texts without a scored token, which are left out of both perplexities.
        judgement: the nats and the tokens of each text.
        diversity: repetition and entropy of the texts, in tokens of the judge.
    """

    mean_of_nats: Measured
    mean_of_perplexities: Measured
    num_tokens: int
    num_unscored: int
    judgement: Judgement
    diversity: Diversity

    @property
    def perplexities(self) -> np.ndarray:
        """The perplexity of each text; nan for a text without a scored token."""
        tokens_S = np.where(self.judgement.tokens_S, self.judgement.tokens_S, np.nan)
        return np.exp(self.judgement.nats_S / tokens_S)

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers; an estimate is [value, standard error]."""
        return {
            "mean_of_nats": list(self.mean_of_nats),
            "mean_of_perplexities": list(self.mean_of_perplexities),
            "num_tokens": self.num_tokens,
            "num_unscored": self.num_unscored,
            "diversity": self.diversity.to_json(),
        }

    def rows(self) -> list[tuple[Cell, ...]]:
        """Return a row of a table for each figure: its name and its value."""
        return [
            ("perplexity, mean of nats", self.mean_of_nats),
            ("perplexity, mean of perplexities", self.mean_of_perplexities),
            *self.diversity.rows(),
        ]


@dataclass(frozen=True, kw_only=True)
class GenerativePerplexity:
    """Samples under a judge, and real text under the same judge.

    Args:
        judge: the judge's name.
        first_token: how the judge treats the first token of a text, for reports.
        samples: the figures of the samples.
        reference: the figures of real text; None if none was given.
        warnings: sentences, each with a reason why the figures may mislead.
    """

    judge: str
    first_token: str
    samples: JudgedTexts
    reference: JudgedTexts | None
    warnings: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Return every figure and the warnings, ready for ``json.dump``."""
        return {
            "judge": self.judge,
            "first_token": self.first_token,
            "samples": self.samples.to_json(),
            "reference": None if self.reference is None else self.reference.to_json(),
            "warnings": list(self.warnings),
        }

    def section(self) -> Section:
        """Make a part of a report: a table, and a plot of perplexity against entropy."""
        about = (
            f"Judged by {self.judge}; the first token of a text is {self.first_token}. Entropy, "
            f"n-grams and lengths are of tokens of {self.samples.diversity.tokenization}. Standard "
            "errors are over texts."
        )
        return Section(
            title="Generative perplexity",
            text="\n\n".join([about, *(f"Warning: {warning}." for warning in self.warnings)]),
            tables=[self.table()],
            figures=[self.figure()],
        )

    def table(self) -> Table:
        """Make a table with a row for each figure, and a column for each set of texts."""
        columns, rows = ["", "samples ± s.e."], self.samples.rows()
        if self.reference is not None:
            columns.append("real text ± s.e.")
            rows = [(*a, b) for a, (_, b) in zip(rows, self.reference.rows(), strict=True)]
        return Table(columns=columns, rows=rows)

    def figure(self):
        """Plot each text as a point by entropy and perplexity; repetitive text is on the left."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.4), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        texts = [("samples", "#d1602b", self.samples)]
        if self.reference is not None:
            texts.insert(0, ("real text", "#555555", self.reference))
        for name, colour, judged in texts:
            axes.scatter(
                judged.diversity.entropy_S,
                judged.perplexities,
                s=18,
                color=colour,
                alpha=0.6,
                linewidths=0,
                label=name,
            )
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,g}")
        axes.yaxis.set_minor_formatter(lambda y, _: f"{y:,g}" if f"{y:e}"[0] in "25" else "")
        axes.tick_params(which="both", labelsize=8)
        axes.set_xlabel("unigram entropy of the text, nats")
        axes.set_title(f"Perplexity under {self.judge}, a point a text", loc="left", fontsize=10)
        plain_axes(axes)
        figure.legend(frameon=False, loc="outside lower center", ncols=2)
        return figure


def generative_perplexity(
    samples: Sequence[str], judge: Judge, *, reference: Sequence[str] | None = None
) -> GenerativePerplexity:
    """Compute the perplexity of samples under a judge.

    Args:
        samples: the texts.
        judge: the model that computes their likelihood.
        reference: real texts, which should be as long as the samples; a warning in the result says
            if their lengths differ by more than a tenth.

    Raises:
        ValueError: if the judge scores no token of the samples, or of the real text.
    """
    judged = judge_texts(samples, judge)
    real = None if reference is None else judge_texts(reference, judge)
    return GenerativePerplexity(
        judge=judge.name,
        first_token=judge.first_token,
        samples=judged,
        reference=real,
        warnings=_warnings(judge, samples, reference, judged, real),
    )


def judge_texts(texts: Sequence[str], judge: Judge) -> JudgedTexts:
    """Compute the perplexities of texts, and their diversity in the judge's tokens.

    Raises:
        ValueError: if the judge scores no token of the texts.
    """
    judgement = judge.judge(texts)
    scored_S = judgement.tokens_S > 0
    if not scored_S.any():
        raise ValueError(f"{judge.name} scores no token of these {len(texts)} texts")
    nats, tokens = judgement.nats_S[scored_S], judgement.tokens_S[scored_S]
    return JudgedTexts(
        mean_of_nats=pooled_perplexity(nats, tokens),
        mean_of_perplexities=mean_of(np.exp(nats / tokens)),
        num_tokens=int(tokens.sum()),
        num_unscored=int((~scored_S).sum()),
        judgement=judgement,
        diversity=measure_diversity(judge.encode(texts), tokenization=judge.name),
    )


def pooled_perplexity(nats_S: np.ndarray, tokens_S: np.ndarray) -> Measured:
    """Return exp(all nats / all tokens) and its standard error over texts, to first order."""
    rate, error = ratio_of(nats_S, tokens_S)
    perplexity = float(np.exp(rate))
    return Measured(perplexity, None if error is None else perplexity * error)


def _warnings(judge, samples, reference, judged, real) -> list[str]:
    """Sentences on texts that were left out, on different lengths, and on a low entropy.

    Entropy grows with the length of a text, so it is compared over as many tokens of each text as
    half of the texts of either set have.
    """
    found = []
    if judged.num_unscored:
        found.append(f"{judged.num_unscored} samples have no token to score and are left out")
    if real is None:
        found.append(
            "no real text was judged beside the samples: nothing says which perplexity and entropy "
            "are right"
        )
        return found
    lengths = [text.diversity.length[0] for text in (judged, real)]
    if not 0.9 < lengths[0] / lengths[1] < 1.1:
        found.append(
            f"samples have {lengths[0]:.0f} tokens on average and real texts {lengths[1]:.0f}: "
            "figures other than the perplexity depend on the length"
        )
    encoded = [judge.encode(texts) for texts in (samples, reference)]
    first = int(min(np.median([len(ids) for ids in texts]) for texts in encoded))
    mine, theirs = ([_entropy(ids[:first]) for ids in texts] for texts in encoded)
    low = float(np.percentile(theirs, 5))
    if np.mean(mine) < low:
        found.append(
            f"the entropy of samples (mean {np.mean(mine):.2f} nats in {first} tokens) is far "
            f"below that of real text (mean {np.mean(theirs):.2f}, 5 % below {low:.2f}): they "
            "repeat themselves, and their perplexity says nothing of their quality"
        )
    return found


def _entropy(ids: np.ndarray) -> float:
    """Entropy of the frequencies of a text's own tokens, in nats."""
    return unigram_entropy(np.unique(ids, return_counts=True)[1])
