"""What the transformers share: the calls of ``Network``, the scan over blocks, and linear layers.

``Transformer`` implements the calls by a trunk, the module of embedding, blocks and final norm. The
blocks are one scan over stacked parameters, so that the program does not grow with the layers. Each
block stores the values marked by ``keep`` for its backward pass and recomputes the others.

Suffixes: ``H`` heads of the queries, ``G`` heads of keys and values, ``K`` channels of a head,
``M`` new rows, ``S`` slots of a memory; the others as in ``sedd.types``.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, ClassVar, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from sedd.errors import FieldError, fields_within
from sedd.networks.attention import Backend, attention, is_kept, keep
from sedd.networks.base import EMPTY, Attend, Memory, Network
from sedd.networks.lora import Lora
from sedd.networks.rotary import Phases, rotate
from sedd.networks.shard import whole
from sedd.types import Array, Bool, Float, Int, Key, Params

Dtype = Literal["float32", "bfloat16"]
ADAPTER = "_adapter"  # the module of the adapter of the layer query is query_adapter


@dataclass(frozen=True, kw_only=True)
class Transformer(Network):
    """A network of blocks with attention.

    Parameters are ``{"trunk": …}`` and those of the output layer. Those of the blocks, in
    ``trunk/blocks``, have a leading axis of length ``num_layers``. Kernels are ``[in, out]``. With
    ``lora`` there are also ``adapters``, which alone are trained.

    Raises ``ValueError`` if a field is out of its range (``FieldError``) or does not fit another.
    """

    stacked = "blocks"
    has_memory = True
    # The linear layers of a block, which may have adapters.
    linear_layers: ClassVar[tuple[str, ...]]

    hidden_dim: int = 768
    """Width D of the hidden states."""
    num_layers: int = 12
    """Number of blocks, each attention and an MLP."""
    num_heads: int = 12
    """Heads of the attention's queries."""
    remat: bool = False
    """Store only the input of each block, and recompute the rest in the backward pass."""
    dtype: Dtype = "float32"
    """Type of the matrix products and of the hidden states."""
    attention: Backend = "auto"
    """How attention is computed; auto picks the fastest that the device has."""
    lora: Lora = Lora()
    """Low-rank adapters, which are trained in place of all parameters."""

    def __post_init__(self):
        self._at_least(1, "hidden_dim", "num_layers", "num_heads")
        self._at_least(2, "num_states")
        self._one_of("dtype", Dtype)
        self._one_of("attention", Backend)
        with fields_within("lora"):
            self.lora.names(self.linear_layers)
        channels = self.key_shape[1]
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise ValueError(f"attention 'cudnn' needs dtype bfloat16, got {self.dtype!r}")
        if self.attention == "cudnn" and (channels % 8 or channels > 128):
            raise ValueError(
                "attention 'cudnn' needs the channels of a head to be a multiple of 8 and at most "
                f"128, got {channels}"
            )

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            if getattr(self, name) < least:
                raise FieldError(name, f"must be at least {least}, got {getattr(self, name)}")

    def _one_of(self, name: str, choices: Any) -> None:
        if getattr(self, name) not in get_args(choices):
            known = ", ".join(get_args(choices))
            raise FieldError(name, f"must be one of {known}, got {getattr(self, name)!r}")

    @property
    @abstractmethod
    def key_shape(self) -> tuple[int, int]:
        """Heads and channels of the keys of a row, (G, K)."""

    @abstractmethod
    def trunk(self) -> nn.Module:
        """The module of embedding, blocks and final norm.

        It is called with tokens, positions, an ``Attend`` or None, σ, the keys of the dropout, and
        the memory: ``past``, the keys and values of a ``Memory``, [B, layers, S, G, K] each, and
        the slot of each row, S for a row that is not written. Both are None without a memory. It
        returns the hidden states and the new ``past``.
        """

    @abstractmethod
    def fresh_head(self) -> Params:
        """Fresh parameters of the output layer, apart from ``trunk``."""

    def init(self, key: Key[Array, ""]) -> Params:
        """Draw fresh parameters."""
        return _init(self, key)

    def trainable(self, params: Params) -> Params:
        """The adapters if there are any, else all parameters."""
        return {"adapters": params["adapters"]} if self.lora.rank else params

    def training_flops(self, length: int, read: float) -> float:
        """Count the FLOPs of training on one sequence; arguments as of ``Network.training_flops``.

        A frozen matrix has no gradient: it counts in the forward pass, and once in the backward
        pass.
        """
        total = super().training_flops(length, read)
        if not self.lora.rank:
            return total
        kernels, factors = _linear_sizes(self)
        frozen = length * kernels + read * self.hidden_dim * self.num_states
        return float(total - 2 * frozen + 3 * 2 * length * factors)

    def hidden(
        self,
        params: Params,
        tokens_BL: Int[Array, "B L"],
        *,
        positions_BL: Int[Array, "B L"] | None = None,
        attend: Attend | None = None,
        sigma_B: Float[Array, "..."] | None = None,
        keys_B: Key[Array, " B"] | None = None,
        added_BLD: Float[Array, "B L D"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Hidden states after the last norm, in the compute type; see ``Network.hidden``.

        The dropout of a sequence depends only on its own key in ``keys_B``, not on the rest of the
        batch. ``added_BLD`` is added to the embeddings of the tokens, by the network ``latent``.
        """
        if self.time_conditioned and sigma_B is None:
            raise ValueError("this network is conditioned on the time: sigma_B is required")
        if not self.time_conditioned and sigma_B is not None:
            raise ValueError("this network is not conditioned on the time: sigma_B must be None")
        if positions_BL is None:
            positions_BL = jnp.arange(tokens_BL.shape[1], dtype=jnp.int32)[None]
        trunk = self._bound(params)
        added = () if added_BLD is None else (added_BLD,)
        hidden_BLD, _ = trunk(tokens_BL, positions_BL, attend, sigma_B, keys_B, None, None, *added)
        return hidden_BLD

    def _bound(self, params: Params) -> Any:
        """The trunk with its parameters."""
        # Sharded blocks are gathered one layer at a time inside the scan, all else here.
        trunk = {k: v if k == "blocks" else whole(v) for k, v in params["trunk"].items()}
        if self.lora.rank:
            adapted = params["adapters"]["blocks"]
            factors = {name + ADAPTER: tree for name, tree in adapted.items()}
            trunk = trunk | {"blocks": {**trunk["blocks"], **factors}}
        return self.trunk().bind({"params": trunk})

    def memory(self, batch: int, slots: int) -> Memory:
        """An empty memory; its keys and values have the compute type."""
        shape = (batch, self.num_layers, slots, *self.key_shape)
        return Memory(
            keys=jnp.zeros(shape, self.dtype),
            values=jnp.zeros(shape, self.dtype),
            rank_BS=jnp.full((batch, slots), EMPTY, jnp.int32),
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
        """Hidden states of new rows, and the memory with them; see ``Network.extend``."""
        if self.time_conditioned:
            raise ValueError("a network that is conditioned on the time has no memory of rows")
        # A scatter drops rows whose slot is out of range.
        slot_BM = jnp.where(write_BM, positions_BM, memory.rank_BS.shape[1])
        rank_BS = _put(memory.rank_BS, slot_BM, rank_BM)
        attend = Attend(kind="ranks", rank_q_BL=rank_BM, rank_k_BL=rank_BS)
        past = (memory.keys, memory.values)
        trunk = self._bound(params)
        hidden_BMD, past = trunk(tokens_BM, positions_BM, attend, None, None, past, slot_BM)
        return hidden_BMD, Memory(keys=past[0], values=past[1], rank_BS=rank_BS)


@partial(jax.jit, static_argnums=0)
def _init(network: Transformer, key: Key[Array, ""]) -> Params:
    """The body of ``Transformer.init``: compiled once for equal networks.

    Under jit the compiler drops the forward pass that Flax runs to find the shapes.
    """
    tokens_BL = jnp.zeros((1, 1), jnp.int32)
    sigma_B = jnp.zeros(1, jnp.float32) if network.time_conditioned else None
    # Parameters do not depend on the backend of the attention, which may refuse length 1.
    trunk = replace(network, attention="einsum").trunk()
    params = trunk.init(key, tokens_BL, tokens_BL, None, sigma_B, None, None, None)["params"]
    params = {"trunk": params, **network.fresh_head()}
    if network.lora.rank:
        blocks = params["trunk"]["blocks"]
        names = network.lora.names(network.linear_layers)
        params["adapters"] = {"blocks": {name: blocks.pop(name + ADAPTER) for name in names}}
    return params


@cache
def _linear_sizes(network: Transformer) -> tuple[int, int]:
    """The number of entries of the kernels of all linear layers, and of the adapters."""
    params = jax.eval_shape(network.init, jax.random.key(0))
    blocks = params["trunk"]["blocks"]
    kernels = sum(blocks[name]["kernel"].size for name in network.linear_layers)
    return kernels, sum(leaf.size for leaf in jax.tree.leaves(params.get("adapters", {})))


def scanned(
    block: type[nn.Module],
    net: Transformer,
    num_layers: int,
    in_axes: tuple[Any, ...],
    *,
    memory: bool = False,
) -> nn.Module:
    """Blocks in a row as one scan, named ``blocks``; their parameters have a leading layer axis.

    The result is called as a block is and returns (x, ``past``); without a memory, (x, None).

    Args:
        block: the module of a block, made from ``net``. It is called with x, the arguments of
            ``in_axes`` and, with a memory, the layer's ``past`` and the slot of each row; it
            returns x and the new ``past``.
        net: the network.
        num_layers: the number of blocks.
        in_axes: of each argument: 0 if it has an entry for each layer, else ``nn.broadcast``.
        memory: whether there is a memory.
    """
    # prevent_cse guards the recomputation from being merged with the forward pass; inside a
    # scan the compiler cannot merge them anyway.
    rematted = nn.remat(block, prevent_cse=False, policy=None if net.remat else is_kept)
    blocks = nn.scan(
        rematted,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(*in_axes, *((1, nn.broadcast) if memory else ())),  # pyright: ignore
        out_axes=1,
        length=num_layers,
    )
    return blocks(net, name="blocks")


def attend_rows(
    q_BLHK: Float[Array, "B L H K"],
    k_BLGK: Float[Array, "B L G K"],
    v_BLGK: Float[Array, "B L G K"],
    rotations: tuple[Phases, Phases],
    attend: Attend | None,
    past: Any,
    slot_BL: Any,
    *,
    backend: str,
) -> tuple[Float[Array, "B L D"], Any]:
    """Rotate queries and keys, attend, and join the heads: the middle of a block's attention.

    Args:
        q_BLHK: queries.
        k_BLGK: keys.
        v_BLGK: values.
        rotations: the rotary phases of the queries and of the keys.
        attend: which rows see which.
        past: the layer's keys and values in a memory, [B, S, G, K] each, or None. The rows are
            written to them, and they replace the rows' own.
        slot_BL: the slot of each row; None without a memory.
        backend: of the attention.

    Returns:
        The output of the attention, and the new ``past``.
    """
    q_BLHK, k_BLGK = map(rotate, (q_BLHK, k_BLGK), rotations)
    q_BLHK, k_BLGK, v_BLGK = keep(q_BLHK), keep(k_BLGK), keep(v_BLGK)
    if past is not None:
        k_BLGK, v_BLGK = (
            _put(slots, slot_BL, rows) for slots, rows in zip(past, (k_BLGK, v_BLGK), strict=True)
        )
        past = (k_BLGK, v_BLGK)
    elif attend is not None:
        keys = attend.num_keys(k_BLGK.shape[1])
        k_BLGK, v_BLGK = k_BLGK[:, :keys], v_BLGK[:, :keys]
    h_BLHK = attention(q_BLHK, k_BLGK, v_BLGK, attend, backend=backend)
    return rearrange(h_BLHK, "b l h k -> b l (h k)"), past


def _put(slots: Array, slot_BM, rows: Array) -> Array:
    """Write rows [B, M, …] to their slots [B, S, …]; a slot that is out of range is dropped."""
    sequence_B1 = jnp.arange(len(rows))[:, None]
    return slots.at[sequence_B1, slot_BM].set(rows, mode="drop")


def uniform(fan_in: int):
    """Initialiser U(-1/√fan_in, 1/√fan_in): PyTorch's for linear layers, SEDD's for embeddings."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def dense(
    net: Transformer,
    features: int,
    fan_in: int,
    name: str,
    *,
    bias: bool = True,
    param_dtype: Dtype = "float32",
) -> Callable[[Float[Array, "B L D"]], Float[Array, "B L F"]]:
    """A linear layer of a block in the compute type, gathered where it is used.

    It has an adapter if ``net.lora`` names it.
    """
    init = uniform(fan_in)
    layer = gathered(nn.Dense, net.dtype)(
        features,
        use_bias=bias,
        dtype=net.dtype,
        param_dtype=param_dtype,
        kernel_init=init,
        bias_init=init,
        dot_general=_flat_product,
        name=name,
    )
    if name not in net.lora.names(net.linear_layers):
        return layer
    adapter = gathered(_Adapter, net.dtype)(
        features, net.lora.rank, net.lora.scale, net.dtype, name=name + ADAPTER
    )
    return lambda x_BLD: layer(x_BLD) + adapter(x_BLD)


class _Adapter(nn.Module):
    """The branch scale·(x·A)·B beside a frozen linear layer, see ``sedd.networks.lora``.

    The product of A and B is not added to the kernel: the gradient of the factors would need that
    of the kernel, a third of the work of training.
    """

    features: int
    rank: int
    scale: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x_BLD):
        width = x_BLD.shape[-1]
        zeros = nn.initializers.zeros
        a_DR = self.param("a", uniform(width), (width, self.rank), jnp.float32)
        b_RF = self.param("b", zeros, (self.rank, self.features), jnp.float32)
        low_BLR = _flat_product(x_BLD.astype(self.dtype), a_DR.astype(self.dtype), None)
        return self.scale * _flat_product(low_BLR, b_RF.astype(self.dtype), None)


def _flat_product(x_BLD, kernel_DF, dimensions, **kwargs):
    """``lax.dot_general`` with the batch axes joined, [B·L, D] by [D, F].

    The gradient of the product of [B, L, D] takes a fifth longer on XLA's CPU backend.
    """
    del dimensions  # a dense layer always contracts the last axis of x and the first of the kernel
    product_MF = jax.lax.dot(x_BLD.reshape(-1, x_BLD.shape[-1]), kernel_DF, **kwargs)
    return product_MF.reshape(*x_BLD.shape[:-1], -1)


def gathered(layer: type[nn.Module], dtype) -> Any:
    """A layer whose sharded parameters are gathered in ``dtype`` when it is called.

    The policy ``is_kept`` does not store the gathered arrays, so that the backward pass gathers
    them again. Stored for all layers, they would be the whole model on every device.
    """

    def apply(variables):
        return whole(variables, dtype)

    return nn.map_variables(layer, "params", trans_in_fn=apply, init=True)
