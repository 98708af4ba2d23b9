"""What the rest of the library knows of a network."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp

from sedd.types import Array, Bool, Float, Int, Key, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Attend:
    """Which positions see which; ``None`` in its place means that everything sees everything.

    Query i sees key j when ``rank_k[j] <= rank_q[i]`` (``<`` if ``strict``) and both lie in the
    same segment. Causal, padding, packed documents, blocks and permuted orders are all of this
    form; each attention backend makes its own mask of it. A query that sees nothing attends to
    nothing: its attention output is 0. Raises ``ValueError`` for one rank without the other.
    """

    rank_q_BL: Int[Array, "B L"] | None = None
    rank_k_BL: Int[Array, "B L"] | None = None
    segment_BL: Int[Array, "B L"] | None = None
    strict: bool = field(default=False, metadata={"static": True})

    def __post_init__(self):
        if (self.rank_q_BL is None) != (self.rank_k_BL is None):
            raise ValueError("rank_q_BL and rank_k_BL describe one order: give both, or neither")

    def mask(self) -> Bool[Array, "B 1 L L"]:
        """The explicit mask, True where a query (second to last axis) sees a key (last axis)."""
        seen = jnp.ones((1, 1, 1), bool)
        if self.rank_q_BL is not None and self.rank_k_BL is not None:
            rank_q, rank_k = self.rank_q_BL[:, :, None], self.rank_k_BL[:, None, :]
            seen = seen & (rank_k < rank_q if self.strict else rank_k <= rank_q)
        if self.segment_BL is not None:
            seen = seen & (self.segment_BL[:, :, None] == self.segment_BL[:, None, :])
        return seen[:, None]


@dataclass(frozen=True, kw_only=True)
class Network(ABC):
    """A map from tokens to hidden states, and the output layer that reads them out.

    The two are apart so that a loss or a sampler reads out only the positions that it needs. A
    network is a value without parameters: they come from ``init`` and go into every call.
    """

    num_states: int  # V: width of the embedding and of the output layer
    time_conditioned: bool  # whether ``hidden`` needs sigma
    # Under this name parameters have an axis of layers in front, which a scan takes apart.
    stacked: ClassVar[str | None] = None

    @abstractmethod
    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh float32 parameters."""

    @abstractmethod
    def hidden(
        self,
        params: Params,
        tokens_BL: Int[Array, "B L"],
        *,
        positions_BL: Int[Array, "B L"] | None = None,
        attend: Attend | None = None,
        sigma_B: Float[Array, " B"] | None = None,
        keys_B: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Hidden states after the last norm and modulation.

        ``positions_BL`` defaults to 0..L-1. ``sigma_B`` is required when ``time_conditioned`` and
        refused (``ValueError``) otherwise. ``keys_B``, one key an example, turns dropout on.
        Parameters that are a ``Shard`` are made whole where they are used (``shard.whole``).
        """

    @abstractmethod
    def head(self, params: Params) -> tuple[Float[Array, "D V"], Float[Array, " V"]]:
        """The output layer's matrix and bias, whole."""

    def raw(self, params: Params, tokens_BL: Int[Array, "B L"], **kwargs) -> Float[Array, "B L V"]:
        """The output at every position, in float32; the arguments are those of ``hidden``."""
        weight_DV, bias_V = self.head(params)
        hidden_BLD = self.hidden(params, tokens_BL, **kwargs)
        return read_out(hidden_BLD, weight_DV, bias_V)


def read_out(
    hidden: Float[Array, "*rows D"], weight_DV: Float[Array, "D V"], bias_V: Float[Array, " V"]
) -> Float[Array, "*rows V"]:
    """The output layer: a product in the hidden states' precision, accumulated in float32 at least.

    Losses and sampling need float32 logits even where the network computes in bfloat16.
    """
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.matmul(hidden, weight_DV.astype(hidden.dtype), preferred_element_type=wide)
    return logits + jnp.broadcast_to(bias_V, logits.shape)
