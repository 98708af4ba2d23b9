"""The diffusion transformer of SEDD and RADD.

SEDD's network (arXiv:2310.16834) conditions every block on the noise level by adaLN-zero (DiT,
arXiv:2212.09748). RADD's (arXiv:2406.03736) is the same transformer without a time input. Both have
bidirectional attention, rotary positions (arXiv:2104.09864) and an output layer that is not tied to
the embedding.

The residual stream, the norms, the modulation and the rotary phases are float32. Matrix products
and attention are computed in the compute type. The published code does the same under autocast.

Suffixes: ``C`` channels of the condition, ``F`` features; the others as in ``sedd.types``.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from sedd.errors import FieldError
from sedd.networks.attention import keep
from sedd.networks.blocks import Transformer, attend_rows, dense, gathered, scanned, uniform
from sedd.networks.rotary import rotary
from sedd.networks.shard import whole
from sedd.types import Array, Float, Int, Key, Params

NORM_EPSILON = 1e-5  # PyTorch's; Flax's default is 1e-6
SIGMA_FREQUENCIES = 128


@dataclass(frozen=True, kw_only=True)
class DDiT(Transformer):
    """A bidirectional transformer, conditioned on σ by adaLN-zero if ``time_conditioned``.

    The defaults are SEDD-small, with 169,627,218 parameters at V = 50258. SEDD-medium has
    ``hidden_dim`` 1024, 24 layers and 16 heads. RADD is ``time_conditioned=False, norm_bias=True,
    dropout=0.02``.

    Parameters are ``{"trunk": …, "head": {"kernel", "bias"}}`` in float32, with kernels
    ``[in, out]``. Parameters of the blocks have a leading axis of length ``num_layers``.

    Raises ``ValueError`` if a field is out of its range (``FieldError``) or does not fit another.
    """

    linear_layers = ("qkv", "attention_out", "mlp_in", "mlp_out")

    hidden_dim: int = 768
    """Width D of the hidden states; a multiple of twice num_heads."""
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

    def __post_init__(self):
        super().__post_init__()
        self._at_least(1, "condition_dim", "mlp_ratio")
        if self.hidden_dim % (2 * self.num_heads):
            raise FieldError(
                "hidden_dim",
                "must be a positive multiple of 2·num_heads (rotary positions pair the "
                f"channels of a head), got {self.hidden_dim} with {self.num_heads} heads",
            )
        if not 0 <= self.dropout < 1:
            raise FieldError("dropout", f"must be in [0, 1), got {self.dropout}")

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.hidden_dim // self.num_heads

    @property
    def key_shape(self) -> tuple[int, int]:
        """Heads and channels of the keys of a row."""
        return self.num_heads, self.head_dim

    def trunk(self) -> nn.Module:
        """The module of embedding, blocks and final norm; see ``Transformer.trunk``."""
        return _Trunk(self)

    def fresh_head(self) -> Params:
        """An output layer of zeros: the raw output of a fresh network is 0 everywhere."""
        kernel_DV = jnp.zeros((self.hidden_dim, self.num_states), jnp.float32)
        return {"head": {"kernel": kernel_DV, "bias": jnp.zeros(self.num_states, jnp.float32)}}

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


class _Trunk(nn.Module):
    """The network without its output layer: embedding, blocks and final norm."""

    net: DDiT

    @nn.compact
    def __call__(
        self, tokens_BL, positions_BL, attend, sigma_B, keys_B, past, slot_BL, added_BLD=None
    ):
        net = self.net
        embed = nn.Embed(
            net.num_states, net.hidden_dim, embedding_init=uniform(net.hidden_dim), name="embed"
        )
        x_BLD = embed(tokens_BL)
        if added_BLD is not None:
            x_BLD = x_BLD + added_BLD
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

        h_BLD = gathered(Norm, jnp.float32)(net.norm_bias, name="norm_attention")(
            x_BLD, shift_a, scale_a
        )
        qkv_BLD = dense(net, 3 * width, width, "qkv", bias=False)(h_BLD)
        q_BLHK, k_BLHK, v_BLHK = rearrange(
            qkv_BLD, "b l (three h k) -> three b l h k", three=3, h=net.num_heads
        )
        h_BLD, past = attend_rows(
            q_BLHK, k_BLHK, v_BLHK, rotations, attend, past, slot_BL, backend=net.attention
        )
        h_BLD = dense(net, width, width, "attention_out", bias=False)(h_BLD)
        x_BLD = keep(add(x_BLD, h_BLD, gate_a, 0))

        h_BLD = gathered(Norm, jnp.float32)(net.norm_bias, name="norm_mlp")(x_BLD, shift_m, scale_m)
        h_BLF = keep(dense(net, net.mlp_ratio * width, width, "mlp_in")(h_BLD))
        h_BLF = jax.nn.gelu(h_BLF, approximate=True)
        h_BLD = dense(net, width, net.mlp_ratio * width, "mlp_out")(h_BLF)
        return add(x_BLD, h_BLD, gate_m, 1), past


def scanned_blocks(net: DDiT, num_layers: int, *, memory: bool = False) -> nn.Module:
    """Blocks in a row, as ``scanned`` makes them.

    Called with x, the number of each layer (for its dropout) and the other arguments of ``_Block``.
    """
    return scanned(_Block, net, num_layers, (0, *[nn.broadcast] * 4), memory=memory)


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
            init = uniform(fan_in)
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


def _modulation(net: DDiT, count: int, condition_B1C: Array | None) -> list:
    """``count`` shifts, scales and gates, linear in the condition; ``None`` without a condition.

    Their shape is [B, 1, D], or [B, L, D] with a noise level for each position. The weights are 0
    in a fresh network (adaLN-zero), in which every branch is therefore gated to 0.
    """
    if condition_B1C is None:
        return [None] * count
    zeros = nn.initializers.zeros
    linear = gathered(nn.Dense, jnp.float32)
    layer = linear(count * net.hidden_dim, kernel_init=zeros, bias_init=zeros, name="modulation")
    return jnp.split(layer(condition_B1C), count, axis=-1)


make = DDiT
