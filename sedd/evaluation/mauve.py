"""MAUVE: the difference between the distributions of samples and of real text.

Pillutla et al., arXiv:2102.01454. Each text has a feature vector; k-means divides the vectors of
both sets into buckets. The two histograms P and Q are compared by their mixtures R = λP + (1 − λ)Q:
the score is the area under the curve of (exp(−c·KL(Q‖R)), exp(−c·KL(P‖R))) with c = 5. It is 1 for
equal histograms and near 0 for disjoint ones. A score depends on the features, on the number of
texts and on the number of buckets. Only scores for which all of these are the same can be compared,
so that scores of this module cannot be compared with published ones.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from sedd.evaluation.report import Section, Table, plain_axes

SCALE = 5.0  # c, as published
VARIANCE = 0.9  # the share of the variance that the principal components keep
POINTS = 101  # points of the curve between its ends
RESTARTS = 5  # starts of k-means, of which the best is taken


@dataclass(frozen=True, kw_only=True)
class Mauve:
    """A MAUVE score, and everything that it depends on.

    Args:
        score: in (0, 1]; 1 for equal histograms.
        features: the name of the features.
        num_samples: the number of samples.
        num_reference: the number of real texts.
        num_buckets: clusters of k-means.
        num_components: principal components that the clusters are found in.
        curve: [POINTS + 2, 2], the divergence curve from (1, 0) to (0, 1).
    """

    score: float
    features: str
    num_samples: int
    num_reference: int
    num_buckets: int
    num_components: int
    curve: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """Return every figure except for the curve, ready for ``json.dump``."""
        return {
            "score": self.score,
            "features": self.features,
            "num_samples": self.num_samples,
            "num_reference": self.num_reference,
            "num_buckets": self.num_buckets,
            "num_components": self.num_components,
        }

    def section(self) -> Section:
        """Make a part of a report: the score and its curve."""
        columns = ("MAUVE", "features", "samples", "real texts", "buckets", "components")
        sizes = (self.num_samples, self.num_reference, self.num_buckets, self.num_components)
        return Section(
            title="MAUVE",
            text="1 where samples and real text fall into the same buckets equally often. Only "
            "figures of the same features and numbers of texts and buckets can be compared.",
            tables=[Table(columns=columns, rows=[(self.score, self.features, *sizes)])],
            figures=[self.figure()],
        )

    def figure(self):
        """Plot the divergence curve, with the area below it shaded."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.6, 4.4), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        x, y = self.curve.T
        axes.fill_between(x, y, color="#2f6fb0", alpha=0.15, linewidth=0)
        axes.plot(x, y, color="#2f6fb0", linewidth=2)
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02), aspect="equal")
        axes.set_xlabel("exp(−c KL(real ‖ mixture))")
        axes.set_ylabel("exp(−c KL(samples ‖ mixture))")
        axes.set_title(f"Divergence curve, area {self.score:.3f}", loc="left", fontsize=10)
        plain_axes(axes)
        return figure


def mauve(
    samples_SD: np.ndarray,
    reference_SD: np.ndarray,
    *,
    features: str,
    num_buckets: int | None = None,
    seed: int = 0,
) -> Mauve:
    """Compute the MAUVE score of samples against real text.

    Feature vectors are scaled to length 1, centred, and reduced to the principal components that
    hold 90 % of the variance (``VARIANCE``). k-means then divides them into buckets.

    Args:
        samples_SD: a feature vector for each sample.
        reference_SD: a feature vector for each real text.
        features: the name of the features, for the result.
        num_buckets: clusters of k-means; by default a tenth of the smaller set's size, at least 2.
        seed: of k-means.

    Raises:
        ValueError: if a set has fewer than 2 texts, if the widths differ, or if there are more
            buckets than texts.
    """
    sizes = (len(samples_SD), len(reference_SD))
    if min(sizes) < 2 or samples_SD.shape[1:] != reference_SD.shape[1:]:
        raise ValueError(
            f"features must be of at least 2 texts each and of one width, got "
            f"{samples_SD.shape} and {reference_SD.shape}"
        )
    buckets = max(2, round(min(sizes) / 10)) if num_buckets is None else num_buckets
    if not 1 <= buckets <= sum(sizes):
        raise ValueError(f"num_buckets must be in 1..{sum(sizes)}, got {buckets}")
    points = _components(np.concatenate([samples_SD, reference_SD]).astype(np.float64))
    labels = k_means(points, buckets, seed=seed)
    p, q = (
        np.bincount(part, minlength=buckets) / len(part)
        for part in (labels[: sizes[0]], labels[sizes[0] :])
    )
    curve = divergence_curve(p, q)
    return Mauve(
        score=float(-np.trapezoid(curve[:, 1], curve[:, 0])),
        features=features,
        num_samples=sizes[0],
        num_reference=sizes[1],
        num_buckets=buckets,
        num_components=points.shape[1],
        curve=curve,
    )


def divergence_curve(p_K: np.ndarray, q_K: np.ndarray) -> np.ndarray:
    """Return the curve as points [POINTS + 2, 2].

    Each point is (exp(−c·KL(q‖r)), exp(−c·KL(p‖r))) for a mixture r of p and q, with c = ``SCALE``.
    The first and the last point are the ends of the curve on the axes, (1, 0) and (0, 1).

    Args:
        p_K: the histogram of the samples over K buckets, which sums to 1.
        q_K: the histogram of the real texts.
    """
    weight = np.linspace(0, 1, POINTS + 2)[1:-1, None]
    mixed = weight * p_K + (1 - weight) * q_K
    points = [np.exp(-SCALE * _kl(law, mixed)) for law in (q_K, p_K)]
    return np.concatenate([[[1, 0]], np.stack(points, axis=1), [[0, 1]]])


def _kl(law_K, mixed_PK):
    """KL(law ‖ mixture) in nats, for each of P mixtures."""
    there = law_K > 0  # the mixtures are then above 0 as well
    return (law_K[there] * np.log(law_K[there] / mixed_PK[:, there])).sum(1)


def _components(x_SD: np.ndarray) -> np.ndarray:
    """Scale rows to length 1, and keep the components that hold ``VARIANCE`` of the variance."""
    x_SD = x_SD / np.maximum(np.linalg.norm(x_SD, axis=1, keepdims=True), 1e-12)
    x_SD = x_SD - x_SD.mean(0)
    u, s, _ = np.linalg.svd(x_SD, full_matrices=False)
    kept = int(np.searchsorted(np.cumsum(s**2), VARIANCE * (s**2).sum())) + 1
    return u[:, :kept] * s[:kept]


def k_means(x_SD: np.ndarray, num_clusters: int, *, seed: int, rounds: int = 100) -> np.ndarray:
    """Return the cluster of each row: the best of several runs of Lloyd's algorithm.

    Each run starts from k-means++. The best run has the smallest sum of squared distances to the
    centres. The centre of a cluster that becomes empty stays in place.

    Args:
        x_SD: the rows.
        num_clusters: the number of clusters.
        seed: determines the starts.
        rounds: the most rounds of Lloyd's algorithm.
    """
    rng = np.random.default_rng(seed)
    best, best_cost = np.zeros(len(x_SD), int), np.inf
    for _ in range(RESTARTS):
        centres = x_SD[rng.integers(len(x_SD), size=1)]
        while len(centres) < num_clusters:
            weight = np.maximum(_squares(x_SD, centres).min(1), 1e-300)
            chosen = rng.choice(len(x_SD), p=weight / weight.sum())
            centres = np.concatenate([centres, x_SD[chosen : chosen + 1]])
        labels = np.full(len(x_SD), -1)
        for _ in range(rounds):
            squares = _squares(x_SD, centres)
            previous, labels = labels, squares.argmin(1)
            if (labels == previous).all():
                break
            number = np.bincount(labels, minlength=num_clusters)
            sums = np.zeros_like(centres)
            np.add.at(sums, labels, x_SD)
            full = number > 0
            centres = np.where(full[:, None], sums / np.maximum(number, 1)[:, None], centres)
        cost = squares.min(1).sum()
        if cost < best_cost:
            best, best_cost = labels, cost
    return best


def _squares(x_SD, centres_KD):
    """Squared distances of rows and centres, [S, K]; rounding may not make them negative."""
    return np.maximum(
        (x_SD**2).sum(1)[:, None] - 2 * x_SD @ centres_KD.T + (centres_KD**2).sum(1), 0
    )
