"""Watermarks: the pseudorandom function, laws over secrets, p-values, and power.

Draws are held against a law by χ² at 1e-4, p-values against the uniform law by Kolmogorov and
Smirnov at 1e-3; seeds are fixed, and controls fail the same test.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import L, N, f32, i32
from scipy import special, stats
from tiers import daily

from sedd.arrays import fold
from sedd.denoiser import Denoiser, all_positions
from sedd.errors import FieldError, UserError
from sedd.networks.rows import Rows
from sedd.parameterizations.conditional import Conditional
from sedd.processes.absorbing import Absorbing
from sedd.samplers.best_of_n import BestOfN
from sedd.samplers.confidence import Confidence
from sedd.samplers.entropy_bounded import EntropyBounded
from sedd.samplers.euler import Euler
from sedd.samplers.event_jump import EventJump
from sedd.samplers.ordered import Ordered
from sedd.samplers.particle import Particle
from sedd.samplers.planned import Planned, Profile
from sedd.samplers.remdm import ReMDM
from sedd.samplers.semi_autoregressive import SemiAutoregressive
from sedd.samplers.speculative import Speculative
from sedd.samplers.token_confidence import TokenConfidence
from sedd.samplers.tweedie import Tweedie
from sedd.schedules import LogLinear
from sedd.watermark import Scheme, detect
from sedd.watermark.green import GREEN, LIST, LISTS, byte, is_green, list_of, table
from sedd.watermark.gumbel import Gumbel, exponential, surprise
from sedd.watermark.prf import key_of, threefry, threefry_on_device
from sedd.watermark.scheme import positions_of, runs_of

SECRETS = 100_000


def sampler_of(make, **options):
    return make(schedule=LogLinear(), **options)


def gumbel(size, *, secrets=None, nonces=None):
    """The watermark of a batch, each sequence with a secret of its own by default."""
    secrets = [f"secret {i}".encode() for i in range(size)] if secrets is None else secrets
    return Gumbel(
        key_BW=np.array([key_of(secret, "gumbel") for secret in secrets]),
        nonce_B=np.arange(size, dtype=np.uint32) if nonces is None else nonces,
        candidate_B=np.zeros(size, np.uint32),
    )


# ---------------------------------------------------------------- the pseudorandom function

KNOWN = """
00000000 00000000 00000000 00000000  00000000 00000000 00000000 00000000
9c6ca96a e17eae66 fc10ecd4 5256a7d8
ffffffff ffffffff ffffffff ffffffff  ffffffff ffffffff ffffffff ffffffff
2a881696 57012287 f6c7446e a16a6732
243f6a88 85a308d3 13198a2e 03707344  a4093822 299f31d0 082efa98 ec4e6c89
59cd1dbb b8879579 86b5d00c ac8b6d84
"""  # counter, key and result, of the authors' test vectors


def test_known_answers():
    words = np.array([int(word, 16) for word in KNOWN.split()], np.uint32).reshape(3, 3, 4)
    counter, key, result = np.moveaxis(words, 1, 0)
    np.testing.assert_array_equal(np.stack(threefry(list(key.T), list(counter.T)), -1), result)


def test_the_host_and_the_device_have_the_same_words():
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, (8, 1000), dtype=np.uint32)
    on_host = threefry(words[:4], words[4:])
    on_device = jax.jit(threefry_on_device)(list(words[:4]), list(words[4:]))
    np.testing.assert_array_equal(np.stack(on_host), np.stack(on_device))


def test_the_key_of_a_secret_is_what_the_page_says():
    r"""SHA-256 of b"sedd watermark gumbel\0abc", computed by coreutils."""
    words = [f"{word:08x}" for word in key_of(b"abc", "gumbel")]
    assert words == ["dee85607", "b8973c39", "4eed4d0a", "d9c8c3a0"]
    assert (key_of(b"abc", "green") != key_of(b"abc", "gumbel")).any()


@pytest.mark.parametrize("num_tokens", [2, 7])
def test_samplers_and_detectors_have_the_same_noise(num_tokens):
    """At equal probabilities the drawn token has the largest u, and so the largest -log(1 - u)."""
    watermark = gumbel(3, nonces=np.array([0, 5, 2**32 - 1], np.uint32)).repeat(2)
    rows = Rows.at(jnp.broadcast_to(jnp.arange(9), (6, 9)))
    log_probs = jnp.full((54, num_tokens), -math.log(num_tokens))
    drawn_BL = np.asarray(jax.jit(Gumbel.tokens)(watermark, rows, log_probs)).reshape(6, 9)
    for row in range(6):
        nonce, candidate = int(watermark.nonce_B[row]), row % 2
        own_LN = surprise(
            np.asarray(watermark.key_BW[row]),
            np.arange(9)[:, None],
            np.arange(num_tokens)[None],
            nonce,
            candidate,
        )
        np.testing.assert_array_equal(drawn_BL[row], own_LN.argmax(1))


def test_exponentials_are_accurate_at_both_ends():
    """-log u of W = 0 and of the largest W, and of words between, to float32."""
    rng = np.random.default_rng(1)
    words = [0, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 2**40, 2**64 - 3, 2**64 - 1]
    words = np.array(words + rng.integers(0, 2**64, 1000, dtype=np.uint64).tolist(), np.uint64)
    high, low = (words >> np.uint64(32)).astype(np.uint32), words.astype(np.uint32)
    found = np.asarray(jax.jit(functools.partial(exponential, dtype=jnp.float32))(high, low))
    big = [(int(word) + 0.5) / 2**64 if word < 2**63 else None for word in words]
    exact = [
        -math.log(u) if u is not None else -math.log1p(-(2**64 - 1 - int(word) + 0.5) / 2**64)
        for u, word in zip(big, words, strict=True)
    ]
    np.testing.assert_allclose(found, exact, rtol=1e-6)
    assert (found > 0).all()


def test_bytes_of_tables_are_those_of_the_host():
    key_W = key_of(b"abc", "green")
    first_A = np.array([0, 3, 255], np.uint32)
    for use in (GREEN, LIST):
        on_device = np.asarray(table(jnp.asarray(key_W), jnp.asarray(first_A), 37, use))
        on_host = byte(key_W, first_A[:, None], np.arange(37)[None], use)
        np.testing.assert_array_equal(on_device, on_host)


# ---------------------------------------------------------------- the law of the samplers


@functools.cache
def world():
    return oracle.Oracle("absorbing", seed=3)


def joint():
    return world().clean_law()


def event_jump_law(steps=3):
    """Each position is revealed in a uniform step: log-linear noise reveals equally many."""
    law = oracle.masked_start(world(), (-1,) * L)
    for k in range(steps):
        law = law @ oracle.reveal_kernel(world(), 1 / (steps - k))
    return law


LAWS = {
    "first_hitting": (sampler_of(EventJump), joint),
    "event_jump": (sampler_of(EventJump, steps=3), event_jump_law),
    "forward": (sampler_of(Ordered), joint),
    "random": (sampler_of(Ordered, order="random"), joint),
    "planned": (sampler_of(Planned, profile=Profile(model="m", nats_L=(2.0,) * L)), joint),
    "entropy": (sampler_of(Confidence), joint),
    "margin": (sampler_of(Confidence, by="margin"), joint),
    "entropy_bounded": (sampler_of(EntropyBounded, gamma=0.0), joint),
    "blocks": (sampler_of(SemiAutoregressive, inner=sampler_of(Confidence), block=2), joint),
    "speculative": (sampler_of(Speculative, coupled=True, lookahead=2), joint),
}


def counts(sampler, watermark):
    denoiser = world().conditional_denoiser()
    batch = len(watermark.nonce_B)
    drawn = oracle.sample(
        sampler,
        Denoiser(
            params=denoiser.params,
            network=denoiser.network,
            parameterization=denoiser.parameterization,
            watermark=watermark,
        ),
        oracle.keys(0, batch),
        i32(np.zeros((batch, L))),
        jnp.zeros((batch, L), bool),
        trace=False,
    )
    return oracle.counts_of(drawn.tokens_BL, world().V)


@functools.cache
def many_secrets():
    """One nonce, and a secret for each text."""
    return gumbel(SECRETS, nonces=np.full(SECRETS, 7, np.uint32))


@pytest.mark.parametrize("name", daily(LAWS, ["event_jump"]))
def test_over_secrets_the_law_is_that_without_a_watermark(name):
    sampler, law = LAWS[name]
    assert oracle.chi_square_p(counts(sampler, many_secrets()), law()) > 1e-4


def test_control_of_one_secret_and_nonce_the_law_is_another():
    """Then only the order is random."""
    one = gumbel(1000, secrets=[b"one"] * 1000, nonces=np.zeros(1000, np.uint32))
    assert oracle.chi_square_p(counts(LAWS["first_hitting"][0], one), joint()) < 1e-4


@pytest.mark.nightly
def test_rare_tokens_are_drawn_as_often_as_they_should():
    probs = np.array([0.9, 0.09, 0.0099, 9e-5, 1e-5])
    watermark = many_secrets()
    rows = Rows.at(jnp.broadcast_to(jnp.arange(20), (SECRETS, 20)))
    log_probs = jnp.broadcast_to(f32(np.log(probs)), (SECRETS * 20, 5))
    drawn = np.asarray(jax.jit(Gumbel.tokens)(watermark, rows, log_probs))
    assert oracle.chi_square_p(np.bincount(drawn, minlength=5), probs) > 1e-4


def test_tokens_without_mass_are_never_drawn_and_nan_is_said():
    log_probs = np.full((54, 5), -1e6, np.float32)
    log_probs[:, 3] = 0.0
    log_probs[7] = np.nan
    rows = Rows.at(jnp.broadcast_to(jnp.arange(9), (6, 9)))
    drawn = np.asarray(Gumbel.tokens(gumbel(6), rows, jnp.asarray(log_probs)))
    assert drawn[7] == -1
    assert (np.delete(drawn, 7) == 3).all()


# ---------------------------------------------------------------- the same tokens in any order

PROBS = np.array([0.6, 0.25, 0.1, 0.05])


def constant(probs=PROBS, length=40, watermark=None, batch=None):
    """A model with the same distribution everywhere, whatever it sees."""
    raw = np.log(np.append(probs, 1e-30))
    raw_BLV = np.broadcast_to(raw, (1, length, len(raw)))
    return Denoiser(
        params=f32(raw_BLV),
        network=oracle.ConstantNetwork(num_states=len(raw), time_conditioned=False),
        parameterization=Conditional(process=Absorbing(num_tokens=len(probs))),
        watermark=watermark,
    )


def draw(sampler, denoiser, batch, length=40):
    shape = (batch, length)
    fixed_BL = jnp.zeros(shape, bool)
    return oracle.sample(
        sampler, denoiser, oracle.keys(5, batch), i32(np.zeros(shape)), fixed_BL, trace=False
    )


ANY_ORDER = [
    sampler_of(EventJump, steps=4),
    sampler_of(Ordered, order="backward", steps=7),
    sampler_of(SemiAutoregressive, inner=sampler_of(EventJump, steps=2), block=16),
    sampler_of(Speculative, coupled=True, lookahead=3, order="random"),
]


@pytest.mark.parametrize(
    "sampler", daily(ANY_ORDER, ANY_ORDER[::3]), ids=lambda sampler: type(sampler).__name__
)
def test_on_independent_positions_every_sampler_draws_the_same_tokens(sampler):
    watermark = gumbel(4)
    rows = Rows.at(jnp.broadcast_to(jnp.arange(40), (4, 40)))
    log_probs = jnp.broadcast_to(f32(np.log(PROBS)), (160, 4))
    once_BL = np.asarray(Gumbel.tokens(watermark, rows, log_probs)).reshape(4, 40)
    drawn = draw(sampler, constant(watermark=watermark), 4)
    np.testing.assert_array_equal(drawn.tokens_BL, once_BL)


@pytest.mark.nightly
def test_event_jump_draws_what_all_steps_draw():
    batch, sampler = 64, LAWS["event_jump"][0]
    exact = world().conditional_denoiser()
    watermark, keys_B = gumbel(batch), oracle.keys(0, batch)
    denoiser = Denoiser(
        params=exact.params,
        network=exact.network,
        parameterization=exact.parameterization,
        watermark=watermark,
    )
    nothing = i32(np.zeros((batch, L))), jnp.zeros((batch, L), bool)
    jumped = oracle.sample(sampler, denoiser, keys_B, *nothing, trace=False)

    @jax.jit
    def everywhere(watermark, x_BL):
        rows = Rows.at(all_positions(x_BL))
        log_probs_RN = denoiser.log_conditional(x_BL).reshape(-1, N)
        return watermark.tokens(rows, log_probs_RN).reshape(x_BL.shape)

    interval_BL = np.asarray(sampler.intervals(fold(keys_B, 0), L))
    x_BL = np.full((batch, L), N, np.int32)
    for k in range(sampler.steps):
        x_BL = np.where(interval_BL == k, everywhere(watermark, jnp.asarray(x_BL)), x_BL).astype(
            np.int32
        )
    np.testing.assert_array_equal(jumped.tokens_BL, x_BL)


# ---------------------------------------------------------------- p-values and power


def zipf_texts(count, length=40, vocabulary=500, seed=0):
    """Texts that nobody watermarked."""
    law = 1 / np.arange(1, vocabulary + 1)
    return np.random.default_rng(seed).choice(vocabulary, (count, length), p=law / law.sum())


def ks(p_values):
    return stats.kstest(p_values, "uniform").pvalue


def test_p_values_of_unrelated_texts_are_uniform():
    texts = zipf_texts(2000)
    p_values = [detect(text, b"%d" % i).p_value for i, text in enumerate(texts)]
    assert ks(p_values) > 1e-3
    assert ks(np.square(p_values)) < 1e-3  # the control


def test_p_values_of_other_keys_are_uniform():
    watermark = gumbel(2000)
    drawn = np.asarray(draw(ANY_ORDER[0], constant(watermark=watermark), 2000).tokens_BL)
    others = [detect(text, b"other %d" % i, nonces=[i]).p_value for i, text in enumerate(drawn)]
    assert ks(others) > 1e-3
    own = [detect(text, b"secret %d" % i, nonces=[i]).p_value for i, text in enumerate(drawn[:200])]
    assert np.median(own) < 1e-3
    near = [detect(text, b"secret %d" % i, nonces=[i + 1]).p_value for i, text in enumerate(drawn)]
    assert ks(near) > 1e-3


def harmonic(x):
    return special.digamma(x + 1) + np.euler_gamma


def test_power_follows_from_the_probabilities():
    """u of a drawn v is Beta(1/p_v, 1), so that -log(1 - u) has the mean H_{1/p_v}."""
    batch = 500
    drawn = np.asarray(draw(ANY_ORDER[0], constant(watermark=gumbel(batch)), batch).tokens_BL)
    mean = (PROBS * harmonic(1 / PROBS)).sum()
    assert mean == pytest.approx(1.81, abs=0.005)
    second = (
        special.polygamma(1, 1) - special.polygamma(1, 1 / PROBS + 1) + harmonic(1 / PROBS) ** 2
    )
    error = math.sqrt(((PROBS * second).sum() - mean**2) / drawn.size)
    found = np.mean(
        [
            detect(text, b"secret %d" % i, nonces=[i]).statistic / len(text)
            for i, text in enumerate(drawn)
        ]
    )
    assert abs(found - mean) < 3 * error
    entropy = -(PROBS * np.log(PROBS)).sum()
    assert mean > 1 + (math.pi**2 / 6 - 1) * entropy  # the lower bound of the page


def test_searches_find_shifted_texts_and_unknown_nonces():
    watermark, length = gumbel(1, secrets=[b"s"], nonces=np.array([5], np.uint32)), 200
    denoiser = constant(watermark=watermark, length=length)
    (text,) = np.asarray(draw(ANY_ORDER[0], denoiser, 1, length).tokens_BL)
    known = detect(text, b"s", nonces=[5])
    assert (known.tests, known.nonce, known.candidate, known.offset) == (1, 5, 0, 0)
    assert known.scored == length
    later = detect(text[7:], b"s", nonces=8, offsets=10)
    assert (later.nonce, later.offset, later.tests) == (5, 7, 8 * 21)
    expected = special.gammaincc(length - 7, later.statistic) * 8 * 21
    assert later.p_value == pytest.approx(expected)
    assert later.p_value < 1e-6
    assert detect(text[7:], b"s", nonces=[5]).p_value > 1e-3
    behind = detect(np.concatenate([text[:9], text]), b"s", nonces=[5], offsets=9)
    assert (behind.offset, behind.scored) == (-9, length)
    part = detect(text, b"s", nonces=[5], scored=np.arange(length) < 50)
    assert part.scored == 50
    assert part.statistic < known.statistic
    nothing = detect([], b"s")
    assert (nothing.p_value, nothing.scored) == (1.0, 0)


def test_candidates_differ_and_are_counted():
    batch, n = 50, 4
    watermark = gumbel(batch, secrets=[b"s"] * batch)
    sampler = sampler_of(BestOfN, inner=ANY_ORDER[0], verifier=fewest_zeros, n=n)
    drawn = np.asarray(draw(sampler, constant(watermark=watermark), batch).tokens_BL)
    found = [detect(text, b"s", nonces=[i], candidates=n) for i, text in enumerate(drawn)]
    assert {one.tests for one in found} == {n}
    assert {one.candidate for one in found} == set(range(n))
    rows = Rows.at(jnp.broadcast_to(jnp.arange(40), (batch * n, 40)))
    log_probs = jnp.broadcast_to(f32(np.log(PROBS)), (batch * n * 40, 4))
    every = np.asarray(Gumbel.tokens(watermark.repeat(n), rows, log_probs)).reshape(batch, n, 40)
    best = (every == 0).sum(-1).argmin(1)
    np.testing.assert_array_equal(drawn, every[np.arange(batch), best])


def fewest_zeros(tokens_RL, real_RL):
    return -(np.asarray(tokens_RL) == 0).sum(1).astype(np.float32)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"nonces": 0}, "nonces"),
        ({"nonces": []}, "nonces"),
        ({"nonces": [2**32]}, "nonces"),
        ({"candidates": 0}, "candidates"),
        ({"offsets": -1}, "offsets"),
        ({"kind": "blue"}, "kind"),
        ({"scored": [True]}, "scored"),
        ({"kind": "green", "gamma": 0.3}, "gamma"),
        ({"tokens": [-1, 2]}, "tokens"),
        ({"tokens": [0.5]}, "tokens"),
    ],
)
def test_detect_names_a_bad_value(changes, field):
    changes = {"tokens": [1, 2, 3], **changes}
    with pytest.raises(FieldError) as caught:
        detect(secret=b"s", **changes)
    assert caught.value.field == field


# ---------------------------------------------------------------- green lists

VOCABULARY, GAMMA, DELTA = 30, 0.5, 2.0


def green(scored_BL, secret=b"s", delta=DELTA):
    scheme = Scheme(secret=secret, kind="green", delta=delta, gamma=GAMMA)
    return scheme.batch(np.zeros(len(scored_BL)), scored_BL)


def test_green_conditionals_follow_the_formula():
    """α of visible, masked and uncounted neighbours, by sums over all pairs of tokens."""
    exact = world().conditional_denoiser()
    x_BL = np.array([[N, N, N, N], [0, N, 2, N], [N, 1, N, N], [N, N, 0, 1]], np.int32)
    scored_BL = np.ones((4, L), bool)
    scored_BL[3, 2:] = False  # the last two are given
    scored_BL[2, 0] = False
    denoiser = Denoiser(
        params=exact.params,
        network=exact.network,
        parameterization=exact.parameterization,
        watermark=green(scored_BL),
    )
    found = np.asarray(jax.jit(lambda d, x: d.log_conditional(x))(denoiser, x_BL))
    key_W, token = key_of(b"s", "green"), np.arange(N)
    likes = is_green(key_W, np.repeat(token, N), np.tile(token, N), GAMMA).reshape(N, N)
    probs = world().conditional()[oracle.state_index(x_BL, N + 1)]  # [4, L, N]
    for b in range(4):
        for i in range(L):
            alpha = np.zeros(N)
            if i > 0:
                alpha += probs[b, i - 1] @ likes
            if i + 1 < L and scored_BL[b, i + 1]:
                alpha += likes @ probs[b, i + 1]
            changed = probs[b, i] * np.exp(DELTA * alpha)
            marked = x_BL[b, i] == N and scored_BL[b, i]
            expected = changed / changed.sum() if marked else probs[b, i]
            np.testing.assert_allclose(np.exp(found[b, i]), expected, atol=2e-6)
            kl = special.rel_entr(expected, probs[b, i]).sum()
            assert kl <= DELTA**2 / 2


def test_lists_are_a_share_of_the_vocabulary_and_independent():
    key_W = key_of(b"s", "green")
    lists = list_of(key_W, np.arange(50_000))
    assert oracle.chi_square_p(np.bincount(lists, minlength=LISTS), np.ones(LISTS)) > 1e-4
    for gamma in (0.25, 0.5):
        green_HN = byte(key_W, np.arange(LISTS)[:, None], np.arange(500)[None], GREEN) < 256 * gamma
        assert stats.binomtest(int(green_HN.sum()), green_HN.size, gamma).pvalue > 1e-4
        both = (green_HN[:-1] & green_HN[1:]).sum()
        assert stats.binomtest(int(both), green_HN[1:].size, gamma**2).pvalue > 1e-4


@functools.cache
def green_texts():
    batch, length = 40, 64
    probs = np.full(VOCABULARY, 1 / VOCABULARY)
    watermark = green(np.ones((batch, length), bool))
    denoiser = constant(probs, length=length, watermark=watermark)
    return np.asarray(draw(sampler_of(EventJump, steps=8), denoiser, batch, length).tokens_BL)


def test_green_texts_are_found_wherever_they_stand():
    found = [detect(text, b"s", kind="green") for text in green_texts()]
    assert np.mean([one.p_value < 1e-4 for one in found]) > 0.9
    moved = detect(np.concatenate([[3, 4, 5], green_texts()[0]]), b"s", kind="green")
    assert moved.p_value < 1e-4
    other = [detect(text, b"other", kind="green").p_value for text in green_texts()]
    assert np.median(other) > 0.1


def test_green_p_values_are_exact():
    """With the ties of a discrete statistic broken by chance they are uniform."""
    rng, p_values = np.random.default_rng(2), []
    for i, text in enumerate(zipf_texts(2000, seed=1)):
        one = detect(text, b"%d" % i, kind="green")
        above = stats.binom.sf(one.statistic, one.scored, GAMMA)
        p_values.append(above + rng.random() * (one.p_value - above))
    assert ks(p_values) > 1e-3


def test_green_pairs_are_counted_once():
    found = detect([1, 2, 1, 2, 1, 2], b"s", kind="green")
    assert found.scored == 2
    assert detect([1], b"s", kind="green").scored == 0
    given = detect([1, 2, 3, 4], b"s", kind="green", scored=[False, False, True, False])
    assert given.scored == 1


# ---------------------------------------------------------------- what is refused


def sum_of(tokens_RL, real_RL):
    return np.asarray(tokens_RL).sum(1).astype(np.float32)


@pytest.mark.parametrize(
    ("sampler", "reason"),
    [
        (sampler_of(ReMDM), "more than once"),
        (sampler_of(TokenConfidence), "anew in every round"),
        (sampler_of(Tweedie), "in every step"),
        (sampler_of(Euler), "in every step"),
        (sampler_of(Speculative), "coupled"),
        (sampler_of(Particle, inner=sampler_of(EventJump), verifier=sum_of), "stay equal"),
        (sampler_of(BestOfN, inner=sampler_of(ReMDM), verifier=sum_of), "more than once"),
        (sampler_of(SemiAutoregressive, inner=sampler_of(TokenConfidence)), "in every round"),
    ],
)
def test_samplers_that_would_change_their_law_refuse(sampler, reason):
    with pytest.raises(UserError, match=f"takes no gumbel watermark: .*{reason}"):
        sampler.check(constant(watermark=gumbel(1)))


def test_samplers_that_do_not_ask_for_conditionals_refuse_green():
    watermark = green(np.ones((1, 40), bool))
    for sampler in (sampler_of(Tweedie), sampler_of(Speculative, coupled=True)):
        with pytest.raises(UserError, match="takes no green watermark"):
            sampler.check(constant(watermark=watermark))
    sampler_of(ReMDM).check(constant(watermark=watermark))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"secret": b""}, "secret"),
        ({"secret": "text"}, "secret"),
        ({"kind": "blue"}, "kind"),
        ({"delta": 0.0}, "delta"),
        ({"delta": math.inf}, "delta"),
        ({"gamma": 0.3}, "gamma"),
        ({"gamma": 1.0}, "gamma"),
    ],
)
def test_a_scheme_checks_its_values(changes, field):
    with pytest.raises(FieldError) as caught:
        Scheme(**{"secret": b"s", **changes})
    assert caught.value.field == field


def test_a_scheme_does_not_show_its_secret():
    assert "hidden" not in repr(Scheme(secret=b"hidden"))


def test_runs_and_positions_are_inverse():
    scored = np.array([0, 1, 1, 0, 0, 1], bool)
    assert runs_of(scored) == [[1, 3], [5, 6]]
    np.testing.assert_array_equal(positions_of(runs_of(scored), 6), scored)
    assert runs_of(np.zeros(3, bool)) == []
