"""What a control's law is, estimated from fresh draws: moments, partition, KL, and the QRS curve.

The draws that determined λ have the wanted moments by construction, and flatter every figure. All
figures here are of other draws, and their errors contain that of λ.
"""

from dataclasses import dataclass

import numpy as np

from sedd.control.law import Control
from sedd.errors import UserError

POINTS = 65  # of a curve


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Figures of a law, from K draws that took no part in λ.

    Without ``log_beta`` the law is that of the control, p; with it, that of quasi-rejection. The
    draws are of the sampler's own law, or of another law if ``estimate`` was given
    ``log_ratio_K``.
    """

    base: np.ndarray
    """Mean of each feature under the sampler's own law, [F]."""
    base_errors: np.ndarray
    """Their standard errors, [F]."""
    moments: np.ndarray
    """Mean of each feature under the law, [F]."""
    errors: np.ndarray
    """Their standard errors, [F]. They contain the error of λ."""
    variances: np.ndarray
    """Variance of each feature of one text under the law, [F]."""
    ess: float
    """Effective number of draws, (Σw)² / Σw²."""
    log_partition: float
    """log Z, of min(exp(λ·φ), β) with quasi-rejection."""
    log_partition_error: float
    kl: float
    """KL(law ‖ the sampler's own law), in nats."""
    kl_error: float
    proposal_kl: float
    """KL(law ‖ law of the draws), in nats; equal to ``kl`` without ``log_ratio_K``."""
    proposal_kl_error: float
    acceptance: float | None
    """Share of the sampler's own draws that rejection accepts, Z/β. Without ``log_beta``, β is
    exp(``Control.log_bound``), which holds for features in [0, 1]; the share is None if a feature
    of these draws is not."""
    acceptance_error: float | None
    num: int
    """Number of draws, K."""


def estimate(
    control: Control, features_KF, log_beta: float | None = None, log_ratio_K=None
) -> Estimate:
    """Estimate the figures of a control's law from fresh draws, by weighting them.

    Errors are those of the delta method, λ taken as uncertain.

    Args:
        control: from ``solve``, on other draws.
        features_KF: the features of K draws.
        log_beta: log β of quasi-rejection, whose law is proportional to a·min(exp(λ·φ), β).
        log_ratio_K: log a(x)/q(x) of each draw, as in ``solve``; not with ``log_beta``.

    Raises:
        UserError: no draw has a weight above 0.
    """
    features_KF = np.asarray(features_KF, float)
    ratio_K = np.zeros(len(features_KF)) if log_ratio_K is None else np.asarray(log_ratio_K, float)
    exponent_K = _exponents(control, features_KF) + ratio_K
    clipped_K = exponent_K if log_beta is None else np.minimum(exponent_K, log_beta)
    num = len(features_KF)
    log_z = float(np.logaddexp.reduce(clipped_K) - np.log(num))
    w_K = np.exp(clipped_K - log_z)
    moments_F = w_K @ features_KF / num
    apart_KF = features_KF - moments_F
    # How the moments change with λ: the weight of a draw at the bound β does not.
    free_K = w_K if log_beta is None else np.where(exponent_K < log_beta, w_K, 0.0)
    change_FF = apart_KF.T @ (free_K[:, None] * features_KF) / num
    influence_KF = w_K[:, None] * apart_KF
    variance_F = (influence_KF**2).mean(0) / num
    variance_F += np.einsum("fg,gh,fh->f", change_FF, control.covariance, change_FF)
    variance_F[control.conditions] = 0.0  # but for rounding
    log_w_K = np.where(w_K > 0, clipped_K - log_z, 0.0)
    kl, kl_error = _divergence(w_K, log_w_K - np.where(w_K > 0, ratio_K, 0.0))
    proposal_kl, proposal_kl_error = _divergence(w_K, log_w_K)
    base_K = np.exp(ratio_K - ratio_K.max())  # weights of the sampler's own law, with mean 1
    base_K /= base_K.mean()
    base_F = base_K @ features_KF / num
    bound = control.log_bound if log_beta is None else log_beta
    unit = ((features_KF >= 0) & (features_KF <= 1)).all()
    acceptance = float(np.exp(log_z - bound)) if unit or log_beta is not None else None
    relative = float(w_K.std() / np.sqrt(num))  # error of log Z
    return Estimate(
        base=base_F,
        base_errors=(base_K[:, None] * (features_KF - base_F)).std(0) / np.sqrt(num),
        moments=moments_F,
        errors=np.sqrt(variance_F),
        variances=(w_K @ apart_KF**2) / num,
        ess=float(num / (w_K**2).mean()),
        log_partition=log_z,
        log_partition_error=relative,
        kl=kl,
        kl_error=kl_error,
        proposal_kl=proposal_kl,
        proposal_kl_error=proposal_kl_error,
        acceptance=acceptance,
        acceptance_error=None if acceptance is None else acceptance * relative,
        num=num,
    )


def _divergence(w_K, log_K) -> tuple[float, float]:
    """E[w·log_K] of normalised weights and its standard error; log_K contains -log Z."""
    value = float((w_K * log_K).mean())
    return value, float((w_K * (log_K - value) - (w_K - 1)).std() / np.sqrt(len(w_K)))


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What quasi-rejection costs and misses, for ascending bounds β.

    A proposal is accepted with the probability min(1, exp(λ·φ)/β), so that the law is proportional
    to a·min(exp(λ·φ), β). All figures are estimates from K draws. At the largest weight of these
    draws the divergences are 0, though draws that were not seen may have larger weights.
    """

    log_beta: np.ndarray
    """log β, [C]."""
    acceptance: np.ndarray
    """Share of proposals that are accepted, [C]."""
    total_variation: np.ndarray
    """Total variation between the law of quasi-rejection and p, [C]."""
    kl: np.ndarray
    """KL(p‖law of quasi-rejection) in nats, [C]."""

    def at_most(self, total_variation: float) -> float:
        """The smallest log β of the curve with at most this total variation."""
        return float(self.log_beta[self.total_variation <= total_variation].min())


def curve(control: Control, features_KF, points: int = POINTS) -> Curve:
    """Estimate the acceptance and the divergences of quasi-rejection over β.

    arXiv:2112.05702, section 2.

    Args:
        control: from ``solve``.
        features_KF: the features of K draws of the sampler.
        points: number of bounds, evenly spread in log β over the weights of these draws.

    Raises:
        UserError: no draw has a weight above 0.
    """
    exponent_K = _exponents(control, np.asarray(features_KF, float))
    num = len(exponent_K)
    finite_K = exponent_K[np.isfinite(exponent_K)]
    log_beta_C = np.linspace(finite_K.min(), finite_K.max(), points)
    log_z = np.logaddexp.reduce(exponent_K) - np.log(num)
    p_K = np.exp(exponent_K - log_z)
    rows = []
    for log_beta in log_beta_C:  # a row of K numbers at a time
        clipped_K = np.minimum(exponent_K, log_beta)
        log_z_beta = np.logaddexp.reduce(clipped_K) - np.log(num)
        distance = np.abs(p_K - np.exp(clipped_K - log_z_beta)).mean() / 2
        above_K = np.where(p_K > 0, np.maximum(exponent_K - log_beta, 0), 0.0)
        rows.append((log_z_beta - log_beta, distance, p_K @ above_K / num + log_z_beta - log_z))
    log_rate_C, distance_C, kl_C = np.array(rows).T
    return Curve(
        log_beta=log_beta_C,
        acceptance=np.exp(log_rate_C),
        total_variation=distance_C,
        kl=np.maximum(kl_C, 0),  # below 0 by rounding
    )


def _exponents(control: Control, features_KF: np.ndarray) -> np.ndarray:
    """λ·φ of the draws [K]; UserError if it is -inf for all of them."""
    exponent_K = control.log_weights(features_KF)
    if not np.isfinite(exponent_K).any():
        wanted = [
            f"{n} = {m:g}"
            for n, m, hard in zip(control.names, control.moments, control.conditions, strict=True)
            if hard
        ]
        raise UserError(
            f"none of {len(features_KF):,} fresh texts has {' and '.join(wanted)}; draw a larger "
            "pool"
        )
    return exponent_K
