"""Sampling by blocks of a block model: the cache, the laws, the calls, and where a text ends."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import f32, i32, keys
from tiers import nightly

from sedd.denoiser import Denoiser
from sedd.errors import FieldError, UserError
from sedd.networks.base import EMPTY, Attend, Memory, Network
from sedd.networks.ddit import DDiT
from sedd.networks.decoder import Decoder
from sedd.parameterizations.block import Block
from sedd.parameterizations.conditional import Conditional
from sedd.processes.absorbing import Absorbing
from sedd.reshape import Reshape
from sedd.samplers.best_of_n import BestOfN
from sedd.samplers.confidence import Confidence
from sedd.samplers.entropy_bounded import EntropyBounded
from sedd.samplers.event_jump import EventJump
from sedd.samplers.ordered import Ordered
from sedd.samplers.remdm import ReMDM
from sedd.samplers.semi_autoregressive import SemiAutoregressive
from sedd.samplers.speculative import Speculative
from sedd.samplers.token_confidence import TokenConfidence
from sedd.samplers.tweedie import Tweedie
from sedd.schedules import LogLinear

N = 5
PROCESS = Absorbing(num_tokens=N)
NETWORK = DDiT(
    num_states=N + 1, time_conditioned=False, hidden_dim=16, num_layers=2, num_heads=2, dropout=0.0
)
NOISE = LogLinear()
JUMP = EventJump(schedule=NOISE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counting(DDiT):
    """The same network, which counts how often each of its passes is traced."""

    def hidden(self, params, tokens_BL, **kwargs):
        TRACED["hidden"] += 1
        return super().hidden(params, tokens_BL, **kwargs)

    def extend(self, params, tokens_BM, memory, **kwargs):
        TRACED["extend"] += 1
        return super().extend(params, tokens_BM, memory, **kwargs)


TRACED = {"hidden": 0, "extend": 0}
COUNTING = Counting(**vars(NETWORK))


@functools.cache
def random_params(network=NETWORK):
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: f32(0.5 * rng.standard_normal(x.shape)), shapes)


def denoiser(block, network=NETWORK, **fields):
    """A block model, or with None a plain one with the same parameters."""
    kind = Conditional(process=PROCESS) if block is None else Block(process=PROCESS, block=block)
    return Denoiser(params=random_params(), network=network, parameterization=kind, **fields)


def blocks(inner=JUMP, **fields):
    return SemiAutoregressive(schedule=NOISE, inner=inner, **fields)


def run(sampler, model, seed, tokens_BL, fixed_BL):
    return oracle.sample(sampler, model, keys(seed, len(tokens_BL)), tokens_BL, fixed_BL, False)


def requests(length=12):
    """Given tokens: none, a prompt, a part of a block, whole blocks; the last text is padded."""
    rng = np.random.default_rng(3)
    tokens_BL = rng.integers(0, N, (6, length))
    fixed_BL = np.zeros((6, length), bool)
    fixed_BL[1, :4] = fixed_BL[2, :6] = True
    fixed_BL[3, 1:3] = fixed_BL[3, 4:8] = True  # a hole, a whole block in the middle
    fixed_BL[4, :9] = fixed_BL[5, 10:] = True
    segment_BL = np.ones((6, length), int)
    segment_BL[5, 10:] = 0
    return i32(tokens_BL), jnp.asarray(fixed_BL), Attend(segment_BL=i32(segment_BL))


# ---------------------------------------------------------------- the cache


DECODER = Decoder(
    num_states=N + 1,
    time_conditioned=False,
    hidden_dim=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=24,
)


@pytest.mark.parametrize(
    ("block", "shift", "network"),
    [
        (4, True, DECODER),
        nightly(5, False, NETWORK),
        *(nightly(block, shift, NETWORK) for block in (1, 4, 12) for shift in (False, True)),
    ],
)
def test_the_cache_gives_the_hidden_states_of_the_whole_text(block, shift, network):
    """In every round of every sequence, at all positions of its block."""
    tokens_BL, fixed_BL, attend = requests()
    kind = Block(process=PROCESS, block=block, shift=shift)
    model = Denoiser(
        params=random_params(network), network=network, parameterization=kind, attend=attend
    )
    sampler = blocks()
    start = jax.jit(sampler.start)(model, keys(0, 6), tokens_BL, fixed_BL)

    @functools.partial(jax.jit, compiler_options=oracle.QUICKLY)
    def step(state):
        plan, active_B = state.plan, sampler.active(model, state)
        calling, _ = sampler._call(model, state, plan.cache, active_B)
        here_BL = (plan.block_BL == plan.block_B[:, None]) & active_B[:, None]
        here_BL = here_BL & (attend.segment_BL > 0)
        error_BL = jnp.abs(calling.called[0] - model.hidden(state.x_BL)[0]).max(-1)
        # A stale row of the memory would be seen: later blocks have other tokens than those read.
        return sampler.advance(model, state), active_B, jnp.where(here_BL, error_BL, 0), here_BL

    state, rounds, compared = start, 0, 0
    while True:
        state, active_B, error_BL, here_BL = step(state)
        if not active_B.any():
            break
        assert error_BL.max() < 1e-5
        rounds, compared = rounds + 1, compared + int(here_BL.sum())
    assert rounds == 12
    assert compared >= (~np.asarray(fixed_BL)).sum()
    np.testing.assert_array_equal(state.calls_B, (~np.asarray(fixed_BL)).sum(1))
    assert (np.asarray(state.x_BL) < N).all()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Float64(Network):
    """One attention of width D over embeddings of tokens and positions, in float64."""

    has_memory = True

    def init(self, key):
        draws = np.random.default_rng(0).standard_normal
        width = 6
        shapes = {
            "token": (self.num_states, width),
            "position": (16, width),
            "head": (width, N + 1),
        }
        shapes |= dict.fromkeys("qkv", (width, width))
        return {name: jnp.asarray(draws(shape)) for name, shape in shapes.items()}

    def hidden(self, params, tokens_BL, *, positions_BL=None, attend=None, **_):
        positions_BL = (
            jnp.arange(tokens_BL.shape[1])[None] if positions_BL is None else positions_BL
        )
        x_BLD = params["token"][tokens_BL] + params["position"][positions_BL]
        mask_BLS = attend.mask(tokens_BL.shape[1], tokens_BL.shape[1])[:, 0]
        return self._attention(params, x_BLD, x_BLD @ params["k"], x_BLD @ params["v"], mask_BLS)

    def memory(self, batch, slots):
        zeros = jnp.zeros((batch, 1, slots, 1, 6), jnp.float64)
        return Memory(keys=zeros, values=zeros, rank_BS=jnp.full((batch, slots), EMPTY))

    def extend(self, params, tokens_BM, memory, *, positions_BM, rank_BM, write_BM):
        x_BMD = params["token"][tokens_BM] + params["position"][positions_BM]
        sequence_B1 = jnp.arange(len(x_BMD))[:, None]
        slot_BM = jnp.where(write_BM, positions_BM, memory.rank_BS.shape[1])

        def put(slots, rows_BM):
            return slots.at[sequence_B1, slot_BM].set(rows_BM, mode="drop")

        keys = put(memory.keys[:, 0, :, 0], x_BMD @ params["k"])
        values = put(memory.values[:, 0, :, 0], x_BMD @ params["v"])
        rank_BS = put(memory.rank_BS, rank_BM)
        mask_BMS = rank_BS[:, None] <= rank_BM[:, :, None]
        hidden_BMD = self._attention(params, x_BMD, keys, values, mask_BMS)
        kept = (x[:, None, :, None] for x in (keys, values))
        return hidden_BMD, Memory(keys=next(kept), values=next(kept), rank_BS=rank_BS)

    def head(self, params):
        return params["head"], jnp.zeros(N + 1)

    def flops(self, length, read):
        raise NotImplementedError

    def _attention(self, params, x_BLD, keys_BSD, values_BSD, mask_BLS):
        logits_BLS = jnp.einsum("bld,bsd->bls", x_BLD @ params["q"], keys_BSD)
        weights_BLS = jax.nn.softmax(jnp.where(mask_BLS, logits_BLS, -1e30), -1)
        return x_BLD + weights_BLS @ values_BSD


@pytest.mark.nightly
def test_in_float64_the_cache_changes_no_token():
    """And the conditionals are equal to 1e-12, so that no seed could tell the two apart."""
    tokens_BL, fixed_BL, attend = requests()
    with jax.enable_x64(True):
        network = Float64(num_states=N + 1, time_conditioned=False)
        kind = Block(process=PROCESS, block=4)
        model = Denoiser(
            params=network.init(None), network=network, parameterization=kind, attend=attend
        )
        for seed in range(4):
            kept, anew = (
                run(blocks(cache=cache), model, seed, tokens_BL, fixed_BL)
                for cache in (True, False)
            )
            np.testing.assert_array_equal(kept.tokens_BL, anew.tokens_BL)
        memory = network.memory(6, 12)
        first_B4, all_B4 = (jnp.broadcast_to(i + jnp.arange(4), (6, 4)) for i in (0, 4))
        needed_B, missing_B4 = jnp.ones(6, bool), jnp.ones((6, 4), bool)
        hidden_BLD, _ = model.extend_block(
            memory, kept.tokens_BL, all_B4, needed_B, first_B4, missing_B4
        )
        assert hidden_BLD.dtype == jnp.float64
        whole_BLD = model.hidden(kept.tokens_BL)[0]
        np.testing.assert_allclose(hidden_BLD[:, 4:8], whole_BLD[:, 4:8], atol=1e-12)


INNER = {
    "event_jump": JUMP,
    "steps": EventJump(schedule=NOISE, steps=3),
    "confidence": Confidence(schedule=NOISE, by="margin"),
    "entropy_bounded": EntropyBounded(schedule=NOISE, gamma=0.3),
    "token_confidence": TokenConfidence(schedule=NOISE, threshold=0.6),
    "backward": Ordered(schedule=NOISE, order="backward", steps=2),
    "tweedie": Tweedie(schedule=NOISE, steps=4),
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", INNER)
def test_the_cache_changes_no_token(name):
    tokens_BL, fixed_BL, attend = requests()
    model = denoiser(4, attend=attend)
    for seed in range(4):
        kept, anew = (
            run(blocks(INNER[name], cache=cache), model, seed, tokens_BL, fixed_BL)
            for cache in (True, False)
        )
        np.testing.assert_array_equal(kept.tokens_BL, anew.tokens_BL)
        np.testing.assert_array_equal(kept.calls_B, anew.calls_B)


@pytest.mark.nightly
def test_temperature_and_top_k_act_with_the_cache():
    tokens_BL, fixed_BL, attend = requests()
    reshape = Reshape.of(temperature=[0.0, 0.5, 1.0, 1.0, 2.0, 1.0], top_k=[5, 2, 1, 5, 3, 5])
    model = denoiser(4, attend=attend, reshape=reshape)
    kept, anew = (run(blocks(cache=c), model, 0, tokens_BL, fixed_BL) for c in (True, False))
    np.testing.assert_array_equal(kept.tokens_BL, anew.tokens_BL)
    other = run(blocks(), denoiser(4, attend=attend), 0, tokens_BL, fixed_BL)
    assert (other.tokens_BL != kept.tokens_BL).any()


@pytest.mark.parametrize(
    "inner", [ReMDM(schedule=NOISE, steps=6), nightly(Speculative(schedule=NOISE))]
)
def test_samplers_with_other_calls_see_the_whole_text(inner):
    """They take no memory, and draw valid tokens all the same."""
    tokens_BL, fixed_BL, attend = requests()
    TRACED.update(hidden=0, extend=0)
    model = denoiser(4, COUNTING, attend=attend)
    samples = run(blocks(inner), model, 0, tokens_BL, fixed_BL)
    assert TRACED["extend"] == 0 < TRACED["hidden"]
    assert (np.asarray(samples.tokens_BL) < N).all()
    np.testing.assert_array_equal(
        np.asarray(samples.tokens_BL)[fixed_BL], np.asarray(tokens_BL)[fixed_BL]
    )


@pytest.mark.nightly
def test_one_program_for_all_blocks_and_texts():
    """Its network calls are traced once for each number of rows, however many blocks there are."""
    sampler, traces = blocks(), []

    @functools.partial(jax.jit, compiler_options=oracle.QUICKLY)
    def drawn(model, keys_B, tokens_BL, fixed_BL):
        traces.append(1)
        return sampler(model, keys_B, tokens_BL, fixed_BL)

    for length in (12, 40):
        tokens_BL = i32(np.zeros((2, length)))
        TRACED.update(hidden=0, extend=0)
        for given in (0, 3, 8, length - 1):
            fixed_BL = jnp.broadcast_to(jnp.arange(length) < given, tokens_BL.shape)
            attend = Attend(segment_BL=i32(np.ones((2, length))).at[1, -given // 2 :].set(0))
            fixed_BL = fixed_BL | (attend.segment_BL == 0)
            drawn(denoiser(4, COUNTING, attend=attend), keys(given, 2), tokens_BL, fixed_BL)
        assert TRACED["hidden"] == 0
        assert TRACED["extend"] <= 3 * 2  # one block, two blocks, all; lax.switch may trace twice
    assert len(traces) == 2  # one a length


@pytest.mark.nightly
def test_a_sequence_does_not_depend_on_its_batch():
    tokens_BL, fixed_BL, attend = requests()
    batched = run(blocks(), denoiser(4, attend=attend), 7, tokens_BL, fixed_BL)
    for b, key in enumerate(keys(7, 6)):
        own = Attend(segment_BL=attend.segment_BL[b : b + 1])
        model = denoiser(4, attend=own)
        alone = oracle.sample(
            blocks(), model, key[None], tokens_BL[b : b + 1], fixed_BL[b : b + 1], False
        )
        np.testing.assert_array_equal(alone.tokens_BL[0], batched.tokens_BL[b])
        assert alone.calls_B[0] == batched.calls_B[b]


# ---------------------------------------------------------------- laws


def law_of_blocks(model, block, fixed=oracle.NOTHING_FIXED):
    """[N^L]: the product over blocks of the mean over orders of the chain rule."""
    states = oracle.all_states(oracle.N + 1)
    log_c = np.asarray(jax.jit(Denoiser.log_conditional)(model, i32(states)), np.float64)
    clean = oracle.all_states(oracle.N)
    law = np.ones(len(clean))
    for first in range(0, oracle.L, block):
        places = [i for i in range(first, min(first + block, oracle.L)) if fixed[i] < 0]
        total = np.zeros(len(clean))
        orders = list(itertools.permutations(places))
        for order in orders:
            xt, nats = clean.copy(), np.zeros(len(clean))
            xt[:, places] = oracle.N
            # Later blocks are masked; rows of this block do not see them.
            xt[:, first + block :] = oracle.N
            for i in order:
                index = oracle.state_index(xt, oracle.N + 1)
                nats += log_c[index, i, clean[:, i]]
                xt[:, i] = clean[:, i]
            total += np.exp(nats)
        law *= total / len(orders)
    held = [i for i in range(oracle.L) if fixed[i] >= 0]
    law[(clean[:, held] != np.asarray(fixed)[held]).any(1)] = 0
    return law


def small(block):
    process = Absorbing(num_tokens=oracle.N)
    network = dataclasses.replace(NETWORK, num_states=oracle.N + 1)
    kind = Conditional(process=process) if block is None else Block(process=process, block=block)
    return Denoiser(params=random_params(network), network=network, parameterization=kind)


@pytest.mark.nightly
@pytest.mark.parametrize("fixed", [oracle.NOTHING_FIXED, (1, -1, -1, 2)], ids=["free", "given"])
@pytest.mark.parametrize("block", [1, 2, 3])
def test_draws_follow_the_product_of_the_laws_of_blocks(block, fixed):
    """20,000 draws; χ² at 1e-4. Blocks of one position are autoregression."""
    model = small(block)
    law = law_of_blocks(model, block, fixed)
    assert law.sum() == pytest.approx(1, abs=1e-5)
    samples = oracle.draw(blocks(), model, 20_000, seed=block, fixed=fixed, trace=False)
    counts = oracle.counts_of(samples.tokens_BL, oracle.N)
    assert oracle.chi_square_p(counts, law) > 1e-4
    wrong = law_of_blocks(small(4), 4, fixed)
    assert oracle.chi_square_p(counts, wrong) < 1e-4  # a control


@pytest.mark.nightly
def test_one_block_draws_what_its_sampler_draws_from_the_plain_model():
    tokens_BL = i32(np.zeros((64, oracle.L)))
    fixed_BL = jnp.zeros(tokens_BL.shape, bool)
    one = run(blocks(), small(oracle.L), 5, tokens_BL, fixed_BL)
    plain = run(JUMP, small(None), 5, tokens_BL, fixed_BL)
    np.testing.assert_array_equal(one.tokens_BL, plain.tokens_BL)


# ---------------------------------------------------------------- where a text ends


def test_a_text_ends_with_the_block_in_which_its_end_is_drawn():
    tokens_BL, fixed_BL, attend = requests()
    model = denoiser(4, attend=attend)
    ended = 0
    for seed in range(3):
        whole, cut = (
            run(blocks(stop=stop), model, seed, tokens_BL, fixed_BL) for stop in (None, "2, 4")
        )
        for b in range(6):
            free_L = ~np.asarray(fixed_BL[b])
            found = np.flatnonzero(free_L & np.isin(whole.tokens_BL[b], [2, 4]))
            if not len(found):
                np.testing.assert_array_equal(cut.tokens_BL[b], whole.tokens_BL[b])
                continue
            after_L = np.arange(12) >= found[0]
            end = np.asarray(whole.tokens_BL[b])[found[0]]
            expected = np.where(after_L & free_L, end, whole.tokens_BL[b])
            np.testing.assert_array_equal(cut.tokens_BL[b], expected)
            last = (found[0] // 4 + 1) * 4
            assert cut.calls_B[b] == free_L[:last].sum()
            ended += last < 12
    assert ended > 5


# ---------------------------------------------------------------- mistakes


def first_tokens(tokens_RL, real_RL):
    return np.asarray(tokens_RL)[:, 0].astype(np.float32)


def test_samplers_of_whole_texts_are_refused():
    model = denoiser(4)
    with pytest.raises(UserError, match="'event_jump' cannot draw from a block model by itself"):
        JUMP.check(model)
    with pytest.raises(UserError, match="'best_of_n' cannot draw from a block model"):
        BestOfN(schedule=NOISE, inner=JUMP, verifier=first_tokens).check(model)
    BestOfN(schedule=NOISE, inner=blocks(), verifier=first_tokens).check(model)
    Ordered(schedule=NOISE).check(model)  # from left to right
    with pytest.raises(UserError, match="cannot draw from a block model"):
        Ordered(schedule=NOISE, order="backward").check(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block": 5}, "block must be that of the model, 4, got 5"),
        ({"stop": 5}, "stop must be below 5, got 5"),
        ({"stop": "2,7"}, "stop must be below 5, got 7"),
    ],
)
def test_options_that_the_model_does_not_have(fields, message):
    with pytest.raises(FieldError, match=f"^{message}$"):
        blocks(**fields).check(denoiser(4))


def test_guidance_and_negative_ids_are_refused():
    _, fixed_BL, _ = requests()
    model = denoiser(4, reshape=Reshape.of(guidance=[1.0] * 6), given_BL=fixed_BL)
    with pytest.raises(UserError, match="no distribution given masks in earlier blocks"):
        blocks().check(model)
    with pytest.raises(FieldError, match="stop must be ids of tokens such as 2 or 2,5, got -1"):
        blocks(stop=-1)
