"""Joint distributions of two tokens, constructed from their conditionals in seven ways.

If the conditionals are those of one joint, all constructions return that joint, except for the
independent joint and the two products. See arXiv:2305.15501, section 2, and
``docs/consistency.md``.
"""

import numpy as np

from sedd.types import Float

JOINTS = {  # the constructions, and their names in reports
    "independent": "independent",
    "chain_ab": "chain, a first",
    "chain_ba": "chain, b first",
    "mrf": "product of conditionals",
    "mrf_logit": "product of logits",
    "hcb": "Hammersley–Clifford–Besag",
    "arnold_gokhale": "Arnold–Gokhale",
}


def pair_joints(
    log_a_given_b: Float[np.ndarray, "A B"],
    log_b_given_a: Float[np.ndarray, "A B"],
    log_a: Float[np.ndarray, " A"],
    log_b: Float[np.ndarray, " B"],
    *,
    logits: tuple[Float[np.ndarray, "A B"], Float[np.ndarray, "A B"]] | None = None,
) -> dict[str, np.ndarray]:
    """Construct all joints of two tokens a, b on a grid of A × B tokens.

    The arguments may be normalised over more tokens than those of the grid. Every joint except for
    Arnold–Gokhale's is then the joint of all tokens, conditional on the pair being on the grid.

    Args:
        log_a_given_b: log p(a | b), at [a, b].
        log_b_given_a: log p(b | a), at [a, b].
        log_a: log p(a) while both tokens are masked.
        log_b: log p(b) while both tokens are masked.
        logits: the first two arguments before their normalisation.

    Returns:
        The log of each joint, [A, B] in float64, normalised on the grid, by name:

    ==================  ===================================================================
    ``independent``     p(a) p(b), from which both are drawn if revealed at once
    ``chain_ab``        p(a) p(b | a)
    ``chain_ba``        p(b) p(a | b)
    ``mrf``             ∝ p(a | b) p(b | a)
    ``mrf_logit``       ∝ exp(logit(a; b) + logit(b; a)), with ``logits`` only
    ``hcb``             see ``besag``, its pivot the likeliest a
    ``arnold_gokhale``  see ``arnold_gokhale``
    ==================  ===================================================================
    """
    given_b, given_a = np.asarray(log_a_given_b, np.float64), np.asarray(log_b_given_a, np.float64)
    a_A1, b_B = np.asarray(log_a, np.float64)[:, None], np.asarray(log_b, np.float64)
    joints = {
        "independent": a_A1 + b_B,
        "chain_ab": a_A1 + given_a,
        "chain_ba": b_B + given_b,
        "mrf": given_b + given_a,
    }
    if logits is not None:
        joints["mrf_logit"] = np.asarray(logits[0], np.float64) + np.asarray(logits[1], np.float64)
    joints["hcb"] = besag(given_b, given_a, int(a_A1.argmax()))
    joints["arnold_gokhale"] = arnold_gokhale(given_b, given_a)
    return {name: joint - log_sum(joint) for name, joint in joints.items()}


def besag(
    log_a_given_b: Float[np.ndarray, "A B"], log_b_given_a: Float[np.ndarray, "A B"], pivot: int
) -> Float[np.ndarray, "A B"]:
    """Construct p(a, b) ∝ p(a | b) / p(a* | b) · p(b | a*) (Hammersley–Clifford–Besag).

    For conditionals of one joint the result is that joint for every pivot a*. Conversely, if the
    result is the same for all pivots, the conditionals are those of one joint.

    Args:
        log_a_given_b: log p(a | b), at [a, b].
        log_b_given_a: log p(b | a), at [a, b].
        pivot: the place of a* on the grid.

    Returns:
        The log of the joint, normalised.
    """
    joint = log_a_given_b - log_a_given_b[pivot] + log_b_given_a[pivot]
    return joint - log_sum(joint)


def arnold_gokhale(
    log_a_given_b: Float[np.ndarray, "A B"],
    log_b_given_a: Float[np.ndarray, "A B"],
    *,
    tolerance: float = 1e-12,
    max_iterations: int = 100,
) -> Float[np.ndarray, "A B"]:
    """Find the joint whose conditionals are closest to the given ones.

    The joint q minimises Σ_b KL(p(· | b) ‖ q(· | b)) + Σ_a KL(p(· | a) ‖ q(· | a)), which is convex
    in log q. At the minimum q(a, b) has the form weight / (1/α_a + 1/β_b), where weight is
    p(a | b) + p(b | a), and α and β are the marginals of q. This is a Bradley–Terry model: token a
    of strength α_a beats token b of strength β_b p(a | b) times, and loses to it p(b | a) times.
    Newton's method on the logs of the strengths takes about ten steps; the published iteration,
    ``arnold_gokhale_step``, has not converged after 10,000.

    Args:
        log_a_given_b: log p(a | b), at [a, b].
        log_b_given_a: log p(b | a), at [a, b].
        tolerance: stop if one published iteration would move the joint by less, in total variation.
        max_iterations: stop after so many steps of Newton's method.

    Returns:
        The log of the joint, normalised.
    """
    wins, losses = _normalised(log_a_given_b, 0), _normalised(log_b_given_a, 1)
    weight, split = wins + losses, len(wins)
    log_weight = np.log(np.maximum(weight, np.finfo(np.float64).tiny))

    def objective(strength):
        lead = strength[:split, None] - strength[split:]
        return (wins * np.logaddexp(0, -lead) + losses * np.logaddexp(0, lead)).sum()

    strength = np.zeros(sum(weight.shape))
    for _ in range(max_iterations):
        log_joint = log_weight - np.logaddexp(-strength[:split, None], -strength[split:])
        log_joint -= log_sum(log_joint)
        joint = np.exp(log_joint)
        if total_variation(arnold_gokhale_step(weight, joint), joint) < tolerance:
            break
        a_wins = 1 / (1 + np.exp(strength[split:] - strength[:split, None]))
        surplus, curvature = wins - weight * a_wins, weight * a_wins * (1 - a_wins)
        gradient = np.concatenate([surplus.sum(1), -surplus.sum(0)])
        # Scale to a diagonal of ones, since the curvatures of rare tokens are orders smaller.
        root = np.sqrt(np.concatenate([curvature.sum(1), curvature.sum(0)]) + 1e-300)
        hessian = np.eye(len(root))
        hessian[:split, split:] = -curvature / root[:split, None] / root[split:]
        hessian[split:, :split] = hessian[:split, split:].T
        # A constant added to all log strengths changes nothing, so the matrix is singular in that
        # direction. The outer product fixes the constant and does not change the rest.
        hessian += np.outer(root, root) / (root @ root)
        step = np.linalg.solve(hessian, gradient / root) / root
        size, now = 1.0, objective(strength)
        while size > 1e-6 and objective(strength + size * step) > now:
            size /= 2
        strength = strength + size * step
    return log_joint


def arnold_gokhale_step(
    weight: Float[np.ndarray, "A B"], joint: Float[np.ndarray, "A B"]
) -> Float[np.ndarray, "A B"]:
    """Return the joint after one published fixed-point iteration, on probabilities.

    Up to a constant the objective is Σ log joint(a) + Σ log joint(b) - Σ weight·log joint. The
    first two terms are concave, so their tangents bound the objective from above. The iteration
    minimises this bound; the objective never rises.

    Args:
        weight: p(a | b) + p(b | a).
        joint: the joint before the iteration, normalised.
    """
    joint = weight / (1 / joint.sum(1, keepdims=True) + 1 / joint.sum(0, keepdims=True))
    return joint / joint.sum()


def total_variation(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return the total variation of joints, in [0, 1], over the last two axes."""
    return np.asarray(0.5 * np.abs(p - q).sum((-2, -1)))


def _normalised(log_probs: np.ndarray, axis: int) -> np.ndarray:
    """Probabilities that sum to 1 over the axis."""
    return np.exp(log_probs - log_sum(log_probs, axis))


def log_sum(log_probs: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Return log Σ exp over an axis, or over all; summed axes stay with length 1."""
    highest = log_probs.max(axis, keepdims=True)
    return highest + np.log(np.exp(log_probs - highest).sum(axis, keepdims=True))
