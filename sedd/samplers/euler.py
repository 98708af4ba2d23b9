"""Euler τ-leaping, the plain first-order step: for any diffusion model, as the reference.

arXiv:2310.16834, algorithm 1 and equation 13.
"""

from dataclasses import dataclass

from sedd.samplers.tau_leaping import TauLeaping


@dataclass(frozen=True, kw_only=True)
class Euler(TauLeaping):
    """Step with p(y) = 1[y = x] + Δt·rate(t)·(reverse rate from x to y) at every position.

    A step that is too long makes the probability of x negative. It is then set to 0, and the others
    are normalised.
    """

    def step_probs(self, process, log_score, x, t, s):
        dsigma = (t - s) * self.schedule.rate(t)
        return process.euler(log_score, x, self.schedule.sigma(t), dsigma)


make = Euler
