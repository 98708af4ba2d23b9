"""A causal head on a trunk: tokens drawn together see each other (arXiv:2510.03929).

A masked diffusion model draws the tokens of one network call independently, each from the trunk's
conditional p(x_i | revealed tokens). The causal head makes a joint distribution of them without a
further call of the trunk. For an order σ of the positions, one more block reads the hidden states h
of that call and the tokens before a position in σ, and gives

    q(x_σ(j+1) | tokens revealed to the trunk, x_σ(1), …, x_σ(j)).

The block's rows are sorted by σ. Row j holds h_σ(j), h_σ(j+1) and the embedding of x_σ(j), and sees
the rows up to j. The result is added to h_σ(j+1), and the trunk's output layer reads the sum. The
last layer of the block is 0 in fresh parameters, so that q = p at the start of training.

Two things differ from the paper's description:

- The paper encodes σ(j) in half of the rotary channels and σ(j+1) in the other half, for queries
  and keys. Here keys are encoded in this way, and all channels of a query encode σ(j+1), the
  position to be predicted. The product of query j and key k then depends on the distance from
  σ(j+1) to σ(k), the position of the token in row k. In the paper's encoding it does not.
- The paper adds the block's output before the trunk's last norm. Here it is added after this norm,
  and has a norm of its own. The head then needs nothing from the trunk but ``hidden``, and q = p at
  the start holds exactly.
"""

from dataclasses import dataclass, replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from sedd.errors import FieldError
from sedd.networks.base import Attend
from sedd.networks.blocks import dense
from sedd.networks.ddit import DDiT, Norm, scanned_blocks
from sedd.networks.rotary import rotary
from sedd.networks.shard import whole
from sedd.types import Array, Float, Int, Key, Params


@dataclass(frozen=True, kw_only=True)
class CausalHead(DDiT):
    """The network ddit (the trunk) and a causal block that reads its hidden states.

    Parameters are ``{"trunk": …, "head": …, "causal": …}``. The first two are those of ``DDiT``,
    and so are ``hidden`` and ``head``: samplers and bounds that do not use the causal head give the
    results of the trunk. ``causal_hidden`` gives the hidden states of q(x_i | the tokens before i
    in an order), by which self-speculative decoding verifies drafts. arXiv:2510.03929.

    Raises ``ValueError`` as ``DDiT`` does, and if hidden_dim / num_heads is no multiple of 4.
    """

    has_causal_head = True

    freeze: bool = True
    """Train the causal block only, on a trunk that was trained before (--init-from)."""

    def __post_init__(self):
        super().__post_init__()
        if self.lora.rank:
            raise FieldError(
                "lora.rank",
                "goes with ddit and decoder: causal_head trains a block of its own, use it without",
            )
        if self.head_dim % 4:
            raise FieldError(
                "hidden_dim",
                "must be a multiple of 4·num_heads (half of the rotary channels encode the next "
                f"position), got {self.hidden_dim} with {self.num_heads} heads",
            )

    def init(self, key: Key[Array, ""]) -> Params:
        """Draw fresh float32 parameters; those of the trunk are ``DDiT.init`` with this key."""
        return super().init(key) | {"causal": _init(self, jax.random.fold_in(key, 1))}

    @property
    def frozen_trunk(self) -> bool:
        """Whether training changes the causal block only."""
        return self.freeze

    def trainable(self, params: Params) -> Params:
        """The causal block if the trunk is frozen, else all parameters."""
        return {"causal": params["causal"]} if self.freeze else params

    def causal_hidden(
        self,
        params: Params,
        hidden_BLD: Float[Array, "B L D"],
        tokens_BL: Int[Array, "B L"],
        order_BL: Int[Array, "B L"],
        *,
        keys_B: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Compute the hidden states of q; row i belongs to position i, as in ``hidden``.

        The row of the result at position σ(j), j = 1..L, reads ``hidden_BLD`` and, of
        ``tokens_BL``, only the entries at σ(1), …, σ(j-1). The row of σ(1), the first position of
        the order, is that of ``hidden``. Positions that are no part of a sequence (padding) come
        last in its order.

        Args:
            params: parameters.
            hidden_BLD: the result of ``hidden``, for tokens of which the first ones in the order
                are visible and the others masked.
            tokens_BL: the tokens: those that were visible, and the drafts or clean tokens of the
                others. Tokens that are not known yet may have any value.
            order_BL: the order σ: a permutation of the positions 0..L-1. In training the visible
                positions are in a random order too.
            keys_B: a key for each sequence turns dropout in the causal block on.
        """
        causal = {k: v if k == "blocks" else whole(v) for k, v in params["causal"].items()}
        embedding_VD = whole(params["trunk"]["embed"]["embedding"])
        next_BL = jnp.roll(order_BL, -1, axis=1)
        own, following = (rotary(rows_BL, self.head_dim // 2) for rows_BL in (order_BL, next_BL))
        rotations = (_halves(following, following), _halves(own, following))
        added_BLD = _Causal(self).bind({"params": causal})(
            _take(hidden_BLD, order_BL),
            _take(hidden_BLD, next_BL),
            embedding_VD[jnp.take_along_axis(tokens_BL, order_BL, 1)],
            rotations,
            keys_B,
        )
        # A row predicts the next position of the order. Nothing predicts the first one; the last
        # row, which wraps around, is unused.
        added_BLD = jnp.roll(added_BLD, 1, axis=1).at[:, 0].set(0)
        return hidden_BLD + _take(added_BLD, jnp.argsort(order_BL, 1))

    def causal_flops(self, length: int) -> float:
        """Count the FLOPs of ``causal_hidden`` for one sequence, as ``flops`` counts."""
        width = self.hidden_dim
        weights = (3 + 4 + 2 * self.mlp_ratio + 1) * width**2  # in, a block, out
        return float(length * (2 * weights + 4 * length * width))

    def training_flops(self, length: int, read: float) -> float:
        """Count the FLOPs of training on one sequence; arguments as of ``Network.training_flops``.

        With a frozen trunk there is no backward pass of the trunk, and that of the output layer
        computes the gradient of the hidden states only. A trunk that is trained has its own loss,
        so that the output layer runs twice.
        """
        causal, head = 3 * self.causal_flops(length), 2 * read * self.hidden_dim * self.num_states
        if self.freeze:
            return self.flops(length, 0.0) + causal + 2 * head
        return super().training_flops(length, read) + causal + 3 * head


@partial(jax.jit, static_argnums=0)
def _init(network: CausalHead, key: Key[Array, ""]) -> Params:
    """Fresh parameters of the causal block; under jit the forward pass of Flax is dropped."""
    x_BLD = jnp.zeros((1, 1, network.hidden_dim))
    rotation = rotary(jnp.zeros((1, 1), jnp.int32), network.head_dim)
    causal = _Causal(replace(network, attention="einsum"))
    return causal.init(key, x_BLD, x_BLD, x_BLD, (rotation, rotation), None)["params"]


class _Causal(nn.Module):
    """The causal block with its first and last layer, on rows that are sorted by the order."""

    net: CausalHead

    @nn.compact
    def __call__(self, own_BLD, next_BLD, token_BLD, rotations, keys_B):
        net, width = self.net, self.net.hidden_dim
        # Embeddings are much smaller than hidden states, which come from a norm.
        token_BLD = Norm(net.norm_bias, name="norm_token")(token_BLD, None, None)
        x_BLD = jnp.concatenate([own_BLD, next_BLD, token_BLD.astype(own_BLD.dtype)], -1)
        x_BLD = dense(net, width, 3 * width, "in")(x_BLD).astype(jnp.float32)
        layers = jnp.array([net.num_layers], jnp.int32)  # its dropout is not that of the trunk
        x_BLD, _ = scanned_blocks(net, 1)(
            x_BLD, layers, None, rotations, Attend(kind="causal"), keys_B
        )
        x_BLD = Norm(net.norm_bias, name="norm")(x_BLD, None, None)
        zeros = nn.initializers.zeros
        return nn.Dense(width, dtype=net.dtype, kernel_init=zeros, name="out")(x_BLD)


def _halves(first, second) -> tuple[Array, ...]:
    """Rotary phases of which half of the channels are the first, half the second."""
    return tuple(jnp.concatenate(both, -1) for both in zip(first, second, strict=True))


def _take(values_BLD: Array, order_BL: Array) -> Array:
    """The rows of each sequence in the given order."""
    return jnp.take_along_axis(values_BLD, order_BL[..., None], 1)


make = CausalHead
