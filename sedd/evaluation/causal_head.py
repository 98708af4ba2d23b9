"""What a causal head gains: nats of tokens given each other, and of the same tokens each alone.

A causal head predicts the masked tokens of a network call one after the other, in a random order;
the trunk predicts each of them independently. Both are measured on the same draws.
"""

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sedd.denoiser import Denoiser
from sedd.evaluation.measured import Measured, ratio_of
from sedd.objectives.self_speculative import SelfSpeculative
from sedd.types import Array, Key


class CausalNats(NamedTuple):
    """Nats per masked token with standard errors over sequences; ``gain`` is trunk - causal.

    ``trunk`` estimates the k-DCE bound of the trunk if the number of masks is drawn. ``causal`` is
    no bound on the likelihood of a sequence: it averages over numbers of revealed tokens.
    """

    causal: Measured
    trunk: Measured
    gain: Measured


def causal_nats(
    denoiser: Denoiser,
    objective: SelfSpeculative,
    key: Key[Array, ""],
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    draws: int = 16,
    masked: float | None = None,
) -> CausalNats:
    """Measure a network with a causal head on a corpus; ``draws`` calls of the trunk a sequence.

    Args:
        denoiser: the model; its network has a causal head.
        objective: draws the masks and the orders.
        key: the key of sequence i is ``fold_in(key, i)``.
        batches: pairs of tokens x0_BL and of scored_BL.
        draws: numbers of masks and orders for each sequence.
        masked: the fraction of the scored positions that is masked, in (0, 1]; None for the
            distribution of training, in which every number of masks is equally likely.
    """
    nats_2S, tokens_S, first = [], [], 0
    for x0_BL, scored_BL in batches:
        index_B = jnp.arange(first, first + len(x0_BL))
        first += len(x0_BL)
        nats_2B = _batch_nats(denoiser, key, index_B, x0_BL, scored_BL, masked, objective, draws)
        nats_2S.append(np.asarray(nats_2B, np.float64))
        tokens_S.append(scored_BL.sum(-1).astype(np.float64))
    causal_S, trunk_S = np.concatenate(nats_2S, axis=1)
    each = (causal_S, trunk_S, trunk_S - causal_S)
    return CausalNats(*(ratio_of(nats_S, np.concatenate(tokens_S)) for nats_S in each))


@partial(jax.jit, static_argnames=("objective", "draws"))
def _batch_nats(denoiser, key, index_B, x0_BL, scored_BL, masked, objective, draws):
    """The mean over draws of the nats of each sequence, [2, B]: causal, trunk."""
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, index_B)

    def draw(number):
        draw_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, number)
        u_B = jax.vmap(jax.random.uniform)(keys_B)
        # Stratified, or just below the fraction: u gives floor(u·L) + 1 masks.
        u_B = (u_B + number) / draws if masked is None else jnp.full_like(u_B, masked - 1e-6)
        corrupted = objective.corrupt(draw_keys_B, u_B, x0_BL, scored_BL)
        nats_2BL = objective.both_nats(denoiser.network, denoiser.params, corrupted, x0_BL)
        return nats_2BL.sum(-1)

    return jax.lax.map(draw, jnp.arange(draws)).mean(0)
