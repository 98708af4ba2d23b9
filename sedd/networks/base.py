"""The base of networks, and ``Attend``: which positions see which."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp

from sedd.types import Array, Bool, Float, Int, Key, Params

Kind = Literal["all", "causal", "ranks"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Attend:
    """Which query rows see which key rows; ``None`` in its place means that all see all.

    The static ``kind`` names the order, so that a backend can use its own kernel for it:

    - ``all``: every query sees every key;
    - ``causal``: query i sees the keys j <= i;
    - ``ranks``: query i sees key j if ``rank_k[j] <= rank_q[i]`` (``<`` if ``strict``): blocks and
      permuted orders. There may be more or fewer keys than queries.

    If ``segment_BL`` is given, a query sees keys of its own segment only: padding and packed
    documents. A query that sees no key has an attention output of 0. Raises ``ValueError`` unless
    the ranks are given exactly for the kind ``ranks``.
    """

    kind: Kind = field(default="all", metadata={"static": True})
    rank_q_BL: Int[Array, "B Q"] | None = None
    rank_k_BL: Int[Array, "B K"] | None = None
    segment_BL: Int[Array, "B L"] | None = None
    strict: bool = field(default=False, metadata={"static": True})

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        for name in ("rank_q_BL", "rank_k_BL"):
            if (getattr(self, name) is not None) != (self.kind == "ranks"):
                raise ValueError(
                    f"rank_q_BL and rank_k_BL go with kind 'ranks', both of them: {name} with "
                    f"kind {self.kind!r} is {getattr(self, name)}"
                )
        if self.strict and self.kind != "ranks":
            raise ValueError(f"strict compares ranks: it needs kind 'ranks', got {self.kind!r}")

    def mask(self, queries: int, keys: int) -> Bool[Array, "B 1 Q K"]:
        """The mask of ``queries`` rows and ``keys`` rows, True where a query sees a key."""
        seen = jnp.ones((1, 1, 1), bool)
        if self.kind == "causal":
            seen = (jnp.arange(keys)[None] <= jnp.arange(queries)[:, None])[None]
        elif self.rank_q_BL is not None and self.rank_k_BL is not None:
            rank_q, rank_k = self.rank_q_BL[:, :, None], self.rank_k_BL[:, None, :]
            seen = rank_k < rank_q if self.strict else rank_k <= rank_q
        if self.segment_BL is not None:
            seen = seen & (self.segment_BL[:, :, None] == self.segment_BL[:, None, :])
        return seen[:, None]


@dataclass(frozen=True, kw_only=True)
class Network(ABC):
    """A map from tokens to hidden states, and an output layer from those to raw output.

    They are two methods so that a loss or a sampler applies the output layer, the widest of all, to
    the positions that it needs only. A network holds no parameters: ``init`` makes them, and every
    call takes them.
    """

    num_states: int  # V: width of the embedding and of the output layer
    time_conditioned: bool  # whether ``hidden`` takes the total noise
    # Parameters under this name are stacked: their first axis counts the layers of a scan.
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
        sigma_B: Float[Array, "..."] | None = None,
        keys_B: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """The hidden states that the output layer takes.

        ``positions_BL`` defaults to 0..L-1. ``sigma_B``, the total noise [B], or [B, L] if it
        differs by position, is required if ``time_conditioned`` and refused otherwise
        (``ValueError``). ``keys_B``, one key a sequence, turns dropout on. Parameters that are a
        ``Shard`` are gathered where they are used (``shard.whole``).
        """

    @abstractmethod
    def head(self, params: Params) -> tuple[Float[Array, "D V"], Float[Array, " V"]]:
        """The output layer's matrix and bias, gathered."""

    @abstractmethod
    def flops(self, length: int, read: float) -> float:
        """FLOPs of the forward pass of one sequence of ``length`` rows, ``read`` of them read out.

        Count what the mathematics needs: 2·a·b·c for a product of [a, b] and [b, c].
        """

    def raw(self, params: Params, tokens_BL: Int[Array, "B L"], **kwargs) -> Float[Array, "B L V"]:
        """The raw output at every position, in float32; arguments as of ``hidden``."""
        weight_DV, bias_V = self.head(params)
        hidden_BLD = self.hidden(params, tokens_BL, **kwargs)
        return read_out(hidden_BLD, weight_DV, bias_V)


def read_out(
    hidden: Float[Array, "*rows D"], weight_DV: Float[Array, "D V"], bias_V: Float[Array, " V"]
) -> Float[Array, "*rows V"]:
    """The output layer: a product in the precision of ``hidden``, accumulated in float32 or wider.

    Losses and sampling need float32 logits even if the network computes in bfloat16.
    """
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.matmul(hidden, weight_DV.astype(hidden.dtype), preferred_element_type=wide)
    return logits + jnp.broadcast_to(bias_V, logits.shape)
