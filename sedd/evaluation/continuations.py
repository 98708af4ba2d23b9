"""Log likelihoods of continuations, each given its context, with Monte-Carlo errors.

Tasks of multiple choice compare how likely a model finds each answer to a question. A pair of token
ids, context and continuation, is scored in one of three ways:

- autoregressive models have the exact log likelihood, in one network call;
- ``bound``, for all other models, estimates the bound of ``sedd.evaluation.monte_carlo``: the
  context is never corrupted. For a time-independent absorbing model this is k-DCE over the n tokens
  of the continuation. With n = 1 it is the log likelihood itself, and takes one call.
- ``ordered``, for time-independent absorbing models, is the exact log likelihood of the tokens
  revealed from left to right. It takes n calls, or one for an any-subset model.

Pairs are scored in batches of similar length. The draws of a pair depend on its tokens and on the
key alone, not on its batch. Padding is in a segment of its own, so that no token sees it.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from sedd.arrays import bucket
from sedd.denoiser import Denoiser, all_positions
from sedd.errors import FieldError
from sedd.evaluation.bound import keyed_estimates
from sedd.evaluation.estimators import REPLICATES, Estimator, check_draws, is_exact, resolve
from sedd.evaluation.monte_carlo import MonteCarlo
from sedd.evaluation.ordered import follow_order
from sedd.networks.base import Attend
from sedd.schedules import NoiseSchedule
from sedd.types import Array, Key

Likelihood = Literal["bound", "ordered"]
Pair = tuple[Sequence[int], Sequence[int]]
"""The token ids of a context, which may be empty, and of its continuation."""
PADDING = -1  # in place of a token id


@dataclass(frozen=True, kw_only=True)
class ContinuationScores:
    """The scores of S continuations, in the order of the pairs.

    Args:
        nats_S: estimates of -log p(continuation given context), or of an upper bound, in nats.
        error_S: their Monte-Carlo standard errors, from the spread of four replicates; 0 if exact.
        exact_S: whether each is the negative log likelihood itself and not a bound.
        greedy_S: whether greedy decoding from left to right returns the continuation. False for
            models without such a decoding; see ``decodes_greedily``.
    """

    nats_S: np.ndarray
    error_S: np.ndarray
    exact_S: np.ndarray
    greedy_S: np.ndarray


def score_continuations(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    key: Key[Array, ""],
    pairs: Sequence[Pair],
    *,
    likelihood: Likelihood = "bound",
    draws: int = 128,
    batch_size: int = 32,
    track: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
) -> ContinuationScores:
    """Score continuations of contexts, split over the devices of the parameters.

    Args:
        denoiser: the model.
        schedule: its noise schedule.
        key: the source of all draws.
        pairs: contexts and continuations; no continuation is empty.
        likelihood: how models are scored that are not autoregressive.
        draws: noise levels for each bound; a multiple of 4.
        batch_size: rows of a network call, over all devices. It changes scores by rounding only.
        track: wraps the batches, whose number it gets, to show progress.

    Raises:
        FieldError: if a value is out of range, or the model has no likelihood of an order.
        ValueError: if a continuation is empty.
    """
    check_draws(draws)
    if batch_size < 1:
        raise FieldError("batch_size", f"must be at least 1, got {batch_size}")
    estimator = estimator_of(denoiser, likelihood)
    if not all(len(continuation) for _, continuation in pairs):
        raise ValueError("a continuation has no tokens")
    nats_S, error_S = np.zeros(len(pairs)), np.zeros(len(pairs))
    exact_S, greedy_S = np.zeros(len(pairs), bool), np.zeros(len(pairs), bool)
    batches = _batches(pairs, batch_size, apart=estimator == "k_dce")
    for one_token in (False, True):
        chosen = [places for single, places in batches if single == one_token]
        if not chosen:
            continue
        # A single token has one number of masks: its bound is exact.
        own = "ordered" if one_token else estimator
        scoring = _Scoring(
            monte_carlo=MonteCarlo(draws=draws, estimator=own),
            greedy=decodes_greedily(denoiser),
        )
        arrays = (_arrays([pairs[i] for i in places]) for places in chosen)
        scored = keyed_estimates(denoiser, schedule, key, arrays, scoring)
        tracked = scored if track is None else track(scored, len(chosen))
        for places, (_, _, (nats_BR, greedy_B)) in zip(chosen, tracked, strict=True):
            nats_BR = nats_BR.astype(np.float64)
            nats_S[places], greedy_S[places] = nats_BR.mean(1), greedy_B
            exact_S[places] = is_exact(own)
            if not is_exact(own):
                error_S[places] = nats_BR.std(1, ddof=1) / np.sqrt(REPLICATES)
    return ContinuationScores(nats_S=nats_S, error_S=error_S, exact_S=exact_S, greedy_S=greedy_S)


def estimator_of(denoiser: Denoiser, likelihood: Likelihood) -> Estimator:
    """The estimator of continuations of more than one token.

    Raises:
        FieldError: if the likelihood is that of an order, and the model has none.
    """
    if likelihood == "bound":
        return "k_dce" if denoiser.any_subset else resolve("auto", denoiser)
    if denoiser.causal:
        raise FieldError(
            "likelihood", "ordered: an autoregressive model is scored exactly; leave it out"
        )
    try:
        return resolve("ordered", denoiser)
    except ValueError:
        raise FieldError(
            "likelihood", "ordered needs a time-independent absorbing model; take bound"
        ) from None


def decodes_greedily(denoiser: Denoiser) -> bool:
    """Whether a model has conditionals of the next token, which greedy decoding needs."""
    return denoiser.process.absorbing and denoiser.time_independent


@dataclass(frozen=True, kw_only=True)
class _Scoring:
    """Scores a batch of padded rows: an estimate for ``keyed_estimates``."""

    monte_carlo: MonteCarlo
    greedy: bool

    def __call__(self, denoiser, schedule, keys_B, x0_BL, scored_BL):
        """Return the replicates of each score [B, R], and whether greedy decoding agrees [B]."""
        real_BL, x0_BL = x0_BL != PADDING, jnp.maximum(x0_BL, 0)
        denoiser = replace(denoiser, attend=Attend(segment_BL=real_BL.astype(jnp.int32)))
        if self.monte_carlo.estimator == "ordered":
            nats_B, greedy_B = follow_order(denoiser, all_positions(x0_BL), x0_BL, scored_BL)
            return jnp.repeat(nats_B[:, None], REPLICATES, 1), greedy_B
        nats = self.monte_carlo(denoiser, schedule, keys_B, x0_BL, scored_BL)
        total_BR = nats.prior_B[:, None] + nats.diffusion_BR + nats.reconstruction_BR
        if not self.greedy:
            return total_BR, jnp.zeros(len(x0_BL), bool)
        order_BL = all_positions(x0_BL)
        return total_BR, follow_order(denoiser, order_BL, x0_BL, scored_BL, greedily=True)[1]


def _batches(
    pairs: Sequence[Pair], batch_size: int, *, apart: bool
) -> list[tuple[bool, np.ndarray]]:
    """Divide the pairs into batches of one padded length, the longest first.

    Within a length, pairs are sorted by the tokens of the continuation, of which the longest in a
    batch decides how many calls an order takes.

    Args:
        pairs: the pairs.
        batch_size: the most pairs in a batch.
        apart: whether continuations of a single token have batches of their own.

    Returns:
        Whether a batch has such continuations only and ``apart`` is set, and the places of its
        pairs.
    """
    groups: dict[tuple[int, bool], list[int]] = {}
    for place, (context, continuation) in enumerate(pairs):
        single = apart and len(continuation) == 1
        length = bucket(len(context) + len(continuation))
        groups.setdefault((length, single), []).append(place)
    batches = []
    for (_, single), places in sorted(groups.items(), reverse=True):
        places.sort(key=lambda place: len(pairs[place][1]))
        for start in range(0, len(places), batch_size):
            batches.append((single, np.array(places[start : start + batch_size])))
    return batches


def _arrays(pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The numbers, padded tokens and scored positions of a batch."""
    length = bucket(max(len(context) + len(continuation) for context, continuation in pairs))
    x0_BL = np.full((len(pairs), length), PADDING, np.int32)
    scored_BL = np.zeros(x0_BL.shape, bool)
    for row, (context, continuation) in enumerate(pairs):
        start, end = len(context), len(context) + len(continuation)
        x0_BL[row, :start], x0_BL[row, start:end] = context, continuation
        scored_BL[row, start:end] = True
    return np.array([number_of(*pair) for pair in pairs], np.uint32), x0_BL, scored_BL


def number_of(context: Sequence[int], continuation: Sequence[int] = ()) -> int:
    """A number in 0..2**32 - 1 for a pair, by which its key is folded: a hash of its tokens."""
    parts = (np.asarray(part, np.int32).tobytes() for part in (context, continuation))
    digest = hashlib.blake2b(digest_size=4)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(digest.digest(), "little")
