"""A user's scoring function, as the samplers that search with it see it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sedd.denoiser import Denoiser
from sedd.types import Array, Float, Int

Verifier = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(tokens [R, L], real [R, L]) -> finite scores [R], higher is better; ``real`` excludes padding.

One that is not finite ends a search, all of whose scores are then nan.
"""


def verify(
    verifier: Verifier, denoiser: Denoiser, tokens_BL: Int[Array, "B L"]
) -> Float[Array, " B"]:
    """The scores, from the host; nan for all where one of them is not finite."""
    attend = denoiser.attend
    segment_BL = None if attend is None else attend.segment_BL
    real_BL = jnp.ones(tokens_BL.shape, bool) if segment_BL is None else segment_BL > 0

    def scores(tokens_RL, real_RL):
        return np.asarray(verifier(np.asarray(tokens_RL), np.asarray(real_RL)), np.float32)

    shape = jax.ShapeDtypeStruct(tokens_BL.shape[:1], jnp.float32)
    score_B = jax.pure_callback(scores, shape, tokens_BL, real_BL, vmap_method="sequential")
    return jnp.where(jnp.isfinite(score_B).all(), score_B, jnp.nan)
