"""Euler τ-leaping, the plain first-order step: for any diffusion model, as the reference.

arXiv:2310.16834, algorithm 1 and equation 13.
"""

from dataclasses import dataclass

from sedd.samplers.tau_leaping import TauLeaping


@dataclass(frozen=True, kw_only=True)
class Euler(TauLeaping):
    """p(y) = 1[y = x] + Δt·rate(t)·(reverse rate x → y), independently at every position.

    Negative probabilities, which too long a step makes, are clipped and the rest renormalised.
    """

    def step_probs(self, process, log_score, x, t, s):
        return process.euler(log_score, x, (t - s) * self.schedule.rate(t))


make = Euler
