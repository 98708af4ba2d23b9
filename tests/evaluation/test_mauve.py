"""MAUVE is 1 for equal laws, 0 for disjoint ones, falls in between, and its curve is exact."""

from itertools import pairwise

import numpy as np
import pytest

from sedd.evaluation.mauve import divergence_curve, k_means, mauve


def draw(size, shift, rng):
    """Points around three centres; ``shift`` is the share of them around three others."""
    centres = np.eye(6) * 4
    which = rng.integers(0, 3, size) + 3 * (rng.random(size) < shift)
    return centres[which] + rng.normal(0, 0.3, (size, 6))


def score(shift, rng, size=400):
    return mauve(draw(size, shift, rng), draw(size, 0.0, rng), features="toy", num_buckets=6).score


def test_equal_disjoint_and_monotone_between():
    rng = np.random.default_rng(0)
    scores = [score(shift, rng) for shift in (0, 0.1, 0.3, 0.6, 0.9, 1)]
    assert scores[0] > 0.99
    assert scores[-1] < 0.02
    assert all(high > low + 0.01 for high, low in pairwise(scores))
    same = draw(50, 0.3, rng)
    assert mauve(same, same, features="toy").score == pytest.approx(1)


def test_curve_by_hand():
    p, q = np.array([1.0, 0.0]), np.array([0.5, 0.5])
    curve = divergence_curve(p, q)
    assert curve[0].tolist() == [1, 0]
    assert curve[-1].tolist() == [0, 1]
    r = np.array([0.75, 0.25])  # the mixture in the middle
    kl_q = 0.5 * np.log(0.5 / r[0]) + 0.5 * np.log(0.5 / r[1])
    kl_p = np.log(1 / r[0])
    assert curve[len(curve) // 2] == pytest.approx(np.exp(-5 * np.array([kl_q, kl_p])))
    # Disjoint: KL to the mixture is −log λ, so that the curve is (1 − λ)^5, λ^5. Its area is
    # ∫ λ^5 · 5 (1 − λ)^4 dλ = 5 · 5! 4! / 10! = 1 / 252.
    curve = divergence_curve(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    assert -np.trapezoid(curve[:, 1], curve[:, 0]) == pytest.approx(1 / 252, rel=2e-3)


def test_it_is_symmetric():
    rng = np.random.default_rng(1)
    p, q = rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(5))
    areas = [
        -np.trapezoid(c[:, 1], c[:, 0]) for c in (divergence_curve(p, q), divergence_curve(q, p))
    ]
    assert areas[0] == pytest.approx(areas[1])


def test_k_means_finds_what_is_apart():
    rng = np.random.default_rng(2)
    truth = rng.integers(0, 4, 200)
    points = np.array([[0, 0], [9, 0], [0, 9], [9, 9]])[truth] + rng.normal(0, 0.5, (200, 2))
    labels = k_means(points, 4, seed=0)
    assert len({*zip(truth.tolist(), labels.tolist(), strict=True)}) == 4
    assert k_means(np.zeros((5, 2)), 3, seed=0).tolist() == [0] * 5  # all the same


def test_result_as_section_and_json():
    rng = np.random.default_rng(3)
    found = mauve(draw(40, 0.5, rng), draw(60, 0.0, rng), features="toy")
    assert found.num_buckets == 4
    assert found.section().tables[0].rows == [(found.score, "toy", 40, 60, 4, found.num_components)]
    assert found.to_json()["num_reference"] == 60


def test_what_cannot_be_compared():
    with pytest.raises(ValueError, match="of one width"):
        mauve(np.zeros((3, 2)), np.zeros((3, 4)), features="toy")
    with pytest.raises(ValueError, match=r"num_buckets must be in 1\.\.6, got 7"):
        mauve(np.zeros((3, 2)), np.zeros((3, 2)), features="toy", num_buckets=7)
