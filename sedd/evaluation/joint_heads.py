"""What a model gains that predicts the tokens of a call jointly: nats jointly, and of each alone.

A causal head predicts the masked tokens of a network call one after the other, in a random order; a
hidden Markov model predicts those of a window together, and a network with a latent all of them,
given a common latent. The trunk, or the network without a latent, predicts each of them
independently. Both are measured on the same draws.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sedd.arrays import fold
from sedd.denoiser import Denoiser
from sedd.evaluation.bound import estimates
from sedd.evaluation.measured import Measured, ratio_of
from sedd.objectives.hmm import Hmm
from sedd.objectives.latent_distill import LatentDistill
from sedd.objectives.self_speculative import SelfSpeculative
from sedd.schedules import LogLinear
from sedd.types import Array, Key


class JointNats(NamedTuple):
    """Nats per masked token with standard errors over sequences; ``gain`` is trunk - joint.

    ``trunk`` estimates the k-DCE bound of the trunk if the number of masks is drawn. ``joint`` is
    no bound on the likelihood of a sequence: it averages over numbers of revealed tokens.
    """

    joint: Measured
    trunk: Measured
    gain: Measured


def joint_nats(
    denoiser: Denoiser,
    objective: SelfSpeculative | Hmm | LatentDistill,
    key: Key[Array, ""],
    batches: Iterable[tuple[np.ndarray, ...]],
    *,
    draws: int = 16,
    masked: float | None = None,
) -> JointNats:
    """Measure a network that predicts the tokens of a call jointly on a corpus.

    It takes ``draws`` calls of the trunk for each sequence.

    Args:
        denoiser: the model; its network is one that the objective trains.
        objective: draws the masks, and the orders of a causal head.
        key: the key of sequence i is ``fold_in(key, i)``.
        batches: pairs of tokens x0_BL and of scored_BL.
        draws: numbers of masks and orders for each sequence.
        masked: the fraction of the scored positions that is masked, in (0, 1]; None for the
            distribution of training, in which every number of masks is equally likely.
    """
    estimate = JointDraws(objective=objective, draws=draws, masked=masked)
    nats_S2, tokens_S = [], []
    # The masks depend on no noise schedule.
    for _, scored_BL, nats_B2 in estimates(denoiser, LogLinear(), key, batches, estimate):
        nats_S2.append(nats_B2.astype(np.float64))
        tokens_S.append(scored_BL.sum(-1).astype(np.float64))
    joint_S, trunk_S = np.concatenate(nats_S2).T
    each = (joint_S, trunk_S, trunk_S - joint_S)
    return JointNats(*(ratio_of(nats_S, np.concatenate(tokens_S)) for nats_S in each))


@dataclass(frozen=True, kw_only=True)
class JointDraws:
    """The estimate of ``joint_nats``; its fields are arguments of that function.

    A call returns the nats of each sequence as means over draws, [B, 2]: joint, trunk.
    """

    objective: SelfSpeculative | Hmm | LatentDistill
    draws: int
    masked: float | None

    def __call__(self, denoiser, schedule, keys_B, x0_BL, scored_BL):
        def draw(number):
            draw_keys_B = fold(keys_B, number)
            if self.masked is None:  # stratified
                u_B = (jax.vmap(jax.random.uniform)(keys_B) + number) / self.draws
            else:  # just below the fraction: u gives floor(u·L) + 1 masks
                u_B = jnp.full(len(keys_B), self.masked - 1e-6)
            corrupted = self.objective.corrupt(draw_keys_B, u_B, x0_BL, scored_BL)
            nats_2BL = self.objective.both_nats(denoiser.network, denoiser.params, corrupted, x0_BL)
            return nats_2BL.sum(-1)

        return jax.lax.map(draw, jnp.arange(self.draws)).mean(0).T
