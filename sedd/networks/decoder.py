"""The decoder of Llama, Qwen and the diffusion models that are built on them.

Blocks of RMSNorm, grouped-query attention with rotary positions, and a SwiGLU MLP (Llama 2,
arXiv:2307.09288). The options cover what published models add: a bias of queries, keys and values
(Qwen2), norms of queries and keys (Qwen3, arXiv:2505.09388), an output layer tied to the embedding,
and scaled rotary frequencies. Which positions see which is decided by ``Attend``: the same network
is autoregressive under causal attention, and a diffusion model under full attention, as LLaDA
(arXiv:2502.09992) is. It takes no noise level and has no dropout.

The residual stream, the mean squares of the norms and the rotary phases are float32. All other
products and the attention are computed in the compute type.

Suffixes: ``F`` channels of the MLP's hidden layer; the others as in ``sedd.types`` and
``sedd.networks.blocks``.
"""

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from sedd.errors import FieldError
from sedd.networks.attention import keep
from sedd.networks.blocks import Dtype, Transformer, attend_rows, dense, gathered, scanned, uniform
from sedd.networks.rotary import RopeScaling, scaled_rotary
from sedd.networks.shard import whole
from sedd.types import Array, Float, Params

MLP_MULTIPLE = 64  # a default width of the MLP is a multiple of this


@dataclass(frozen=True, kw_only=True)
class Decoder(Transformer):
    """A pre-norm transformer with RMSNorm, SwiGLU and grouped-query attention.

    The defaults have the size of GPT-2 small. Widths that are 0 are replaced by the values that
    they stand for, so that a ``Decoder`` has the true ones.

    Parameters are ``{"trunk": {"embed", "blocks", "norm"}, "head": {"kernel"}}`` in
    ``param_dtype``; a ``tied`` network has no ``head``. The layers of a block are
    ``norm_attention``, ``query``, ``key``, ``value``, ``norm_query`` and ``norm_key`` (with
    ``qk_norm``), ``attention_out``, ``norm_mlp``, ``mlp_gate``, ``mlp_up`` and ``mlp_down``. A norm
    has a ``scale``, a linear layer a ``kernel`` [layers, in, out] and possibly a ``bias``.

    Raises ``ValueError`` if a field is out of its range (``FieldError``) or does not fit another,
    or if the network is to be ``time_conditioned``.
    """

    linear_layers = (
        *("query", "key", "value", "attention_out"),
        *("mlp_gate", "mlp_up", "mlp_down"),
    )

    num_kv_heads: int = 0
    """Heads of keys and values, each shared by num_heads / num_kv_heads heads of the queries; 0 for
    num_heads."""
    head_dim: int = 0
    """Channels of a head, an even number; 0 for hidden_dim / num_heads."""
    mlp_dim: int = 0
    """Width of the MLP's hidden layer; 0 for 8/3 of hidden_dim, rounded up to a multiple of 64."""
    norm_eps: float = 1e-5
    """Added to the mean square in the norms."""
    rope_theta: float = 1e4
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling = RopeScaling()
    """Scaling of the rotary frequencies for long texts."""
    qkv_bias: bool = False
    """Whether queries, keys and values have a bias, as Qwen2's have."""
    output_bias: bool = False
    """Whether the output of the attention has a bias."""
    qk_norm: bool = False
    """Whether each head of queries and keys is normed before the rotation, as Qwen3's are."""
    embed_norm: bool = False
    """Whether each embedding is divided by its root mean square before the first block."""
    tied: bool = False
    """Whether the output layer is the transposed embedding, without parameters of its own."""
    spare_rows: int = 0
    """Rows of the embedding and of the output layer after those of the states, as published
    vocabularies have them, which no token uses."""
    param_dtype: Dtype = "float32"
    """Type of the parameters. Those that are trained must be float32; bfloat16 halves the memory of
    a large model that is not trained, or of which only adapters are."""

    def __post_init__(self):
        if self.time_conditioned:
            raise ValueError(
                "takes no noise level: it needs a time-independent parameterization (conditional, "
                "autoregressive or any_subset)"
            )
        self._at_least(1, "hidden_dim", "num_heads")
        self._at_least(0, "num_kv_heads", "head_dim", "mlp_dim", "spare_rows")
        if not self.head_dim and self.hidden_dim % self.num_heads:
            raise FieldError(
                "hidden_dim",
                f"must be a multiple of num_heads where head_dim is 0, got {self.hidden_dim} with "
                f"{self.num_heads} heads",
            )
        for name, stands_for in (
            ("num_kv_heads", self.num_heads),
            ("head_dim", self.hidden_dim // self.num_heads),
            ("mlp_dim", -(-8 * self.hidden_dim // (3 * MLP_MULTIPLE)) * MLP_MULTIPLE),
        ):
            object.__setattr__(self, name, getattr(self, name) or stands_for)
        super().__post_init__()
        if self.num_heads % self.num_kv_heads:
            raise FieldError(
                "num_kv_heads",
                f"must divide num_heads, got {self.num_kv_heads} with {self.num_heads} heads",
            )
        if self.head_dim % 2:
            raise FieldError(
                "head_dim",
                f"must be even (rotary positions pair the channels of a head), got {self.head_dim}",
            )
        for name in ("norm_eps", "rope_theta"):
            if getattr(self, name) <= 0:
                raise FieldError(name, f"must be above 0, got {getattr(self, name)}")
        self._one_of("param_dtype", Dtype)

    @property
    def num_rows(self) -> int:
        """Rows of the embedding: those of the states, and the spare ones."""
        return self.num_states + self.spare_rows

    @property
    def key_shape(self) -> tuple[int, int]:
        """Heads and channels of the keys of a row."""
        return self.num_kv_heads, self.head_dim

    def trunk(self) -> nn.Module:
        """The module of embedding, blocks and final norm; see ``Transformer.trunk``."""
        return _Trunk(self)

    def fresh_head(self) -> Params:
        """An output layer of zeros: the raw output of a fresh network is 0, unless it is tied."""
        if self.tied:
            return {}
        return {"head": {"kernel": jnp.zeros((self.hidden_dim, self.num_rows), self.param_dtype)}}

    def head(self, params: Params) -> tuple[Float[Array, "D V"], Float[Array, " V"]]:
        """The matrix of the output layer, and a bias of zeros: arguments of ``read_out``."""
        if self.tied:
            kernel_DV = whole(params["trunk"]["embed"]["embedding"]).T
        else:
            kernel_DV = whole(params["head"]["kernel"])
        return kernel_DV, jnp.zeros(self.num_rows, jnp.float32)

    def flops(self, length: int, read: float) -> float:
        """Count the FLOPs of the forward pass of one sequence; arguments as of ``Network.flops``.

        A matrix of w weights counts 2·w for each row. The two products of the attention count
        4·L·num_heads·head_dim for each row and layer. Norms, rotations, activations and the softmax
        do not count. Causal attention counts like full attention.
        """
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        weights = self.hidden_dim * (2 * queries + 2 * keys + 3 * self.mlp_dim)
        rows = length * self.num_layers * (2 * weights + 4 * length * queries)
        return float(rows + 2 * read * self.hidden_dim * self.num_rows)


class _Trunk(nn.Module):
    """The network without its output layer: embedding, blocks and final norm."""

    net: Decoder

    @nn.compact
    def __call__(self, tokens_BL, positions_BL, attend, sigma_B, keys_B, past, slot_BL):
        del sigma_B, keys_B  # there is neither a noise level nor dropout
        net = self.net
        embed = nn.Embed(
            net.num_rows,
            net.hidden_dim,
            embedding_init=uniform(net.hidden_dim),
            param_dtype=net.param_dtype,
            name="embed",
        )
        x_BLD = embed(tokens_BL).astype(jnp.float32)
        if net.embed_norm:
            x_BLD = of_unit_size(x_BLD, net.norm_eps)
        rotations = scaled_rotary(positions_BL, net.head_dim, net.rope_theta, net.rope_scaling)
        memory = () if past is None else (past, slot_BL)
        blocks = scanned(
            _Block, net, net.num_layers, (nn.broadcast, nn.broadcast), memory=bool(memory)
        )
        x_BLD, past = blocks(x_BLD, rotations, attend, *memory)
        return _RMSNorm(net, name="norm")(x_BLD), past


class _Block(nn.Module):
    """One layer: attention and an MLP, each of the normed residual stream and added to it.

    The arguments are those of ``sedd.networks.blocks.attend_rows``.
    """

    net: Decoder

    @nn.compact
    def __call__(self, x_BLD, rotations, attend, past=None, slot_BL=None):
        net, width = self.net, self.net.hidden_dim
        linear = partial(dense, net, param_dtype=net.param_dtype)
        norm = partial(gathered(_RMSNorm, net.dtype), net)

        h_BLD = norm(name="norm_attention")(x_BLD)
        q_BLHK, k_BLGK, v_BLGK = (
            linear(heads * net.head_dim, width, name, bias=net.qkv_bias)(h_BLD).reshape(
                *h_BLD.shape[:2], heads, net.head_dim
            )
            for name, heads in (
                ("query", net.num_heads),
                ("key", net.num_kv_heads),
                ("value", net.num_kv_heads),
            )
        )
        if net.qk_norm:
            q_BLHK, k_BLGK = norm(name="norm_query")(q_BLHK), norm(name="norm_key")(k_BLGK)
        h_BLD, past = attend_rows(
            q_BLHK, k_BLGK, v_BLGK, rotations, attend, past, slot_BL, backend=net.attention
        )
        h_BLD = linear(width, h_BLD.shape[-1], "attention_out", bias=net.output_bias)(h_BLD)
        x_BLD = keep(x_BLD + h_BLD.astype(jnp.float32))

        h_BLD = norm(name="norm_mlp")(x_BLD)
        gate_BLF = keep(linear(net.mlp_dim, width, "mlp_gate", bias=False)(h_BLD))
        up_BLF = keep(linear(net.mlp_dim, width, "mlp_up", bias=False)(h_BLD))
        h_BLF = jax.nn.silu(gate_BLF) * up_BLF
        h_BLD = linear(width, net.mlp_dim, "mlp_down", bias=False)(h_BLF)
        return x_BLD + h_BLD.astype(jnp.float32), past


class _RMSNorm(nn.Module):
    """Divide by the root mean square of the last axis in float32, then multiply by a weight.

    The weight multiplies, as in the published models, after the cast to the compute type.
    """

    net: Decoder

    @nn.compact
    def __call__(self, x):
        net = self.net
        weight = self.param("scale", nn.initializers.ones, x.shape[-1:], net.param_dtype)
        x = of_unit_size(x.astype(jnp.float32), net.norm_eps).astype(net.dtype)
        return x * weight.astype(net.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def of_unit_size(x: Array, eps: float) -> Array:
    """Divide each vector along the last axis by the root of its mean square plus ``eps``."""
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + eps)


make = Decoder
