"""What only a GPU can show: cuDNN's attention, and draws in float32 on the device.

``pytest -m gpu tests/test_gpu.py`` runs them; no other selection does. The tests of draws compare
the default device with the CPU. They need no fixture of ``conftest.py``.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from scipy import stats

from sedd.arrays import categorical, fold
from sedd.denoiser import Denoiser
from sedd.networks.attention import attention, choose, is_kept, keep
from sedd.networks.base import Attend
from sedd.networks.rows import Rows
from sedd.parameterizations.conditional import Conditional
from sedd.processes.absorbing import Absorbing
from sedd.samplers.event_jump import EventJump
from sedd.samplers.noise import coins, random_rank, tokens_at
from sedd.schedules import LogLinear

pytestmark = pytest.mark.gpu

B, L, H, K = 2, 256, 4, 64
ON_CPU = jax.default_backend() == "cpu"  # a rehearsal of these tests draws less
RANK = np.random.default_rng(0).permuted(np.tile(np.arange(L, dtype=np.int32), (B, 1)), axis=1)
SEGMENT = np.sort(np.random.default_rng(1).integers(0, 3, (B, L)).astype(np.int32), axis=1)
FORMS = {
    "everything": None,
    "causal": Attend(kind="causal"),
    "permuted": Attend(kind="ranks", rank_q_BL=RANK, rank_k_BL=RANK),
    "strictly before": Attend(kind="ranks", rank_q_BL=RANK, rank_k_BL=RANK, strict=True),
    "packed": Attend(segment_BL=SEGMENT),
    "packed causal": Attend(kind="causal", segment_BL=SEGMENT),
}


def draw_qkv(length=L, shared=H):
    """Queries, keys and values; ``shared`` is the number of heads of keys and values."""
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(
        jax.random.normal(key, (B, length, heads, K), jnp.bfloat16)
        for key, heads in zip(keys, (H, shared, shared), strict=True)
    )


@functools.partial(jax.jit, static_argnames=("attend", "backend", "kept"))
def value_and_grads(qkv, *, attend, backend, kept=False):
    """The output and the gradients of a weighted sum of it."""

    def weighted(qkv):
        out = attention(*qkv, FORMS[attend], backend=backend)
        weight = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return (weight * out.astype(jnp.float32)).sum(), out

    if kept:  # as in a block of the network
        plain = weighted
        weighted = jax.checkpoint(lambda qkv: plain(tuple(map(keep, qkv))), policy=is_kept)
    grads, out = jax.grad(weighted, has_aux=True)(qkv)
    return out, *grads


def error(got, wanted):
    got, wanted = (np.asarray(x, np.float64) for x in (got, wanted))
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def fused():
    """The backend to test: cuDNN's, if the device has it."""
    chosen = choose("auto", draw_qkv()[0], None)
    if chosen != "cudnn":
        pytest.skip(f"no NVIDIA GPU of capability 8.0 or more: {jax.devices()[0].device_kind}")
    return chosen


def assert_like_einsum_in_float32(form, backend, kept=False, shared=H):
    """Relative errors below 0.01, and at most twice those of einsum in bfloat16."""
    qkv = draw_qkv(shared=shared)
    with jax.default_matmul_precision("float32"):
        exact = value_and_grads(
            tuple(x.astype(jnp.float32) for x in qkv), attend=form, backend="einsum"
        )
    rounded = value_and_grads(qkv, attend=form, backend="einsum")
    got = value_and_grads(qkv, attend=form, backend=backend, kept=kept)
    for name, a, b, c in zip(["out", "q", "k", "v"], got, rounded, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        print(f"{form}, {name}: {backend} {error(a, c):.5f}, einsum {error(b, c):.5f}")
        assert error(a, c) < max(2 * error(b, c), 0.004) < 0.03
    return got


@pytest.mark.parametrize("form", FORMS)
def test_cudnn_has_the_values_and_gradients_of_einsum(form):
    assert_like_einsum_in_float32(form, fused())


@pytest.mark.parametrize("form", ["everything", "packed causal", "permuted"])
def test_cudnn_shares_heads_of_keys(form):
    assert_like_einsum_in_float32(form, fused(), shared=2)


def test_the_comparison_with_einsum_passes_for_einsum_and_can_fail():
    assert_like_einsum_in_float32("causal", "einsum")
    assert_like_einsum_in_float32("packed", "einsum", shared=2)
    causal, full = (
        value_and_grads(draw_qkv(), attend=form, backend="einsum")[0]
        for form in ("causal", "everything")
    )
    assert error(causal, full) > 0.1


def test_a_checkpointed_block_stores_what_cudnn_needs():
    """The gradients are right, and the forward kernel is not run a second time."""
    backend = fused()
    assert_like_einsum_in_float32("everything", backend, kept=True)
    lowered = value_and_grads.lower(draw_qkv(), attend="everything", backend=backend, kept=True)
    text = lowered.compile().as_text()
    calls = [line for line in text.splitlines() if "custom_call_target" in line and "fmha" in line]
    assert len([line for line in calls if "Backward" in line]) == 1
    assert len([line for line in calls if "Backward" not in line]) == 1


def on_cpu(function, *args):
    """The result of a jitted function on the CPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.tree.map(np.asarray, jax.jit(function)(*jax.tree.map(np.asarray, args)))


def test_orders_and_coins_are_those_of_the_cpu():
    """Their noise is whole numbers, or compared with a threshold: the same on every device."""
    rows = Rows.at(jnp.broadcast_to(jnp.arange(512), (4, 512)))

    def draw(seed):
        keys_B = jax.random.split(jax.random.key(seed), 4)
        rank_BL = random_rank(keys_B, jnp.ones((4, 512), bool))
        return rank_BL, coins(fold(keys_B, 1), rows, jnp.full(2048, 0.3))

    (rank, coin), (rank_cpu, coin_cpu) = jax.jit(draw)(7), on_cpu(draw, 7)
    np.testing.assert_array_equal(rank, rank_cpu)
    assert (np.asarray(coin) != coin_cpu).sum() <= 1  # a draw within rounding of the threshold
    assert abs(coin_cpu.mean() - 0.3) < 0.05


def test_the_tail_of_a_large_vocabulary_has_its_mass_in_float32():
    vocabulary, count = 50_257, 500 if ON_CPU else 2000
    probs = 1 / np.arange(1, vocabulary + 1) ** 1.2
    probs /= probs.sum()
    log_probs = jnp.asarray(np.log(probs), jnp.float32)
    draw = jax.jit(lambda key: categorical(key, jnp.broadcast_to(log_probs, (250, vocabulary))))
    drawn = np.concatenate([draw(key) for key in jax.random.split(jax.random.key(0), count // 250)])
    tail = probs[10_000:].sum()
    assert stats.binomtest(int((drawn >= 10_000).sum()), drawn.size, tail).pvalue > 1e-4
    assert stats.binomtest(int((drawn == 0).sum()), drawn.size, probs[0]).pvalue > 1e-4


def test_rare_moves_are_drawn_as_often_as_they_should():
    count = 2**20 if ON_CPU else 2**22
    rows = Rows.at(jnp.arange(count)[None])
    draw = jax.jit(lambda key: coins(key[None], rows, jnp.full(count, 1e-6)).sum())
    drawn = sum(int(draw(key)) for key in jax.random.split(jax.random.key(1), 4))
    assert stats.binomtest(drawn, 4 * count, 1e-6).pvalue > 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact(oracle.ConstantNetwork):
    """A row of a table, by a whole number that depends on all tokens: no sum of floats."""

    def hidden(self, params, tokens_BL, **context):
        weight_L = jnp.arange(1, tokens_BL.shape[1] + 1) ** 2 % 41
        mixed_B1 = (weight_L * tokens_BL).sum(-1, keepdims=True)
        return params[(mixed_B1 + 5 * weight_L) % len(params)]


def test_event_jump_draws_the_same_tokens_as_all_steps_and_as_the_cpu():
    length, steps, tokens = 24, 16, 6
    network = Exact(num_states=tokens + 1, time_conditioned=False)
    parameterization = Conditional(process=Absorbing(num_tokens=tokens))
    sampler = EventJump(schedule=LogLinear(), steps=steps)
    with jax.default_device(jax.devices("cpu")[0]):
        table = np.asarray(2 * jax.random.normal(jax.random.key(8), (101, tokens + 1)))

    def denoiser():
        return Denoiser(
            params=jnp.asarray(table), network=network, parameterization=parameterization
        )

    def jump(seed):
        keys_B = jax.random.split(jax.random.key(seed), 5)
        blank_BL = jnp.zeros((5, length), jnp.int32)
        drawn = sampler(denoiser(), keys_B, blank_BL, jnp.zeros((5, length), bool))
        return drawn.tokens_BL

    @jax.jit
    def walk(seed):
        """Every interval in turn; the keys are those of ``EventJump.start``."""
        keys_B = jax.random.split(jax.random.key(seed), 5)
        interval_BL = sampler.intervals(fold(keys_B, 0), length)
        rows = Rows.at(jnp.broadcast_to(jnp.arange(length), (5, length)))

        def step(x_BL, k):
            log_probs_BLN = denoiser().log_conditional(x_BL)
            flat_RN = log_probs_BLN.reshape(-1, log_probs_BLN.shape[-1])
            drawn_BL = tokens_at(fold(keys_B, 1), rows, flat_RN).reshape(x_BL.shape)
            return jnp.where(interval_BL == k, drawn_BL, x_BL), None

        masks_BL = jnp.full((5, length), tokens, jnp.int32)
        return jax.lax.scan(step, masks_BL, jnp.arange(steps))[0]

    jumped = np.asarray(jax.jit(jump)(3))
    np.testing.assert_array_equal(jumped, walk(3))
    np.testing.assert_array_equal(jumped, on_cpu(jump, 3))
    assert (jumped != np.asarray(walk(4))).any(1).all()  # the control: other keys draw others
