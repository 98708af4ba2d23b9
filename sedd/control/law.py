"""The law that has wanted moments and is nearest to a sampler's own law.

Let a be the law of a sampler and φ(x) the F features of a text x. Of all laws under which the means
of the features are the wanted moments μ, the one with the smallest KL divergence to a is

    p(x) = a(x)·w(x),  w(x) = exp(λ·φ(x)) / Z,  Z = E_a exp(λ·φ)

(arXiv:2012.11635, section 2). λ minimises the convex function log E_a exp(λ·(φ - μ)). ``solve``
puts K draws of a in the place of E_a. Draws are weighted by w alone: the probabilities a(x) cancel,
so that everything here is right for the law of any sampler. Draws of another law q are weighted by
a(x)/q(x) as well, which has to be known then (``log_ratio_K``).

A feature with the values 0 and 1 and a moment of 1 or 0 is a condition: its λ is infinite, and p is
a, conditioned on the feature, times the exponential of the other features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sedd.errors import UserError

CLOSE = 1e-9  # to a wanted moment, as a share of the range of the feature
SEPARATED = 1e-5  # distance of a row from a plane above the tolerance of the linear program


@dataclass(frozen=True, kw_only=True)
class Control:
    """The law p(x) = a(x)·exp(λ·φ(x)) / Z with λ from K draws; ``solve`` makes it.

    The draws are of the sampler's own law a, or of another law q and then weighted by a/q.
    Errors are those of λ, which is estimated. ``ess``, ``log_partition``, and ``kl`` are of the
    draws that determined λ, and therefore optimistic: ``estimate`` computes them from others.
    """

    names: tuple[str, ...]
    """Names of the features."""
    moments: np.ndarray
    """The wanted moments μ, [F]."""
    base: np.ndarray
    """The mean of each feature under a, as the draws estimate it, [F]."""
    weights: np.ndarray
    """λ, [F]; inf for a feature that must be 1, and -inf for one that must be 0."""
    covariance: np.ndarray
    """Covariance of the errors of λ, [F, F]; 0 where λ is infinite."""
    moment_covariance: np.ndarray
    """Covariance of the errors of the moments of p, which those of λ cause, [F, F]."""
    log_partition: float
    """log Z."""
    ess: float
    """Effective number of draws, (Σw)² / Σw², with the weights of the draws."""
    kl: float
    """KL(p‖a) in nats."""
    num: int
    """Number of draws, K."""

    @property
    def errors(self) -> np.ndarray:
        """Standard errors of λ, [F]."""
        return np.sqrt(np.diag(self.covariance))

    @property
    def moment_errors(self) -> np.ndarray:
        """Standard errors of the moments of p about the wanted ones, since λ is estimated, [F]."""
        return np.sqrt(np.diag(self.moment_covariance))

    @property
    def conditions(self) -> np.ndarray:
        """Which features are conditions, bool [F]."""
        return np.isinf(self.weights)

    @property
    def log_bound(self) -> float:
        """The largest λ·φ of features between 0 and 1: the log β of exact rejection."""
        return float(np.maximum(self.weights[~self.conditions], 0).sum())

    def log_weights(self, features_KF) -> np.ndarray:
        """λ·φ of each text, [K]; -inf where a condition is not met.

        Args:
            features_KF: the features of K texts.
        """
        features_KF = np.asarray(features_KF, float)
        hard_F = self.conditions
        met_K = (features_KF[:, hard_F] == self.moments[hard_F]).all(1)
        return np.where(met_K, features_KF[:, ~hard_F] @ self.weights[~hard_F], -np.inf)


def solve(features_KF, moments_F, names: Sequence[str] | None = None, log_ratio_K=None) -> Control:
    """Find the law with the wanted moments from the features of K draws of a sampler.

    Args:
        features_KF: the features of the draws, finite numbers.
        moments_F: the wanted mean of each feature. 1 or 0 for a feature with the values 0 and 1 is
            a condition that every text must meet.
        names: names of the features, for messages; by default 0, 1, ….
        log_ratio_K: log a(x)/q(x) of each draw if they are draws of another law q; finite.

    Raises:
        UserError: the numbers of features and moments differ, one is not finite, or no weights of
            the draws have these moments: a feature has the same value in all draws and another
            moment, a moment is beyond the values of its feature, or moments contradict each other.

    Example:
        >>> import numpy as np, sedd
        >>> has_digit = np.repeat([0.0, 1.0], [80, 20])[:, None]
        >>> law = sedd.control.solve(has_digit, [0.5])
        >>> bool(abs(law.weights[0] - np.log(4)) < 1e-8), round(law.ess)
        (True, 64)
    """
    features_KF, moments_F, known = _checked(features_KF, moments_F, names)
    binary_F = np.isin(features_KF, (0, 1)).all(0)
    hard_F = binary_F & np.isin(moments_F, (0, 1))
    met_K = (features_KF[:, hard_F] == moments_F[hard_F]).all(1)
    soft = [name for name, hard in zip(known, hard_F, strict=True) if not hard]
    _check_conditions(features_KF, moments_F, known, hard_F, met_K)
    ratio_K = np.zeros(len(met_K)) if log_ratio_K is None else np.asarray(log_ratio_K, float)
    rows_UF, row_K = np.unique(features_KF[met_K][:, ~hard_F], axis=0, return_inverse=True)
    mass_U = np.bincount(row_K, np.exp(ratio_K[met_K] - ratio_K[met_K].max()))
    _check_hull(rows_UF, moments_F[~hard_F], soft, int(met_K.sum()), conditioned=bool(hard_F.any()))
    weights_F = np.where(moments_F == 1, np.inf, -np.inf)
    weights_F[~hard_F] = _newton(rows_UF - moments_F[~hard_F], mass_U, soft)
    return _control(features_KF, moments_F, known, weights_F, met_K, ratio_K)


def _control(features_KF, moments_F, names, weights_F, met_K, ratio_K) -> Control:
    """The ``Control`` of weights λ: its figures, and the error of λ by the delta method.

    λ solves Σ_k w_k·(φ_k - μ) = 0, an estimating equation, so that the covariance of its error is
    H⁻¹·G·H⁻¹ / K with H = E_a[w·(φ-μ)(φ-μ)ᵀ] and G = E_a[w²·(φ-μ)(φ-μ)ᵀ]. H is the derivative of
    the moments, so that the covariance of their errors is G / K.
    """
    hard_F = np.isinf(weights_F)
    exponent_K = np.where(met_K, features_KF[:, ~hard_F] @ weights_F[~hard_F] + ratio_K, -np.inf)
    num = len(features_KF)
    log_partition = float(np.logaddexp.reduce(exponent_K) - np.log(num))
    w_K = np.exp(exponent_K - log_partition)
    apart_KS = (features_KF - moments_F)[:, ~hard_F]
    spread_SS = (apart_KS * w_K[:, None]).T @ apart_KS / num
    squared_SS = (apart_KS * w_K[:, None] ** 2).T @ apart_KS / num
    inverse_SS = np.linalg.pinv(spread_SS, hermitian=True)
    covariance_FF, moments_FF = (np.zeros((len(weights_F),) * 2) for _ in range(2))
    covariance_FF[np.ix_(~hard_F, ~hard_F)] = inverse_SS @ squared_SS @ inverse_SS / num
    moments_FF[np.ix_(~hard_F, ~hard_F)] = squared_SS / num
    return Control(
        names=names,
        moments=moments_F,
        base=np.average(features_KF, axis=0, weights=np.exp(ratio_K - ratio_K.max())),
        weights=weights_F,
        covariance=covariance_FF,
        moment_covariance=moments_FF,
        log_partition=log_partition,
        ess=float(num / (w_K**2).mean()),
        kl=float(weights_F[~hard_F] @ moments_F[~hard_F] - log_partition),
        num=num,
    )


def _newton(apart_US, mass_U, names: Sequence[str]) -> np.ndarray:
    """λ [S] that minimises log Σ_u mass_u·exp(λ·apart_u), by Newton steps in a trust region.

    The rows are whitened, which also leaves out directions in which all features are constant or
    depend on each other: there λ has no effect, and is 0.

    Args:
        apart_US: the distinct rows φ - μ.
        mass_U: how many draws have each row, or the sum of their ratios.
        names: names of the features.
    """
    from scipy.optimize import minimize, root  # which changes the filters of warnings

    if not apart_US.shape[1]:
        return np.zeros(0)
    reach_S = np.maximum(np.abs(apart_US).max(0), np.finfo(float).tiny)
    share_U = mass_U / mass_U.sum()
    scaled_US = apart_US / reach_S
    _, size_R, basis_RS = np.linalg.svd(np.sqrt(share_U)[:, None] * scaled_US, full_matrices=False)
    kept_R = size_R > CLOSE
    change_SR = basis_RS[kept_R].T / size_R[kept_R]
    white_UR = scaled_US @ change_SR
    log_share_U = np.log(share_U)
    if not kept_R.any():  # features that are constant, at their moments
        return np.zeros(len(reach_S))

    def law_of(z_R):
        return np.exp(log_share_U + white_UR @ z_R - value(z_R))

    def value(z_R):
        return np.logaddexp.reduce(log_share_U + white_UR @ z_R)

    def gradient(z_R):
        return law_of(z_R) @ white_UR

    def hessian(z_R):
        law_U, mean_R = law_of(z_R), gradient(z_R)
        return (white_UR * law_U[:, None]).T @ white_UR - np.outer(mean_R, mean_R)

    near = minimize(value, np.zeros(kept_R.sum()), jac=gradient, hess=hessian, method="trust-exact")
    # Differences of values near the minimum are lost in rounding; its gradient's zero is not.
    found = root(gradient, near.x, jac=hessian, tol=1e-14)
    gap_S = law_of(found.x) @ scaled_US
    if not np.isfinite(found.x).all() or np.abs(gap_S).max() > CLOSE:
        worst = names[int(np.abs(gap_S).argmax())]
        raise UserError(
            f"the weight of feature {worst} diverges: its moment is too near to the edge of what "
            "these texts can have"
        )
    return change_SR @ found.x / reach_S


def _checked(features_KF, moments_F, names) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """The arguments of ``solve`` as float64 and names; UserError for shapes and values."""
    features_KF, moments_F = np.asarray(features_KF, float), np.asarray(moments_F, float)
    if features_KF.ndim != 2 or not len(features_KF):
        raise UserError(
            f"features must be an array [K, F] of at least one text, got {features_KF.shape}"
        )
    count = features_KF.shape[1]
    known = tuple(map(str, range(count))) if names is None else tuple(names)
    if moments_F.shape != (count,) or len(known) != count or not count:
        raise UserError(
            f"there are {count} features ({', '.join(known)}) and {moments_F.size} moments: give "
            "one moment for each feature"
        )
    for name, moment, values_K in zip(known, moments_F, features_KF.T, strict=True):
        if not np.isfinite(moment):
            raise UserError(f"the moment of feature {name} must be finite, got {moment}")
        if not np.isfinite(values_K).all():
            bad = values_K[~np.isfinite(values_K)][0]
            raise UserError(f"feature {name} must be finite, got {bad}")
    return features_KF, moments_F, known


def _check_conditions(features_KF, moments_F, names, hard_F, met_K) -> None:
    """Raise UserError, naming the features, if no draw meets all conditions."""
    if met_K.any():
        return
    num = len(features_KF)
    for name, moment, values_K in zip(names, moments_F, features_KF.T, strict=True):
        if moment in (0, 1) and not (values_K == moment).any():
            raise UserError(_never(name, 1 - moment, moment, f"all {num:,} texts"))
    wanted = [f"{n} = {m:g}" for n, m, hard in zip(names, moments_F, hard_F, strict=True) if hard]
    raise UserError(f"none of the {num:,} texts has {' and '.join(wanted)}; draw a larger pool")


def _never(name: str, value: float, moment: float, texts: str) -> str:
    """The message of a feature that is the same in all draws."""
    return (
        f"feature {name} is {value:g} in {texts}: its mean cannot become {moment:g}; draw a larger "
        "pool, or ask for less"
    )


def _check_hull(rows_US, moments_S, names: Sequence[str], num: int, *, conditioned: bool) -> None:
    """Raise UserError, naming features, unless weights above 0 of the rows have the moments.

    Args:
        rows_US: the distinct rows of features.
        moments_S: the wanted moments.
        names: names of the features.
        num: number of draws.
        conditioned: whether draws that do not meet a condition were left out.
    """
    texts = f"all {num:,} texts" + (" that meet the conditions" if conditioned else "")
    for name, moment, values_U in zip(names, moments_S, rows_US.T, strict=True):
        low, high = values_U.min(), values_U.max()
        if low == high != moment:
            raise UserError(_never(name, low, moment, texts))
        if low < high and not low < moment < high:
            raise UserError(
                f"feature {name} is between {low:g} and {high:g} in {texts}: its mean cannot "
                f"become {moment:g}, only a number between the two"
            )
    if not _separated(rows_US, moments_S):
        return
    together = list(range(len(names)))
    for feature in range(len(names)):  # leave out those that the others do without
        rest = [each for each in together if each != feature]
        if _separated(rows_US[:, rest], moments_S[rest]):
            together = rest
    concerned = ", ".join(f"{names[each]} = {moments_S[each]:g}" for each in together)
    raise UserError(
        f"the means {concerned} cannot be met together by weights of {texts}: draw a larger pool, "
        "or ask for less"
    )


def _separated(rows_US, moments_S) -> bool:
    """Whether a plane through the moments has all rows on one side, and one of them apart from it.

    Moments that are means of the rows with weights above 0 have no such plane.
    """
    from scipy.optimize import linprog

    if rows_US.shape[1] < 2:
        return False  # the range of a single feature was checked
    apart_US = (rows_US - moments_S) / np.maximum(np.ptp(rows_US, 0), np.finfo(float).tiny)
    plane = linprog(apart_US.sum(0), A_ub=apart_US, b_ub=np.zeros(len(apart_US)), bounds=(-1, 1))
    return plane.x is not None and (apart_US @ plane.x).min() < -SEPARATED
