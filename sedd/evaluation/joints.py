"""Joint distributions of two tokens, derived from their conditionals by seven constructions.

All but the independent joint and the two products are right for conditionals of one joint. See
arXiv:2305.15501, section 2, and ``docs/consistency.md``.
"""

import numpy as np

from sedd.types import Float

JOINTS = {  # every joint, as it is named for a reader
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
    """Name → log joint [A, B] on a grid of tokens a, b, in float64; each sums to 1 there.

    ``log_a_given_b[a, b]`` = log p(a | b), ``log_b_given_a[a, b]`` = log p(b | a); ``log_a`` and
    ``log_b`` are with both masked; ``logits`` are the first two before their normalisation. All
    may be normalised over more tokens than the grid's: every joint but Arnold–Gokhale's is then
    that of all tokens, given that the pair is on the grid.

    ==================  ===================================================================
    ``independent``     p(a) p(b), what is drawn when both are revealed at once
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
    """p(a, b) ∝ p(a | b) / p(a* | b) · p(b | a*), a* the pivot (Hammersley–Clifford–Besag).

    For conditionals of one joint it is that joint, whatever the pivot; if it is the same for
    all pivots, they are. Log, and normalised.
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
    """The joint whose conditionals are closest to the given ones. Log, and normalised.

    Closest: Σ_b KL(p(· | b) ‖ joint's) + Σ_a KL(p(· | a) ‖ joint's) is least, a convex function of
    the joint's log. At its minimum the joint is weight / (1/α_a + 1/β_b), weight = p(a | b) +
    p(b | a), with marginals α and β. That is a Bradley–Terry model, in which a beats b p(a | b)
    times and b beats a p(b | a) times, of strengths α and β: Newton's method on their logs takes
    some ten steps, where the fixed point of ``arnold_gokhale_step`` is not reached in 10,000. Ends
    where that iteration would move the joint by less than ``tolerance`` in total variation.
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
        # Scaled to a diagonal of ones: curvatures of rare tokens are many orders smaller.
        root = np.sqrt(np.concatenate([curvature.sum(1), curvature.sum(0)]) + 1e-300)
        hessian = np.eye(len(root))
        hessian[:split, split:] = -curvature / root[:split, None] / root[split:]
        hessian[split:, :split] = hessian[:split, split:].T
        # Strengths are known up to a constant; the outer product fixes it and nothing else.
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
    """The published fixed-point iteration, on probabilities; weight = p(a | b) + p(b | a).

    The objective is Σ log joint(a) + Σ log joint(b) - Σ weight·log joint up to a constant. Tangents
    of its first two terms, which are concave, bound it from above, and this minimises the bound:
    it never rises.
    """
    joint = weight / (1 / joint.sum(1, keepdims=True) + 1 / joint.sum(0, keepdims=True))
    return joint / joint.sum()


def total_variation(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 * np.abs(p - q).sum((-2, -1)))


def _normalised(log_probs: np.ndarray, axis: int) -> np.ndarray:
    return np.exp(log_probs - log_sum(log_probs, axis))


def log_sum(log_probs: np.ndarray, axis: int | None = None) -> np.ndarray:
    """log Σ exp, over all entries or with the axis kept."""
    highest = log_probs.max(axis, keepdims=True)
    return highest + np.log(np.exp(log_probs - highest).sum(axis, keepdims=True))
