"""Published samplers token for token: their options here against plain programs of their papers.

The programs below are written from the published descriptions, in numpy and for one sequence. The
model is a table, so that both sides read the same numbers.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from tiers import nightly

import sedd
from sedd.arrays import fold
from sedd.configuration.build import build_sampler
from sedd.denoiser import Denoiser
from sedd.errors import FieldError
from sedd.networks.rows import Rows
from sedd.parameterizations.conditional import Conditional
from sedd.processes.absorbing import Absorbing
from sedd.reshape import Reshape
from sedd.samplers.noise import tokens_at
from sedd.samplers.reveal import spread
from sedd.schedules import LogLinear

N, L, PROMPT, ROWS = 7, 21, 5, 101
MASK = N
FREE = L - PROMPT
WEIGHT_L = np.arange(1, L + 1) ** 2 % 41
TABLE_MV = 2 * np.random.default_rng(5).standard_normal((ROWS, N + 1)).astype(np.float32)
START_L = np.array([3, 1, 4, 1, 5] + [MASK] * FREE)


@dataclass(frozen=True, kw_only=True)
class Table(oracle.ConstantNetwork):
    """A row of the table by a whole number that depends on the place and on all tokens."""

    def hidden(
        self, params, tokens_BL, *, positions_BL=None, attend=None, sigma_B=None, keys_B=None
    ):
        weight_L = jnp.asarray(WEIGHT_L)
        return params[((weight_L * tokens_BL).sum(1)[:, None] + 5 * weight_L) % ROWS]


def log_probs(x_L, temperature=1.0):
    """The model in numpy: log p of each real token, [L, N]."""
    raw_LV = TABLE_MV[((WEIGHT_L * x_L).sum() + 5 * WEIGHT_L) % ROWS].astype(np.float64)
    raw_LN = raw_LV[:, :N] / temperature
    return raw_LN - np.log(np.exp(raw_LN).sum(-1, keepdims=True))


@functools.partial(jax.jit, static_argnames="sampler", compiler_options=oracle.QUICKLY)
def run(sampler, denoiser, keys_B, x_BL, fixed_BL):
    return sampler(denoiser, keys_B, x_BL, fixed_BL)


def ours(name, temperature, **options):
    """What a sampler draws at batch 1 with the key 0, and its network calls."""
    denoiser = Denoiser(
        params=jnp.asarray(TABLE_MV),
        network=Table(num_states=N + 1, time_conditioned=False),
        parameterization=Conditional(process=Absorbing(num_tokens=N)),
        reshape=Reshape.of(temperature=[temperature]),
    )
    sampler = build_sampler(sedd.samplers.options(name, **options), LogLinear())
    x_BL = jnp.asarray(START_L, jnp.int32)[None]
    samples = run(sampler, denoiser, jax.random.key(0)[None], x_BL, x_BL != MASK)
    return np.asarray(samples.tokens_BL[0]).tolist(), int(samples.calls_B[0])


def noise(temperature, *, each_round):
    """A draw of all tokens with our noise, so that programs with temperature can be compared."""
    keys_B = fold(jax.random.key(0)[None], 1)
    rows = Rows(sequence_R=jnp.zeros(L, jnp.int32), position_R=jnp.arange(L))

    def draw(x_L, step):
        if temperature == 0:
            return log_probs(x_L).argmax(-1)
        keys = fold(keys_B, step) if each_round else keys_B
        shaped = jnp.asarray(log_probs(x_L, temperature), jnp.float32)
        return np.asarray(tokens_at(keys, rows, shaped))

    return draw


# ---------------------------------------------------------------- the published programs


def llada(draw, *, steps, block):
    """arXiv:2502.09992, algorithm 5: in each block the most confident drawn tokens stay.

    Of n masked positions of a block, step i keeps n // s + (i < n mod s).
    """
    x_L = START_L.copy()
    for start in range(PROMPT, L, block):
        inside_L = (np.arange(L) >= start) & (np.arange(L) < start + block)
        n = (inside_L & (x_L == MASK)).sum()
        for step in range(steps):
            drawn_L = draw(x_L, step)
            confidence_L = np.exp(log_probs(x_L))[np.arange(L), drawn_L]
            confidence_L[~inside_L | (x_L != MASK)] = -np.inf
            keep = np.argsort(-confidence_L, kind="stable")[: n // steps + (step < n % steps)]
            x_L[keep] = drawn_L[keep]
    return x_L.tolist()


def dream(draw, by, *, steps, temperature):
    """arXiv:2508.15487 and its code: a step from t to s reveals int(m (1 - s/t)) of m masks."""
    x_L, times = START_L.copy(), np.linspace(1, 1e-3, steps + 1).astype(np.float32)
    for step in range(steps):
        masked_L = x_L == MASK
        probs_LN = np.exp(log_probs(x_L, temperature or 1))
        drawn_L = draw(x_L, step)
        best_LN = np.sort(probs_LN, -1)
        score_L = {
            "maskgit_plus": probs_LN[np.arange(L), drawn_L],
            "topk_margin": best_LN[:, -1] - best_LN[:, -2],
            "entropy": (probs_LN * np.log(probs_LN)).sum(-1),
        }[by]
        share = np.float32(1) - times[step + 1] / times[step]
        count = masked_L.sum() if step == steps - 1 else int(np.float32(masked_L.sum()) * share)
        keep = np.argsort(-np.where(masked_L, score_L, -np.inf), kind="stable")[:count]
        x_L[keep] = drawn_L[keep]
    return x_L.tolist()


def sdar(draw, *, threshold, block, temperature):
    """arXiv:2510.06303 and its code: a step keeps all tokens above the threshold, at least one."""
    x_L, calls = START_L.copy(), 0
    for start in range(PROMPT, L, block):
        inside_L = (np.arange(L) >= start) & (np.arange(L) < start + block)
        step = 0
        while (masked_L := inside_L & (x_L == MASK)).any():
            drawn_L = draw(x_L, step)
            probability_L = np.exp(log_probs(x_L, temperature or 1))[np.arange(L), drawn_L]
            probability_L[~masked_L] = -np.inf
            count = max((probability_L > threshold).sum(), 1)
            keep = np.argsort(-probability_L, kind="stable")[:count]
            x_L[keep] = drawn_L[keep]
            step, calls = step + 1, calls + 1
    return x_L.tolist(), calls


# ---------------------------------------------------------------- the table of docs/sampling.md


@pytest.mark.nightly
@pytest.mark.parametrize(("steps", "block"), [(3, 8), (4, 8), (3, 4)])
def test_llada_in_blocks(steps, block):
    """Blocks of 4 are SDAR's, whose ``low_confidence_static`` is this program."""
    inner = sedd.samplers.options("token_confidence", steps=steps, counts="early")
    drawn, calls = ours("semi_autoregressive", 0, inner=inner, block=block)
    assert drawn == llada(noise(0, each_round=True), steps=steps, block=block)
    assert calls == steps * FREE // block


@pytest.mark.nightly
@pytest.mark.parametrize("temperature", [0, 0.6, 1.5])
def test_llada_at_any_temperature(temperature):
    """The confidence is that of the model without temperature; with it the tokens differ."""
    options = {"steps": 5, "counts": "early"}
    drawn, _ = ours("token_confidence", temperature, unsharpened=True, **options)
    published = llada(noise(temperature, each_round=True), steps=5, block=FREE)
    assert drawn == published
    if temperature == 1.5:
        assert ours("token_confidence", temperature, **options)[0] != published


@pytest.mark.parametrize("temperature", [0, 0.6])
@pytest.mark.parametrize(
    ("by", "name", "options"),
    [
        nightly("maskgit_plus", "token_confidence", {}),
        nightly("topk_margin", "confidence", {"by": "margin"}),
        ("entropy", "confidence", {"by": "entropy"}),
    ],
)
@pytest.mark.parametrize("steps", [5, nightly(FREE)])
def test_dream(by, name, options, temperature, steps):
    draw = noise(temperature, each_round=name == "token_confidence")
    drawn, calls = ours(name, temperature, steps=steps, counts="dream", **options)
    assert drawn == dream(draw, by, steps=steps, temperature=temperature)
    assert calls == steps


@pytest.mark.parametrize("threshold", [0.5, nightly(0.9)])
def test_sdar_in_blocks(threshold):
    inner = sedd.samplers.options("token_confidence", threshold=threshold)
    drawn = ours("semi_autoregressive", 0, inner=inner, block=4)
    draw = noise(0, each_round=True)
    assert drawn == sdar(draw, threshold=threshold, block=4, temperature=0)
    if threshold == 0.5:
        assert drawn[1] < FREE


@pytest.mark.nightly
def test_sdar_with_temperature():
    drawn = ours("token_confidence", 0.7, threshold=0.5)
    draw = noise(0.7, each_round=True)
    assert drawn == sdar(draw, threshold=0.5, block=FREE, temperature=0.7)


@pytest.mark.parametrize("steps", [1, 3, 16, 40])
def test_the_counts_of_the_steps(steps):
    """They sum to the number of positions, and Dream's may be 0."""
    total, found = 16, {}
    for counts in ("late", "early", "dream"):
        left, taken = total, []
        for step in range(steps):
            of = (jnp.array([n], jnp.int32) for n in (total, left))
            taken.append(int(spread(*of, steps, jnp.array([step]), counts)[0]))
            left -= taken[-1]
            if not left:
                break
        assert sum(taken) == total, counts
        found[counts] = taken
    assert found["late"] == found["early"][::-1]
    if steps == 40:
        assert 0 in found["dream"]


def test_counts_need_steps():
    for name in ("confidence", "token_confidence"):
        with pytest.raises(FieldError, match="counts is 'early', which needs steps"):
            build_sampler(sedd.samplers.options(name, counts="early"), LogLinear())
