"""The figures of ``consistency``, with their tables, text and plot for a report."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from sedd.evaluation.joints import JOINTS
from sedd.evaluation.measured import Measured, mean_of
from sedd.evaluation.report import Section, Table, plain_axes

ORDER_MEASURES = {  # measures between the two chains, as they are named for a reader
    "total_variation": "total variation",
    "jensen_shannon": "Jensen–Shannon divergence, nats",
    "kl_ab_ba": "KL(a first ‖ b first), nats",
    "kl_ba_ab": "KL(b first ‖ a first), nats",
    "true_pair": "|log ratio| at the true pair, nats",
    "max_log_ratio": "largest |log ratio| on the grid, nats",
}


@dataclass(frozen=True, kw_only=True)
class Consistency:
    """Measures of P pairs of positions, whose joint is constructed in J ways.

    Reports show means over pairs. Their standard errors treat pairs as independent. No position is
    drawn twice as the first of a pair. With a random distance, positions may still occur in several
    pairs, and a pair may occur twice.

    Args:
        joints: names of the J constructions, the keys of ``pair_joints``.
        distance: the distance between the two positions; None if it is random.
        num_tokens: how many tokens are compared at each position. The joints are tables of
            num_tokens × num_tokens pairs of tokens, called the grid.
        exact: whether the grid has all real tokens.
        sigma: total noise that a time-dependent model was given; None for a time-independent model.
        positions: [P, 3], the sequence and the positions a < b of each pair.
        coverage: [P], the mass of ``chain_ab`` on the grid.
        model_unary_nats: [P], nats of the true tokens, each given the other one, by the model;
            the mean of the two.
        unary_nats: [P, J], the same by the conditionals of each joint.
        pairwise_nats: [P, J], nats of the true pair by each joint.
        kl_true: [P, J], KL(the model's conditional ‖ the joint's) of one token given the true other
            one; the mean of the two.
        kl_all: [P, J], the same, averaged over all tokens of the grid as the other token.
        distances: [P, J, J], total variation between the joints.
        orders: measures between ``chain_ab`` and ``chain_ba``, each [P]; see ``ORDER_MEASURES``.
        residual: [P], by how much one more Arnold–Gokhale iteration moves that joint, in total
            variation.
    """

    joints: tuple[str, ...]
    distance: int | None
    num_tokens: int
    exact: bool
    sigma: float | None
    positions: np.ndarray
    coverage: np.ndarray
    model_unary_nats: np.ndarray
    unary_nats: np.ndarray
    pairwise_nats: np.ndarray
    kl_true: np.ndarray
    kl_all: np.ndarray
    distances: np.ndarray
    orders: dict[str, np.ndarray]
    residual: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """Return the figures of all pairs together, ready for ``json.dump``."""
        return {
            "num_pairs": len(self.positions),
            "distance": self.distance,
            "num_tokens": self.num_tokens,
            "exact": self.exact,
            "coverage": float(self.coverage.mean()),
            "sigma": self.sigma,
            "model_unary_perplexity": math.exp(self.model_unary_nats.mean()),
            "joints": self._of_joints(),
            "orders": self._of_orders(),
            "total_variation": self.distances.mean(0).tolist(),
            "arnold_gokhale_residual": float(self.residual.max()),
        }

    def section(self) -> Section:
        """Make a part of a report: an explanation, two tables and a plot."""
        model = math.exp(self.model_unary_nats.mean())
        joints = Table(
            title="Joints derived from the conditionals",
            columns=(
                "joint",
                "pair perplexity",
                "Δ nats ± s.e.",
                "token perplexity",
                "KL, true",
                "KL, all",
            ),
            rows=[
                ("the model's conditionals", None, None, model, 0.0, 0.0),
                *(_joint_row(JOINTS[name], of) for name, of in self._of_joints().items()),
            ],
        )
        orders = Table(
            title="Between the two orders of the chain",
            columns=("measure", "mean ± s.e.", "largest"),
            rows=[
                (ORDER_MEASURES[name], mean_of(x_P), float(x_P.max()))
                for name, x_P in self.orders.items()
            ],
        )
        return Section(
            title="Are the conditionals consistent?",
            text=self._text(),
            tables=[joints, orders],
            figures=[self.figure()],
        )

    def figure(self):
        """Plot total variation between the joints, and the true pairs' nats in both orders."""
        from matplotlib.figure import Figure

        blue, grey = "#2f6fb0", "#555555"
        figure = Figure(figsize=(11, 4.8), dpi=150, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        mean = self.distances.mean(0)
        image = left.imshow(mean, cmap="Blues", vmin=0)
        names = [JOINTS[name] for name in self.joints]
        left.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
        left.set_yticks(range(len(names)), names, fontsize=8)
        for (i, j), value in np.ndenumerate(mean):
            dark = value > 0.6 * mean.max()
            left.text(
                j,
                i,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark else grey,
            )
        figure.colorbar(image, ax=left, shrink=0.8)
        left.set_title("Total variation between joints", loc="left")

        a_first, b_first = (
            self.pairwise_nats[:, self.joints.index(name)] for name in ("chain_ab", "chain_ba")
        )
        high = 1.04 * max(a_first.max(), b_first.max())
        right.plot([0, high], [0, high], color=grey, linestyle="--", linewidth=1.2)
        right.scatter(a_first, b_first, color=blue, s=14, alpha=0.7, linewidths=0)
        right.set_xlim(0, high)
        right.set_ylim(0, high)
        right.set_aspect("equal")
        right.set_xlabel("nats of the true pair, a first")
        right.set_ylabel("b first")
        right.set_title("One pair, two orders", loc="left")
        plain_axes(right)
        return figure

    def _of_joints(self) -> dict[str, dict[str, float | None]]:
        """The figures of each joint, means over pairs."""
        first_P = self.pairwise_nats[:, self.joints.index("chain_ab")]
        figures = {}
        for j, name in enumerate(self.joints):
            # Pairs differ far more than joints do, so the error is that of the difference from
            # ``chain_ab`` within a pair.
            above, error = mean_of((self.pairwise_nats[:, j] - first_P) / 2)
            figures[name] = {
                "pairwise_perplexity": math.exp(self.pairwise_nats[:, j].mean() / 2),
                "nats_per_token_above_chain_ab": above,
                "standard_error": error,
                "unary_perplexity": math.exp(self.unary_nats[:, j].mean()),
                "unary_kl_true": float(self.kl_true[:, j].mean()),
                "unary_kl_all": float(self.kl_all[:, j].mean()),
            }
        return figures

    def _of_orders(self) -> dict[str, dict[str, float | None]]:
        """The measures between the two chains: mean, standard error and largest value."""
        figures = {}
        for name, x_P in self.orders.items():
            mean, error = mean_of(x_P)
            figures[name] = {"mean": mean, "standard_error": error, "largest": float(x_P.max())}
        return figures

    def _text(self) -> str:
        """The explanation that stands above the tables."""
        apart = "at random distances" if self.distance is None else f"{self.distance} apart"
        tokens = (
            f"All {self.num_tokens} tokens of each position are compared: the joints of a pair are "
            "exact, and errors are standard errors over pairs."
            if self.exact
            else f"Approximate: only the {self.num_tokens} most likely tokens of each position "
            "(the true one among them) are compared. All probabilities are conditional on both "
            f"tokens being among these ({100 * self.coverage.mean():.1f} % of the chain's mass)."
        )
        time = "" if self.sigma is None else f" The model was given σ = {self.sigma:.4g}."
        return (
            f"{len(self.positions)} pairs of positions a < b, {apart}; both are masked, all others "
            f"given. {tokens}{time}\n\nPair perplexity is that of the true pair under the joint, "
            "per token; Δ is the difference of its nats per token from the chain that draws a "
            "first. Token perplexity is that of one true token given the other. KL is the "
            "divergence of the joint's conditional of one token from the model's, in nats, given "
            "the true other token, or averaged over all tokens as the other one; it is 0 if the "
            "joint agrees with the model.\n\nIf the conditionals were consistent, all rows but the "
            "independent joint and the two products would be equal, and the last table would be 0."
            "\n\nOne more fixed-point iteration changes no Arnold–Gokhale joint by more than "
            f"{self.residual.max():.1g} in total variation."
        )


def _joint_row(name: str, figures: dict[str, Any]) -> tuple[Any, ...]:
    """Make a row of the table of joints; the difference and its error share a cell."""
    pair, above, error, *others = figures.values()
    return (name, pair, Measured(above, error), *others)
