"""One data set under one protocol: its sequences scored in batches, and the figures of all."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from sedd.data.baselines import unigram_nats
from sedd.denoiser import Denoiser
from sedd.errors import FieldError
from sedd.evaluation.bound import BoundResult, score_sequences, summarise
from sedd.evaluation.datasets import DataSet
from sedd.evaluation.journal import Journal
from sedd.evaluation.monte_carlo import REPLICATES, MonteCarlo, SequenceNats, resolve
from sedd.evaluation.ordered import make_order, ordered_nats
from sedd.evaluation.protocols import Protocol, describe
from sedd.schedules import NoiseSchedule
from sedd.types import Array, Key

Order = Literal["forward", "backward", "random"]
Track = Callable[[Iterable[Any], str, int], Iterable[Any]]  # batches, their label, their number


@dataclass(frozen=True, kw_only=True)
class EvaluationResult(BoundResult):
    """The figures of one data set under one protocol; see ``BoundResult`` for the figures.

    Args:
        data: the evaluated rows.
        protocol: how they were evaluated.
        protocol_name: the name of the protocol that ``protocol`` is, or departs from.
        unigram_nats: cross entropy of the tokens under the training frequencies, in nats per token:
            what a model without context attains. None if these are unknown.
    """

    data: DataSet
    protocol: Protocol
    protocol_name: str
    unigram_nats: float | None = None

    @property
    def protocol_text(self) -> str:
        """The protocol's name with the fields that differ from it."""
        return describe(self.protocol_name, self.protocol)

    def to_json(self) -> dict[str, Any]:
        """All figures, and which tokens they are of; ready for ``json.dump``."""
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
class InOrder:
    """The exact NLL of one order of each sequence's tokens, with the arguments of ``MonteCarlo``.

    All replicates are the same, so that their spread is 0.
    """

    order: Order

    def __call__(self, denoiser, schedule, keys_B, x0_BL, scored_BL) -> SequenceNats:
        order_BL = make_order(self.order, keys_B, scored_BL)
        nats_B = ordered_nats(denoiser, order_BL, x0_BL, scored_BL)
        nats_BR = jnp.repeat(nats_B[:, None], REPLICATES, 1)
        zero_BR = jnp.zeros_like(nats_BR)
        return SequenceNats(prior_B=zero_BR[:, 0], diffusion_BR=nats_BR, reconstruction_BR=zero_BR)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """How the nats of a sequence are computed.

    Args:
        name: "k_dce", "score_entropy", "exact", or an order such as "forward order".
        draws: noise levels for each sequence; 0 where the likelihood is exact.
        compute: the function that ``score_sequences`` calls.
    """

    name: str
    draws: int
    compute: Callable[..., SequenceNats]


def choose_estimate(chosen: Protocol, denoiser: Denoiser, order: Order | None = None) -> Estimate:
    """The estimate that the protocol asks for, or with ``order`` the exact NLL of one order.

    Raises:
        FieldError: on an estimator or an order that the model does not have.
    """
    if order is None:
        try:
            name = resolve(chosen.estimator, denoiser)
        except ValueError as error:
            problem = str(error).removeprefix("estimator ")
            raise FieldError("estimator", problem) from error
        compute = MonteCarlo(draws=chosen.draws, t_min=chosen.t_min, estimator=chosen.estimator)
        return Estimate(name=name, draws=0 if name == "exact" else chosen.draws, compute=compute)
    if denoiser.causal:
        raise FieldError(
            "order", f"{order}: an autoregressive model has its own order, the default"
        )
    if not denoiser.time_independent or not denoiser.process.absorbing:
        raise FieldError("order", f"{order} needs a time-independent absorbing model")
    return Estimate(name=f"{order} order", draws=0, compute=InOrder(order=order))


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
    """Score the rows of a data set, ``batch_size`` at a time on all local devices.

    Args:
        denoiser: the model.
        schedule: its noise schedule.
        key: noise of a sequence depends on this key and on its place in the data set alone.
        data: the rows.
        estimate: how to score them, from ``choose_estimate``.
        protocol: what ``estimate`` was chosen for.
        protocol_name: the name of the protocol that ``protocol`` is, or departs from.
        batch_size: rows side by side, over all devices.
        count_text: ids to (characters, bytes), for figures per character and byte.
        journal: sequences that it holds are not computed again, and new ones are added to it.
        track: wraps the batches, to show progress.
        train_counts_N: how often each token is in the training text, for ``unigram_nats``.
    """
    done = journal.done(data.label) if journal is not None else None
    scored = [] if done is None else [done]
    first = sum(map(len, scored))
    starts = range(first, len(data.chosen), batch_size)
    batches = (data.rows(start, batch_size) for start in starts)
    if track is not None:
        batches = track(batches, data.label, len(starts))
    for part in score_sequences(
        denoiser, schedule, key, batches, estimate.compute, first=first, count_text=count_text
    ):
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
    baseline = None
    if train_counts_N is not None:
        counts_N = np.pad(data.counts, (0, len(train_counts_N) - len(data.counts)))
        baseline = unigram_nats(train_counts_N, counts_N)
    return EvaluationResult(
        **vars(figures),
        data=data,
        protocol=protocol,
        protocol_name=protocol_name,
        unigram_nats=baseline,
    )
