"""The base of networks, and ``Attend``: which positions see which.

A network maps tokens to raw output, [B, L] to [B, L, V]. It knows neither the process nor the
meaning of its output, which are the concern of ``sedd.parameterizations``.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp

from sedd.errors import UserError
from sedd.networks.hidden_markov import HiddenMarkov
from sedd.types import Array, Bool, Float, Int, Key, Params

Kind = Literal["all", "causal", "ranks"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Attend:
    """Which query rows see which key rows. Functions take ``None`` for "all see all".

    The static ``kind`` names the order, so that a backend can choose a kernel while tracing:

    - ``all``: every query sees every key;
    - ``causal``: query i sees the keys j <= i;
    - ``ranks``: query i sees key j if ``rank_k[j] <= rank_q[i]``, or ``<`` if ``strict``. Blocks
      and permuted orders are written in this way. If there are fewer ranks of keys than of queries,
      only the first rows are keys, and nobody sees the other rows.

    With the kind ``ranks``, ``group_BL`` is a group of each row, or -1. A query also sees the keys
    of its own group, whatever their ranks. The noisy rows of a block of block diffusion see each
    other in this way, and are hidden from all other rows by the rank ``EMPTY`` as keys.

    ``segment_BL`` is the id of each row's segment; queries and keys are then the same rows, or
    the keys are the first of them. A query sees only keys of its own segment. Segments separate
    padding from text; they also separate packed documents from each other. Ids are 1, 2, … for
    texts; samplers, verifiers and evaluations take positions of segment 0 for padding. A query that
    sees no key has attention output 0. An axis B of length 1 serves all sequences.

    Raises ``ValueError`` unless both ranks are given for the kind ``ranks``, and neither ranks nor
    groups for other kinds.
    """

    kind: Kind = field(default="all", metadata={"static": True})
    rank_q_BL: Int[Array, "#B Q"] | None = None
    rank_k_BL: Int[Array, "#B K"] | None = None
    segment_BL: Int[Array, "#B L"] | None = None
    group_BL: Int[Array, "#B L"] | None = None
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
        for name, given in (("strict", self.strict), ("group_BL", self.group_BL is not None)):
            if given and self.kind != "ranks":
                raise ValueError(
                    f"{name} goes with ranks: it needs kind 'ranks', got {self.kind!r}"
                )

    def num_keys(self, rows: int) -> int:
        """How many of a network's rows are keys: the first ones."""
        return rows if self.rank_k_BL is None else self.rank_k_BL.shape[1]

    def mask(self, queries: int, keys: int) -> Bool[Array, "B 1 Q K"]:
        """Return the mask, True where a query sees a key; it broadcasts to [B, 1, Q, K].

        The batch axis has size 1 if neither ranks nor segments are given. For the kind ``all``
        without segments the last two axes have size 1 too.

        Args:
            queries: the number of queries, Q.
            keys: the number of keys, K.
        """
        seen = jnp.ones((1, 1, 1), bool)
        if self.kind == "causal":
            seen = (jnp.arange(keys)[None] <= jnp.arange(queries)[:, None])[None]
        elif self.rank_q_BL is not None and self.rank_k_BL is not None:
            rank_q, rank_k = self.rank_q_BL[:, :, None], self.rank_k_BL[:, None, :]
            seen = rank_k < rank_q if self.strict else rank_k <= rank_q
            if self.group_BL is not None:
                group_q, group_k = self.group_BL[:, :, None], self.group_BL[:, None, :keys]
                seen = seen | ((group_q == group_k) & (group_k >= 0))
        if self.segment_BL is not None:
            seen = seen & (self.segment_BL[:, :, None] == self.segment_BL[:, None, :keys])
        return seen[:, None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Memory:
    """Keys and values of rows that a network has seen: an exact cache, see ``Network.extend``.

    There are S slots. The row of position p is kept in slot p, and ``rank_BS`` is its rank as a
    key; an empty slot has the rank ``EMPTY``, which no query sees. Every array has the sequences
    first, so that a sampler's state may hold a memory.
    """

    keys: Float[Array, "B layers S H K"]
    values: Float[Array, "B layers S H K"]
    rank_BS: Int[Array, "B S"]


EMPTY = 2**30  # a rank above that of any query


@dataclass(frozen=True, kw_only=True)
class Network(ABC):
    """A map from tokens to hidden states, and an output layer from hidden states to raw output.

    The two are separate methods because raw output [B, L, V] would be the largest array of a
    program: losses and samplers apply the output layer only to the positions that they need. A
    network is a configuration without arrays. ``init`` makes the parameters, and every call takes
    them as an argument.
    """

    num_states: int  # V: rows of the embedding, and width of the output layer
    time_conditioned: bool  # whether ``hidden`` takes the total noise
    # The key of the parameters that are stacked over layers: a scan runs over their first axis.
    stacked: ClassVar[str | None] = None
    # Whether there are ``memory`` and ``extend``.
    has_memory: ClassVar[bool] = False
    # Whether there is a ``causal_hidden``, with the parameters ``causal``.
    has_causal_head: ClassVar[bool] = False
    # Whether there is a ``log_marginal``, with the parameters ``marginal`` and ``unigram``.
    has_marginal_head: ClassVar[bool] = False
    # Whether there is an ``hmm``, with the parameters ``hmm``.
    has_hmm_head: ClassVar[bool] = False
    # Whether ``hidden`` takes a latent, ``latent_BZ`` with ``latents`` numbers for each sequence.
    has_latent: ClassVar[bool] = False

    @abstractmethod
    def init(self, key: Key[Array, ""]) -> Params:
        """Draw fresh parameters, float32 unless the network has a ``param_dtype``."""

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
        """Compute the hidden states that the output layer reads.

        Args:
            params: parameters; each ``Shard`` among them is gathered where it is used
                (``sedd.networks.shard.whole``).
            tokens_BL: token ids in 0..V-1.
            positions_BL: positions for the position encoding; by default 0..L-1.
            attend: which positions see which.
            sigma_B: total noise, [B], or [B, L] if it differs by position.
            keys_B: a key for each sequence turns dropout on; None turns it off.

        Raises:
            ValueError: if ``sigma_B`` is missing and the network is ``time_conditioned``, or is
                given and it is not.
        """

    def memory(self, batch: int, slots: int) -> Memory:
        """An empty memory for sequences of ``slots`` positions; UserError without ``extend``."""
        raise UserError(
            f"the network {type(self).__name__} has no memory of rows; ddit and decoder have"
        )

    def extend(
        self,
        params: Params,
        tokens_BM: Int[Array, "B M"],
        memory: Memory,
        *,
        positions_BM: Int[Array, "B M"],
        rank_BM: Int[Array, "B M"],
        write_BM: Bool[Array, "B M"],
    ) -> tuple[Float[Array, "B M D"], Memory]:
        """Compute the hidden states of new rows only, given the rows in the memory.

        Rows with ``write_BM`` are written to the memory, each to the slot of its position, which is
        overwritten. Then every row sees the slots whose rank is not above its own; rows that are
        not written are seen by nobody. The result is that of ``hidden`` on all rows together if no
        row of the memory would see a row that was written after it.

        Args:
            params: parameters.
            tokens_BM: token ids of the new rows.
            memory: the rows so far, from ``memory`` or an earlier call.
            positions_BM: the position of each row, in 0..S-1; those written are distinct.
            rank_BM: the rank of each row, as a query and as a key, below ``EMPTY``.
            write_BM: which rows are written.

        Returns:
            The hidden states of the new rows, and the memory with the written ones.

        Raises:
            UserError: if the network has no memory.
            ValueError: if the network is conditioned on the noise level.
        """
        raise UserError(
            f"the network {type(self).__name__} has no memory of rows; ddit and decoder have"
        )

    def causal_hidden(
        self,
        params: Params,
        hidden_BLD: Float[Array, "B L D"],
        tokens_BL: Int[Array, "B L"],
        order_BL: Int[Array, "B L"],
        *,
        keys_B: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Compute the hidden states of tokens given each other; see ``CausalHead``.

        Only networks with ``has_causal_head`` have this method; others raise ``UserError``.
        """
        raise UserError(f"the network {type(self).__name__} has no causal head; causal_head has")

    def log_marginal(
        self, params: Params, hidden_BLD: Float[Array, "B L D"], tokens_BL: Int[Array, "B L"]
    ) -> Float[Array, " B"]:
        """Approximate the log probability of the visible tokens; see ``MarginalHead``.

        Only networks with ``has_marginal_head`` have this method; others raise ``UserError``.
        """
        raise UserError(
            f"the network {type(self).__name__} has no marginal head; marginal_head has"
        )

    def hmm(self, params: Params) -> HiddenMarkov:
        """The hidden Markov model of these parameters; see ``HmmHead``.

        Only networks with ``has_hmm_head`` have this method; others raise ``UserError``.
        """
        raise UserError(f"the network {type(self).__name__} has no HMM head; hmm_head has")

    @property
    def frozen_trunk(self) -> bool:
        """Whether training changes neither ``hidden`` nor ``head``."""
        return False

    @abstractmethod
    def head(self, params: Params) -> tuple[Float[Array, "D V"], Float[Array, " V"]]:
        """The matrix and the bias of the output layer, gathered from all devices if sharded."""

    @abstractmethod
    def flops(self, length: int, read: float) -> float:
        """Count the FLOPs of the forward pass of one sequence.

        A product of [a, b] and [b, c] counts 2·a·b·c. Recomputation and padding do not count.

        Args:
            length: rows of the network's input.
            read: rows to which the output layer is applied; may be an average.
        """

    def trainable(self, params: Params) -> Params:
        """Return the parameters that training changes: some entries of the dictionary ``params``.

        By default these are all. The other entries are frozen: training computes no gradient for
        them, and the optimizer has no state for them.
        """
        return params

    def training_flops(self, length: int, read: float) -> float:
        """Count the FLOPs of the forward and backward pass of one sequence in training.

        The backward pass counts twice the forward pass (arXiv:2204.02311, appendix B). Arguments
        are those of ``flops``.
        """
        return 3 * self.flops(length, read)

    def raw(self, params: Params, tokens_BL: Int[Array, "B L"], **kwargs) -> Float[Array, "B L V"]:
        """The raw output at every position, in float32; the arguments are those of ``hidden``."""
        weight_DV, bias_V = self.head(params)
        hidden_BLD = self.hidden(params, tokens_BL, **kwargs)
        return read_out(hidden_BLD, weight_DV, bias_V)


def read_out(
    hidden: Float[Array, "*rows D"], weight_DV: Float[Array, "D V"], bias_V: Float[Array, " V"]
) -> Float[Array, "*rows V"]:
    """Apply the output layer: ``hidden @ weight + bias``.

    The factors have the type of ``hidden``, and the sum is accumulated in float32 or wider, because
    losses and sampling need float32 logits even if the network computes in bfloat16.
    """
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.matmul(hidden, weight_DV.astype(hidden.dtype), preferred_element_type=wide)
    return logits + jnp.broadcast_to(bias_V, logits.shape)
