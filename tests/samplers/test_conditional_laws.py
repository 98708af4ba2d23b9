"""Samplers of masked positions against their own laws, enumerated over all V^L states.

Draws are held against a law by χ² at 1e-4; controls fail the same test.
"""

import collections
import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import NOTHING_FIXED, L, N, f32, i32
from scipy import stats
from tiers import daily, nightly

from sedd.samplers.base import State
from sedd.samplers.confidence import Confidence
from sedd.samplers.entropy_bounded import EntropyBounded
from sedd.samplers.event_jump import EventJump
from sedd.samplers.ordered import Ordered
from sedd.samplers.remdm import ReMDM
from sedd.samplers.reveal import Prediction, masked
from sedd.samplers.semi_autoregressive import SemiAutoregressive
from sedd.samplers.token_confidence import TokenConfidence
from sedd.samplers.tweedie import Tweedie
from sedd.schedules import Cosine, Geometric, LogLinear

DRAWS = 8_000
NOISE = {"log_linear": LogLinear(), "geometric": Geometric(), "cosine": Cosine()}
GIVEN = (-1, 2, -1, -1)  # a clamped position between free ones
clamps = pytest.mark.parametrize("fixed", [NOTHING_FIXED, GIVEN], ids=["free", "clamped"])


def sampler_of(make, **options):
    return make(schedule=NOISE["log_linear"], **options)


@functools.cache
def world(seed=3):
    return oracle.Oracle("absorbing", seed=seed)


@functools.cache
def denoiser():
    return world().conditional_denoiser()


@functools.cache
def joint(fixed):
    return oracle.conditional_joint(world(), fixed)


@functools.cache
def samples(sampler, fixed):
    return oracle.draw(sampler, denoiser(), DRAWS, seed=1, fixed=fixed)


def p_value(sampler, fixed, law):
    counts = oracle.counts_of(samples(sampler, fixed).tokens_BL, world().V)
    return oracle.chi_square_p(counts, law)


def is_free(fixed):
    return np.asarray(fixed) < 0


# ---------------------------------------------------------------- exact: one position a call

EXACT = {
    "first_hitting": sampler_of(EventJump),
    "forward": sampler_of(Ordered),
    "backward": sampler_of(Ordered, order="backward"),
    "random": sampler_of(Ordered, order="random"),
    "given": sampler_of(Ordered, order="2,0,3"),
    "entropy": sampler_of(Confidence, by="entropy"),
    "margin": sampler_of(Confidence, by="margin"),
    "max_probability": sampler_of(Confidence, by="max_probability"),
    "entropy_bounded": sampler_of(EntropyBounded, gamma=0.0),
    "blocks": sampler_of(SemiAutoregressive, inner=sampler_of(EventJump), block=2),
}
FURTHER_ORDERS = {"backward", "margin", "max_probability"}
exact = pytest.mark.parametrize("name", daily(EXACT, EXACT.keys() - FURTHER_ORDERS))


@functools.cache
def library_conditional():
    log_probs = jax.jit(lambda d, x: d.log_conditional(x))(denoiser(), i32(world().states))
    return np.exp(np.asarray(log_probs, np.float64))


@functools.cache
def library_plans(sampler, free):
    """Plans that the library makes for the free positions, and how often."""
    free_BL = jnp.broadcast_to(jnp.asarray(free), (DRAWS, L))
    plan = np.asarray(jax.jit(sampler.make_plan)(oracle.keys(2, DRAWS), free_BL))
    plan = np.where(free, plan, 0) if plan.ndim == 2 else plan
    return np.unique(plan, axis=0, return_counts=True)


@functools.partial(jax.jit, static_argnames="sampler", compiler_options=oracle.QUICKLY)
def library_choice(sampler, denoiser, state):
    prediction = Prediction(
        denoiser=denoiser,
        hidden=denoiser.hidden(state.x_BL),
        x_BL=state.x_BL,
        keys_B=state.keys_B,
    )
    masked_BL = masked(denoiser, state)
    return masked_BL & sampler.choose(state, masked_BL, prediction)


def library_step(sampler, free, plan, round):
    """[V^L, V^L]: what the library reveals in a round of any state, by its own conditionals."""
    x_SL = i32(world().states)
    count = len(x_SL)
    state = State.starting(
        oracle.keys(0, count),
        x_BL=x_SL,
        free_BL=jnp.broadcast_to(jnp.asarray(free), x_SL.shape),
        plan=jnp.broadcast_to(jnp.asarray(plan), (count, *np.shape(plan))),
    )
    state = dataclasses.replace(state, round_B=jnp.full(count, round))
    return library_kernel(np.asarray(library_choice(sampler, denoiser(), state)).tobytes())


@functools.cache
def library_kernel(chosen):
    chosen_SL = np.frombuffer(chosen, bool).reshape(-1, L)
    return oracle.reveal_kernel(world(), chosen_SL, conditional=library_conditional())


def library_blocks(sampler, fixed):
    """(sampler, free positions) of each stage."""
    free = is_free(fixed)
    if not isinstance(sampler, SemiAutoregressive):
        return [(sampler, free)]
    x_1L = i32([fixed])
    block_1L, *_ = sampler.start(denoiser(), oracle.keys(0, 1), x_1L, x_1L >= 0).plan
    block_L = np.asarray(block_1L)[0]
    return [(sampler.inner, free & (block_L == b)) for b in np.unique(block_L[free])]


def library_law(sampler, fixed):
    """[V^L]: propagated without draws, the mean over the library's plans."""
    law = oracle.masked_start(world(), fixed)
    for inner, free in library_blocks(sampler, fixed):
        plans, _ = library_plans(inner, tuple(free))
        ends = np.zeros((len(plans), len(law)))
        for end, plan in zip(ends, plans, strict=True):
            end[:] = law
            for r in range(free.sum()):
                end[:] = end @ library_step(inner, free, plan, r)
        law = ends.mean(0)
    return law


@clamps
@exact
def test_choices_and_conditionals_propagate_to_the_joint(name, fixed):
    """Up to the float32 of the conditionals."""
    assert oracle.total_variation(library_law(EXACT[name], fixed), joint(fixed)) < 1e-6


@pytest.mark.parametrize("name", ["forward", "random", "entropy", "margin"])
def test_control_two_positions_a_call_do_not(name):
    options = {"by": name} if isinstance(EXACT[name], Confidence) else {"order": name}
    law = library_law(sampler_of(type(EXACT[name]), steps=2, **options), NOTHING_FIXED)
    assert law.sum() == pytest.approx(1, abs=1e-5)
    assert oracle.total_variation(law, joint(NOTHING_FIXED)) > 0.05


@clamps
@pytest.mark.parametrize("name", ["first_hitting", "random"])
def test_random_orders_are_uniform(name, fixed):
    """Over all permutations of the free positions, as the mean above takes them to be."""
    free = is_free(fixed)
    plans, counts = library_plans(EXACT[name], tuple(free))
    orders = sorted(map(tuple, plans[:, free]))
    assert orders == list(itertools.permutations(range(free.sum())))
    assert oracle.chi_square_p(counts, np.ones(len(counts))) > 1e-4


@clamps
@pytest.mark.parametrize("name", daily(EXACT, EXACT.keys() - FURTHER_ORDERS - {"random", "given"}))
def test_draws_follow_the_joint(name, fixed):
    drawn = samples(EXACT[name], fixed)
    held = ~is_free(fixed)
    assert p_value(EXACT[name], fixed, joint(fixed)) > 1e-4
    np.testing.assert_array_equal(drawn.calls_B, L - held.sum())
    assert (np.asarray(drawn.trace_TBL)[..., held] == np.asarray(fixed)[held]).all()


# ---------------------------------------------------------------- several positions a call


def group_sizes(total, steps):
    """`total` over at most `steps` calls, the larger groups last."""
    groups = min(total, steps)
    small, larger = divmod(total, groups)
    return [small] * (groups - larger) + [small + 1] * larger


def in_groups(total, steps):
    """How many to reveal of the masks that are left."""
    sizes = group_sizes(total, steps)
    size_at = {sum(sizes[k:]): size for k, size in enumerate(sizes)}
    return lambda falling: size_at.get(len(falling), 0)


def within(gamma):
    """As many entropies as sum to gamma but for the last of them."""
    return lambda falling: int((np.cumsum([0, *-falling[:-1]]) <= gamma).sum())


@functools.cache
def scores():
    """[V^L, L] by name: what ranks the masked positions, from the exact conditionals."""
    c = world().conditional()
    best = -np.sort(-c, -1)
    place = np.arange(L)
    ranks = {"forward": -place, "backward": place, "given": -np.array([1, 3, 0, 2])}
    return {name: np.broadcast_to(rank, c.shape[:2]) for name, rank in ranks.items()} | {
        "entropy": np.sum(c * np.log(np.maximum(c, 1e-300)), -1),
        "margin": best[..., 0] - best[..., 1],
        "max_probability": best[..., 0],
    }


def ranked_law(score_SL, count, fixed):
    """[V^L]: the highest scores of each state at a time, `count(falling scores)` of them."""
    reveal = np.zeros(score_SL.shape)
    for row, x in enumerate(world().states):
        order = [i for i in np.argsort(-score_SL[row], kind="stable") if x[i] == N]
        if order:
            reveal[row, order[: count(score_SL[row, order])]] = 1
    kernel = oracle.reveal_kernel(world(), reveal)
    return oracle.masked_start(world(), fixed) @ np.linalg.matrix_power(kernel, L)


def grouped_law(name, steps, fixed):
    count = in_groups(is_free(fixed).sum(), steps)
    if name != "random":
        return ranked_law(scores()[name], count, fixed)
    ranks = np.broadcast_to(np.array(list(itertools.permutations(range(L))))[:, None], (24, 256, L))
    return np.mean([ranked_law(-rank, count, fixed) for rank in ranks], 0)


def grouped_sampler(name, steps):
    if name in ("entropy", "margin", "max_probability"):
        return sampler_of(Confidence, by=name, steps=steps)
    return sampler_of(Ordered, order="2,0,3" if name == "given" else name, steps=steps)


def test_groups_of_the_law():
    assert group_sizes(4, 3) == [1, 1, 2]
    assert [in_groups(4, 3)(range(n)) for n in (4, 3, 2)] == [1, 1, 2]
    assert [in_groups(3, 2)(range(n)) for n in (3, 2)] == [1, 2]


@clamps
@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("entropy", 2),
        nightly("forward", 2),
        ("random", 3),
        nightly("given", 3),
        nightly("margin", 2),
        *[nightly(name, 3) for name in ("backward", "max_probability")],
    ],
)
def test_draws_in_groups_follow_their_law(name, steps, fixed):
    sampler = grouped_sampler(name, steps)
    assert p_value(sampler, fixed, grouped_law(name, steps, fixed)) > 1e-4
    np.testing.assert_array_equal(samples(sampler, fixed).calls_B, steps)
    if fixed == NOTHING_FIXED and steps == 2:
        assert p_value(sampler, fixed, joint(fixed)) < 1e-4  # control


@clamps
@pytest.mark.parametrize("gamma", [0.5, nightly(1.0)])
def test_entropy_bounded_draws_follow_their_law(gamma, fixed):
    sampler = sampler_of(EntropyBounded, gamma=gamma)
    assert p_value(sampler, fixed, ranked_law(scores()["entropy"], within(gamma), fixed)) > 1e-4
    wrong = ranked_law(scores()["entropy"], within(1.5 - gamma), fixed)
    assert p_value(sampler, fixed, wrong) < 1e-4


LEFT_FIRST = ["entropy", "margin", "max_probability", "entropy_bounded", "token_confidence"]


@pytest.mark.parametrize("name", daily(LEFT_FIRST, ["token_confidence"]))
def test_ties_go_to_the_left(name):
    alike = oracle.table_denoiser(np.zeros(((N + 1) ** L, L, N + 1)), N)
    sampler = EXACT.get(name, sampler_of(TokenConfidence))
    frames_TBL = np.asarray(oracle.draw(sampler, alike, DRAWS).trace_TBL)
    for frame, x_BL in enumerate(frames_TBL):
        assert ((x_BL == N) == (np.arange(L) >= frame)).all()


def test_entropy_bounded_reveals_together_what_is_certain():
    """At gamma 0, where no entropy at all is allowed."""
    certain = np.full(((N + 1) ** L, L, N + 1), -1e30)
    certain[..., 1] = 0
    drawn = oracle.draw(EXACT["entropy_bounded"], oracle.table_denoiser(certain, N), DRAWS)
    assert (np.asarray(drawn.tokens_BL) == 1).all()
    np.testing.assert_array_equal(drawn.calls_B, 1)


# ---------------------------------------------------------------- event-jump with steps

ALPHA = {
    "log_linear": lambda t: 1 - (1 - 1e-3) * t,
    "geometric": lambda t: np.exp(-1e-4 * (20 / 1e-4) ** t),
    "cosine": lambda t: 1 - 1e-4 - (1 - 2e-4) * np.sin(np.pi / 2 * t),
}


def shares(noise, steps):
    """[steps + 1]: of the positions, how many are revealed at t = 1 - k/steps."""
    alpha = ALPHA[noise](np.linspace(1, 0, steps + 1))
    return (alpha - alpha[0]) / (alpha[-1] - alpha[0])


def reveal_probs(noise, steps):
    share = shares(noise, steps)
    return np.diff(share) / (1 - share[:-1])


def laws(reveals, remasks, fixed):
    """[steps + 1, V^L]: step by step; a probability of revealing and one of masking a step."""
    out = [oracle.masked_start(world(), fixed)]
    for reveal, remask in zip(reveals, remasks, strict=True):
        kernel = oracle.reveal_kernel(world(), reveal, remask * is_free(fixed))
        out.append(out[-1] @ kernel)
    return np.array(out)


@functools.cache
def interval_laws(noise, steps, fixed):
    return laws(reveal_probs(noise, steps), np.zeros(steps), fixed)


@clamps
@pytest.mark.parametrize(
    ("noise", "steps"),
    daily(
        [("log_linear", 1), *itertools.product(NOISE, (2, 3, 8))],
        [("cosine", 3)],
    ),
)
def test_event_jump_draws_follow_their_law(noise, steps, fixed):
    sampler = EventJump(schedule=NOISE[noise], steps=steps)
    assert p_value(sampler, fixed, interval_laws(noise, steps, fixed)[-1]) > 1e-4
    # Controls: the joint, twice the steps and other noise.
    assert p_value(sampler, fixed, joint(fixed)) < 1e-4
    if fixed == NOTHING_FIXED:
        assert p_value(sampler, fixed, interval_laws(noise, 2 * steps, fixed)[-1]) < 1e-4
    if noise == "geometric":
        assert p_value(sampler, fixed, interval_laws("log_linear", steps, fixed)[-1]) < 1e-4


@clamps
@pytest.mark.parametrize("noise", daily(NOISE, ["geometric"]))
def test_event_jump_calls_are_the_intervals_hit(noise, fixed):
    """Σ 1 - (1 - p_k)^m on average; 4σ of the mean of the draws."""
    calls_B = np.asarray(samples(EventJump(schedule=NOISE[noise], steps=8), fixed).calls_B)
    expected = (1 - (1 - np.diff(shares(noise, 8))) ** is_free(fixed).sum()).sum()
    assert abs(calls_B.mean() - expected) < 4 * calls_B.std() / DRAWS**0.5


@clamps
def test_the_error_of_event_jump_halves_as_the_steps_double(fixed):
    distance = np.array(
        [
            oracle.total_variation(interval_laws("log_linear", n, fixed)[-1], joint(fixed))
            for n in (8, 16, 32, 64)
        ]
    )
    print("\nevent_jump", *(f"{d:.4f}" for d in distance))
    ratios = distance[:-1] / distance[1:]
    assert ((ratios > 1.7) & (ratios < 2.4)).all()


# ---------------------------------------------------------------- ReMDM


def loop_shares(steps, t_on=0.55, t_off=0.05, alpha_on=0.9):
    t = np.linspace(1, 0, steps + 1)
    return np.interp(-t, [-1, -t_on, -t_off, 0], [0, alpha_on, alpha_on, 1])


def remdm_shares(strategy, noise, steps):
    return loop_shares(steps) if strategy == "loop" else shares(noise, steps)


def remdm_probs(strategy, noise, steps, eta):
    """ς and the probability of revealing, of each step. arXiv:2503.00307, equations 5 to 8."""
    share = remdm_shares(strategy, noise, steps)
    before, after = share[:-1], share[1:]
    limit = np.minimum(1, (1 - after) / np.maximum(before, 1e-300))
    remask = eta * limit if strategy == "rescale" else np.minimum(eta, limit)
    if strategy == "loop":
        remask = np.where((before == 0.9) & (after == 0.9), remask, 0)
    return remask, (after - (1 - remask) * before) / (1 - before)


@functools.cache
def remdm_laws(strategy, noise, steps, eta, fixed):
    remask, reveal = remdm_probs(strategy, noise, steps, eta)
    return laws(reveal, remask, fixed)


@functools.cache
def confident_laws(noise, steps, eta, fixed):
    """[steps + 1, V^L] of the confidence strategy: a state knows the ψ of each of its tokens."""
    conditional = world().conditional()
    share = shares(noise, steps)
    start = tuple(np.where(is_free(fixed), N, fixed))
    states = {(start, (np.inf,) * L): 1.0}
    out = [states]
    for before, after in itertools.pairwise(share):
        reveal = (after - before) / (1 - before)
        limit = 1.0 if before == 0 else min(1.0, (1 - after) / before)
        moved = collections.defaultdict(float)
        for (x, psi), p in states.items():
            weight = np.exp(-np.array(psi))  # 0 at masks and where it is clamped
            remask = eta * limit * weight / max(weight.sum(), 1e-300)
            c = conditional[oracle.state_index(x, N + 1)]
            options = []
            for i in range(L):
                if x[i] == N:
                    shown = [(y, c[i, y], reveal * c[i, y]) for y in range(N)]
                    options.append([(N, np.inf, 1 - reveal), *shown])
                else:
                    options.append([(N, np.inf, remask[i]), (x[i], psi[i], 1 - remask[i])])
            for ends in itertools.product(*options):
                tokens, new_psi, probs = zip(*ends, strict=True)
                if (factor := math.prod(probs)) > 0:
                    moved[tokens, new_psi] += p * factor
        states = moved
        out.append(states)
    result = np.zeros((len(out), len(world().states)))
    for law, states in zip(result, out, strict=True):
        for (x, _), p in states.items():
            law[oracle.state_index(x, N + 1)] += p
    return result


def remdm_exact(strategy, noise, steps, eta, fixed):
    if strategy == "confidence":
        return confident_laws(noise, steps, eta, fixed)
    return remdm_laws(strategy, noise, steps, eta, fixed)


REMDM = [
    ("cap", "log_linear", 3, 0.1),
    ("cap", "cosine", 6, 0.5),
    ("rescale", "log_linear", 3, 0.5),
    ("rescale", "geometric", 6, 0.1),
    ("loop", "log_linear", 6, 0.1),
    ("loop", "log_linear", 8, 0.5),
    ("confidence", "log_linear", 3, 1.0),
    ("confidence", "cosine", 3, 0.1),
]
remdm = pytest.mark.parametrize(("strategy", "noise", "steps", "eta"), daily(REMDM, [REMDM[6]]))


@clamps
@remdm
def test_remdm_draws_follow_their_law(strategy, noise, steps, eta, fixed):
    sampler = ReMDM(schedule=NOISE[noise], strategy=strategy, steps=steps, eta=eta)
    law = remdm_exact(strategy, noise, steps, eta, fixed)[-1]
    assert law.sum() == pytest.approx(1)
    assert p_value(sampler, fixed, law) > 1e-4
    assert p_value(sampler, fixed, joint(fixed)) < 1e-4
    frames_TBL, held = np.asarray(samples(sampler, fixed).trace_TBL), ~is_free(fixed)
    assert (frames_TBL[..., held] == np.asarray(fixed)[held]).all()
    masks = frames_TBL == N
    assert (masks[1:] & ~masks[:-1]).any() == (steps > 2)  # some are masked again
    assert not masks[-1].any()


@remdm
def test_remdm_calls_are_the_steps_that_reveal(strategy, noise, steps, eta):
    """Their number on average; 4σ of the mean of the draws."""
    sampler = ReMDM(schedule=NOISE[noise], strategy=strategy, steps=steps, eta=eta)
    if strategy == "confidence":
        reveal = reveal_probs(noise, steps)
    else:
        _, reveal = remdm_probs(strategy, noise, steps, eta)
    masks_S = (world().states == N).sum(1)
    states = remdm_exact(strategy, noise, steps, eta, NOTHING_FIXED)[:-1]
    expected = (states * (1 - (1 - reveal[:, None]) ** masks_S)).sum()
    calls_B = np.asarray(samples(sampler, NOTHING_FIXED).calls_B)
    assert abs(calls_B.mean() - expected) < 4 * calls_B.std() / DRAWS**0.5


@remdm
def test_remdm_probabilities_are_those_of_the_formulas(strategy, noise, steps, eta):
    sampler = ReMDM(schedule=NOISE[noise], strategy=strategy, steps=steps, eta=eta)
    step_B1 = jnp.arange(steps)[:, None]
    psi = np.array([0.2, np.inf, 0.9, 0.5])
    share = remdm_shares(strategy, noise, steps)
    if strategy == "confidence":
        limit = np.minimum(1, (1 - share[1:]) / np.maximum(share[:-1], 1e-300))
        remask = eta * limit[:, None] * np.exp(-psi) / np.exp(-psi).sum()
        reveal, of_mask = reveal_probs(noise, steps), 0.0
    else:
        remask, reveal = remdm_probs(strategy, noise, steps, eta)
        remask = of_mask = np.repeat(remask[:, None], L, 1)
    got = sampler.remask_probability(step_B1, jnp.broadcast_to(f32(psi), (steps, L)))
    np.testing.assert_allclose(np.broadcast_to(got, (steps, L)), remask, atol=1e-5)
    got = sampler.reveal_probability(step_B1, f32(of_mask))
    np.testing.assert_allclose(got, np.broadcast_to(reveal[:, None], got.shape), atol=1e-5)
    np.testing.assert_allclose(sampler.share(jnp.arange(steps + 1)), share, atol=1e-5)


@pytest.mark.nightly
def test_confidence_remembers_how_probable_each_token_was():
    """ψ after one call, and after another one in the very next step; infinite at masks."""
    sampler = ReMDM(schedule=NOISE["log_linear"], strategy="confidence", steps=3, eta=0.5)
    fixed_BL = jnp.broadcast_to(jnp.asarray(GIVEN) >= 0, (256, L))
    state = sampler.start(denoiser(), oracle.keys(4, 256), i32(np.full((256, L), 2)), fixed_BL)
    advance = jax.jit(sampler.advance, compiler_options=oracle.QUICKLY)
    for _ in range(2):
        before, state = state, advance(denoiser(), state)
        x_BL, was_BL = np.asarray(state.x_BL), np.asarray(before.x_BL)
        conditional_BLN = world().conditional()[oracle.state_index(was_BL, N + 1)]
        token_BL1 = np.minimum(x_BL, N - 1)[..., None]
        drawn_BL = np.take_along_axis(conditional_BLN, token_BL1, 2)[..., 0]
        psi_BL = np.where(was_BL == N, drawn_BL, before.plan)
        psi_BL = np.where(x_BL == N, np.inf, psi_BL)
        # The first call may come after quiet steps, in which there is nothing yet to mask.
        next_B = (np.asarray(before.round_B) == 0) | (state.round_B == before.round_B + 1)
        next_B &= np.asarray(state.calls_B > before.calls_B)
        assert next_B.sum() > 50
        np.testing.assert_allclose(np.asarray(state.plan)[next_B], psi_BL[next_B], rtol=1e-5)


def mask_counts(states, share):
    """(enumerated, binomial): [steps + 1, L + 1] laws of the number of masks."""
    masks_S = (world().states == N).sum(1)
    enumerated = np.stack([states[:, masks_S == m].sum(1) for m in range(L + 1)], 1)
    return enumerated, stats.binom.pmf(np.arange(L + 1), L, 1 - share[:, None])


@pytest.mark.parametrize("eta", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("strategy", ["cap", "rescale", "loop"])
def test_remdm_preserves_the_number_of_masks(strategy, eta):
    """At every time, whatever ς; confidence keeps it only roughly."""
    for noise in NOISE:
        share = remdm_shares(strategy, noise, 6)
        states = remdm_laws(strategy, noise, 6, eta, NOTHING_FIXED)
        np.testing.assert_allclose(*mask_counts(states, share), atol=1e-9)
    states = confident_laws("log_linear", 3, 0.5, NOTHING_FIXED)
    enumerated, binomial = mask_counts(states, shares("log_linear", 3))
    assert 0.01 < oracle.total_variation(enumerated[2], binomial[2]) < 0.2


@clamps
def test_remdm_without_remasking_is_event_jump(fixed):
    law = interval_laws("cosine", 3, fixed)[-1]
    np.testing.assert_allclose(remdm_laws("cap", "cosine", 3, 0.0, fixed)[-1], law, atol=1e-12)
    assert p_value(ReMDM(schedule=Cosine(), steps=3, eta=0.0), fixed, law) > 1e-4
    if fixed == NOTHING_FIXED:
        wrong = remdm_laws("cap", "cosine", 6, 1.0, fixed)[-1]
        assert p_value(ReMDM(schedule=Cosine(), steps=3, eta=0.0), fixed, wrong) < 1e-4


# ---------------------------------------------------------------- token confidence


def token_confidence_law(here, threshold, fixed):
    """[V^L]: all masks are drawn; the likeliest token stays, or all of at least the threshold."""
    kernel = np.eye(len(here.states))
    for row, (x, c) in enumerate(zip(here.states, here.conditional(), strict=True)):
        places = np.flatnonzero(x == N)
        if not len(places):
            continue
        kernel[row] = 0
        for tokens in itertools.product(range(N), repeat=len(places)):
            probs, end = c[places, tokens], x.copy()
            keep = {int(probs.argmax())}
            if threshold is not None:
                keep |= set(np.flatnonzero(probs >= threshold))
            for i in keep:
                end[places[i]] = tokens[i]
            kernel[row, oracle.state_index(end, here.V)] += probs.prod()
    return oracle.masked_start(here, fixed) @ np.linalg.matrix_power(kernel, L)


@clamps
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_token_confidence_draws_follow_their_law(threshold, fixed):
    sampler = sampler_of(TokenConfidence, threshold=threshold)
    assert p_value(sampler, fixed, token_confidence_law(world(), threshold, fixed)) > 1e-4
    assert p_value(sampler, fixed, joint(fixed)) < 1e-4
    if fixed == NOTHING_FIXED:
        other = token_confidence_law(world(), 0.5 if threshold is None else None, fixed)
        assert p_value(sampler, fixed, other) < 1e-4


def test_token_confidence_is_biased_with_a_perfect_network():
    """The distance of the law, one token a call, on 30 small worlds."""
    distance = [
        oracle.total_variation(
            token_confidence_law(world(seed), None, NOTHING_FIXED), world(seed).clean_law()
        )
        for seed in range(30)
    ]
    print(f"\ntoken_confidence: {min(distance):.3f} to {max(distance):.3f}")
    assert min(distance) > 0.4  # measured exactly, without draws: .418 to .603


# ---------------------------------------------------------------- blocks


def block_law(block_length, reveals, remasks, fixed):
    """[V^L]: the same steps in one block of free positions after another."""
    law, free = oracle.masked_start(world(), fixed), np.flatnonzero(is_free(fixed))
    for first in range(0, len(free), block_length):
        here = np.isin(np.arange(L), free[first : first + block_length])
        for reveal, remask in zip(reveals, remasks, strict=True):
            law = law @ oracle.reveal_kernel(world(), reveal * here, remask * here)
    return law


def leap_probs(steps):
    """Tweedie's under log-linear noise, and its denoising call."""
    t = np.linspace(1, 1e-5, steps + 1)
    return [*(1 - t[1:] / t[:-1]), 1.0]


REMASK, REVEAL = remdm_probs("cap", "log_linear", 4, 0.5)
BLOCKS = {
    "event_jump": (sampler_of(EventJump, steps=1), [1.0], [0.0]),
    "tweedie": (sampler_of(Tweedie, steps=4), leap_probs(4), np.zeros(5)),
    "remdm": (sampler_of(ReMDM, steps=4, eta=0.5), REVEAL, REMASK),
}


@clamps
@pytest.mark.parametrize("name", daily(BLOCKS, ["remdm"]))
def test_blocks_have_the_product_of_the_inner_laws(name, fixed):
    inner, reveals, remasks = BLOCKS[name]
    sampler = sampler_of(SemiAutoregressive, inner=inner, block=2)
    assert p_value(sampler, fixed, block_law(2, reveals, remasks, fixed)) > 1e-4
    # Controls: the inner sampler by itself, and the joint.
    assert p_value(sampler, fixed, block_law(L, reveals, remasks, fixed)) < 1e-4
    assert p_value(sampler, fixed, joint(fixed)) < 1e-4
