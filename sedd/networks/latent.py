"""A transformer with noise in its mask: a call draws from a mixture (arXiv:2410.08709, 2605.10518).

The tokens that a masked diffusion model predicts in one call are independent of each other. Here a
call also gets a latent ε ~ N(0, 1), a few numbers for the whole sequence, which are mapped linearly
and added to the embedding of the mask. Given ε the tokens are independent; over ε they are not, and
a call draws from E_ε Π_i c_i(x_i | x_t, ε). The objective ``latent_distill`` trains it. Without a
latent (ε = 0) it is the network ``ddit``.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sedd.errors import FieldError
from sedd.networks.ddit import DDiT
from sedd.networks.shard import whole
from sedd.types import Array, Float, Key, Params


@dataclass(frozen=True, kw_only=True)
class Latent(DDiT):
    """The network ddit with ``latents`` numbers of noise that are added to the mask.

    Parameters are ``{"trunk": …, "head": …, "latent": {"kernel"}}``. The first two are those of
    ``DDiT``, from which a run can therefore start. The last state is the mask.

    Raises ``ValueError`` as ``DDiT`` does.
    """

    has_latent = True

    latents: int = 16
    """Numbers of a latent, which is drawn once for each sequence and network call."""

    def __post_init__(self):
        super().__post_init__()
        self._at_least(1, "latents")
        if self.lora.rank:
            raise FieldError(
                "lora.rank", "goes with ddit and decoder: latent trains all parameters"
            )

    def init(self, key: Key[Array, ""]) -> Params:
        """Draw fresh float32 parameters; those of the trunk are ``DDiT.init`` with this key."""
        params = super().init(key)
        # As large as the embedding of the mask, whose entries are of the same order.
        scale = jnp.sqrt(jnp.square(params["trunk"]["embed"]["embedding"]).mean() / self.latents)
        shape = (self.latents, self.hidden_dim)
        kernel_ZD = scale * jax.random.normal(jax.random.fold_in(key, 1), shape, jnp.float32)
        return params | {"latent": {"kernel": kernel_ZD}}

    def hidden(self, params, tokens_BL, *, latent_BZ: Float[Array, "B Z"] | None = None, **options):
        """Compute the hidden states, given a latent of each sequence; None is the latent 0."""
        if latent_BZ is None:
            return super().hidden(params, tokens_BL, **options)
        shift_BD = latent_BZ @ whole(params["latent"])["kernel"]
        masked_BL1 = (tokens_BL == self.num_states - 1)[..., None]
        added_BLD = jnp.where(masked_BL1, shift_BD[:, None], 0.0)
        return super().hidden(params, tokens_BL, added_BLD=added_BLD, **options)


make = Latent
