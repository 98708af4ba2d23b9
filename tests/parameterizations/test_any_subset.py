"""Two-stream rows of any-subset models: what each row sees, the gradient, and the exact cache."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import f32, i32

from sedd.denoiser import Denoiser
from sedd.errors import UserError
from sedd.networks.base import Attend
from sedd.networks.ddit import DDiT
from sedd.parameterizations.any_subset import UNKNOWN, AnySubset
from sedd.parameterizations.conditional import Conditional
from sedd.processes.absorbing import Absorbing
from sedd.reshape import Reshape

B, L, N = 3, 6, 11
MASK = N
READING = AnySubset(process=Absorbing(num_tokens=N))
NETWORK = DDiT(
    num_states=N + 1,
    time_conditioned=False,
    hidden_dim=16,
    num_layers=2,
    num_heads=2,
    norm_bias=True,
    dropout=0.0,
)
RNG = np.random.default_rng(0)
# Distinct tokens, so that each position has its own row of the embedding.
X_BL = i32(np.stack([RNG.permutation(N)[:L] for _ in range(B)]))
# Prompts of 2, 0 and 1 positions, and a random order of the others.
RANK_BL = i32([[0, 3, 1, 0, 4, 2], [6, 2, 3, 1, 5, 4], [5, 1, 0, 4, 2, 3]])
ALL_BL = i32(np.tile(np.arange(L), (B, 1)))


@functools.cache
def denoiser():
    shapes = jax.eval_shape(NETWORK.init, jax.random.key(0))
    params = jax.tree.map(lambda x: 0.4 * RNG.standard_normal(x.shape, np.float32), shapes)
    return Denoiser(params=params, network=NETWORK, parameterization=READING)


@functools.partial(jax.jit, compiler_options=oracle.QUICKLY)
def in_order(model, x_BL, rank_BL, query_BK, query_rank_BK):
    return model.hidden_in_order(x_BL, rank_BL, query_BK, query_rank_BK)


@functools.partial(jax.jit, compiler_options=oracle.QUICKLY)
def all_rows(model, x_BL):
    """Hidden states of every row, [B, 2L, D]: content, then a query at each position."""
    call = READING.in_order(x_BL, RANK_BL, ALL_BL, RANK_BL)
    return NETWORK.hidden(
        model.params, call.tokens_BM, positions_BL=call.positions_BM, attend=call.attend
    )


def seen_by_the_rules(rank_L):
    """[2L, L]: the rules of the module's docstring, one pair at a time."""
    seen = np.zeros((2 * L, L), bool)
    for i in range(L):
        for j in range(L):
            prompt = rank_L[i] == rank_L[j] == 0
            seen[i, j] = i == j or prompt or rank_L[j] < rank_L[i]
            seen[L + i, j] = rank_L[j] < rank_L[i]
    return seen


def test_every_row_sees_what_the_rules_say():
    call = READING.in_order(X_BL, RANK_BL, ALL_BL, RANK_BL)
    assert call.attend is not None
    got = np.asarray(call.attend.mask(2 * L, call.attend.num_keys(2 * L)))[:, 0]
    np.testing.assert_array_equal(got, [seen_by_the_rules(rank) for rank in np.asarray(RANK_BL)])
    np.testing.assert_array_equal(call.tokens_BM[:, L:], np.full((B, L), MASK))
    np.testing.assert_array_equal(call.read_BL, np.asarray(ALL_BL) + L)


def test_segments_hold_for_query_rows_too():
    segment_BL = i32([[1, 1, 2, 2, 1, 0]] * B)
    query_BK = i32([[4, 2], [0, 3], [1, 5]])
    call = READING.in_order(
        X_BL, RANK_BL, query_BK, i32([[9, 9]] * B), attend=Attend(segment_BL=segment_BL)
    )
    assert call.attend is not None
    own = np.take_along_axis(np.asarray(segment_BL), np.asarray(query_BK), 1)
    seen = np.asarray(call.attend.mask(L + 2, L))[:, 0, L:]
    np.testing.assert_array_equal(seen, own[:, :, None] == np.asarray(segment_BL)[:, None])


def test_later_tokens_change_neither_content_nor_queries():
    """Bit for bit; and earlier ones change both."""
    base = np.asarray(all_rows(denoiser(), X_BL))
    rank_BL = np.asarray(RANK_BL)
    for rank in range(1, L + 1):
        other = np.where(rank_BL == rank, (np.asarray(X_BL) + 1) % N, X_BL)
        moved = np.asarray(all_rows(denoiser(), i32(other)) != base).any(-1)
        expected_B2L = np.concatenate([rank_BL >= rank, rank_BL > rank], 1)
        expected_B2L &= (rank_BL == rank).any(1)[:, None]
        np.testing.assert_array_equal(moved, expected_B2L)


def test_the_gradient_by_embeddings_of_own_or_higher_ranks_is_0():
    @functools.partial(jax.jit, compiler_options=oracle.QUICKLY)
    @jax.jacrev
    def gradients(params):
        """Of the query at each position of the first sequence."""
        model = Denoiser(params=params, network=NETWORK, parameterization=READING)
        one = (x[:1] for x in (X_BL, RANK_BL, ALL_BL, RANK_BL))
        return model.hidden_in_order(*one)[0].sum(-1)

    grad_LVD = np.asarray(gradients(denoiser().params)["trunk"]["embed"]["embedding"])
    rank_L = np.asarray(RANK_BL[0])
    touches_LL = (grad_LVD[:, np.asarray(X_BL[0])] != 0).any(-1)
    np.testing.assert_array_equal(touches_LL, rank_L[None, :] < rank_L[:, None])


def test_the_first_generated_position_has_the_conditional_of_today():
    """Where nothing is generated yet, both passes have the same context; afterwards they differ."""
    known_BL = np.asarray(RANK_BL) == 0
    xt_BL = i32(np.where(known_BL, X_BL, MASK))
    (today_BLD,) = jax.jit(Denoiser.hidden)(denoiser(), xt_BL)
    rank_BL = i32(np.where(known_BL, 0, UNKNOWN))
    first = in_order(denoiser(), xt_BL, rank_BL, ALL_BL, jnp.ones_like(ALL_BL))
    hidden = ~known_BL
    np.testing.assert_allclose(np.asarray(today_BLD)[hidden], first[hidden], atol=1e-5)
    half_BL = np.asarray(RANK_BL) <= 2
    (today_BLD,) = jax.jit(Denoiser.hidden)(denoiser(), i32(np.where(half_BL, X_BL, MASK)))
    third = in_order(denoiser(), X_BL, RANK_BL, ALL_BL, 3 * jnp.ones_like(ALL_BL))
    assert np.abs(np.asarray(today_BLD) - third)[~half_BL].max() > 1e-2


def test_draft_queries_share_what_is_known():
    """The queries of a window at rank n + 1 see the first n, whatever the later content is."""
    n = 2
    known_BL = np.asarray(RANK_BL) <= n
    window = in_order(denoiser(), X_BL, RANK_BL, ALL_BL, i32(np.full((B, L), n + 1)))
    alone = in_order(
        denoiser(),
        i32(np.where(known_BL, X_BL, MASK)),
        i32(np.where(known_BL, RANK_BL, UNKNOWN)),
        ALL_BL,
        i32(np.full((B, L), n + 1)),
    )
    np.testing.assert_array_equal(window, alone)


@functools.partial(jax.jit, compiler_options=oracle.QUICKLY)
def extend(model, memory, tokens, positions, rank, query, query_rank):
    return model.extend(memory, tokens, positions, rank, query, query_rank)


def test_the_memory_gives_the_hidden_states_of_the_full_pass():
    """Content is written a few rows at a time, and drafts that are rejected are overwritten.

    The sequences have prompts of different sizes and are at different stages.
    """
    model = denoiser()
    full = np.asarray(in_order(model, X_BL, RANK_BL, ALL_BL, RANK_BL))
    order_BL = np.argsort(np.asarray(RANK_BL), axis=1, kind="stable")
    x_BL, rank_BL = np.asarray(X_BL), np.asarray(RANK_BL)
    num_prompt = (rank_BL == 0).sum(1)
    memory = NETWORK.memory(B, L)
    done = np.zeros(B, int)  # rows of ``order_BL`` that are in the memory
    checked = 0
    for call in range(2 * L):
        # The prompt comes at once; then one or two rows, more in some sequences than in others.
        count = np.array([2, 2, 1] if call == 0 else [1 + (call + b) % 2 for b in range(B)])
        count = np.where(call == 0, np.maximum(num_prompt, 1), count)
        slot = np.minimum(done[:, None] + np.arange(2), L - 1)
        written = np.arange(2) < np.minimum(count, L - done)[:, None]
        positions = np.take_along_axis(order_BL, slot, 1)
        ranks = np.where(written, np.take_along_axis(rank_BL, positions, 1), UNKNOWN)
        tokens = np.take_along_axis(x_BL, positions, 1)
        # A wrong token first, as a draft that is rejected: the second call overwrites it.
        query = np.take_along_axis(order_BL, np.minimum(done[:, None] + [1, 2], L - 1), 1)
        ask = np.take_along_axis(rank_BL, query, 1)
        arrays = [i32(a) for a in (positions, ranks, query, ask)]
        _, memory = extend(model, memory, i32((tokens + 1) % N), *arrays)
        hidden, memory = extend(model, memory, i32(tokens), *arrays)
        done = np.minimum(done + written.sum(1), L)
        for b in range(B):
            for k in range(2):  # a query is answered if all lower ranks are in the memory
                if (rank_BL[b] < ask[b, k]).sum() <= done[b]:
                    np.testing.assert_allclose(hidden[b, k], full[b, query[b, k]], atol=2e-5)
                    checked += 1
    assert checked > 40
    assert (done == L).all()
    np.testing.assert_array_equal(memory.rank_BS, 2 * rank_BL)


def test_conditionals_of_queries_are_reshaped():
    hot = Reshape.of(temperature=[0.5, 1.0, 2.0])
    model = denoiser()
    hidden = in_order(model, X_BL, RANK_BL, ALL_BL, RANK_BL)
    plain = model.log_conditional_in_order(hidden, X_BL, ALL_BL)
    np.testing.assert_allclose(jnp.exp(plain).sum(-1), 1, atol=1e-5)
    shaped = Denoiser(
        params=model.params, network=NETWORK, parameterization=READING, reshape=hot
    ).log_conditional_in_order(hidden, X_BL, ALL_BL)
    divided = plain / f32([0.5, 1.0, 2.0])[:, None, None]
    np.testing.assert_allclose(shaped, jax.nn.log_softmax(divided, -1), atol=1e-4)


def test_other_models_refuse():
    radd = Denoiser(
        params=None, network=NETWORK, parameterization=Conditional(process=READING.process)
    )
    with pytest.raises(ValueError, match="parameterization conditional has no pass over an order"):
        radd.hidden_in_order(X_BL, RANK_BL, ALL_BL, RANK_BL)
    table = oracle.table_denoiser(oracle.random_table(), oracle.N).network
    with pytest.raises(UserError, match="TableNetwork has no memory"):
        table.memory(2, 4)
    timed = replace(NETWORK, time_conditioned=True)
    flags = jnp.ones((B, L), bool)
    with pytest.raises(ValueError, match="conditioned on the time has no memory"):
        timed.extend(
            None, X_BL, timed.memory(B, L), positions_BM=ALL_BL, rank_BM=RANK_BL, write_BM=flags
        )
    with pytest.raises(ValueError, match="give segments only"):
        READING.inputs(X_BL, Attend(kind="causal"))
