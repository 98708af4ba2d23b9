"""The exact NLL of tokens that are revealed in one order, by the chain rule.

A time-independent absorbing model is an autoregressive model for every order of the positions. The
likelihood of one order takes a network call for each token, or one call for an any-subset model.
"""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from sedd.arrays import at, fold
from sedd.denoiser import Denoiser, all_positions
from sedd.samplers.noise import random_rank
from sedd.types import Array, Bool, Float, Int, Key

Order = Literal["forward", "backward", "random"]


def nats_over_orders(
    denoiser: Denoiser,
    keys_B: Key[Array, " B"],
    x0_BL: Int[Array, "B L"],
    scored_BL: Bool[Array, "B L"],
    *,
    order: Order,
    orders: int = 1,
) -> Float[Array, " B"]:
    """Compute -log of the mean of p(x0 | order) over some orders of each sequence, in nats.

    For one order this is ``ordered_nats``. For several random orders σ_1..σ_K it is
    -log((1/K)·Σ_k p(x0 | σ_k)). Let p̄ be the distribution of the tokens if the order is drawn at
    random first, p̄(x0) = E p(x0 | σ). By Jensen's inequality the expected figure is an upper bound
    on -log p̄(x0). It falls as K grows, from the mean of -log p(x0 | σ) at K = 1, which k-DCE
    estimates too, to -log p̄(x0). Network calls: K times those of ``ordered_nats``.

    Args:
        denoiser: the model, as for ``ordered_nats``.
        keys_B: one key a sequence, for random orders.
        x0_BL: clean tokens.
        scored_BL: positions whose tokens are counted.
        order: the order; see ``make_order``.
        orders: the number K of orders; more than one only makes sense if they are random.
    """

    def nats(keys_B):
        return ordered_nats(denoiser, make_order(order, keys_B, scored_BL), x0_BL, scored_BL)

    if orders == 1:
        return nats(keys_B)
    nats_KB = jax.lax.map(lambda k: nats(fold(keys_B, k)), jnp.arange(orders))
    return math.log(orders) - jax.nn.logsumexp(-nats_KB, axis=0)


def ordered_nats(
    denoiser: Denoiser,
    order_BL: Int[Array, "B L"],
    x0_BL: Int[Array, "B L"],
    scored_BL: Bool[Array, "B L"],
) -> Float[Array, " B"]:
    """Compute -log p of each sequence's scored tokens, revealed in a given order, in nats.

    The mean over uniformly random orders is the quantity that k-DCE estimates (arXiv:2406.03736,
    section 3.3). Network calls: as many as the most scored positions of a sequence; for an
    any-subset model one, with the positions that are not scored as the prompt.

    Args:
        denoiser: the model.
        order_BL: the positions of each sequence, the first to be revealed first. Positions that are
            not scored are given from the start, wherever they stand in the order.
        x0_BL: clean tokens.
        scored_BL: positions whose tokens are counted.

    Raises:
        ValueError: if the model has no likelihood of an order: on a process that is not absorbing,
            on a time-dependent model, and on an autoregressive model, whose only order takes one
            call (``evaluate_bound``).
    """
    if denoiser.causal:
        raise ValueError(
            "an autoregressive model has one order, from left to right: evaluate_bound gives its "
            "exact NLL in one call"
        )
    return follow_order(denoiser, order_BL, x0_BL, scored_BL)[0]


def follow_order(
    denoiser: Denoiser,
    order_BL: Int[Array, "B L"],
    x0_BL: Int[Array, "B L"],
    scored_BL: Bool[Array, "B L"],
    *,
    greedily: bool = False,
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Reveal each sequence's scored tokens in an order, and compare them with the likeliest ones.

    Arguments, errors and network calls are those of ``ordered_nats``. An autoregressive model takes
    one call, and its order must be from left to right.

    Args:
        denoiser: the model.
        order_BL: the positions, the first to be revealed first.
        x0_BL: clean tokens.
        scored_BL: positions whose tokens are revealed.
        greedily: stop where a token is not the likeliest one. The nats are then incomplete, and
            most sequences take few calls.

    Returns:
        -log p of the scored tokens of each sequence in nats, and whether each of them is the most
        likely token, given those before it: whether greedy decoding would have returned them.
    """
    if not denoiser.process.absorbing:
        raise ValueError("the likelihood of an order needs an absorbing process")
    if not denoiser.time_independent:
        raise ValueError(
            "the likelihood of an order needs a time-independent model; for this time-dependent "
            "model only a bound exists (evaluate_bound)"
        )
    # The scored positions come first, in their order.
    later_BL = ~jnp.take_along_axis(scored_BL, order_BL, 1)
    order_BL = jnp.take_along_axis(order_BL, jnp.argsort(later_BL, axis=1, stable=True), 1)
    if denoiser.causal:
        return _in_one_pass(denoiser, denoiser.hidden(x0_BL), x0_BL, scored_BL)
    if denoiser.any_subset:
        rank_BL = jnp.where(scored_BL, 1 + jnp.argsort(order_BL, axis=1), 0)
        hidden_BLD = denoiser.hidden_in_order(x0_BL, rank_BL, all_positions(x0_BL), rank_BL)
        return _in_one_pass(denoiser, (hidden_BLD,), x0_BL, scored_BL)
    return _token_by_token(denoiser, order_BL, x0_BL, scored_BL, greedily)


def _token_by_token(denoiser, order_BL, x0_BL, scored_BL, greedily) -> tuple[Array, Array]:
    """``follow_order`` with a network call for each token; ``order_BL`` has scored ones first."""
    count_B = scored_BL.sum(1)

    def unfinished(carry):
        i, _, _, likeliest_B = carry
        return denoiser.anywhere((i < count_B) & (likeliest_B | (not greedily)))

    def reveal(carry):
        i, x_BL, nats_B, likeliest_B = carry
        position_B1 = jax.lax.dynamic_slice_in_dim(order_BL, i, 1, 1)
        log_probs_B1N = denoiser.log_conditional_at(denoiser.hidden(x_BL), x_BL, position_B1)
        token_B1 = jnp.take_along_axis(x0_BL, position_B1, 1)
        # A sequence whose scored positions are all revealed keeps its results.
        nats_B = nats_B + jnp.where(i < count_B, -at(log_probs_B1N, token_B1)[:, 0], 0.0)
        likeliest_B &= (i >= count_B) | (jnp.argmax(log_probs_B1N, -1) == token_B1)[:, 0]
        revealed_BL = jnp.arange(x_BL.shape[1])[None] == position_B1
        return i + 1, jnp.where(revealed_BL, x0_BL, x_BL), nats_B, likeliest_B

    masked_BL = jnp.where(scored_BL, denoiser.mask_id, x0_BL)
    zero_B = jnp.zeros(len(x0_BL))
    start = (jnp.zeros((), jnp.int32), masked_BL, zero_B, jnp.ones_like(zero_B, bool))
    return jax.lax.while_loop(unfinished, reveal, start)[2:]


def _in_one_pass(denoiser, hidden, x0_BL, scored_BL) -> tuple[Array, Array]:
    """``follow_order`` from the hidden states of one call, in which x0 is given in this order."""
    masked_BL = jnp.where(scored_BL, denoiser.mask_id, x0_BL)

    def nats(rows):
        log_probs_RN = denoiser.log_conditional_rows(hidden, masked_BL, rows)
        return -at(log_probs_RN, rows.pick(x0_BL))

    def likeliest(rows):
        log_probs_RN = denoiser.log_conditional_rows(hidden, masked_BL, rows)
        return jnp.argmax(log_probs_RN, -1) == rows.pick(x0_BL)

    nats_B = denoiser.map_rows(scored_BL, nats, jnp.float32).sum(1)
    return nats_B, (denoiser.map_rows(scored_BL, likeliest, bool) | ~scored_BL).all(1)


def make_order(
    name: str, keys_B: Key[Array, " B"], scored_BL: Bool[Array, "B L"]
) -> Int[Array, "B L"]:
    """Return the positions of each sequence in an order, for ``ordered_nats``.

    Args:
        name: "forward" (left to right), "backward" or "random". A random order is uniform over the
            orders of the scored positions, which come first; padding at the end does not change it.
        keys_B: one key a sequence, for the random order.
        scored_BL: the scored positions.

    Raises:
        ValueError: on another name.
    """
    if name == "random":
        return jnp.argsort(random_rank(keys_B, scored_BL), axis=1)
    if name not in get_args(Order):
        raise ValueError(f"an order is one of {', '.join(get_args(Order))}, got {name!r}")
    position_L = jnp.arange(scored_BL.shape[1])
    return jnp.broadcast_to(position_L if name == "forward" else position_L[::-1], scored_BL.shape)
