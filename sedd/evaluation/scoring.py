"""Evaluates one data set under one protocol.

``choose_estimate`` turns a protocol into a function on batches, and ``score_data_set`` runs that
function over the rows of a data set and sums up the figures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sedd.data.baselines import unigram_nats
from sedd.denoiser import Denoiser
from sedd.errors import FieldError
from sedd.evaluation.bound import BoundResult, score_sequences, summarise
from sedd.evaluation.datasets import DataSet, Track
from sedd.evaluation.estimators import is_exact, label_of, resolve
from sedd.evaluation.journal import Journal
from sedd.evaluation.monte_carlo import MonteCarlo, SequenceNats
from sedd.evaluation.ordered import Order
from sedd.evaluation.protocols import Protocol, describe
from sedd.networks.mesh import from_first
from sedd.schedules import NoiseSchedule
from sedd.types import Array, Key


@dataclass(frozen=True, kw_only=True)
class EvaluationResult(BoundResult):
    """The figures of one data set under one protocol; see ``BoundResult`` for the figures.

    Args:
        data: the evaluated rows.
        protocol: how they were evaluated.
        protocol_name: the name of the protocol that ``protocol`` is, or departs from.
        unigram_nats: nats per token of a model without context, which predicts the frequencies of
            the training tokens. None if these frequencies are unknown.
    """

    data: DataSet
    protocol: Protocol
    protocol_name: str
    unigram_nats: float | None = None

    @property
    def protocol_text(self) -> str:
        """The protocol's name, and the fields in which ``protocol`` departs from it."""
        return describe(self.protocol_name, self.protocol)

    def to_json(self) -> dict[str, Any]:
        """Return all figures and a description of the evaluated tokens, for ``json.dump``."""
        figures = super().to_json()
        for name in ("data", "protocol", "protocol_name"):
            del figures[name]
        return {
            "data": self.data.label,
            "split": self.data.split,
            "fingerprint": self.data.fingerprint,
            "num_tokens_dropped": self.data.num_dropped,
            "num_sequences_not_evaluated": self.data.num_rows_not_evaluated,
            "unigram_entropy": self.data.unigram_entropy,
            **figures,
        }


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """How the nats of a sequence are computed.

    Args:
        name: as ``label_of`` returns it.
        draws: noise levels or orders for each sequence; 0 if the likelihood is exact.
        compute: the function on batches that ``score_sequences`` calls.
    """

    name: str
    draws: int
    compute: Callable[..., SequenceNats]


def choose_estimate(
    chosen: Protocol,
    denoiser: Denoiser,
    order: Order | None = None,
    orders: int = 1,
    *,
    schedule: NoiseSchedule | None = None,
) -> Estimate:
    """Return the estimate that the protocol asks for; with ``order``, the exact NLL of that order.

    Args:
        chosen: the protocol.
        denoiser: the model, which decides what "auto" stands for.
        order: replaces the protocol's estimator by ``ordered``, whose order is forward by default.
        orders: average the likelihood over so many random orders; needs the order random.
        schedule: the model's noise schedule, which "auto" considers as well.

    Raises:
        FieldError: if the model does not have the estimator; or, with ``order``, if it is
            autoregressive, depends on the noise level, or is not absorbing, or has blocks and
            another order than forward; or if ``orders`` is below 1 or goes with another order.
    """
    if orders < 1:
        raise FieldError("orders", f"must be at least 1, got {orders}")
    if order is not None and denoiser.causal:
        raise FieldError(
            "order",
            f"{order}: an autoregressive model has one order only, from left to right; leave the "
            "order out",
        )
    estimator = chosen.estimator if order is None else "ordered"
    try:
        resolved = resolve(estimator, denoiser, schedule)
    except ValueError as error:
        if order is not None:
            problem = f"{order} needs a time-independent absorbing model"
            raise FieldError("order", problem) from error
        raise FieldError("estimator", str(error).removeprefix("estimator ")) from error
    order = order or "forward"
    if resolved == "ordered" and denoiser.block is not None and order != "forward":
        raise FieldError(
            "order", f"{order}: a block model draws its blocks from left to right: use forward"
        )
    if orders > 1 and (resolved != "ordered" or order != "random"):
        raise FieldError("orders", f"{orders} averages over random orders: it needs order random")
    draws = orders if resolved == "ordered" else chosen.draws
    compute = MonteCarlo(
        draws=chosen.draws, t_min=chosen.t_min, estimator=resolved, order=order, orders=orders
    )
    return Estimate(
        name=label_of(resolved, order, orders),
        draws=0 if is_exact(resolved, orders) else draws,
        compute=compute,
    )


def score_data_set(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    key: Key[Array, ""],
    data: DataSet,
    estimate: Estimate,
    *,
    protocol: Protocol,
    protocol_name: str,
    batch_size: int,
    count_text: Callable | None = None,
    journal: Journal | None = None,
    track: Track | None = None,
    train_counts_N: np.ndarray | None = None,
) -> EvaluationResult:
    """Score the rows of a data set, ``batch_size`` at a time; see ``estimates`` for the devices.

    Args:
        denoiser: the model.
        schedule: its noise schedule.
        key: the noise of a sequence depends on this key and on its place in the data set alone.
        data: the rows.
        estimate: how to score them, from ``choose_estimate`` of ``protocol``.
        protocol: the protocol, for the result.
        protocol_name: its name, or that of the protocol that it departs from.
        batch_size: rows of a network call, over all devices.
        count_text: maps ids to (characters, bytes), for figures per character and byte.
        journal: a file of finished sequences; these are not computed again, and new ones are added.
            With several processes that of the first one counts, and the others need none.
        track: wraps the batches to show progress.
        train_counts_N: how often each token occurs in the training text, for ``unigram_nats``.

    Raises:
        ValueError: if there is no row, or no token of the rows is scored.
    """
    done = from_first(None if journal is None else journal.done(data.label))
    scored = [] if done is None else [done]
    first = sum(map(len, scored))
    batches = data.batches(batch_size, first=first, track=track)
    options = {"first": first, "count_text": count_text}
    for part in score_sequences(denoiser, schedule, key, batches, estimate.compute, **options):
        scored.append(part)
        if journal is not None:
            journal.add(data.label, part)
    figures = summarise(
        scored,
        draws=estimate.draws,
        estimator=estimate.name,
        t_min=protocol.t_min,
        outer_terms=protocol.outer_terms,
    )
    return EvaluationResult(
        **vars(figures),
        data=data,
        protocol=protocol,
        protocol_name=protocol_name,
        unigram_nats=_unigram_nats(data, train_counts_N),
    )


def _unigram_nats(data: DataSet, train_counts_N: np.ndarray | None) -> float | None:
    """Nats per scored token of the training frequencies; None if these are unknown."""
    if train_counts_N is None:
        return None
    counts_N = np.pad(data.counts, (0, len(train_counts_N) - len(data.counts)))
    return unigram_nats(train_counts_N, counts_N)
