"""Events instead of steps: the same samples, the calls that are counted, and what a draw hangs on.

Samplers that reveal by a plan or a score are tested here for what they share: a request's samples
are its own, rounds are counted, and memory does not grow with the steps.
"""

import dataclasses
import functools
from dataclasses import dataclass
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import i32, keys
from tiers import daily, nightly

from sedd.arrays import fold
from sedd.denoiser import Denoiser, all_positions
from sedd.networks.base import Attend, Network
from sedd.networks.rows import CHUNK_BYTES, COPIES, Rows, row_sizes
from sedd.parameterizations.conditional import Conditional
from sedd.parameterizations.score import Score
from sedd.processes.absorbing import Absorbing
from sedd.processes.uniform import Uniform
from sedd.samplers.best_of_n import BestOfN
from sedd.samplers.confidence import Confidence
from sedd.samplers.entropy_bounded import EntropyBounded
from sedd.samplers.euler import Euler
from sedd.samplers.event_jump import EventJump
from sedd.samplers.noise import tokens_at
from sedd.samplers.ordered import Ordered
from sedd.samplers.particle import Particle
from sedd.samplers.remdm import ReMDM
from sedd.samplers.reveal import dense_rank, group_of, group_size
from sedd.samplers.search_paths import SearchPaths
from sedd.samplers.self_likelihood import SelfLikelihood
from sedd.samplers.semi_autoregressive import SemiAutoregressive
from sedd.samplers.speculative import Speculative
from sedd.samplers.token_confidence import TokenConfidence
from sedd.samplers.tweedie import Tweedie
from sedd.samplers.zero_order import ZeroOrder
from sedd.schedules import Cosine, Geometric, LogLinear

N, D = 6, 8
LOG_LINEAR = LogLinear()


@functools.partial(jax.jit, static_argnames=("sampler", "trace"), compiler_options=oracle.QUICKLY)
def run(sampler, denoiser, keys_B, tokens_BL, fixed_BL, trace=False):
    return sampler(denoiser, keys_B, tokens_BL, fixed_BL, trace=trace)


# ---------------------------------------------------------------- models


@dataclass(frozen=True, kw_only=True)
class Mixing(Network):
    """Two layers in which positions of one segment see each other, in the parameters' precision."""

    def init(self, key, dtype=jnp.float32):
        names = {"embed": (self.num_states, D), "first": (D, D), "second": (D, D)}
        names |= {"head": (D, self.num_states)}
        split = jax.random.split(key, len(names))
        return {
            name: jax.random.normal(k, shape, dtype)
            for (name, shape), k in zip(names.items(), split, strict=True)
        }

    def hidden(
        self, params, tokens_BL, *, positions_BL=None, attend=None, sigma_B=None, keys_B=None
    ):
        length = tokens_BL.shape[1]
        place_L = jnp.arange(length).astype(params["embed"].dtype)
        seen_BLL = (
            jnp.ones((1, length, length), bool)
            if attend is None
            else attend.mask(length, length)[:, 0]
        )
        mix_BLL = jnp.where(seen_BLL, jnp.cos(place_L[:, None] * 1.7 - place_L[None])[None], 0)
        h_BLD = params["embed"][tokens_BL] + jnp.sin(place_L)[None, :, None]
        if sigma_B is not None:
            h_BLD = h_BLD + jnp.cos(sigma_B)[:, None, None]
        h_BLD = jnp.tanh(mix_BLL @ jnp.tanh(h_BLD) @ params["first"])
        return jnp.tanh(mix_BLL @ h_BLD @ params["second"])

    def head(self, params):
        return params["head"], jnp.zeros(self.num_states, params["head"].dtype)

    def flops(self, length, read):
        return 4 * length * D * (length + D) + 2 * read * D * self.num_states


@dataclass(frozen=True, kw_only=True)
class ExactNetwork(oracle.ConstantNetwork):
    """A row of a table [M, V], by a whole number that hangs on the place and on all tokens seen.

    No sum of floats depends on the batch or on the padding: float32 draws can be compared exactly.
    """

    def hidden(
        self, params, tokens_BL, *, positions_BL=None, attend=None, sigma_B=None, keys_B=None
    ):
        length = tokens_BL.shape[1]
        seen_BLL = (
            jnp.ones((1, length, length), bool)
            if attend is None
            else attend.mask(length, length)[:, 0]
        )
        weight_L = jnp.arange(1, length + 1) ** 2 % 41
        mixed_BL = jnp.where(seen_BLL, (weight_L * tokens_BL)[:, None], 0).sum(-1)
        return params[(mixed_BL + 5 * weight_L) % len(params)]


def mixing(reading, dtype=jnp.float64):
    process = reading.process
    network = Mixing(num_states=process.num_states, time_conditioned=not reading.time_independent)
    params = jax.jit(network.init, static_argnums=1)(jax.random.key(7), dtype)
    return Denoiser(params=params, network=network, parameterization=reading)


def exact(reading):
    size = reading.process.num_states
    return Denoiser(
        params=2 * jax.random.normal(jax.random.key(8), (101, size)),
        network=ExactNetwork(num_states=size, time_conditioned=not reading.time_independent),
        parameterization=reading,
    )


READINGS = {
    "radd": Conditional(process=Absorbing(num_tokens=N)),
    "sedd": Score(process=Absorbing(num_tokens=N)),
    "uniform": Score(process=Uniform(num_tokens=N)),
}
RADD = READINGS["radd"]


def random_clamps(seed, batch, length, share=0.3):
    rng = np.random.default_rng(seed)
    return i32(rng.integers(0, N, (batch, length))), jnp.asarray(
        rng.random((batch, length)) < share
    )


# ---------------------------------------------------------------- event-jump is all of its steps


@jax.jit
def draw_everywhere(denoiser, keys_B, x_BL):
    rows = Rows.at(all_positions(x_BL))
    log_probs_BLN = denoiser.log_conditional(x_BL)
    log_probs_RN = log_probs_BLN.reshape(-1, log_probs_BLN.shape[-1])
    return tokens_at(keys_B, rows, log_probs_RN).reshape(x_BL.shape)


def step_by_step(sampler, denoiser, keys_B, tokens_BL, fixed_BL):
    """Every interval in turn, a network call each; the keys are those of ``EventJump.start``."""
    intervals = jax.jit(sampler.intervals, static_argnums=1)
    interval_BL = np.asarray(intervals(fold(keys_B, 0), tokens_BL.shape[1]))
    fixed_BL = np.asarray(fixed_BL)
    x_BL = np.where(fixed_BL, tokens_BL, N).astype(np.int32)
    for k in range(sampler.steps):
        drawn_BL = np.asarray(draw_everywhere(denoiser, fold(keys_B, 1), jnp.asarray(x_BL)))
        x_BL = np.where(~fixed_BL & (interval_BL == k), drawn_BL, x_BL).astype(np.int32)
    return x_BL, interval_BL


@pytest.mark.parametrize(
    ("steps", "precision"),
    daily(product([1, 7, 64], ["float64", "float32"]), [(7, "float64")]),
)
def test_event_jump_draws_what_all_steps_draw(steps, precision):
    """The same tokens: in float64, and in float32 with a network that does not round."""
    sampler = EventJump(schedule=LOG_LINEAR if steps == 64 else Cosine(), steps=steps)
    with jax.enable_x64(precision == "float64"):
        denoiser = mixing(RADD) if precision == "float64" else exact(RADD)
        args = random_clamps(0, 5, 24)
        jumped = run(sampler, denoiser, keys(0, 5), *args)
        stepped_BL, interval_BL = step_by_step(sampler, denoiser, keys(0, 5), *args)
        other_BL, _ = step_by_step(sampler, denoiser, keys(1, 5), *args)
        assert denoiser.log_conditional(args[0]).dtype == precision
    np.testing.assert_array_equal(jumped.tokens_BL, stepped_BL)
    assert (other_BL != stepped_BL).any(1).all()  # the control: other keys draw others
    rows = zip(interval_BL, np.asarray(args[1]), strict=True)
    events = [len(np.unique(row[~fixed])) for row, fixed in rows]
    np.testing.assert_array_equal(jumped.calls_B, events)
    assert jumped.rounds == max(events)


# ---------------------------------------------------------------- a request alone and in a batch


def scores(tokens_RL, real_RL):
    """A verifier: how much of the text is even, with weights by position."""
    tokens_RL, real_RL = np.asarray(tokens_RL), np.asarray(real_RL)
    weight_L = 1 + np.arange(tokens_RL.shape[1]) % 3
    return ((tokens_RL % 2 == 0) * real_RL * weight_L).sum(1).astype(np.float32)


def samplers():
    """One of every kind, and of every way to choose positions and to mask again."""
    jump = EventJump(schedule=LOG_LINEAR, steps=6)
    kinds = {
        "euler": Euler(schedule=LOG_LINEAR, steps=6),
        "tweedie": Tweedie(schedule=Geometric(), steps=6),
        "event_jump": jump,
        "first_hitting": EventJump(schedule=LOG_LINEAR),
        "forward": Ordered(schedule=LOG_LINEAR),
        "random": Ordered(schedule=LOG_LINEAR, order="random", steps=4),
        "entropy": Confidence(schedule=LOG_LINEAR),
        "margin": Confidence(schedule=LOG_LINEAR, by="margin", steps=3),
        "entropy_bounded": EntropyBounded(schedule=LOG_LINEAR, gamma=1.0),
        "token_confidence": TokenConfidence(schedule=LOG_LINEAR, steps=4),
        "threshold": TokenConfidence(schedule=LOG_LINEAR, threshold=0.6),
        "blocks": SemiAutoregressive(schedule=LOG_LINEAR, inner=jump, block=3),
        "speculative": Speculative(schedule=LOG_LINEAR, lookahead=3, order="random"),
        "best_of_n": BestOfN(schedule=LOG_LINEAR, inner=jump, verifier=scores, n=3),
        "particle": Particle(
            schedule=LOG_LINEAR, inner=jump, verifier=scores, particles=4, resample_every=2
        ),
        "sweeps": Particle(schedule=LOG_LINEAR, inner=jump, verifier=scores, particles=2, sweeps=3),
        "zero_order": ZeroOrder(
            schedule=LOG_LINEAR, inner=jump, verifier=scores, rounds=3, rho=0.3
        ),
        "metropolis": ZeroOrder(
            schedule=LOG_LINEAR, inner=jump, verifier=scores, rounds=3, rho=0.3, tilt=1.0
        ),
        "search_paths": SearchPaths(
            schedule=LOG_LINEAR, inner=jump, verifier=SelfLikelihood(draws=2), branches=2
        ),
    }
    for strategy in ("cap", "rescale", "loop", "confidence"):
        kinds[strategy] = ReMDM(schedule=LOG_LINEAR, strategy=strategy, steps=12, eta=0.3)
    return kinds


SAMPLERS = samplers()
EACH_DAY = ["event_jump"]
LENGTHS = [4, 16, 4, 3]
KEYS = keys(4, 4)


def together(sampler, denoiser, order):
    """The requests in one padded batch, in an order; each one's tokens and calls."""
    real_BL = np.arange(max(LENGTHS))[None] < np.array(LENGTHS)[order][:, None]
    tokens_BL, fixed_BL = (np.array(rows)[order] for rows in random_clamps(2, 4, max(LENGTHS)))
    drawn = run(
        sampler,
        dataclasses.replace(denoiser, attend=Attend(segment_BL=i32(real_BL))),
        KEYS[np.array(order)],
        jnp.asarray(np.where(real_BL, tokens_BL, 0)),
        jnp.asarray(fixed_BL | ~real_BL),
    )
    rows = zip(order, np.asarray(drawn.tokens_BL), np.asarray(drawn.calls_B), strict=True)
    return {i: [*row[: LENGTHS[i]].tolist(), int(calls)] for i, row, calls in rows}


def alone(sampler, denoiser, i):
    """One request, without padding."""
    tokens_BL, fixed_BL = random_clamps(2, 4, max(LENGTHS))
    own = (slice(i, i + 1), slice(0, LENGTHS[i]))
    drawn = run(sampler, denoiser, KEYS[i : i + 1], tokens_BL[own], fixed_BL[own])
    return [*np.asarray(drawn.tokens_BL)[0].tolist(), int(drawn.calls_B[0])]


def assert_requests_are_their_own(sampler, denoiser):
    batch = together(sampler, denoiser, [0, 1, 2, 3])
    assert batch == together(sampler, denoiser, [3, 0, 2, 1])
    assert batch[0] == alone(sampler, denoiser, 0)
    assert batch[2] == alone(sampler, denoiser, 2)
    assert batch[0][:-1] != batch[2][:-1]


@pytest.mark.parametrize("name", daily(SAMPLERS, EACH_DAY))
def test_a_request_does_not_depend_on_its_batch(name):
    """Nor on its place in it and on padding: tokens and calls, with a network that is exact."""
    assert_requests_are_their_own(SAMPLERS[name], exact(RADD))


def test_requests_that_are_done_do_not_wait_for_others():
    """Particles are not weighed again because another request has rounds to go."""
    sampler = dataclasses.replace(SAMPLERS["particle"], particles=8)
    real_BL = np.arange(16)[None] < np.array([4] * 24 + [16])[:, None]
    denoiser = dataclasses.replace(exact(RADD), attend=Attend(segment_BL=i32(real_BL)))
    tokens_BL, fixed_BL = jnp.zeros((25, 16), jnp.int32), ~real_BL
    with_other = run(sampler, denoiser, keys(0, 25), tokens_BL, jnp.asarray(fixed_BL))
    fixed_BL[-1] = True
    without = run(sampler, denoiser, keys(0, 25), tokens_BL, jnp.asarray(fixed_BL))
    np.testing.assert_array_equal(with_other.tokens_BL[:-1], without.tokens_BL[:-1])


@pytest.mark.nightly
@pytest.mark.parametrize(
    "name",
    ["event_jump", "entropy", "cap", "particle", "tweedie"],
)
def test_nor_with_a_network_that_rounds(name):
    """In float64: a batch of another shape rounds differently, and float32 would show it."""
    with jax.enable_x64(True):
        assert_requests_are_their_own(SAMPLERS[name], mixing(RADD))


@pytest.mark.nightly
@pytest.mark.parametrize(("kind", "name"), [("sedd", "cap"), ("uniform", "tweedie")])
def test_nor_with_a_model_that_depends_on_the_noise_level(kind, name):
    with jax.enable_x64(True):
        assert_requests_are_their_own(SAMPLERS[name], mixing(READINGS[kind]))


# ---------------------------------------------------------------- calls


def interval_probs(schedule, steps):
    """p_k in float64, of the schedule's own formula."""
    t = 1 - np.arange(steps + 1) / steps
    alpha = {
        LogLinear: lambda: 1 - (1 - 1e-3) * t,
        Geometric: lambda: np.exp(-1e-4 * (20 / 1e-4) ** t),
        Cosine: lambda: 1 - 1e-4 - (1 - 2e-4) * np.sin(np.pi / 2 * t),
    }[type(schedule)]()
    return np.diff(alpha) / (alpha[-1] - alpha[0])


def occupancy(probs, balls):
    """Mean and variance of the number of boxes with a ball in them."""
    empty = (1 - probs) ** balls
    both = (1 - probs[:, None] - probs[None]) ** balls
    np.fill_diagonal(both, empty)
    return (1 - empty).sum(), (both - np.outer(empty, empty)).sum()


@pytest.mark.parametrize("schedule", [LOG_LINEAR, Geometric(), Cosine()])
@pytest.mark.parametrize("free", [nightly(1), 10, nightly(48)])
def test_the_mean_of_calls_is_that_of_occupied_intervals(schedule, free):
    """Σ_k 1 - (1 - p_k)^m, within 3σ of the mean of 4000 sequences, σ by the variance of it."""
    steps, length, count = 32, 48, 4000
    probs = interval_probs(schedule, steps)
    mean, variance = occupancy(probs, free)
    if isinstance(schedule, LogLinear):
        np.testing.assert_allclose(mean, steps * (1 - (1 - 1 / steps) ** free))
    rng = np.random.default_rng(free)
    free_BL = rng.permuted(np.arange(length) < free, axis=0) * np.ones((count, 1), bool)
    free_BL = rng.permuted(free_BL, axis=1)
    sampler = EventJump(schedule=schedule, steps=steps)
    plan_BL = np.asarray(sampler.make_plan(keys(5, count), jnp.asarray(free_BL)))
    calls_B = np.where(free_BL, plan_BL, -1).max(1) + 1
    assert abs(calls_B.mean() - mean) <= 3 * np.sqrt(variance / count) + 1e-9
    interval_BL = np.asarray(sampler.intervals(keys(6, count), length))
    counts = np.bincount(interval_BL.ravel(), minlength=steps)
    assert oracle.chi_square_p(counts, probs) > 1e-4
    if not isinstance(schedule, LogLinear):  # the control: equal intervals are another law
        assert oracle.chi_square_p(counts, np.ones(steps)) < 1e-4


def test_what_is_given_costs_nothing():
    sampler = EventJump(schedule=LOG_LINEAR, steps=20)
    fixed_BL = np.ones((4, 24), bool)
    fixed_BL[1, 5] = fixed_BL[2, [3, 9]] = fixed_BL[3] = False
    tokens_BL = i32(np.random.default_rng(0).integers(0, N, (4, 24)))
    samples = run(sampler, exact(RADD), keys(7, 4), tokens_BL, jnp.asarray(fixed_BL))
    interval_BL = np.asarray(sampler.intervals(fold(keys(7, 4), 0), 24))
    events = [len(np.unique(row[~fixed])) for row, fixed in zip(interval_BL, fixed_BL, strict=True)]
    np.testing.assert_array_equal(samples.calls_B, events)
    assert events[:2] == [0, 1]
    assert events[3] < 20 < 24  # fewer than intervals and than positions
    np.testing.assert_array_equal(samples.tokens_BL[0], tokens_BL[0])


def largest(interval_SBL):
    """The most distinct intervals that a sequence of each batch has."""
    distinct_SB = (np.diff(np.sort(interval_SBL, -1), axis=-1) != 0).sum(-1) + 1
    return distinct_SB.max(-1)


def test_a_batch_of_eight_needs_662_calls_for_1024_steps():
    """The mean of 64 batches within 3σ of a simulation's mean, by both standard errors."""
    batches, steps = 64, 1024
    sampler = EventJump(schedule=LOG_LINEAR, steps=steps)
    free_BL = jnp.ones((8, steps), bool)
    plan = jax.jit(lambda keys_B: sampler.make_plan(keys_B, free_BL).max() + 1)
    calls = np.array([plan(k) for k in keys(8, 8 * batches).reshape(batches, 8)])
    simulated = largest(np.random.default_rng(0).integers(0, steps, (1000, 8, steps)))
    assert abs(simulated.mean() - 662) < 1
    error = simulated.std() * np.sqrt(1 / batches + 1 / 1000)
    print(f"\ncalls of a batch: {calls.mean():.1f}, simulated {simulated.mean():.1f} ± {error:.1f}")
    assert abs(calls.mean() - simulated.mean()) < 3 * error


def test_every_sequence_jumps_by_itself():
    """All of 1024 steps: a cache that the batch shares would call the network in nearly all."""
    sampler = EventJump(schedule=LOG_LINEAR, steps=1024)
    tokens_BL, fixed_BL = jnp.zeros((8, 1024), jnp.int32), jnp.zeros((8, 1024), bool)
    network = oracle.ConstantNetwork(num_states=N + 1, time_conditioned=False)
    denoiser = Denoiser(params=jnp.zeros((1, 1024, N + 1)), network=network, parameterization=RADD)
    samples = run(sampler, denoiser, keys(9, 8), tokens_BL, fixed_BL)
    interval_BL = np.asarray(sampler.intervals(fold(keys(9, 8), 0), 1024))
    np.testing.assert_array_equal(samples.calls_B, [len(np.unique(row)) for row in interval_BL])
    assert int(samples.rounds) == int(samples.calls_B.max()) < 720
    assert len(np.unique(interval_BL)) > 1015
    assert (np.asarray(samples.tokens_BL) < N).all()


def test_first_hitting_takes_a_call_a_position():
    tokens_BL, fixed_BL = random_clamps(3, 6, 24, share=0.5)
    samples = run(EventJump(schedule=LOG_LINEAR), exact(RADD), keys(10, 6), tokens_BL, fixed_BL)
    np.testing.assert_array_equal(samples.calls_B, (~np.asarray(fixed_BL)).sum(1))


@pytest.mark.parametrize("steps", [None, 16])
def test_the_plan_does_not_depend_on_padding(steps):
    sampler = EventJump(schedule=LOG_LINEAR, steps=steps)
    free_BL = np.random.default_rng(4).random((6, 10)) < 0.7
    short_BL = sampler.make_plan(keys(11, 6), jnp.asarray(free_BL))
    padded_BL = sampler.make_plan(keys(11, 6), jnp.asarray(np.pad(free_BL, ((0, 0), (0, 5)))))
    np.testing.assert_array_equal(
        np.asarray(short_BL)[free_BL], np.asarray(padded_BL)[:, :10][free_BL]
    )


def test_first_hitting_is_a_uniformly_random_order():
    """All 24 orders of four positions among six, 9600 sequences: χ² at 1e-4."""
    free_BL = jnp.broadcast_to(jnp.array([True, False, True, True, False, True]), (9600, 6))
    rank_BL = np.asarray(EventJump(schedule=LOG_LINEAR).make_plan(keys(12, 9600), free_BL))
    rank_BL = rank_BL[:, [0, 2, 3, 5]]
    np.testing.assert_array_equal(np.sort(rank_BL, 1), np.broadcast_to(np.arange(4), (9600, 4)))
    _, counts = np.unique(rank_BL, axis=0, return_counts=True)
    assert len(counts) == 24
    assert oracle.chi_square_p(counts, np.ones(24)) > 1e-4


# ---------------------------------------------------------------- orders


def reveal_rounds(sampler, batch=6, length=8, share=0.3):
    """(the frame at which each position first has its token, 0 where it is given), fixed [B, L]."""
    tokens_BL, fixed_BL = random_clamps(5, batch, length, share)
    samples = run(sampler, exact(RADD), keys(13, batch), tokens_BL, fixed_BL, trace=True)
    frames_TBL = np.asarray(samples.trace_TBL)
    assert frames_TBL.shape == (sampler.max_rounds(exact(RADD), length) + 1, batch, length)
    np.testing.assert_array_equal(frames_TBL[-1], samples.tokens_BL)
    assert (frames_TBL[-1] < N).all()
    return (frames_TBL != N).argmax(0), np.asarray(fixed_BL)


@pytest.mark.parametrize(
    ("order", "places"),
    [
        nightly("forward", range(8)),
        nightly("backward", range(7, -1, -1)),
        ("3,0,2", [3, 0, 2, 1, 4, 5, 6, 7]),
    ],
)
def test_a_fixed_order_is_kept(order, places):
    round_BL, fixed_BL = reveal_rounds(Ordered(schedule=LOG_LINEAR, order=order))
    for row, fixed in zip(round_BL, fixed_BL, strict=True):
        assert [row[place] for place in places if not fixed[place]] == list(
            range(1, 1 + (~fixed).sum())
        )


def test_a_random_order_is_each_sequence_own():
    round_BL, fixed_BL = reveal_rounds(Ordered(schedule=LOG_LINEAR, order="random"), share=0)
    assert not fixed_BL.any()
    np.testing.assert_array_equal(np.sort(round_BL, 1), np.broadcast_to(np.arange(1, 9), (6, 8)))
    assert len(np.unique(round_BL, axis=0)) == 6


@pytest.mark.parametrize(
    ("kind", "steps"),
    [nightly(Ordered, 3), (Confidence, 5), nightly(Confidence, 11), nightly(TokenConfidence, 1)],
)
def test_steps_share_the_positions_evenly(kind, steps):
    """Groups differ by one at most, the larger ones last."""
    round_BL, fixed_BL = reveal_rounds(kind(schedule=LOG_LINEAR, steps=steps))
    for row, fixed in zip(round_BL, fixed_BL, strict=True):
        sizes = np.bincount(row[~fixed])[1:]
        assert len(sizes) == min(steps, (~fixed).sum())
        assert sizes.min() >= sizes.max() - 1
        assert (np.diff(sizes) >= 0).all()


@pytest.mark.parametrize("steps", [None, *range(1, 15)])
def test_both_ways_to_count_a_group_agree(steps):
    total_B = np.arange(13)
    rank_BL = np.broadcast_to(np.arange(12), (13, 12))
    round_BL = np.asarray(group_of(i32(rank_BL), i32(total_B), steps))
    for total in total_B:
        groups = min(total, steps or total)
        sizes = np.bincount(round_BL[total, :total], minlength=groups)
        expected = [
            int(group_size(i32([total]), steps, i32([k]))[0]) for k in range(max(groups, 1))
        ]
        assert sizes.tolist() == expected[:groups]
        assert sizes.sum() == total
        if total:
            assert sizes.min() >= max(sizes.max() - 1, 1)
            assert (np.diff(sizes) >= 0).all()
        else:
            assert expected == [0]


def test_dense_rank():
    values_BL = i32([[5, 2, 5, 9, 2], [7, 7, 1, 1, 3]])
    select_BL = jnp.asarray([[True, True, True, False, False], [True, False, True, False, True]])
    rank_BL = np.asarray(dense_rank(values_BL, select_BL))
    assert rank_BL[0, :3].tolist() == [1, 0, 1]
    assert rank_BL[1, [0, 2, 4]].tolist() == [2, 0, 1]


# ---------------------------------------------------------------- rows in chunks


@pytest.mark.parametrize(("length", "num_states"), [(3, 5), (65, 5), (65, 2**20), (65, 2**40)])
def test_values_land_at_the_selected_positions(length, num_states):
    """Whatever their number: none, a chunk, several, the last one filled up; chunks of one row."""
    rng = np.random.default_rng(length)
    network = oracle.ConstantNetwork(num_states=num_states, time_conditioned=False)
    denoiser = dataclasses.replace(exact(RADD), params=None, network=network)

    @jax.jit
    def squares(select_BL):
        def square(rows):
            return 1000 * (1 + rows.sequence_R) + rows.position_R**2

        return denoiser.map_rows(select_BL, square, jnp.int32)

    value_BL = 1000 * np.arange(1, 4)[:, None] + np.arange(length)[None] ** 2
    for count in range(length + 1):
        counts = np.array([count, count // 2, 0])
        select_BL = rng.permuted(np.arange(length)[None] < counts[:, None], axis=1)
        got_BL = np.asarray(squares(jnp.asarray(select_BL)))
        np.testing.assert_array_equal(got_BL, np.where(select_BL, value_BL, 0))


@pytest.mark.parametrize(
    ("batch", "length", "num_states", "sizes"),
    [
        (32, 512, 50_258, (256, 32)),
        (1, 512, 50_258, (256, 8, 1)),
        (512, 64, 50_258, (256,)),  # fewer rows than sequences
        (3, 6, 5, (18, 3)),
        (1, 1, 2**40, (1,)),
    ],
)
def test_chunks_fit_into_their_bytes(batch, length, num_states, sizes):
    assert row_sizes(batch, length, num_states) == sizes
    assert sizes == (1,) or 4 * COPIES * sizes[0] * num_states <= CHUNK_BYTES


# ---------------------------------------------------------------- memory


@pytest.mark.nightly
@pytest.mark.parametrize("kind", [EventJump, Tweedie, ReMDM, Confidence])
def test_memory_does_not_grow_with_the_steps(kind):
    """What the compiled program holds besides its arguments and its result."""
    args = (exact(RADD), keys(14, 5), *random_clamps(6, 5, 24))

    def temporary(steps, trace=False):
        lowered = run.lower(kind(schedule=LOG_LINEAR, steps=steps), *args, trace=trace)
        analysis: Any = lowered.compile().memory_analysis()
        return analysis.temp_size_in_bytes

    few, many = temporary(8), temporary(8000)
    print(f"\n{kind.__name__}: {few} bytes at 8 steps, {many} at 8000")
    assert few > 0
    assert abs(many - few) <= 4096
    if kind is Tweedie:  # the control: a trace does grow, by 8000 frames
        assert temporary(8000, trace=True) > few + 7000 * 5 * 24 * 4
