"""``sedd sample --features``: draw texts under a control, and print the figures of their law."""

import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sedd.commands.answers import Answer, Answering, Asked
from sedd.commands.asking import Asking, Steering
from sedd.commands.cli import note
from sedd.control.draws import POOL, TOTAL_VARIATION, Drawing, Proposals, score_of
from sedd.control.estimates import Curve
from sedd.control.features import Features
from sedd.control.law import Control
from sedd.control.ratio import LogRatio
from sedd.errors import UserError
from sedd.evaluation.measured import Measured
from sedd.evaluation.report import Cell, Table
from sedd.progress import Activity
from sedd.samplers.particle import Particle
from sedd.samplers.verifier import TextVerifier

SEEDS = 2**32
ROUGH = 30  # effective texts, below which errors of the delta method are rough
ROWS = 7  # of the printed curve


@dataclass(kw_only=True)
class Controlled:
    """Draws the answers of one request under a control.

    Proposal number i has the seed ``--seed`` + i, so that ``sample.py --seed`` with the seed of an
    answer draws it again (not with ``particle``). The first ``--pool`` of them determine λ.

    Args:
        asking: the flags and the model.
        answering: the settings that all batches share.
    """

    asking: Asking
    answering: Answering

    def __post_init__(self):
        command = self.asking.command
        flags = command.control
        self.features: Features = flags.load()
        self.pool = flags.pool or POOL
        with self.asking.requests() as requests:
            first = next(iter(requests()))
        assert isinstance(first, Asked)
        self._first, self._drawn = first, 0
        self._activity: Activity | None = None
        self.drawing: Drawing[Answer] = Drawing(
            proposals=self._proposals(self._proposed(), 0),
            features=self.features,
            moments=np.array(flags.wanted),
            method=flags.method or "reject",
            num=command.num,
            pool=self.pool,
            uniform=lambda one: np.random.default_rng([one.request.seed, 1]).random(),
            rng=np.random.default_rng([command.seed, 2]),
            total_variation=(
                TOTAL_VARIATION if flags.total_variation is None else flags.total_variation
            ),
            steered=self._steered,
            log_ratio=self._log_ratio() if flags.base is not None else None,
        )

    def _log_ratio(self) -> Callable[[list[Answer]], np.ndarray]:
        """The log ratio of texts under the law of --base and of the model that proposes."""
        command = self.asking.command
        assert command.control.base is not None
        base = command.how.load(command.control.base)
        ratio = LogRatio(base, self.asking.model, self._first.sampler, command.batch_size)
        return lambda texts: ratio([one.tokens for one in texts])

    def _proposed(self) -> Asked:
        """The request with the sampler whose law is controlled."""
        sampler = self._first.sampler
        if self.asking.command.control.method != "particle":
            return self._first
        assert isinstance(sampler, Particle)
        return self._first._replace(sampler=sampler.inner)

    def _steered(self, control: Control) -> Proposals[Answer]:
        """The texts of the particle sampler, steered by λ·φ."""
        verifier = self.asking.verifier
        assert isinstance(verifier, TextVerifier)
        assert isinstance(verifier.function, Steering)
        verifier.function.score = score_of(control, self.features)
        return self._proposals(self._first, 2 * self.pool)

    def _proposals(self, asked: Asked, start: int) -> Proposals[Answer]:
        """The texts of a request with the seeds from ``--seed`` + ``start`` on."""
        command = self.asking.command

        def requests() -> Iterator[Asked]:
            for number in itertools.count(command.seed + start):
                if number >= SEEDS:
                    raise UserError(f"--seed {command.seed}: there is no seed beyond 2**32 - 1")
                request = dataclasses.replace(asked.request, id=number, seed=number)
                yield asked._replace(request=request)

        width = asked.sampler.width
        size = max(command.batch_size // width, 1)
        if asked.sampler is self._first.sampler and width > 1:
            size = min(size, max(command.num, 1))
        answering = dataclasses.replace(self.answering, counts={asked.program: size})
        return Proposals(self._checked(answering, requests()), lambda one: one.text, self.features)

    def _checked(self, answering: Answering, asked: Iterator[Asked]) -> Iterator[list[Answer]]:
        """Yield the texts, and show their number; UserError if the logit processor failed."""
        for batch in answering.answers(asked):
            if self.asking.processor is not None:
                self.asking.processor.raise_error()
            self._drawn += len(batch)
            if self._activity is not None:
                returned = f"{len(self.drawing.drawn):,} returned"
                self._activity.update(f"drawing: {self._drawn:,} texts of the model, {returned}")
            yield batch

    def batches(self) -> Generator[list[Answer]]:
        """Yield the answers in lists, with their features, numbered from 0."""
        drawing, number = self.drawing, itertools.count()
        with Activity("compiling and drawing") as self._activity:
            for batch in drawing.texts():
                weights = [None] * len(batch)
                if drawing.method == "weigh":
                    weights = drawing.weights.tolist()
                answers = [
                    dataclasses.replace(
                        one,
                        request=dataclasses.replace(one.request, id=next(number)),
                        features=dict(zip(self.features.names, features_F.tolist(), strict=True)),
                        weight=weight,
                    )
                    for (one, features_F), weight in zip(batch, weights, strict=True)
                ]
                with self._activity.paused():  # the caller prints them
                    yield answers

    def tables(self) -> list[Table]:
        """The figures of the law and of the answers, once all are drawn."""
        curve = self.drawing.curve
        return [
            feature_table(self.drawing),
            figure_table(self.drawing),
            *([] if curve is None else [curve_table(curve)]),
        ]

    def remarks(self) -> Iterator[str]:
        """Yield what a user should know about these answers."""
        drawing = self.drawing
        assert drawing.estimate is not None
        if drawing.estimate.ess < ROUGH:
            yield (
                f"{drawing.estimate.ess:.1f} effective texts are few: weights and errors are "
                "rough; draw a larger --pool"
            )
        if drawing.method == "resample" and drawing.distinct < drawing.num:
            yield (
                f"resample repeats texts: {drawing.distinct} of {drawing.num} are different; a "
                "larger --pool repeats fewer, and --method reject none"
            )
        if drawing.method == "particle":
            yield (
                "particle is approximate: its law tends to the controlled one as --particles grow, "
                "and the errors are without this bias"
            )


def feature_table(drawing: Drawing[Answer]) -> Table:
    """A row for each feature: what was wanted, the weight, and what was reached."""
    control, found = drawing.control, drawing.estimate
    assert control is not None
    assert found is not None
    law = drawing.method != "particle"  # of its law only the answers are known
    rows: list[tuple[Cell, ...]] = []
    for f, name in enumerate(control.names):
        hard = control.conditions[f]
        weight = (
            f"{control.weights[f]:+}" if hard else Measured(control.weights[f], control.errors[f])
        )
        rows.append(
            (
                name,
                float(control.moments[f]),
                Measured(found.base[f], found.base_errors[f]),
                weight,
                Measured(found.moments[f], found.errors[f]) if law else None,
                Measured(drawing.achieved[f], drawing.achieved_errors[f]),
            )
        )
    columns = ("mean of feature", "wanted", "model", "weight λ", "law of the texts", "these texts")
    return Table(columns=columns, rows=rows)


def figure_table(drawing: Drawing[Answer]) -> Table:
    """The figures of the law: what it costs, and how far it is from the model's."""
    control, found = drawing.control, drawing.estimate
    assert control is not None
    assert found is not None
    rows: list[tuple[Cell, ...]] = [
        ("log Z", Measured(found.log_partition, found.log_partition_error)),
        ("KL to the model, nats", Measured(found.kl, found.kl_error)),
        *(
            []
            if drawing.log_ratio is None
            else [("KL to the proposals", Measured(found.proposal_kl, found.proposal_kl_error))]
        ),
        (f"effective texts of {found.num}", round(found.ess, 1)),
    ]
    if drawing.method in ("reject", "qrs") and found.acceptance is not None:
        assert found.acceptance_error is not None
        rows.append(("acceptance", Measured(found.acceptance, found.acceptance_error)))
    if drawing.log_beta is not None:
        rows.append(("log β", drawing.log_beta))
    rows += [
        ("different texts", drawing.distinct),
        ("texts drawn of the model", drawing.proposals.count),
    ]
    return Table(columns=("figure", "value ± s.e."), rows=rows)


def curve_table(curve: Curve) -> Table:
    """Some rows of the curve of quasi-rejection."""
    places = np.unique(np.linspace(0, len(curve.log_beta) - 1, ROWS).astype(int))
    names = ("log_beta", "acceptance", "total_variation", "kl")
    rows = [tuple(float(getattr(curve, name)[at]) for name in names) for at in places]
    columns = ("log β", "acceptance", "total variation", "KL(law‖qrs), nats")
    return Table(columns=columns, rows=rows, title="quasi-rejection by its bound β")


def report(controlled: Controlled, console: Any) -> None:
    """Print the figures, and the remarks as notes."""
    for table in controlled.tables():
        console.print(table)
    for remark in controlled.remarks():
        note(remark)
