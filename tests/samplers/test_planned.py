"""Planned groups of a random order: the law by enumeration, the calls, and what is refused."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny_run
from oracle import NOTHING_FIXED, L
from tiers import daily

import sedd
from sedd.errors import FieldError, UserError
from sedd.samplers.ordered import Ordered
from sedd.samplers.planned import Planned, Profile, group_sizes
from sedd.sampling.batch import run_sampler
from sedd.schedules import LogLinear

DRAWS = 8_000
SCHEDULE = LogLinear()
GIVEN = (-1, 2, -1, -1)
FLAT_END = Profile(model="m", nats_L=(3.0, 2.9, 1.0, 1.0))  # the plan waits for two tokens
STEEP = Profile(model="m", nats_L=(3.0, 1.0, 0.9, 0.8))  # or for one
PLANS = {  # (profile, calls, what is given): sizes by hand
    (FLAT_END, 2, NOTHING_FIXED): (2, 2),
    (FLAT_END, 3, NOTHING_FIXED): (1, 1, 2),
    (STEEP, 2, NOTHING_FIXED): (1, 3),
    (FLAT_END, 2, GIVEN): (1, 2),
    (FLAT_END, 3, GIVEN): (1, 1, 1),
    (STEEP, 1, GIVEN): (3,),
}


@functools.cache
def world():
    return oracle.Oracle("absorbing", seed=3)


@functools.cache
def law(sizes, fixed):
    """[V^L]: the mean over orders of the free positions, propagated group by group."""
    free = [i for i in range(L) if fixed[i] < 0]
    total = np.zeros(len(world().states))
    for order in itertools.permutations(free):
        end = oracle.masked_start(world(), fixed)
        for a, b in itertools.pairwise(np.cumsum((0, *sizes))):
            end = end @ kernel(tuple(sorted(order[a:b])))
        total += end
    return total / total.sum()


@functools.cache
def kernel(group):
    return oracle.reveal_kernel(world(), np.isin(np.arange(L), group))


@functools.cache
def drawn(profile, calls, fixed):
    sampler = Planned(schedule=SCHEDULE, profile=profile, calls=calls)
    return oracle.draw(
        sampler, world().conditional_denoiser(), DRAWS, seed=1, fixed=fixed, trace=False
    )


@pytest.mark.parametrize(
    ("profile", "calls", "fixed", "sizes"),
    daily(
        [(*case, sizes) for case, sizes in PLANS.items()],
        [(FLAT_END, 3, NOTHING_FIXED, (1, 1, 2)), (STEEP, 1, GIVEN, (3,))],
    ),
)
def test_draws_follow_the_law_of_their_groups(profile, calls, fixed, sizes):
    samples = drawn(profile, calls, fixed)
    assert (np.asarray(samples.calls_B) == len(sizes)).all()
    counts = oracle.counts_of(samples.tokens_BL, world().V)
    assert oracle.chi_square_p(counts, law(sizes, fixed)) > 1e-4


def test_control_other_groups_have_another_law():
    counts = oracle.counts_of(drawn(FLAT_END, 3, NOTHING_FIXED).tokens_BL, world().V)
    assert oracle.chi_square_p(counts, law((2, 1, 1), NOTHING_FIXED)) < 1e-4


@pytest.mark.parametrize("calls", [None, L])
def test_one_position_a_call_is_a_random_order(calls):
    planned = Planned(schedule=SCHEDULE, profile=STEEP, calls=calls)
    ordered = Ordered(schedule=SCHEDULE, order="random")
    keys_B, free_BL = oracle.keys(0, 50), jnp.ones((50, L), bool)
    np.testing.assert_array_equal(
        planned.make_plan(keys_B, free_BL), ordered.make_plan(keys_B, free_BL)
    )


def test_each_sequence_has_the_plan_of_its_own_number_of_given_tokens():
    """In one program, which is not compiled again, and padding is no token."""
    nats = tuple(np.linspace(5, 1, 9) ** 1.5)
    sampler = Planned(schedule=SCHEDULE, profile=Profile(model="m", nats_L=nats), calls=4)
    given = range(10)  # of nine positions; three more are padding
    fixed_BL = np.arange(12)[None] < np.array(given)[:, None]
    fixed_BL[:, 9:] = True
    plan_BL = jax.jit(sampler.make_plan)(oracle.keys(3, 10), jnp.asarray(~fixed_BL))
    for start, fixed_L, plan_L in zip(given, fixed_BL, np.asarray(plan_BL), strict=True):
        calls = min(4, 9 - start)
        sizes = np.bincount(plan_L[~fixed_L], minlength=calls)
        # A suffix of h has the plan of sequences that start there.
        assert sizes.tolist() == (group_sizes(nats[start:], calls) if calls else [])


# ---------------------------------------------------------------- models and files


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return sedd.load(tiny_run.make_run(tmp_path_factory.mktemp("run"), tiny_run.config("radd")))


@pytest.fixture(scope="module")
def price(model):
    x0_BL = np.random.default_rng(0).integers(0, model.process.num_tokens, (16, 12))
    return sedd.price(model, x0_BL, 0, draws=12, batch_size=16)


@pytest.mark.nightly
def test_a_price_or_its_file_is_the_profile(model, price, tmp_path):
    price.save(tmp_path / "price.json")
    options = {"num": 2, "sampler": "planned", "calls": 5}
    one = sedd.sample(model, 0, profile=price, **options)
    assert one.calls.tolist() == [5, 5]
    compiled = programs()
    for profile in (tmp_path / "price.json", str(tmp_path / "price.json"), price.profile):
        other = sedd.sample(model, 0, profile=profile, **options)
        np.testing.assert_array_equal(one.tokens, other.tokens)
    # Other numbers of given tokens compile nothing: of two prompts, 3 and 9 tokens.
    given = sedd.sample(model, 0, prompt=["the", "the cat s"], profile=price, **options)
    assert given.calls.tolist() == [5, 3]
    assert programs() == compiled
    inner = sedd.samplers.options("planned", calls=3, profile=price)
    best = sedd.sample(model, 0, sampler="best_of_n", n=2, inner=inner, verifier=_lengths)
    assert best.calls.tolist() == [6]
    best = sedd.sample(
        *(model, 0),
        **{"sampler": "best_of_n", "inner": "planned", "profile": price, "verifier": _lengths},
    )
    assert best.calls.tolist() == [8 * 12]


def programs():
    """How many programs of samplers are compiled."""
    return run_sampler._cache_size()  # pyright: ignore[reportAttributeAccessIssue]


def _lengths(texts):
    return [float(len(text)) for text in texts]


def test_mistakes(model, price, tmp_path):
    def refused(message, **options):
        with pytest.raises(UserError, match=message):
            sedd.sample(model, 0, **{"sampler": "planned", "profile": price, **options})

    for calls in (0, 13, -1):
        refused(f"calls must be from 1 to 12, the tokens of a sequence, got {calls}", calls=calls)
    refused("profile: it was measured on sequences of 12 tokens, .* has 9: draw 12", length=9)
    other = dataclasses.replace(price, model="other")
    refused("profile: it was measured with another model than ", profile=other)
    refused("sampler 'planned' needs a profile", profile=None)
    refused("profile: .*none.json: No such file", profile=tmp_path / "none.json")
    refused("profile: must be a Price or its file, got 3", profile=3)
    refused("sampler 'ordered' takes no profile; planned does", sampler="ordered")
    refused("inner must not be planned: its groups", sampler="semi_autoregressive", inner="planned")
    with pytest.raises(FieldError, match="calls must be"):
        Planned(schedule=SCHEDULE, profile=STEEP, calls=5)


@pytest.mark.parametrize(
    ("denoiser", "message"),
    [
        (lambda: world().score_denoiser(), "needs a time-independent model"),
        (lambda: world().autoregressive_denoiser(), "cannot draw from an autoregressive model"),
        (lambda: oracle.Oracle("uniform").score_denoiser(), "needs a model of the absorbing"),
    ],
    ids=["timed", "causal", "uniform"],
)
def test_models_that_it_cannot_draw_from(denoiser, message):
    with pytest.raises(UserError, match=f"sampler 'planned' {message}"):
        Planned(schedule=SCHEDULE, profile=STEEP).check(denoiser())
