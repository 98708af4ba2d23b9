"""Tweedie τ-leaping, SEDD's "analytic": for any diffusion model, by optimal independent steps.

arXiv:2310.16834, theorem 4.2.
"""

from dataclasses import dataclass

from sedd.samplers.tau_leaping import TauLeaping


@dataclass(frozen=True, kw_only=True)
class Tweedie(TauLeaping):
    """Step from t to s: draw each position from its posterior at s given all tokens at t.

    If the score is exact, this is the best step, in KL divergence, that changes positions
    independently of each other. Under absorbing noise with the log-linear schedule its law is that
    of Euler's step.
    """

    def step_probs(self, process, log_score, x, t, s):
        sigma = self.schedule.sigma(t)
        return process.tweedie(log_score, x, sigma, sigma - self.schedule.sigma(s))


make = Tweedie
