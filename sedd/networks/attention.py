"""Softmax attention by four backends, and the rule that chooses one.

- ``einsum``: written out here, with a backward pass that recomputes the weights; for CPUs;
- ``xla``: ``jax.nn.dot_product_attention`` compiled by XLA; works everywhere;
- ``cudnn``: the fused kernel of NVIDIA's cuDNN, through the same function;
- ``splash``: JAX's Pallas kernel for TPUs.

Tests on a CPU run ``einsum``, ``xla`` and, in interpret mode, ``splash``. The cuDNN call needs a
GPU, and the compiled splash kernel a TPU.

Keys and values may have fewer heads than queries (grouped-query attention, arXiv:2305.13245): each
of the G heads then serves H / G neighbouring heads of the queries. No backend repeats them in
memory.

Suffixes: ``H`` heads of the queries, ``G`` heads of keys and values, ``K`` channels of a head,
``S`` keys where their number differs from that of the queries, ``L``; the others as in
``sedd.types``.
"""

from dataclasses import replace
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sedd.errors import UserError
from sedd.networks.base import Attend
from sedd.types import Array, Bool, Float

Backend = Literal["auto", "einsum", "xla", "cudnn", "splash"]
BACKENDS: tuple[str, ...] = get_args(Backend)

LANES = 128  # splash tiles the sequence in multiples of the TPU's vector width
MASKED = -1e30  # finite: a row of -inf would make the softmax and its gradient nan

# ``keep`` marks a value that the forward pass stores for the backward pass. Under the policy
# ``is_kept`` every other value inside ``jax.checkpoint`` is computed again.
KEPT = "kept"
keep = partial(checkpoint_name, name=KEPT)
_is_marked = jax.checkpoint_policies.save_only_these_names(KEPT)


def is_kept(primitive, *inputs, **params) -> bool:
    """A policy of ``jax.checkpoint``: store values marked by ``keep``, and cuDNN's outputs.

    cuDNN's own backward kernel needs the output and the softmax statistics of its forward kernel.
    """
    by_cudnn = primitive.name.startswith("dot_product_attention_fwd")
    return by_cudnn or _is_marked(primitive, *inputs, **params)


def attention(
    q_BLHK: Float[Array, "B L H K"],
    k_BSGK: Float[Array, "B S G K"],
    v_BSGK: Float[Array, "B S G K"],
    attend: Attend | None = None,
    *,
    backend: str = "auto",
) -> Float[Array, "B L H K"]:
    """softmax(q·k / √K)·v over the keys that each query sees.

    The softmax is computed in float32, and the result has the type of the inputs. A query that sees
    no key has output 0 and gradient 0.

    Args:
        q_BLHK: queries.
        k_BSGK: keys; there may be more or fewer keys than queries. Their number of heads, G,
            divides that of the queries.
        v_BSGK: values, as many as keys.
        attend: which queries see which keys; None lets all see all.
        backend: one of ``BACKENDS``; see ``choose`` for "auto".

    Raises:
        ValueError: if ``backend`` is unknown, or named although ``refusal`` excludes it.

    XLA's partitioner cannot split the splash kernel: under ``jit`` with sharded arguments it must
    be called inside ``shard_map``. Under ``pmap`` nothing is needed.
    """
    chosen = choose(backend, q_BLHK, attend)
    if chosen == "splash":
        return _splash(q_BLHK, k_BSGK, v_BSGK, attend)
    batch, queries, keys = *q_BLHK.shape[:2], k_BSGK.shape[1]
    if chosen == "einsum":
        mask_B1LS = _mask(attend, queries, keys)
        out_BLHK = _einsum(q_BLHK, k_BSGK, v_BSGK, mask_B1LS)
    else:
        causal = False
        if attend is not None and attend.kind == "causal":  # the backend's own causal kernel
            causal, attend = True, replace(attend, kind="all")
        mask_B1LS = _mask(attend, queries, keys)
        if mask_B1LS is not None:  # cuDNN takes no broadcast batch axis
            mask_B1LS = jnp.broadcast_to(mask_B1LS, (batch, 1, queries, keys))
        out_BLHK = jax.nn.dot_product_attention(
            q_BLHK,
            k_BSGK,
            v_BSGK,
            mask=mask_B1LS,
            is_causal=causal,
            implementation="cudnn" if chosen == "cudnn" else "xla",
        )
    if attend is None or attend.kind != "ranks" or mask_B1LS is None:
        return out_BLHK  # every query sees at least itself
    # Ranks may leave a query without a key. Its softmax is then uniform over the masked keys.
    sees_BL = mask_B1LS.any(axis=-1)[:, 0]
    return jnp.where(sees_BL[:, :, None, None], out_BLHK, 0)


def choose(
    backend: str, q_BLHK: Array, attend: Attend | None, *, platform: str | None = None
) -> str:
    """Choose the backend while tracing: einsum, xla, cudnn or splash.

    "auto" is einsum on a CPU, where it is 2-4 times faster than XLA's path; cudnn on an NVIDIA GPU
    of compute capability 8.0 or more; splash on a TPU; and xla elsewhere, and wherever ``refusal``
    excludes cudnn or splash.

    Args:
        backend: "auto", or a backend to use as it is.
        q_BLHK: queries; their shape and type decide what a kernel supports.
        attend: which queries see which keys.
        platform: platform that runs the program; by default that of JAX's default device. Programs
            for another platform should name the backend.

    Raises:
        ValueError: for an unknown backend, or a named one that ``refusal`` excludes.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend != "auto":
        reason = refusal(backend, q_BLHK, attend)
        if reason is not None:
            raise UserError(f"attention {backend!r} {reason}; 'auto' falls back by itself")
        return backend
    platform = platform or jax.default_backend()
    if platform == "cpu":
        return "einsum"
    wanted = {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}.get(platform, "xla")
    if wanted == "cudnn" and not _flash_capable(jax.devices()[0]):
        return "xla"
    return "xla" if refusal(wanted, q_BLHK, attend) else wanted


def refusal(backend: str, q_BLHK: Array, attend: Attend | None) -> str | None:
    """Return the reason why ``backend`` cannot compute this attention; None if it can.

    cuDNN supports every ``Attend``: kind ``causal`` by its own kernel, ranks and segments by an
    additive mask, which needs an even length. Splash supports the kinds ``all`` and ``causal``,
    with or without segments. It does not support ranks, because its mask is fixed when the kernel
    is built, and ranks are known only when the program runs.
    """
    length, width = q_BLHK.shape[1], q_BLHK.shape[3]
    if backend == "cudnn":
        if q_BLHK.dtype not in (jnp.bfloat16, jnp.float16):
            return f"needs bfloat16 or float16, got {q_BLHK.dtype}"
        if width % 8 or width > 128:
            return f"needs a head width that is a multiple of 8, at most 128, got {width}"
        masked = attend is not None and (attend.kind == "ranks" or attend.segment_BL is not None)
        keys = length if attend is None else attend.num_keys(length)
        if masked and (length % 2 or keys % 2):
            return f"needs an even length under a mask, got {length}, with {keys} keys"
    if backend == "splash":
        if length % LANES:
            return f"needs a length that is a multiple of {LANES}, got {length}"
        if attend is not None and attend.kind == "ranks":
            return "takes segments, not ranks"
    return None


def _mask(attend: Attend | None, queries: int, keys: int) -> Bool[Array, "B 1 L S"] | None:
    """The attention mask; None if every query sees every key."""
    if attend is None or (attend.kind == "all" and attend.segment_BL is None):
        return None
    return attend.mask(queries, keys)


def _flash_capable(device) -> bool:
    """Whether cuDNN's fused attention runs on ``device``: an NVIDIA GPU, Ampere or newer."""
    if "cuda" not in device.client.platform_version.lower():
        return False
    return int(str(device.compute_capability).split(".")[0]) >= 8


def _einsum(q_BLHK: Array, k_BSGK: Array, v_BSGK: Array, mask_B1LS: Bool[Array, "..."] | None):
    """Attention by two batched matrix products, with few stored values.

    The softmax is divided by its sum after the product with v instead of before. The backward pass
    recomputes the weights from three stored values: the largest logit, the sum and the unnormalised
    output of each query. One product and an exponential take less time than writing the [L, S]
    weights to memory and reading them again.
    """
    # Heads before positions: on a CPU, XLA multiplies contiguous [L, K] matrices up to 3 times
    # faster than matrices whose rows are not adjacent. The queries of all heads that share a head
    # of keys are the M rows of one matrix.
    q_BHLK, k_BGSK, v_BGSK = (jnp.swapaxes(x, 1, 2) for x in (q_BLHK, k_BSGK, v_BSGK))
    batch, _, length, width = q_BHLK.shape
    groups, keys = k_BGSK.shape[1:3]
    q_BGMK = q_BHLK.reshape(batch, groups, -1, width)
    product = partial(jnp.matmul, preferred_element_type=jnp.float32)
    logits_BGMS = product(q_BGMK, k_BGSK.mT)
    if mask_B1LS is not None:
        by_head = logits_BGMS.reshape(batch, groups, -1, length, keys)
        logits_BGMS = jnp.where(mask_B1LS[:, :, None], by_head, MASKED).reshape(logits_BGMS.shape)
    # The output does not depend on the subtracted maximum, so that it needs no gradient.
    largest_BGM1 = keep(jax.lax.stop_gradient(logits_BGMS.max(axis=-1, keepdims=True)))
    weight_BGMS = jnp.exp((logits_BGMS - largest_BGM1) * width**-0.5)
    total_BGM1 = keep(weight_BGMS.sum(axis=-1, keepdims=True))
    sum_BGMK = keep(product(weight_BGMS.astype(v_BGSK.dtype), v_BGSK))
    out_BHLK = (sum_BGMK / total_BGM1).reshape(q_BHLK.shape)
    return jnp.swapaxes(out_BHLK, 1, 2).astype(v_BGSK.dtype)


def _splash(
    q_BLHK: Array, k_BSGK: Array, v_BSGK: Array, attend: Attend | None, *, interpret: bool = False
) -> Array:
    """JAX's TPU kernel under ``vmap`` over sequences; ``interpret`` runs it on any platform.

    The kernel for several heads of keys (``mha``) takes fewer of them than heads of queries.
    """
    # Imported here because only TPU runs need Pallas.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    batch, length, num_heads, width = q_BLHK.shape
    shape = splash.CausalMask if attend and attend.kind == "causal" else splash.FullMask
    block = next(size for size in (512, 256, LANES) if length % size == 0)
    kernel = splash.make_splash_mha_single_device(
        mask=splash.MultiHeadMask([shape((length, length))] * num_heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )
    # The kernel does not scale by 1/√K, which bfloat16 may not represent exactly: float32.
    q_BLHK = (q_BLHK.astype(jnp.float32) * width**-0.5).astype(q_BLHK.dtype)
    q_BHLK, k_BGSK, v_BGSK = (jnp.swapaxes(x, 1, 2) for x in (q_BLHK, k_BSGK, v_BSGK))
    segments = None
    if attend is not None and attend.segment_BL is not None:
        segment_BL = jnp.broadcast_to(attend.segment_BL, (batch, length)).astype(jnp.int32)
        segments = splash.SegmentIds(q=segment_BL, kv=segment_BL)
    out_BHLK = jax.vmap(kernel)(q_BHLK, k_BGSK, v_BGSK, segments)
    return jnp.swapaxes(out_BHLK, 1, 2).astype(v_BSGK.dtype)  # pyright: ignore
