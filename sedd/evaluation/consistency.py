"""Are a masked model's conditionals those of one joint? See ``docs/consistency.md``.

Two positions of a held-out sequence are masked; all others are given. The network defines p(a | b)
for every token b and p(b | a) for every token a, and nothing in it makes the two consistent. If
they were the conditionals of one joint, several constructions of ``joints`` would all return that
joint. This module measures how far the constructed joints differ (arXiv:2305.15501).
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sedd.denoiser import Denoiser
from sedd.evaluation.joints import (
    JOINTS,
    arnold_gokhale_step,
    log_sum,
    pair_joints,
    total_variation,
)
from sedd.evaluation.report import Measured, Section, Table
from sedd.networks.base import read_out
from sedd.types import Array, Bool, Int, Key

LARGEST_GRID = 2048  # tokens a position: beyond, V² probabilities and 2V network rows a pair


@dataclass(frozen=True, kw_only=True)
class Consistency:
    """Joints of P pairs of positions by J constructions; means over pairs are reported.

    Errors are over pairs, as if these were independent: they lie in different places, mostly of
    different sequences.
    """

    joints: tuple[str, ...]  # [J], names of ``pair_joints``
    distance: int | None  # between the positions of a pair; None: any
    num_tokens: int  # on the grid, for each position
    exact: bool  # whether these are all tokens
    sigma: float | None  # at which a time-dependent model was asked
    positions: np.ndarray  # [P, 3]: sequence, a, b; a < b
    coverage: np.ndarray  # [P], mass that chain_ab puts on the grid
    model_unary_nats: np.ndarray  # [P], -log of the model's own conditionals of the true tokens
    unary_nats: np.ndarray  # [P, J], the same of the joint's conditionals; means of two
    pairwise_nats: np.ndarray  # [P, J], -log joint of the true pair
    kl_true: np.ndarray  # [P, J], KL(model's conditional ‖ joint's) given the true other token
    kl_all: np.ndarray  # [P, J], its mean over all tokens of the grid as the other one
    distances: np.ndarray  # [P, J, J], total variation between joints
    orders: dict[str, np.ndarray]  # [P] each: measures between chain_ab and chain_ba
    residual: np.ndarray  # [P], total variation of one more Arnold–Gokhale iteration

    def to_json(self) -> dict[str, Any]:
        """Every figure, ready for ``json.dump``; what is of a single pair is left out."""
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
        """The figures as a part of a report."""
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
                (ORDERS[name], _mean(x_P), float(x_P.max())) for name, x_P in self.orders.items()
            ],
        )
        return Section(
            title="Are the conditionals consistent?",
            text=self._text(),
            tables=[joints, orders],
            figures=[self.figure()],
        )

    def figure(self):
        """Total variation between joints, and the true pairs' nats in either order."""
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
        right.grid(color="#e4e4e4", linewidth=0.8)
        right.set_axisbelow(True)
        right.spines[["top", "right"]].set_visible(False)
        return figure

    def _of_joints(self) -> dict[str, dict[str, float | None]]:
        first_P = self.pairwise_nats[:, self.joints.index("chain_ab")]
        figures = {}
        for j, name in enumerate(self.joints):
            # Pairs differ far more than joints do: the error is of the difference, pair by pair.
            above, error = _mean((self.pairwise_nats[:, j] - first_P) / 2)
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
        figures = {}
        for name, x_P in self.orders.items():
            mean, error = _mean(x_P)
            figures[name] = {"mean": mean, "standard_error": error, "largest": float(x_P.max())}
        return figures

    def _text(self) -> str:
        apart = "at random distances" if self.distance is None else f"{self.distance} apart"
        tokens = (
            f"All {self.num_tokens} tokens of each position are compared: the joints of a pair are "
            "exact, and errors are standard errors over pairs."
            if self.exact
            else f"Approximate: only the {self.num_tokens} most likely tokens of each position "
            "(the true one among them) are compared. All probabilities are conditional on both "
            f"tokens being among these ({100 * self.coverage.mean():.1f} % of the chain's mass)."
        )
        time = "" if self.sigma is None else f" The model was asked at σ = {self.sigma:.4g}."
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


ORDERS = {
    "total_variation": "total variation",
    "jensen_shannon": "Jensen–Shannon divergence, nats",
    "kl_ab_ba": "KL(a first ‖ b first), nats",
    "kl_ba_ab": "KL(b first ‖ a first), nats",
    "true_pair": "|log ratio| at the true pair, nats",
    "max_log_ratio": "largest |log ratio| on the grid, nats",
}


def _joint_row(name: str, figures: dict[str, Any]) -> tuple[Any, ...]:
    """A row of the table of joints; the difference and its error share a cell."""
    pair, above, error, *others = figures.values()
    return (name, pair, Measured(above, error), *others)


def _mean(values_P: np.ndarray) -> Measured:
    """The mean and its standard error; a single value has no error."""
    count = len(values_P)
    error = float(values_P.std(ddof=1)) / math.sqrt(count) if count > 1 else None
    return Measured(float(values_P.mean()), error)


def _kl(log_p: np.ndarray, log_q: np.ndarray, axis: Any = (-2, -1)) -> np.ndarray:
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis)
    return np.asarray(np.maximum(kl, 0))  # rounding may go below


def _compare(
    joints: dict[str, np.ndarray],
    given_b: np.ndarray,
    given_a: np.ndarray,
    true: tuple[int, int],
) -> dict[str, Any]:
    """The figures of one pair; a ``true`` token is its place on the grid."""
    a, b = true
    # Of the model and then of the joints, normalised on the grid: [1 + J, A, B].
    by_b = np.stack([given_b, *joints.values()])
    by_a = np.stack([given_a, *joints.values()])
    by_b, by_a = by_b - log_sum(by_b, -2), by_a - log_sum(by_a, -1)
    unary = -(by_b[:, a, b] + by_a[:, a, b]) / 2
    kl_b, kl_a = _kl(by_b[:1], by_b[1:], -2), _kl(by_a[:1], by_a[1:], -1)
    stacked = np.stack(list(joints.values()))
    probs = np.exp(stacked)
    ab, ba = joints["chain_ab"], joints["chain_ba"]
    middle = np.logaddexp(ab, ba) - math.log(2)
    weight = np.exp(by_b[0]) + np.exp(by_a[0])
    fitted = np.exp(joints["arnold_gokhale"])
    return {
        "model_unary_nats": unary[0],
        "unary_nats": unary[1:],
        "pairwise_nats": -stacked[:, a, b],
        "kl_true": (kl_b[:, b] + kl_a[:, a]) / 2,
        "kl_all": np.concatenate([kl_b, kl_a], -1).mean(-1),
        "distances": total_variation(probs[:, None], probs),
        "residual": total_variation(arnold_gokhale_step(weight, fitted), fitted),
        "total_variation": total_variation(np.exp(ab), np.exp(ba)),
        "jensen_shannon": 0.5 * (_kl(ab, middle) + _kl(ba, middle)),
        "kl_ab_ba": _kl(ab, ba),
        "kl_ba_ab": _kl(ba, ab),
        "true_pair": abs(ab[a, b] - ba[a, b]),
        "max_log_ratio": np.abs(ab - ba).max(),
    }


def consistency(
    denoiser: Denoiser,
    x0_BL: Int[Array, "B L"],
    scored_BL: Bool[Array, "B L"],
    key: Key[Array, ""],
    *,
    pairs: int,
    distance: int | None = 1,
    top: int | None = None,
    sigma: float | None = None,
    batch_size: int = 128,
) -> Consistency:
    """Compare the joints of ``pairs`` pairs of scored positions that ``key`` draws.

    First positions are drawn without repetition; the second is ``distance`` further on, or any
    other one of the sequence (None). With ``top`` the joints are on the so many likeliest tokens
    of each position with both masked, the true one always among them: approximate, and for a
    large vocabulary the only way, since a pair takes 2·top + 2 network rows, of ``batch_size``
    each call. A time-dependent model is asked at ``sigma``, by default -log(1 - 2/L), at which 2
    of L tokens are expected to be masked; the conditionals are the model's, not reshaped ones.

    ValueError on a process without a mask, on fewer possible first positions than ``pairs``, and
    on a grid that is too large.
    """
    positions = draw_pairs(denoiser, np.asarray(scored_BL), key, pairs=pairs, distance=distance)
    mask_id, num_tokens = denoiser.mask_id, denoiser.process.num_tokens
    size = num_tokens if top is None else min(top, num_tokens)
    if not 2 <= size <= LARGEST_GRID:
        raise ValueError(f"top must be in [2, {LARGEST_GRID}], got {size} tokens a position")
    if denoiser.time_independent:
        sigma = None
    elif sigma is None:
        if x0_BL.shape[1] < 3:  # where that is infinite
            raise ValueError("sequences of fewer than 3 tokens need a sigma")
        sigma = -math.log1p(-2 / x0_BL.shape[1])
    x0_PL, places_P2 = np.asarray(x0_BL)[positions[:, 0]], positions[:, 1:]
    true_P2 = np.take_along_axis(x0_PL, places_P2, 1)
    masked_PL = x0_PL.copy()
    np.put_along_axis(masked_PL, places_P2, mask_id, 1)
    reader = _Reader(denoiser, sigma, batch_size)
    both_P2N = _log_softmax(
        reader(np.repeat(masked_PL, 2, 0), places_P2.ravel()).reshape(pairs, 2, num_tokens)
    )
    results = []
    for masked_L, (place_a, place_b), (true_a, true_b), (both_a, both_b) in zip(
        masked_PL, places_P2, true_P2, both_P2N, strict=True
    ):
        grid_a, grid_b = _grid(both_a, int(true_a), size), _grid(both_b, int(true_b), size)
        rows_RL = np.tile(masked_L, (2 * size, 1))
        rows_RL[:size, place_b], rows_RL[size:, place_a] = grid_b, grid_a
        logits_RN = reader(rows_RL, np.repeat([place_a, place_b], size))
        (logit_b, logit_a), (given_b, given_a) = (
            (rows_RN[:size, grid_a].T, rows_RN[size:, grid_b])
            for rows_RN in (logits_RN, _log_softmax(logits_RN))
        )
        log_a, log_b = both_a[grid_a], both_b[grid_b]
        joints = pair_joints(given_b, given_a, log_a, log_b, logits=(logit_b, logit_a))
        at_true = (int(np.searchsorted(grid_a, true_a)), int(np.searchsorted(grid_b, true_b)))
        coverage = float(np.exp(log_a[:, None] + given_a).sum())
        results.append({"coverage": coverage, **_compare(joints, given_b, given_a, at_true)})
    arrays = {name: np.array([r[name] for r in results]) for name in results[0]}
    return Consistency(
        joints=tuple(JOINTS),
        distance=distance,
        num_tokens=size,
        exact=size == num_tokens,
        sigma=sigma,
        positions=positions,
        orders={name: arrays.pop(name) for name in ORDERS},
        **arrays,
    )


def draw_pairs(
    denoiser: Denoiser,
    scored_BL: np.ndarray,
    key: Key[Array, ""],
    *,
    pairs: int,
    distance: int | None,
) -> np.ndarray:
    """Draw pairs of scored positions: [P, 3], a sequence and two positions, ascending.

    ValueError if the model has no conditionals of masked pairs, or there are too few pairs.
    """
    if not denoiser.process.absorbing:
        raise ValueError("consistency is of masked positions: it needs an absorbing process")
    if denoiser.causal:
        raise ValueError("an autoregressive model is one joint: its conditionals are consistent")
    rng = np.random.default_rng(int(jax.random.bits(key)))
    if distance is None:
        possible_BL = scored_BL & (scored_BL.sum(1, keepdims=True) > 1)
    elif distance >= 1:
        possible_BL = scored_BL[:, :-distance] & scored_BL[:, distance:]
    else:
        raise ValueError(f"distance must be at least 1, got {distance}")
    possible = np.argwhere(possible_BL)
    if not 1 <= pairs <= len(possible):
        raise ValueError(f"pairs must be in [1, {len(possible)}] for these sequences, got {pairs}")
    drawn = []
    for row, a in possible[rng.choice(len(possible), pairs, replace=False)]:
        if distance is None:
            others = np.flatnonzero(scored_BL[row])
            b = rng.choice(others[others != a])
        else:
            b = a + distance
        drawn.append((row, min(a, b), max(a, b)))
    return np.array(drawn)


def _grid(log_probs_N: np.ndarray, true: int, size: int) -> np.ndarray:
    """The likeliest tokens, ascending; the true one in the place of the last if it is not there."""
    if size == len(log_probs_N):
        return np.arange(size)
    tokens = np.argsort(-log_probs_N, kind="stable")[:size]
    if true not in tokens:
        tokens[-1] = true
    return np.sort(tokens)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - log_sum(logits, -1)


class _Reader:
    """Reads logits of one position of each row, in float64, in batches of one size."""

    def __init__(self, denoiser: Denoiser, sigma: float | None, batch_size: int):
        self.denoiser, self.sigma, self.batch_size = denoiser, sigma, batch_size

    def __call__(self, x_RL: np.ndarray, position_R: np.ndarray) -> np.ndarray:
        out = []
        for first in range(0, len(x_RL), self.batch_size):
            part = slice(first, first + self.batch_size)
            rows = np.resize(np.arange(len(x_RL[part])), self.batch_size)
            sigma_R = None
            if self.sigma is not None:
                sigma_R = jnp.full(self.batch_size, self.sigma, jnp.float32)
            logits_RN = _logits_at(
                self.denoiser,
                jnp.asarray(x_RL[part][rows]),
                jnp.asarray(position_R[part][rows]),
                sigma_R,
            )
            out.append(np.asarray(logits_RN, np.float64)[: len(x_RL[part])])
        return np.concatenate(out)


@jax.jit
def _logits_at(denoiser: Denoiser, x_RL, position_R, sigma_R):
    hidden_RLD = denoiser.hidden(x_RL, sigma_R)[0]
    hidden_RD = jnp.take_along_axis(hidden_RLD, position_R[:, None, None], 1)[:, 0]
    raw_RV = read_out(hidden_RD, *denoiser.network.head(denoiser.params))
    return denoiser.parameterization.masked_logits(raw_RV)
