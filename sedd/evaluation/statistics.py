"""Whether samples have the statistics of real text, by exact tests. ``docs/sample_quality.md``.

After Meister and Cotterell, "Language Model Evaluation Beyond Perplexity", arXiv:2106.00085. A
document is the unit: labels of whole documents are permuted, so that the level is exact however
words within a document depend on each other.

Words are runs of letters, digits and underscores with apostrophes inside them, in lower case. A
sentence ends at ``. ! ?`` followed by white space (after closing quotes or brackets), at an empty
line, or with its document; abbreviations count as ends, in both texts alike. Symbols are
characters that are neither letters nor digits nor white space.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import sparse

from sedd.evaluation.report import Measured, Section, Table

WORD = re.compile(r"\w+(?:['’]\w+)*")
SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*\s+|\n\s*\n")
SYMBOL = re.compile(r"[^\w\s]|_")
_STOP_WORDS = """
    a about after all also am an and any are as at be because been before being both but by can
    could did do does doing down during each few for from had has have having he her here hers him
    his how i if in into is it its just may me might more most must my no nor not now of off on once
    only or other our ours out over own shall she should so some such than that the their theirs
    them then there these they this those through to too under until up upon us very was we were
    what when where which while who whom whose why will with would you your yours"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
LONGEST = 200  # words in a sentence or a run; longer ones are counted with it
CHECKPOINTS = np.unique(np.round(8 * 2 ** (np.arange(23) / 2)).astype(int))  # 8, 11, 16, … 16384
ZIPF_RANKS = 1000  # the law holds for the head; the tail bends away from it
CELLS = 1 << 22  # of a permuted table at once


@dataclass(frozen=True, kw_only=True)
class Documents:
    """S documents as the statistics see them. Growth is nan beyond the end of a document."""

    num_types: int  # distinct words in all of them, V
    counts_SV: sparse.csr_array  # of each word
    types_SG: np.ndarray  # distinct words among the first CHECKPOINTS
    bigram_types_SG: np.ndarray  # distinct pairs of neighbours among as many words
    sentences_SK: np.ndarray  # how many sentences of 1..LONGEST words
    stop_runs_SK: np.ndarray  # how many runs of 1..LONGEST stop words, between other words
    words_S: np.ndarray
    stop_share_S: np.ndarray  # of the words
    symbol_share_S: np.ndarray  # of the characters that are not white space

    @property
    def size(self) -> int:
        return len(self.words_S)

    def counts(self, chosen_S: np.ndarray) -> np.ndarray:
        """Of each word in the chosen documents together."""
        return np.asarray(self.counts_SV.T @ chosen_S.astype(np.float32))


def measure(texts: Sequence[str]) -> Documents:
    """What the tests need of each text, one document each."""
    ids: dict[str, int] = {}
    rows, types, bigrams, sentences, runs, symbols = [], [], [], [], [], []
    for text in texts:
        words = WORD.findall(text.lower())
        row = np.array([ids.setdefault(word, len(ids)) for word in words], np.int64)
        rows.append(row)
        types.append(_growth(row, len(row)))
        bigrams.append(_growth((row[:-1] << 32) | row[1:], len(row)))
        lengths = [len(WORD.findall(sentence)) for sentence in SENTENCE_END.split(text)]
        sentences.append(_lengths(np.array(lengths)))
        stop = np.array([False, *(word in STOP_WORDS for word in words), False], int)
        runs.append(_lengths(np.flatnonzero(np.diff(stop) < 0) - np.flatnonzero(np.diff(stop) > 0)))
        symbols.append(len(SYMBOL.findall(text)) / max(len("".join(text.split())), 1))
    stop_words = np.array([word in STOP_WORDS for word in ids], bool)
    flat, sizes = np.concatenate([*rows, np.zeros(0, np.int64)]), np.array([len(r) for r in rows])
    owner = np.repeat(np.arange(len(rows)), sizes)
    counts = sparse.csr_array(
        (np.ones(len(flat), np.float32), (owner, flat)), shape=(len(rows), max(len(ids), 1))
    )
    return Documents(
        num_types=len(ids),
        counts_SV=counts,
        types_SG=np.array(types),
        bigram_types_SG=np.array(bigrams),
        sentences_SK=np.array(sentences, np.float32),
        stop_runs_SK=np.array(runs, np.float32),
        words_S=sizes,
        stop_share_S=np.array([stop_words[row].mean() if len(row) else 0.0 for row in rows]),
        symbol_share_S=np.array(symbols),
    )


def _lengths(lengths: np.ndarray) -> np.ndarray:
    return np.bincount(np.minimum(lengths, LONGEST), minlength=LONGEST + 1)[1:]


def _growth(row: np.ndarray, length: int) -> np.ndarray:
    first = np.sort(np.unique(row, return_index=True)[1])
    distinct = np.searchsorted(first, CHECKPOINTS).astype(float)
    distinct[length < CHECKPOINTS] = np.nan
    return distinct


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """One statistic of two sets of texts. ``p`` is exact; ``p_holm`` is corrected for them all."""

    name: str
    quantity: str  # the number that stands for it, ± standard error over documents
    samples: Measured | None
    reference: Measured | None
    distance: float  # what is tested: see ``docs/sample_quality.md``
    p: float
    p_holm: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Samples against real text: every statistic with its test."""

    statistics: Sequence[Statistic]
    alpha: float
    permutations: int
    documents: Documents
    is_sample_S: np.ndarray

    @property
    def differs(self) -> bool:
        """Whether any statistic differs, at family-wise level ``alpha`` (Holm)."""
        return any(s.p_holm <= self.alpha for s in self.statistics)

    @property
    def num_samples(self) -> int:
        return int(self.is_sample_S.sum())

    @property
    def num_reference(self) -> int:
        return self.documents.size - self.num_samples

    @cached_property
    def curves(self) -> dict[str, Any]:
        """What the figure shows, for samples and reference: rank–frequency, growth, and laws."""
        return {
            name: _curves(self.documents, chosen)
            for name, chosen in (("samples", self.is_sample_S), ("reference", ~self.is_sample_S))
        }

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; standard errors are over documents."""
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
        """A table of the tests and the laws behind them."""
        found = [s.name for s in self.statistics if s.p_holm <= self.alpha]
        verdict = f"These differ: {', '.join(found)}." if found else "None is seen to differ."
        return Section(
            title="Statistics of the text",
            text=f"{self.num_samples} samples against {self.num_reference} documents of real text. "
            f"{verdict} Tests permute whole documents ({self.permutations} times) and are "
            f"corrected by Holm's method: of samples that were real text, any would be said to "
            f"differ with probability {self.alpha:g} at most. Errors are standard errors over "
            "documents.",
            tables=[self.table()],
            figures=[self.figure()],
        )

    def table(self) -> Table:
        """A row a statistic."""
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
        """Six panels: the rank–frequency law, growth, and the distributions that are compared."""
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
            panel.grid(color="#e4e4e4", linewidth=0.8)
            panel.set_axisbelow(True)
            panel.spines[["top", "right"]].set_visible(False)
        for panel in panels.flat[:2]:
            if not any(len(line.get_xdata()) for line in panel.lines):  # all texts too short
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
    """Test samples against held-out real text, cut the same way; two documents each at least."""
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
    """The same of documents that have been measured together; ``is_sample_S`` tells the two apart.

    ``ValueError`` where a set has fewer than two documents, or where so few permutations could
    reject nothing.
    """
    for name, number in (("samples", is_sample_S.sum()), ("reference", (~is_sample_S).sum())):
        if number < 2:
            raise ValueError(f"{name}: at least 2 documents are needed, got {number}")
    distances = distances_of(documents)
    if (needed := int(np.ceil(len(distances) / alpha)) - 1) > permutations:
        raise ValueError(
            f"permutations must be at least {needed} to reject at alpha {alpha}, got {permutations}"
        )
    observed, p = permutation_test(distances, is_sample_S, permutations, seed)
    quantities = _quantities(documents, is_sample_S)
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


def permutation_test(
    distances: dict[str, "Distance"], is_sample_S: np.ndarray, permutations: int, seed: int
) -> tuple[list[float], list[float]]:
    """Each distance under the labels as they are, and its p-value (1 + #) / (1 + permutations).

    # counts the random labellings with a distance at least as large: of exchangeable documents,
    p is at most any level with at most that probability.
    """
    rng = np.random.default_rng(seed)
    labels_PS = np.concatenate(
        [is_sample_S[None], rng.permuted(np.tile(is_sample_S, (permutations, 1)), axis=1)]
    ).astype(np.float32)
    observed, p = [], []
    for distance in distances.values():
        found = distance(labels_PS)
        observed.append(float(found[0]))
        p.append(float((found >= found[0] * (1 - 1e-6)).mean()))  # sums may differ in a last bit
    return observed, p


def holm(p: Sequence[float]) -> list[float]:
    """P-values that may be compared with a family-wise level. Holm, 1979."""
    order = np.argsort(p)
    steps = np.asarray(p, float)[order] * np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected.tolist()


Distance = Callable[[np.ndarray], np.ndarray]  # labels [P, S] of 0 and 1 -> [P]


def distances_of(documents: Documents) -> dict[str, Distance]:
    """The test statistics: functions of which documents are samples, many labellings at once."""

    def of_counts(distance):
        def chunked(labels_PS):
            rows = max(1, CELLS // max(documents.num_types, 1))
            return np.concatenate(
                [
                    distance(*_both(labels_PS[i : i + rows], documents.counts_SV))
                    for i in range(0, len(labels_PS), rows)
                ]
            )

        return chunked

    return {
        "rank–frequency": of_counts(lambda a, b: _ks(_descending(a), _descending(b))),
        "words": of_counts(lambda a, b: np.abs(_shares(a) - _shares(b)).sum(1) / 2),
        "type–token": _standardised(documents.types_SG),
        "bigram type–token": _standardised(documents.bigram_types_SG),
        "sentence length": lambda labels: _ks(*_both(labels, documents.sentences_SK)),
        "document length": _ks_of_values(documents.words_S),
        "stop-word runs": lambda labels: _ks(*_both(labels, documents.stop_runs_SK)),
        "stop words": _ks_of_values(documents.stop_share_S),
        "symbols": _ks_of_values(documents.symbol_share_S),
    }


def _both(labels_PS, values_SG):
    """Sums over samples and over reference, exact: the values are counts below 2^24."""
    a_PG = np.ascontiguousarray(labels_PS @ values_SG)  # rows are sorted next
    return a_PG, np.asarray(values_SG.sum(0)) - a_PG


def _shares(a_PG):
    return a_PG / np.maximum(a_PG.sum(1, keepdims=True), 1)


def _descending(a_PG):
    return np.sort(a_PG, axis=1)[:, ::-1]


def _ks(a_PG, b_PG):
    """The largest difference of two cumulative laws, given the counts of their G values."""
    return np.abs(np.cumsum(_shares(a_PG) - _shares(b_PG), axis=1)).max(1)


def _ks_of_values(values_S) -> Distance:
    _, place = np.unique(values_S, return_inverse=True)
    return lambda labels: _ks(*_both(labels, np.eye(place.max() + 1, dtype=np.float32)[place]))


def _standardised(curve_SG) -> Distance:
    """The largest difference of two mean curves in units of its standard error.

    The standard deviation is of all documents, so that it does not depend on the labels.
    """
    there_SG = ~np.isnan(curve_SG)
    enough = there_SG.sum(0) > 1
    there, curve = there_SG[:, enough].astype(np.float32), np.nan_to_num(curve_SG[:, enough])
    deviation = np.nanstd(curve_SG[:, enough], axis=0, ddof=1)

    def distance(labels_PS):
        (na, nb), (a, b) = _both(labels_PS, there), _both(labels_PS, curve.astype(np.float32))
        difference = a / np.maximum(na, 1) - b / np.maximum(nb, 1)
        error = deviation * np.sqrt(1 / np.maximum(na, 1) + 1 / np.maximum(nb, 1))
        usable = (na > 0) & (nb > 0) & (error > 0)
        scaled = np.where(usable, np.abs(difference) / np.where(error > 0, error, 1), 0)
        return scaled.max(1, initial=0)

    return distance


Quantity = tuple[str, Measured | None, Measured | None]


def _quantities(documents: Documents, is_sample_S: np.ndarray) -> dict[str, Quantity]:
    sets = (is_sample_S, ~is_sample_S)
    num_types = [int((documents.counts(s) > 0).sum()) for s in sets]
    ranks = max(min(ZIPF_RANKS, *num_types), 2)
    reached = np.all([(documents.words_S[s, None] >= CHECKPOINTS).mean(0) >= 0.5 for s in sets], 0)

    def mean_length(numbers_SK):
        return lambda s: _ratio(numbers_SK[s] @ np.arange(1, LONGEST + 1), numbers_SK[s].sum(1))

    def both(name, function):
        return name, function(sets[0]), function(sets[1])

    return {
        "rank–frequency": both(
            f"Zipf exponent, ranks 1–{ranks}", lambda s: _zipf(documents, s, ranks)
        ),
        "words": ("", None, None),
        "type–token": both("Heaps exponent", lambda s: _heaps(documents.types_SG[s], reached)),
        "bigram type–token": both(
            "Heaps exponent of pairs", lambda s: _heaps(documents.bigram_types_SG[s], reached)
        ),
        "sentence length": both("words a sentence", mean_length(documents.sentences_SK)),
        "stop-word runs": both("stop words a run", mean_length(documents.stop_runs_SK)),
        "document length": both("words a document", lambda s: _mean(documents.words_S[s])),
        "stop words": both("share of the words", lambda s: _mean(documents.stop_share_S[s])),
        "symbols": both("share of the characters", lambda s: _mean(documents.symbol_share_S[s])),
    }


def _mean(values) -> Measured:
    return Measured(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))


def _ratio(top, bottom) -> Measured | None:
    if not bottom.sum():
        return None
    ratio = top.sum() / bottom.sum()
    residual, n = top - ratio * bottom, len(top)
    error = np.sqrt(n / (n - 1) * (residual**2).sum()) / bottom.sum()
    return Measured(float(ratio), float(error))


def _zipf(documents: Documents, chosen_S: np.ndarray, ranks: int) -> Measured | None:
    """The exponent s of p(r) ∝ r^-s over the first ranks, by maximum likelihood.

    The error is the jackknife's over documents: words of one document are not independent. Ranks
    are those of the same counts, which biases s upwards a little, in both texts alike.
    """
    total = documents.counts(chosen_S)
    if not total.any():
        return None
    log_rank = np.log(np.arange(1, ranks + 1))
    s = np.linspace(0, 5, 501)
    law = np.exp(-s[:, None] * log_rank)
    expected = (law * log_rank).sum(1) / law.sum(1)  # falls with s

    def fit(counts_PV):
        head = _descending(counts_PV)[:, :ranks].astype(float)
        mean = (head * log_rank[: head.shape[1]]).sum(1) / np.maximum(head.sum(1), 1)
        return np.interp(mean, expected[::-1], s[::-1])

    chosen, rows = np.flatnonzero(chosen_S), max(1, CELLS // len(total))
    size = len(chosen)
    left_out = np.concatenate(
        [
            fit(total - documents.counts_SV[chosen[i : i + rows]].toarray())
            for i in range(0, size, rows)
        ]
    )
    error = np.sqrt((size - 1) / size * ((left_out - left_out.mean()) ** 2).sum())
    return Measured(float(fit(total[None])[0]), float(error))


def _heaps(curve_SG, reached_G) -> Measured | None:
    """The mean over documents of the exponent β of types ∝ words^β, by least squares of logarithms.

    Over lengths that at least half of the documents of either text reach, and documents that reach
    them all, so that both texts are fitted at the same places.
    """
    curve = curve_SG[:, reached_G]
    curve = curve[~np.isnan(curve).any(1)]
    if reached_G.sum() < 2 or len(curve) < 2:
        return None
    x = np.log(CHECKPOINTS[reached_G])
    x = x - x.mean()
    return _mean(np.log(curve) @ x / (x @ x))


def _curves(documents: Documents, chosen_S: np.ndarray) -> dict[str, Any]:
    counts = _descending(documents.counts(chosen_S)[None])[0]
    counts = counts[counts > 0]
    growth: dict[str, Any] = {}
    for name, curve_SG in (
        ("types", documents.types_SG),
        ("bigram_types", documents.bigram_types_SG),
    ):
        curve = curve_SG[chosen_S]
        number = (~np.isnan(curve)).sum(0)
        kept = number > max(1, len(curve) // 10)  # a mean of a few long documents wobbles
        growth["words"] = CHECKPOINTS[kept].tolist()
        growth[name] = np.nanmean(curve[:, kept], 0).tolist()
        error = np.nanstd(curve[:, kept], 0, ddof=1) / np.sqrt(number[kept])
        growth[f"{name}_error"] = error.tolist()

    def of_lengths(numbers_SK):
        numbers = numbers_SK[chosen_S].sum(0)
        return np.arange(LONGEST + 1), np.append(0, np.cumsum(numbers)) / max(numbers.sum(), 1)

    def of_values(values_S):
        values = np.sort(values_S[chosen_S])
        return np.append(values[0], values), np.arange(len(values) + 1) / len(values)

    return {
        "rank_frequency": (np.arange(1, len(counts) + 1), counts / counts.sum()),
        "growth": growth,
        "sentence_length": of_lengths(documents.sentences_SK),
        "stop_runs": of_lengths(documents.stop_runs_SK),
        "stop_words": of_values(documents.stop_share_S),
        "symbols": of_values(documents.symbol_share_S),
    }
