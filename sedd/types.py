"""Array aliases, and the meaning of the shape suffixes.

A suffix such as ``_BL`` in the name of an array lists its axes in order, one letter each:

==========  =====================================================================
``B``       batch (sequences)
``L``       length (positions)
``V``       states of the process: the real tokens, and the mask if there is one
``N``       real tokens; the mask, if there is one, has the id ``N``
``D``       width of the model
``R``       rows: selected positions of a batch, or replicates of an estimate
``S``       sequences of a data set
==========  =====================================================================

``x0`` are clean tokens and ``xt`` corrupted ones, ``t`` in [0, 1] is the diffusion time, and
``sigma`` the total noise. Logarithms are natural, and losses are in nats. The log score of token y
at position i is ``s[i, y] = log(p_t(xt with y at i) / p_t(xt))``, which is 0 at ``y = xt[i]``.
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

Keys = Key[Array, "B ..."]
"""Keys of a batch of sequences, with which samplers draw.

[B]: a key for each sequence. [B, 1 + L]: the key of what a sequence draws as a whole, such as its
order of positions, and then a key for each position. A sequence whose 1 + L keys are equal is drawn
as with this one key.
"""

__all__ = ["Array", "Bool", "Float", "Int", "Key", "Keys", "Params", "Shaped"]
