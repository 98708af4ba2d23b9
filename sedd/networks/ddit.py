"""The diffusion transformer of SEDD and RADD.

SEDD's network (arXiv:2310.16834) conditions every block on the noise level by adaLN-zero (DiT,
arXiv:2212.09748). RADD's (arXiv:2406.03736) is the same transformer without a time input. Both have
bidirectional attention, rotary positions (arXiv:2104.09864) and an output layer that is not tied to
the embedding.

The residual stream, the norms, the modulation and the rotary phases are float32. Matrix products
and attention are computed in the compute type. The published code does the same under autocast.

The blocks are one scan over stacked parameters, so that the program does not grow with the layers.
Each block stores the values marked by ``keep`` for its backward pass and recomputes the others.

Suffixes: ``C`` channels of the condition, ``F`` features; the others as in ``sedd.types``.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from sedd.errors import FieldError
from sedd.networks.attention import Backend, attention, is_kept, keep
from sedd.networks.base import EMPTY, Attend, Memory, Network
from sedd.networks.shard import whole
from sedd.types import Array, Bool, Float, Int, Key, Params

NORM_EPSILON = 1e-5  # PyTorch's; Flax's default is 1e-6
SIGMA_FREQUENCIES = 128
ROTARY_BASE = 1e4

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class DDiT(Network):
    """A bidirectional transformer, conditioned on σ by adaLN-zero if ``time_conditioned``.

    The defaults are SEDD-small, with 169,627,218 parameters at V = 50258. SEDD-medium has
    ``hidden_dim`` 1024, 24 layers and 16 heads. RADD is ``time_conditioned=False, norm_bias=True,
    dropout=0.02``.

    Parameters are ``{"trunk": …, "head": {"kernel", "bias"}}`` in float32, with kernels
    ``[in, out]``. Parameters of the blocks have a leading axis of length ``num_layers``.

    Raises ``ValueError`` if a field is out of its range (``FieldError``) or does not fit another.
    """

    stacked = "blocks"
    has_memory = True

    hidden_dim: int = 768
    """Width D of the hidden states; a multiple of twice num_heads."""
    num_layers: int = 12
    """Number of blocks, each attention and an MLP."""
    num_heads: int = 12
    """Heads of the attention, each D / num_heads channels wide."""
    condition_dim: int = 128
    """Width C of the embedding of σ; unused by a network that is not conditioned on the time."""
    mlp_ratio: int = 4
    """Width of the MLP's hidden layer, as a multiple of D."""
    dropout: float = 0.1
    """Dropout rate on both residual branches, in training only."""
    norm_bias: bool = False
    """Whether the layer norms have a bias, as RADD's have."""
    remat: bool = False
    """Store only the input of each block, and recompute the rest in the backward pass."""
    dtype: Dtype = "float32"
    """Type of the matrix products and of the hidden states; parameters are always float32."""
    attention: Backend = "auto"
    """How attention is computed; auto picks the fastest that the device has."""

    def __post_init__(self):
        for name in ("num_layers", "num_heads", "condition_dim", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise FieldError(name, f"must be at least 1, got {getattr(self, name)}")
        if self.num_states < 2:
            raise FieldError("num_states", f"must be at least 2, got {self.num_states}")
        if self.hidden_dim < 1 or self.hidden_dim % (2 * self.num_heads):
            raise FieldError(
                "hidden_dim",
                "must be a positive multiple of 2·num_heads (rotary positions pair the "
                f"channels of a head), got {self.hidden_dim} with {self.num_heads} heads",
            )
        if not 0 <= self.dropout < 1:
            raise FieldError("dropout", f"must be in [0, 1), got {self.dropout}")
        for name, choices in (("dtype", get_args(Dtype)), ("attention", get_args(Backend))):
            if getattr(self, name) not in choices:
                raise FieldError(
                    name, f"must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise ValueError(f"attention 'cudnn' needs dtype bfloat16, got {self.dtype!r}")
        if self.attention == "cudnn" and (self.head_dim % 8 or self.head_dim > 128):
            raise ValueError(
                "attention 'cudnn' needs hidden_dim / num_heads to be a multiple of 8 and at most "
                f"128, got {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.hidden_dim // self.num_heads

    def init(self, key: Key[Array, ""]) -> Params:
        """Draw fresh float32 parameters; the raw output of a fresh network is 0 everywhere."""
        return _init(self, key)

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
        """Hidden states after the last norm and modulation, in the compute type.

        Arguments are those of ``Network.hidden``. The dropout of a sequence depends only on its own
        key in ``keys_B``, not on the rest of the batch.
        """
        if self.time_conditioned and sigma_B is None:
            raise ValueError("this network is conditioned on the time: sigma_B is required")
        if not self.time_conditioned and sigma_B is not None:
            raise ValueError("this network is not conditioned on the time: sigma_B must be None")
        if positions_BL is None:
            positions_BL = jnp.arange(tokens_BL.shape[1], dtype=jnp.int32)[None]
        trunk = self._trunk(params)
        hidden_BLD, _ = trunk(tokens_BL, positions_BL, attend, sigma_B, keys_B, None, None)
        return hidden_BLD

    def _trunk(self, params: Params):
        """The bound module of the trunk."""
        # Sharded blocks are gathered one layer at a time inside the scan, all else here.
        trunk = {k: v if k == "blocks" else whole(v) for k, v in params["trunk"].items()}
        return _Trunk(self).bind({"params": trunk})

    def memory(self, batch: int, slots: int) -> Memory:
        """An empty memory; its keys and values have the compute type."""
        shape = (batch, self.num_layers, slots, self.num_heads, self.head_dim)
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
        trunk = self._trunk(params)
        hidden_BMD, past = trunk(tokens_BM, positions_BM, attend, None, None, past, slot_BM)
        return hidden_BMD, Memory(keys=past[0], values=past[1], rank_BS=rank_BS)

    def flops(self, length: int, read: float) -> float:
        """Count the FLOPs of the forward pass of one sequence; arguments as of ``Network.flops``.

        A matrix of w weights counts 2·w for each row. The two products of the attention count
        4·L·D for each row and layer. The conditioning counts once for each sequence. Norms,
        activations and the softmax do not count. Causal attention counts like full attention.
        """
        width, layers = self.hidden_dim, self.num_layers
        block = (4 + 2 * self.mlp_ratio) * width**2  # qkv, attention_out, mlp_in, mlp_out
        conditioning = 0
        if self.time_conditioned:
            into = (2 * SIGMA_FREQUENCIES + self.condition_dim) * self.condition_dim
            conditioning = into + self.condition_dim * width * (6 * layers + 2)
        rows = length * layers * (2 * block + 4 * length * width)
        return rows + 2 * conditioning + 2 * read * width * self.num_states

    def head(self, params: Params) -> tuple[Float[Array, "D V"], Float[Array, " V"]]:
        """The matrix and bias of the output layer, arguments of ``read_out``."""
        head = whole(params["head"])
        return head["kernel"], head["bias"]


@partial(jax.jit, static_argnums=0)
def _init(network: DDiT, key: Key[Array, ""]) -> Params:
    """The body of ``DDiT.init``: compiled once for equal networks.

    Under jit the compiler drops the forward pass that Flax runs to find the shapes.
    """
    tokens_BL = jnp.zeros((1, 1), jnp.int32)
    sigma_B = jnp.zeros(1, jnp.float32) if network.time_conditioned else None
    # Parameters do not depend on the backend of the attention, which may refuse length 1.
    trunk = _Trunk(replace(network, attention="einsum"))
    params = trunk.init(key, tokens_BL, tokens_BL, None, sigma_B, None, None, None)["params"]
    head = {
        "kernel": jnp.zeros((network.hidden_dim, network.num_states), jnp.float32),
        "bias": jnp.zeros(network.num_states, jnp.float32),
    }
    return {"trunk": params, "head": head}


class _Trunk(nn.Module):
    """The network without its output layer: embedding, blocks and final norm.

    ``past`` are the keys and values of a ``Memory``, [B, layers, S, H, K] each, and ``slot_BL`` the
    slot of each row, S for a row that is not written; None without a memory. Returns the hidden
    states and the new ``past``.
    """

    net: DDiT

    @nn.compact
    def __call__(self, tokens_BL, positions_BL, attend, sigma_B, keys_B, past, slot_BL):
        net = self.net
        embed = nn.Embed(
            net.num_states, net.hidden_dim, embedding_init=_uniform(net.hidden_dim), name="embed"
        )
        x_BLD = embed(tokens_BL)
        condition_B1C = None
        if net.time_conditioned:
            sigma_map = _SigmaMap(net.condition_dim, name="sigma_map")
            # [B, 1, C] for one noise level a sequence, [B, L, C] for one a position.
            condition_B1C = sigma_map(sigma_B).reshape(len(sigma_B), -1, net.condition_dim)
        rotation_BL1K = rotary(positions_BL, net.head_dim)
        layers = jnp.arange(net.num_layers, dtype=jnp.int32)
        blocks = scanned_blocks(net, net.num_layers, memory=past is not None)
        memory = () if past is None else (past, slot_BL)
        rotations = (rotation_BL1K, rotation_BL1K)
        x_BLD, past = blocks(x_BLD, layers, condition_B1C, rotations, attend, keys_B, *memory)
        shift, scale = _modulation(net, 2, condition_B1C)
        return Norm(net.norm_bias, name="norm")(x_BLD, shift, scale).astype(net.dtype), past


class _Block(nn.Module):
    """One layer: attention and an MLP, each added to the residual stream as a branch.

    A branch is norm, modulation, layers, dropout and gate. The gate and the modulation come from
    the condition; without a condition there are none. ``rotations`` are the rotary phases of the
    queries and of the keys. ``past`` are the layer's keys and values in a memory, [B, S, H, K]
    each: the rows are written to them, and they replace the rows' own.
    """

    net: DDiT

    @nn.compact
    def __call__(
        self,
        x_BLD,
        layer,
        condition_B1C,
        rotations,
        attend,
        keys_B,
        past=None,
        slot_BL=None,
    ):
        net = self.net
        width = x_BLD.shape[-1]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = _modulation(net, 6, condition_B1C)

        def add(x_BLD, branch_BLD, gate_B1D, branch):
            """x plus a branch after dropout and gate; ``branch``, 0 or 1, selects the noise."""
            if keys_B is not None and net.dropout > 0:
                branch_BLD = drop(branch_BLD, keys_B, 2 * layer + branch, net.dropout)
            branch_BLD = branch_BLD.astype(jnp.float32)
            if gate_B1D is not None:
                branch_BLD = gate_B1D * keep(branch_BLD)
            return x_BLD + branch_BLD

        h_BLD = _gathered(Norm, jnp.float32)(net.norm_bias, name="norm_attention")(
            x_BLD, shift_a, scale_a
        )
        qkv_BLD = dense(net, 3 * width, width, "qkv", bias=False)(h_BLD)
        q_BLHK, k_BLHK, v_BLHK = rearrange(
            qkv_BLD, "b l (three h k) -> three b l h k", three=3, h=net.num_heads
        )
        q_BLHK, k_BLHK = map(rotate, (q_BLHK, k_BLHK), rotations)
        q_BLHK, k_BLHK, v_BLHK = keep(q_BLHK), keep(k_BLHK), keep(v_BLHK)
        if past is not None:
            k_BLHK, v_BLHK = (
                _put(slots, slot_BL, rows)
                for slots, rows in zip(past, (k_BLHK, v_BLHK), strict=True)
            )
            past = (k_BLHK, v_BLHK)
        elif attend is not None:
            keys = attend.num_keys(k_BLHK.shape[1])
            k_BLHK, v_BLHK = k_BLHK[:, :keys], v_BLHK[:, :keys]
        h_BLHK = attention(q_BLHK, k_BLHK, v_BLHK, attend, backend=net.attention)
        h_BLD = rearrange(h_BLHK, "b l h k -> b l (h k)")
        h_BLD = dense(net, width, width, "attention_out", bias=False)(h_BLD)
        x_BLD = keep(add(x_BLD, h_BLD, gate_a, 0))

        h_BLD = _gathered(Norm, jnp.float32)(net.norm_bias, name="norm_mlp")(
            x_BLD, shift_m, scale_m
        )
        h_BLF = keep(dense(net, net.mlp_ratio * width, width, "mlp_in")(h_BLD))
        h_BLF = jax.nn.gelu(h_BLF, approximate=True)
        h_BLD = dense(net, width, net.mlp_ratio * width, "mlp_out")(h_BLF)
        return add(x_BLD, h_BLD, gate_m, 1), past


def scanned_blocks(net: DDiT, num_layers: int, *, memory: bool = False) -> nn.Module:
    """Blocks in a row as one scan, named ``blocks``; their parameters have a leading layer axis.

    Called with x, the number of each layer (for its dropout) and the other arguments of ``_Block``,
    it returns (x, None). With ``memory`` the last two arguments are ``past`` and ``slot_BL`` of
    ``_Trunk``, and it returns (x, past).
    """
    # prevent_cse guards the recomputation from being merged with the forward pass; inside a
    # scan the compiler cannot merge them anyway.
    block = nn.remat(_Block, prevent_cse=False, policy=None if net.remat else is_kept)
    blocks = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, *[nn.broadcast] * 4, *((1, nn.broadcast) if memory else ())),  # pyright: ignore
        out_axes=1,
        length=num_layers,
    )
    return blocks(net, name="blocks")


def _put(slots: Array, slot_BM, rows: Array) -> Array:
    """Write rows [B, M, …] to their slots [B, S, …]; a slot that is out of range is dropped."""
    sequence_B1 = jnp.arange(len(rows))[:, None]
    return slots.at[sequence_B1, slot_BM].set(rows, mode="drop")


class Norm(nn.Module):
    """Layer normalisation in float32, followed by the modulation x·(1 + scale) + shift if given."""

    use_bias: bool

    @nn.compact
    def __call__(self, x_BLD, shift_B1D, scale_B1D):
        width = x_BLD.shape[-1:]
        weight_D = self.param("scale", nn.initializers.ones, width, jnp.float32)
        bias_D = None
        if self.use_bias:  # initialised to ones, as in RADD's code
            bias_D = self.param("bias", nn.initializers.ones, width, jnp.float32)
        x_BLD = x_BLD - x_BLD.mean(axis=-1, keepdims=True)
        variance_BL1 = jnp.square(x_BLD).mean(axis=-1, keepdims=True)
        x_BLD = x_BLD * jax.lax.rsqrt(variance_BL1 + NORM_EPSILON) * weight_D[None, None]
        if bias_D is not None:
            x_BLD = x_BLD + bias_D[None, None]
        if shift_B1D is not None:
            x_BLD = x_BLD * (1 + scale_B1D) + shift_B1D
        return x_BLD


class _SigmaMap(nn.Module):
    """The condition: an MLP of sinusoids of σ, [B] to [B, C], with SiLU after both layers."""

    width: int

    @nn.compact
    def __call__(self, sigma_B):
        features_BF = sigma_features(sigma_B)
        for name, fan_in in (("in", 2 * SIGMA_FREQUENCIES), ("out", self.width)):
            init = _uniform(fan_in)
            layer = nn.Dense(self.width, kernel_init=init, bias_init=init, name=name)
            features_BF = nn.silu(layer(features_BF))
        return features_BF


def sigma_features(sigma_B: Float[Array, "*b"]) -> Float[Array, "*b F"]:
    """Sinusoids of the total noise: cos, then sin, of σ·10⁴^(-k/128) for k = 0..127.

    As in the published code, σ itself is the phase, not its logarithm. ``sigma_B`` is [B] or
    [B, L], and the result is [B, 256] or [B, L, 256].
    """
    k_F = jnp.arange(SIGMA_FREQUENCIES, dtype=jnp.float32)
    frequency_F = jnp.exp(-jnp.log(1e4) * k_F / SIGMA_FREQUENCIES)
    phase_BF = jnp.expand_dims(sigma_B, -1) * frequency_F.reshape((1,) * sigma_B.ndim + (-1,))
    return jnp.concatenate([jnp.cos(phase_BF), jnp.sin(phase_BF)], axis=-1)


def rotary(
    positions_BL: Int[Array, "B L"], head_dim: int
) -> tuple[Float[Array, "B L 1 F"], Float[Array, "B L 1 F"]]:
    """Rotary phases: cos and sin of position·10⁴^(-2k/K) for each channel k = 0..K/2-1, float32.

    ``head_dim`` is K. Channel k is rotated together with channel k + K/2. arXiv:2104.09864.
    """
    k_F = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    phase_BLF = positions_BL.astype(jnp.float32)[:, :, None] * (ROTARY_BASE**-k_F)[None, None]
    return jnp.cos(phase_BLF)[:, :, None], jnp.sin(phase_BLF)[:, :, None]


def rotate(x_BLHK: Float[Array, "B L H K"], rotation_BL1K) -> Float[Array, "B L H K"]:
    """Rotate queries or keys by the phases of ``rotary``, in float32; the type is unchanged."""
    cos, sin = rotation_BL1K
    first, second = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BLHK.dtype)


def drop(
    x_BLD: Float[Array, "B L D"], keys_B: Key[Array, " B"], index: Int[Array, ""], rate: float
) -> Float[Array, "B L D"]:
    """Inverted dropout with a key for each example.

    The entries that an example loses depend neither on the rest of the batch nor on the number of
    devices.

    Args:
        x_BLD: values.
        keys_B: a key for each example.
        index: number of this dropout in the network, folded into the keys.
        rate: probability of dropping an entry, in [0, 1).
    """

    def one(key, x_LD):
        keeps_LD = jax.random.bernoulli(jax.random.fold_in(key, index), 1 - rate, x_LD.shape)
        return jnp.where(keep(keeps_LD), x_LD / (1 - rate), 0)

    return jax.vmap(one)(keys_B, x_BLD)


def _uniform(fan_in: int):
    """Initialiser U(-1/√fan_in, 1/√fan_in): PyTorch's for linear layers, SEDD's for embeddings."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def dense(net: DDiT, features: int, fan_in: int, name: str, *, bias: bool = True) -> nn.Dense:
    """A linear layer of a block in the compute type, gathered where it is used."""
    init = _uniform(fan_in)
    return _gathered(nn.Dense, net.dtype)(
        features,
        use_bias=bias,
        dtype=net.dtype,
        kernel_init=init,
        bias_init=init,
        dot_general=_flat_product,
        name=name,
    )


def _flat_product(x_BLD, kernel_DF, dimensions, **kwargs):
    """``lax.dot_general`` with the batch axes joined, [B·L, D] by [D, F].

    The gradient of the product of [B, L, D] takes a fifth longer on XLA's CPU backend.
    """
    del dimensions  # a dense layer always contracts the last axis of x and the first of the kernel
    product_MF = jax.lax.dot(x_BLD.reshape(-1, x_BLD.shape[-1]), kernel_DF, **kwargs)
    return product_MF.reshape(*x_BLD.shape[:-1], -1)


def _gathered(layer: type[nn.Module], dtype) -> Any:
    """A layer whose sharded parameters are gathered in ``dtype`` when it is called.

    The policy ``is_kept`` does not store the gathered arrays, so that the backward pass gathers
    them again. Stored for all layers, they would be the whole model on every device.
    """

    def apply(variables):
        return whole(variables, dtype)

    return nn.map_variables(layer, "params", trans_in_fn=apply, init=True)


def _modulation(net: DDiT, count: int, condition_B1C: Array | None) -> list:
    """``count`` shifts, scales and gates, linear in the condition; ``None`` without a condition.

    Their shape is [B, 1, D], or [B, L, D] with a noise level for each position. The weights are 0
    in a fresh network (adaLN-zero), in which every branch is therefore gated to 0.
    """
    if condition_B1C is None:
        return [None] * count
    zeros = nn.initializers.zeros
    dense = _gathered(nn.Dense, jnp.float32)
    layer = dense(count * net.hidden_dim, kernel_init=zeros, bias_init=zeros, name="modulation")
    return jnp.split(layer(condition_B1C), count, axis=-1)


make = DDiT
