"""Tweedie τ-leaping, SEDD's "analytic": for any diffusion model, by optimal independent steps.

arXiv:2310.16834, theorem 4.2.
"""

from dataclasses import dataclass

from sedd.samplers.tau_leaping import TauLeaping


@dataclass(frozen=True, kw_only=True)
class Tweedie(TauLeaping):
    """The exact posterior of each position by itself, at Δσ = σ(t) - σ(s), if the score is exact.

    The optimal step among those that change positions independently. Under absorbing log-linear
    noise it is the same law as Euler's.
    """

    def step_probs(self, process, log_score, x, t, s):
        return process.tweedie(log_score, x, self.schedule.sigma(t) - self.schedule.sigma(s))


make = Tweedie
