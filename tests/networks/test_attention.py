import dataclasses
import functools
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import nightly

from sedd.denoiser import Denoiser
from sedd.networks import attention as module
from sedd.networks.attention import attention, choose, is_kept, keep
from sedd.networks.base import EMPTY, Attend
from sedd.networks.ddit import DDiT
from sedd.networks.decoder import Decoder
from sedd.parameterizations import Autoregressive, Block, Conditional
from sedd.processes import Absorbing

B, L, H, K = 3, 12, 2, 8
ORDER = np.tile(np.arange(L, dtype=np.int32), (B, 1))
SHUFFLED = np.random.default_rng(0).permuted(ORDER, axis=1)
SEGMENT = np.sort(np.random.default_rng(1).integers(0, 3, (B, L)).astype(np.int32), axis=1)
FORMS = {
    "everything": None,
    "nothing stated": Attend(),
    "causal": Attend(kind="causal"),
    "permuted": Attend(kind="ranks", rank_q_BL=SHUFFLED, rank_k_BL=SHUFFLED),
    "strictly before": Attend(kind="ranks", rank_q_BL=SHUFFLED, rank_k_BL=SHUFFLED, strict=True),
    "packed": Attend(segment_BL=SEGMENT),
    "packed causal": Attend(kind="causal", segment_BL=SEGMENT),
    "packed permuted": Attend(
        kind="ranks", rank_q_BL=SHUFFLED, rank_k_BL=SHUFFLED, segment_BL=SEGMENT
    ),
    "noisy and clean blocks": Block(process=Absorbing(num_tokens=2), block=2)
    .doubled(ORDER[:, :6], ORDER[:, :6])
    .attend,
    "packed groups": Attend(
        kind="ranks",
        rank_q_BL=SHUFFLED,
        rank_k_BL=np.where(SHUFFLED % 2, EMPTY, SHUFFLED),
        group_BL=np.where(SHUFFLED % 2, SHUFFLED // 6, -1),
        segment_BL=SEGMENT,
    ),
}

# These tests compile much and run little.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def draw_qkv(length=L, width=K, dtype=jnp.float32, heads=(H, H)):
    """Queries, keys and values; ``heads`` are those of the queries and of the keys."""
    keys, (queries, shared) = jax.random.split(jax.random.key(0), 3), heads
    return tuple(
        jax.random.normal(key, (B, length, number, width), dtype)
        for key, number in zip(keys, (queries, shared, shared), strict=True)
    )


def sees(attend, b, i, j):
    """The definition in ``Attend``, one pair at a time."""
    if attend is None:
        return True
    if attend.rank_q_BL is not None:
        b %= len(attend.rank_q_BL)
    if attend.segment_BL is not None and attend.segment_BL[b, i] != attend.segment_BL[b, j]:
        return False
    if attend.kind != "ranks":
        return attend.kind == "all" or j <= i
    rank_q, rank_k = attend.rank_q_BL[b, i], attend.rank_k_BL[b, j]
    if attend.group_BL is not None and attend.group_BL[b, i] == attend.group_BL[b, j] >= 0:
        return True
    return rank_k < rank_q if attend.strict else rank_k <= rank_q


@functools.partial(jax.jit, static_argnums=2, compiler_options=QUICK)
def run(qkv, attend, backend):
    return attention(*qkv, attend, backend=backend)


def by_definition(q, k, v, attend):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    out = np.zeros_like(q)
    for b, i, h in np.ndindex(*q.shape[:3]):
        keys = [j for j in range(k.shape[1]) if sees(attend, b, i, j)]
        if keys:
            weight = np.exp(k[b, keys, h] @ q[b, i, h] / np.sqrt(q.shape[-1]))
            out[b, i, h] = weight @ v[b, keys, h] / weight.sum()
    return out


@pytest.mark.parametrize("backend", ["einsum", "xla"])
@pytest.mark.parametrize("form", FORMS)
def test_is_the_softmax_over_what_is_seen(form, backend):
    out = run(draw_qkv(), FORMS[form], backend)
    np.testing.assert_allclose(out, by_definition(*draw_qkv(), FORMS[form]), atol=1e-6)


@pytest.mark.parametrize("backend", ["einsum", "xla"])
@pytest.mark.parametrize("form", ["everything", "packed causal", "packed permuted"])
def test_neighbouring_heads_of_queries_share_a_head_of_keys(form, backend):
    qkv = draw_qkv(heads=(6, 2))
    out = run(qkv, FORMS[form], backend)
    np.testing.assert_allclose(out, by_definition(*qkv, FORMS[form]), atol=1e-6)


@pytest.mark.parametrize("backend", ["einsum", "xla"])
def test_shared_keys_are_not_repeated_in_memory(backend):
    """No array of the program, nor of its gradient's, has the size of repeated keys."""
    heads, shared, keys, width = 8, 2, 64, 32
    q = jax.ShapeDtypeStruct((B, 2, heads, width), jnp.float32)
    k = jax.ShapeDtypeStruct((B, keys, shared, width), jnp.float32)

    @jax.grad
    def loss(qkv):
        return attention(*qkv, FORMS["everything"], backend=backend).sum()

    program = jax.jit(loss).lower((q, k, k)).as_text()
    shapes = re.findall(r"tensor<((?:\d+x)+)f32>", program)
    sizes = [math.prod(map(int, shape.rstrip("x").split("x"))) for shape in shapes]
    assert max(sizes) == B * keys * shared * width


@pytest.mark.parametrize("form", FORMS)
def test_backends_have_the_same_gradients(form):
    @functools.partial(jax.jit, static_argnums=1, compiler_options=QUICK)
    def grads(qkv, backend):
        return jax.grad(lambda qkv: (attention(*qkv, FORMS[form], backend=backend) ** 2).sum())(qkv)

    qkv = draw_qkv(heads=(4, 2) if form == "packed causal" else (H, H))
    for a, b in zip(*(grads(qkv, name) for name in ("einsum", "xla")), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    # JAX's own code mixes types in the gradient of its XLA path in bfloat16: strict promotion
    # refuses it.
    [("einsum", jnp.float32), ("einsum", jnp.bfloat16), ("xla", jnp.float32)],
)
def test_a_query_that_sees_nothing_gets_zero_and_a_zero_gradient(backend, dtype):
    first = np.argmin(SHUFFLED, axis=1)
    qkv = draw_qkv(dtype=dtype)

    @functools.partial(jax.jit, compiler_options=QUICK)
    @functools.partial(jax.value_and_grad, argnums=1, has_aux=True)
    def loss_and_grads(weight_BL, qkv):
        out = attention(*qkv, FORMS["strictly before"], backend=backend).astype(jnp.float32)
        return (weight_BL[:, :, None, None] * out).sum(), out

    (_, out), grads = loss_and_grads(jnp.ones((B, L)), qkv)
    np.testing.assert_array_equal(out[np.arange(B), first], 0)
    assert all(bool(jnp.isfinite(grad).all()) and bool(grad.any()) for grad in grads)
    _, of_empty = loss_and_grads(jnp.zeros((B, L)).at[np.arange(B), first].set(1), qkv)
    assert not any(bool(grad.any()) for grad in of_empty)


@pytest.mark.parametrize("backend", ["einsum", "xla"])
def test_nothing_leaks_from_the_future(backend):
    def out(k, v):
        return attention(draw_qkv()[0], k, v, FORMS["causal"], backend=backend)[0, :, 0, 0]

    for jacobian in jax.jit(jax.jacobian(out, (0, 1)), compiler_options=QUICK)(*draw_qkv()[1:]):
        influence = np.abs(jacobian[:, 0]).sum((-1, -2))  # [query, key]
        np.testing.assert_array_equal(np.triu(influence, 1), 0)
        assert (np.tril(influence)[1:] > 0).sum() == L * (L + 1) // 2 - 1


@pytest.mark.parametrize("backend", ["einsum", "xla"])
@jax.numpy_dtype_promotion("standard")  # the XLA path of jax.nn relies on it
def test_the_softmax_is_in_float32(backend):
    """512 equal keys and one slightly better: bfloat16 weights would sum to 2 or more."""
    zeros = jnp.zeros((1, 512, 1, 8), jnp.bfloat16)
    out = run((zeros, zeros, zeros + 1), None, backend)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), 1, atol=1e-2)
    q, k, v = draw_qkv()
    exact = by_definition(4 * q, k, v, None)
    low = run(tuple(x.astype(jnp.bfloat16) for x in (4 * q, k, v)), None, backend)
    np.testing.assert_allclose(low.astype(jnp.float32), exact, atol=0.1)


@pytest.mark.parametrize("form", [nightly("everything"), nightly("packed"), "packed causal"])
def test_splash_interpreted_equals_einsum(form):
    """The kernel itself, on the CPU: its scale, its segments and its gradients."""
    qkv = draw_qkv(length=256, width=64, heads=(4, 2) if form == "packed causal" else (H, H))
    attend = FORMS[form]
    if attend is not None:
        attend = dataclasses.replace(attend, segment_BL=np.repeat(SEGMENT, 22, 1)[:, :256])

    def loss(qkv, splash):
        if splash:
            out = module._splash(*qkv, attend, interpret=True)
        else:
            out = attention(*qkv, attend, backend="einsum")
        return (out**2).sum()

    grads = jax.jit(jax.value_and_grad(loss), static_argnums=1, compiler_options=QUICK)
    (ours, our_grads), (theirs, their_grads) = (grads(qkv, splash) for splash in (True, False))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    for a, b in zip(our_grads, their_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


LOW = {"dtype": jnp.bfloat16}


@pytest.mark.parametrize(
    ("platform", "shape", "form", "expected"),
    [
        ("cpu", LOW, "everything", "einsum"),
        ("gpu", LOW, "everything", "cudnn"),
        ("gpu", LOW, "strictly before", "cudnn"),
        ("gpu", LOW | {"length": 13}, "everything", "cudnn"),
        ("gpu", LOW | {"length": 13}, "packed", "xla"),
        ("gpu", LOW | {"width": 12}, "everything", "xla"),
        ("gpu", LOW | {"width": 256}, "everything", "xla"),
        ("gpu", {}, "everything", "xla"),
        ("tpu", {"length": 256}, "everything", "splash"),
        ("tpu", {"length": 384}, "packed", "splash"),
        ("tpu", {"length": 200}, "everything", "xla"),
        ("tpu", {"length": 256}, "causal", "splash"),
        ("tpu", {"length": 256}, "permuted", "xla"),
        ("gpu", LOW | {"length": 13}, "causal", "cudnn"),
        ("gpu", LOW | {"length": 13}, "permuted", "xla"),
        ("something else", LOW, "everything", "xla"),
    ],
)
def test_auto_picks(platform, shape, form, expected, monkeypatch):
    monkeypatch.setattr(module, "_flash_capable", lambda device: True)
    assert choose("auto", draw_qkv(**shape)[0], FORMS[form], platform=platform) == expected


@pytest.mark.parametrize(
    ("version", "capability", "capable"),
    [
        ("PJRT C API\ncuda 12090", "8.0", True),
        ("cuda 12090", "10.3", True),
        ("cuda 12090", "7.5", False),
        ("rocm 60100", "gfx90a", False),
    ],
)
def test_cudnn_needs_an_ampere_gpu(version, capability, capable, monkeypatch):
    device = SimpleNamespace(
        client=SimpleNamespace(platform_version=version), compute_capability=capability
    )
    monkeypatch.setattr(jax, "devices", lambda: [device])
    chosen = choose("auto", draw_qkv(**LOW)[0], None, platform="gpu")
    assert chosen == ("cudnn" if capable else "xla")


@pytest.mark.parametrize(
    ("backend", "shape", "form", "words"),
    [
        ("flash", {}, "everything", "auto, einsum, xla, cudnn, splash, got 'flash'"),
        ("cudnn", {}, "everything", "bfloat16 or float16, got float32"),
        ("cudnn", LOW | {"width": 12}, "everything", "multiple of 8, at most 128, got 12"),
        ("cudnn", LOW | {"length": 13}, "packed", "even length under a mask, got 13"),
        ("splash", {"length": 100}, "everything", "multiple of 128, got 100"),
        ("splash", {"length": 128}, "permuted", "segments, not ranks"),
    ],
)
def test_a_named_backend_never_becomes_another(backend, shape, form, words):
    with pytest.raises(ValueError, match=words):
        attention(*draw_qkv(**shape), FORMS[form], backend=backend)


def test_cudnn_is_not_run_again_in_the_backward_pass(monkeypatch):
    """By the kernels in the gradient's program; splash's are counted where it is compiled."""
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000
    )
    qkv = draw_qkv(dtype=jnp.bfloat16)

    def kernels(**remat):
        @functools.partial(jax.checkpoint, **remat)
        def loss(qkv):
            return attention(*map(keep, qkv), backend="cudnn").sum()

        return str(jax.make_jaxpr(jax.grad(loss))(qkv)).count("dot_product_attention_fwd")

    assert (kernels(policy=is_kept), kernels()) == (1, 2)


@pytest.mark.parametrize("backend", ["einsum", "xla"])
@pytest.mark.parametrize("form", ["everything", "causal", "permuted"])
def test_fewer_keys_than_queries(form, backend):
    """Any-subset models: keys are the visible tokens, queries all of them."""
    (q, _, _), (_, k, v) = draw_qkv(), draw_qkv(length=5)
    attend = FORMS[form]
    if form == "permuted":
        attend = dataclasses.replace(attend, rank_k_BL=SHUFFLED[:, :5])
    out = run((q, k, v), attend, backend)
    np.testing.assert_allclose(out, by_definition(q, k, v, attend), atol=1e-6)


@pytest.mark.parametrize("backend", ["xla", "cudnn"])
def test_causal_attention_has_no_mask_of_its_own(backend, monkeypatch):
    """JAX's call is told that it is causal, and given a mask of the segments alone."""
    given = {}

    def call(q, k, v, *, mask, is_causal, implementation):
        given.update(mask=mask, is_causal=is_causal)
        return v

    monkeypatch.setattr(jax.nn, "dot_product_attention", call)
    qkv = draw_qkv(dtype=jnp.bfloat16)
    attention(*qkv, FORMS["causal"], backend=backend)
    assert given == {"mask": None, "is_causal": True}
    attention(*qkv, FORMS["packed causal"], backend=backend)
    assert given["is_causal"]
    np.testing.assert_array_equal(given["mask"], FORMS["packed"].mask(L, L))


@pytest.fixture
def a_gpu(monkeypatch):
    """Programs for a GPU are lowered as if cuDNN were here."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda *_: True)


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize(
    ("kind", "network"),
    [
        ("autoregressive", DDiT),
        ("conditional", DDiT),
        ("conditional", functools.partial(Decoder, num_kv_heads=1)),
    ],
    ids=["autoregressive", "conditional", "shared keys"],
)
def test_models_lower_to_the_kernels_of_their_attention(kind, network):
    """An autoregressive model gets causal kernels, and no program has a mask [L, L]."""
    length = 256
    process = Absorbing(num_tokens=10)
    parameterization = {"autoregressive": Autoregressive, "conditional": Conditional}[kind](
        process=process
    )
    tokens_BL = jax.ShapeDtypeStruct((2, length), jnp.int32)
    programs = {}
    for platform, backend in (("cuda", "cudnn"), ("tpu", "splash")):
        net = network(
            num_states=11,
            time_conditioned=False,
            hidden_dim=128,
            num_heads=2,
            num_layers=2,
            dtype="bfloat16",
            attention=backend,
        )
        denoiser = Denoiser(
            params=jax.eval_shape(net.init, jax.random.key(0)),
            network=net,
            parameterization=parameterization,
        )
        traced = jax.jit(lambda model, x_BL: model.hidden(x_BL)).trace(denoiser, tokens_BL)
        programs[platform] = traced.lower(lowering_platforms=(platform,)).as_text()
        assert not re.findall(rf"{length}x{length}x", programs[platform])
    causal = kind == "autoregressive"
    masks = re.findall(r"mask_type\\22: \\22(\w+)", programs["cuda"])
    assert masks == (["CAUSAL"] if causal else ["NO_MASK"])
    # The causal kernel computes its mask of the positions of its queries, an operand of their own.
    (kernel,) = re.findall(r'kernel_name = "(\w+)"', programs["tpu"])
    assert kernel.startswith("splash_mha_fwd")
    assert ("tensor<256x128xi32>" in programs["tpu"]) == causal


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank_q_BL": ORDER}, "both of them: rank_q_BL with kind 'all'"),
        ({"kind": "ranks", "rank_q_BL": ORDER}, "rank_k_BL with kind 'ranks' is None"),
        ({"kind": "causal", "strict": True}, "needs kind 'ranks', got 'causal'"),
        ({"kind": "all", "group_BL": ORDER}, "group_BL goes with ranks"),
    ],
)
def test_a_contradiction_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        Attend(**fields)
