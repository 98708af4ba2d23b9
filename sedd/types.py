"""Array aliases, and the legend of the shape suffixes.

==========  =====================================================================
``B``       batch (sequences)
``L``       length (positions)
``V``       states of the process: the real tokens, and the mask where there is one
``N``       real tokens; the mask, where there is one, is the id ``N``
``D``       width of the model
``R``       rows: positions picked from a batch, or replicates of an estimate
``S``       sequences of a data set
==========  =====================================================================

``x0`` is clean, ``xt`` corrupted; ``t`` is in [0, 1]; ``sigma`` is the total noise; logarithms are
natural and losses are in nats. A log score is ``s[i, y] = log p_t(xt with y at i) / p_t(xt)``, 0 at
``y = xt[i]``.
"""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Key, Shaped

if TYPE_CHECKING:
    from jax import Array
else:
    Array = jax.Array | np.ndarray  # callers may pass either

Params = Any  # the nested dictionary of arrays that a network was initialised with

__all__ = ["Array", "Bool", "Float", "Int", "Key", "Params", "Shaped"]
