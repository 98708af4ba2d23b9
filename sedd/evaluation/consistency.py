"""Are the conditionals of a masked model those of one joint? See ``docs/consistency.md``.

Two positions of a held-out sequence are masked, and all others are given. The network defines
p(a | b) for every token b and p(b | a) for every token a, but nothing in the network makes the two
consistent. If they were the conditionals of one joint distribution, several constructions in
``joints`` would all return that joint. This module measures how far the constructed joints differ
(arXiv:2305.15501).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sedd.denoiser import Denoiser
from sedd.evaluation.consistency_report import ORDER_MEASURES, Consistency
from sedd.evaluation.joints import (
    JOINTS,
    arnold_gokhale_step,
    log_sum,
    pair_joints,
    total_variation,
)
from sedd.networks.base import read_out
from sedd.types import Array, Bool, Int, Key

LARGEST_GRID = 2048  # tokens a position; a pair takes V² probabilities and 2V network rows


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
    """Compare the joints that the model's conditionals define for pairs of scored positions.

    The conditionals are the model's own: a ``Reshape`` of the denoiser is ignored. A pair takes
    2·``top`` + 2 rows of the network.

    Args:
        denoiser: the model; its process must be absorbing.
        x0_BL: held-out sequences.
        scored_BL: the positions of which pairs are drawn.
        key: draws the pairs.
        pairs: the number of pairs. No position is drawn twice as the first of a pair.
        distance: the distance of the second position from the first; None for any other position
            of the sequence.
        top: compare so many tokens of each position, the most likely ones and the true one. The
            joints are then approximate; a large vocabulary needs it. None for all tokens.
        sigma: total noise that a time-dependent model is given; by default -log(1 - 2/L), at which
            2 of L tokens are expected to be masked.
        batch_size: rows of a network call.

    Raises:
        ValueError: if the process is not absorbing or the model is autoregressive, if ``distance``
            is below 1, if there are fewer possible first positions than ``pairs``, if the grid has
            fewer than 2 or more than ``LARGEST_GRID`` tokens a position, or if a time-dependent
            model gets no ``sigma`` for sequences of fewer than 3 tokens.
    """
    positions = draw_pairs(denoiser, np.asarray(scored_BL), key, pairs=pairs, distance=distance)
    size = _grid_size(denoiser, top)
    sigma = _noise(denoiser, sigma, x0_BL.shape[1])
    x0_PL, places_P2 = np.asarray(x0_BL)[positions[:, 0]], positions[:, 1:]
    true_P2 = np.take_along_axis(x0_PL, places_P2, 1)
    np.put_along_axis(masked_PL := x0_PL.copy(), places_P2, denoiser.mask_id, 1)
    reader = _Reader(denoiser, sigma, batch_size)
    logits_2PN = reader(np.repeat(masked_PL, 2, 0), places_P2.ravel())  # with both masked
    both_P2N = _log_softmax(logits_2PN.reshape(pairs, 2, -1))
    pairs_P = zip(masked_PL, places_P2, true_P2, both_P2N, strict=True)
    results = [_measure_pair(reader, *pair, size) for pair in pairs_P]
    arrays = {name: np.array([r[name] for r in results]) for name in results[0]}
    return Consistency(
        joints=tuple(JOINTS),
        distance=distance,
        num_tokens=size,
        exact=size == denoiser.process.num_tokens,
        sigma=sigma,
        positions=positions,
        orders={name: arrays.pop(name) for name in ORDER_MEASURES},
        **arrays,
    )


def _grid_size(denoiser: Denoiser, top: int | None) -> int:
    """The number of tokens of each position that are compared; ValueError if it is too large."""
    num_tokens = denoiser.process.num_tokens
    size = num_tokens if top is None else min(top, num_tokens)
    if not 2 <= size <= LARGEST_GRID:
        raise ValueError(f"top must be in [2, {LARGEST_GRID}], got {size} tokens a position")
    return size


def _noise(denoiser: Denoiser, sigma: float | None, length: int) -> float | None:
    """The total noise of the network calls: None for a time-independent model."""
    if denoiser.time_independent:
        return None
    if sigma is not None:
        return sigma
    if length < 3:  # -log(1 - 2/L) is infinite
        raise ValueError("sequences of fewer than 3 tokens need a sigma")
    return -math.log1p(-2 / length)


def _measure_pair(
    reader: "_Reader",
    masked_L: np.ndarray,
    places_2: np.ndarray,
    true_2: np.ndarray,
    both_2N: np.ndarray,
    size: int,
) -> dict[str, Any]:
    """Read the conditionals of one pair on its grid, construct the joints, and compare them.

    Args:
        reader: reads logits of the model.
        masked_L: the sequence with both positions masked.
        places_2: the two positions a, b.
        true_2: their true tokens.
        both_2N: log p of each position's tokens while both are masked.
        size: tokens of the grid for each position.
    """
    place_a, place_b = places_2
    grid_a, grid_b = (
        _grid(both_N, int(true), size) for both_N, true in zip(both_2N, true_2, strict=True)
    )
    # A row for each token b of the grid at its position, then a row for each token a.
    rows_RL = np.tile(masked_L, (2 * size, 1))
    rows_RL[:size, place_b], rows_RL[size:, place_a] = grid_b, grid_a
    logits_RN = reader(rows_RL, np.repeat([place_a, place_b], size))
    (logit_b, logit_a), (given_b, given_a) = (
        (rows_RN[:size, grid_a].T, rows_RN[size:, grid_b])
        for rows_RN in (logits_RN, _log_softmax(logits_RN))
    )
    log_a, log_b = both_2N[0][grid_a], both_2N[1][grid_b]
    joints = pair_joints(given_b, given_a, log_a, log_b, logits=(logit_b, logit_a))
    at_true = (
        int(np.searchsorted(grid_a, true_2[0])),
        int(np.searchsorted(grid_b, true_2[1])),
    )
    coverage = float(np.exp(log_a[:, None] + given_a).sum())
    return {"coverage": coverage, **_compare(joints, given_b, given_a, at_true)}


def _kl(log_p: np.ndarray, log_q: np.ndarray, axis: Any = (-2, -1)) -> np.ndarray:
    """KL(p ‖ q) in nats, summed over ``axis``."""
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis)
    return np.asarray(np.maximum(kl, 0))  # rounding may make it negative


def _compare(
    joints: dict[str, np.ndarray],
    given_b: np.ndarray,
    given_a: np.ndarray,
    true: tuple[int, int],
) -> dict[str, Any]:
    """Compute the figures of one pair from its J joints.

    Args:
        joints: log joint [A, B] by name.
        given_b: the model's log p(a | b), [A, B].
        given_a: the model's log p(b | a), [A, B].
        true: the places of the true tokens on the grid.
    """
    a, b = true
    # Conditionals of the model, then of each joint, normalised on the grid: [1 + J, A, B].
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


def draw_pairs(
    denoiser: Denoiser,
    scored_BL: np.ndarray,
    key: Key[Array, ""],
    *,
    pairs: int,
    distance: int | None,
) -> np.ndarray:
    """Draw pairs of scored positions.

    One position of a pair is drawn without replacement, then the other one by ``distance``. Returns
    integers [P, 3]: the sequence, the smaller and the larger position.

    Args:
        denoiser: the model, which is only checked.
        scored_BL: the positions to draw from.
        key: determines the pairs.
        pairs: how many.
        distance: the distance of the second position; None for any other one of the sequence.

    Raises:
        ValueError: if the model has no conditionals of masked pairs, or there are too few pairs.
    """
    if not denoiser.process.absorbing:
        raise ValueError("consistency is of masked positions: it needs an absorbing process")
    if denoiser.causal:
        raise ValueError("an autoregressive model is one joint: its conditionals are consistent")
    if denoiser.block is not None:
        raise ValueError(
            "pairs of positions are masked anywhere, and a block model has conditionals only where "
            "all earlier blocks are clean"
        )
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
    """The ``size`` most likely tokens in ascending order, and the true one always among them.

    If the true token is not among the most likely ones, it replaces the least likely of them.
    """
    if size == len(log_probs_N):
        return np.arange(size)
    tokens = np.argsort(-log_probs_N, kind="stable")[:size]
    if true not in tokens:
        tokens[-1] = true
    return np.sort(tokens)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - log_sum(logits, -1)


class _Reader:
    """Reads the logits of one position of each row in float64, in batches of equal size.

    The last batch repeats rows to be full, so that one program serves all.
    """

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
    """Logits over real tokens [R, N] at one position of each row."""
    hidden_RLD = denoiser.hidden(x_RL, sigma_R)[0]
    hidden_RD = jnp.take_along_axis(hidden_RLD, position_R[:, None, None], 1)[:, 0]
    raw_RV = read_out(hidden_RD, *denoiser.network.head(denoiser.params))
    return denoiser.parameterization.masked_logits(raw_RV)
