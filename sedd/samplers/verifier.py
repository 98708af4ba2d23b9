"""A user's scoring function, as the samplers that search with it see it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sedd.denoiser import Denoiser
from sedd.types import Array, Float, Int

Verifier = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(tokens [R, L], real [R, L]) -> scores [R], higher is better. ``real`` is False at padding."""


def verify(
    verifier: Verifier, denoiser: Denoiser, tokens_BL: Int[Array, "B L"]
) -> Float[Array, "B"]:
    """The scores, from the host."""
    attend = denoiser.attend
    segment_BL = None if attend is None else attend.segment_BL
    real_BL = jnp.ones(tokens_BL.shape, bool) if segment_BL is None else segment_BL > 0
    shape = jax.ShapeDtypeStruct(tokens_BL.shape[:1], jnp.float32)
    return jax.pure_callback(verifier, shape, tokens_BL, real_BL, vmap_method="sequential")
