"""How far a model that was trained on an energy has come: its free energy, and log Z."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from sedd.denoiser import Denoiser
from sedd.evaluation.bound import estimates
from sedd.evaluation.measured import Measured, mean_of
from sedd.objectives.energy import Energy
from sedd.schedules import LogLinear
from sedd.types import Array, Key


class FreeEnergy(NamedTuple):
    """Figures of texts that were drawn from the model, with standard errors over texts.

    ``free`` is the mean of F = log p(x | σ) + E(x), in nats: at least -log Z, by the divergence of
    the model from e^(-E)/Z. ``log_z`` is log mean e^(-F), by importance weights: unbiased for Z.
    ``effective`` is the number of texts that these weights are worth, out of ``texts``.
    """

    free: Measured
    log_z: Measured
    effective: float
    texts: int


@dataclass(frozen=True, kw_only=True)
class EnergyDraws:
    """The estimate of ``free_energy``: F of one text that is drawn in the place of each row."""

    objective: Energy

    def __call__(self, denoiser, schedule, keys_B, x0_BL, scored_BL) -> Array:
        """Draw a text for each row and return F, [B]."""
        objective, network = self.objective, denoiser.network
        corrupted = objective.corrupt(keys_B, jnp.zeros(len(keys_B)), x0_BL, scored_BL)
        return objective.draw(network, denoiser.params, corrupted, x0_BL)[1]


def free_energy(
    denoiser: Denoiser,
    objective: Energy,
    key: Key[Array, ""],
    batches: Iterable[tuple[np.ndarray, ...]],
) -> FreeEnergy:
    """Draw a text for each row of the batches, and compare it with the user's energy.

    Args:
        denoiser: the model.
        objective: has the energy.
        key: the draws of row i depend on ``fold_in(key, i)``.
        batches: pairs of tokens x0_BL, which are given where scored_BL is False, and of scored_BL.
    """
    draws = EnergyDraws(objective=objective)
    free_S = np.concatenate(
        [free_B for *_, free_B in estimates(denoiser, LogLinear(), key, batches, draws)]
    ).astype(np.float64)
    log_z = np.logaddexp.reduce(-free_S) - np.log(len(free_S))
    weight_S = np.exp(-free_S - log_z)  # of mean 1
    return FreeEnergy(
        free=mean_of(free_S),
        log_z=Measured(float(log_z), mean_of(weight_S).error),  # the delta method
        effective=float(len(free_S) ** 2 / np.square(weight_S).sum()),
        texts=len(free_S),
    )
