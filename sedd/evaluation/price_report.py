"""The figures of a ``Price`` for some numbers of network calls: tables, text and plot."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sedd.evaluation.measured import Measured
from sedd.evaluation.price import Price
from sedd.evaluation.report import Section, Table, plain_axes
from sedd.schedules import NoiseSchedule

BITS = 1 / math.log(2)  # in a nat


@dataclass(frozen=True, kw_only=True)
class PriceFigures:
    """Nats per token at one number of network calls.

    Args:
        calls: network calls for a text.
        equal: equal groups in random order.
        plan: the best groups in random order, chosen by other sequences than it is priced on.
        groups: the sizes of the best groups, chosen by all sequences.
        excess: by how much ``plan`` exceeds one position a call.
        event_jump: the sampler event_jump over as many intervals of time.
        event_jump_calls: the mean network calls that it takes.
    """

    calls: int
    equal: Measured
    plan: Measured
    groups: list[int]
    excess: Measured
    event_jump: Measured
    event_jump_calls: float

    def to_json(self) -> dict[str, Any]:
        """Return all figures in nats per token, for ``json.dump``; None for unknown errors."""
        figures: dict[str, Any] = {"calls": self.calls}
        for name in ("equal", "plan", "excess", "event_jump"):
            figures[f"{name}_nats"], figures[f"{name}_error"] = getattr(self, name)
        return {**figures, "event_jump_calls": self.event_jump_calls, "groups": self.groups}


def price_figures(
    price: Price, schedule: NoiseSchedule, calls: Sequence[int]
) -> list[PriceFigures]:
    """Compute the figures for each of several numbers of calls, in rising order.

    Raises:
        FieldError: if a number is not in 1..L.
    """
    rows = []
    for number in sorted(set(calls)):
        row = PriceFigures(
            calls=number,
            equal=price.nats_per_token(price.equal_groups(number)),
            plan=price.plan_nats(number),
            groups=price.plan(number),
            excess=price.plan_excess(number),
            event_jump=price.event_jump(schedule, number),
            event_jump_calls=price.event_jump_calls(schedule, number),
        )
        rows.append(row)
    return rows


def price_section(price: Price, rows: Sequence[PriceFigures]) -> Section:
    """Make a part of a report: an explanation, tables in nats and in bits, and a plot."""
    methods = ("equal groups", "best plan", "event_jump")
    nats = Table(
        title="Nats per token",
        columns=("calls", *methods, "its calls", "best plan above one a call"),
        rows=[(r.calls, r.equal, r.plan, r.event_jump, r.event_jump_calls, r.excess) for r in rows],
    )
    bits = Table(
        title="Bits per token",
        columns=("calls", *methods),
        rows=[(r.calls, *map(_in_bits, (r.equal, r.plan, r.event_jump))) for r in rows],
    )
    return Section(
        title="What parallelism costs",
        text=_text(price),
        tables=[nats, bits],
        figures=[price_figure(price, rows)],
    )


def price_figure(price: Price, rows: Sequence[PriceFigures]):
    """Plot h with its error band and fit, and nats per token against network calls."""
    from matplotlib.figure import Figure

    blue, red, green, grey = "#2f6fb0", "#c0504d", "#4f8f4f", "#555555"
    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    known_L, nats_L = np.arange(price.length), price.nats_by_known
    error_L = 2 * np.nan_to_num(price.errors)
    left.fill_between(known_L, nats_L - error_L, nats_L + error_L, color=blue, alpha=0.2, lw=0)
    left.plot(known_L, nats_L, color=blue, lw=1.5, label="h, ± 2 standard errors")
    left.plot(
        known_L, price.profile.nats_L, color=grey, lw=1, ls="--", label="fit that never rises"
    )
    left.set_xlabel("known tokens")
    left.set_ylabel("nats of a random unknown token")
    left.legend(frameon=False)

    one = price.nats_per_token([1] * price.length)
    right.axhline(one.value, color=grey, lw=1, ls="--", label="one position a call")
    series = (
        ("equal groups", red, [(r.calls, r.equal) for r in rows]),
        ("event_jump", green, [(r.event_jump_calls, r.event_jump) for r in rows]),
        ("best plan", blue, [(r.calls, r.plan) for r in rows]),
    )
    for label, color, points in series:
        calls = [calls for calls, _ in points]
        value = [measured.value for _, measured in points]
        right.plot(calls, value, color=color, lw=1.5, marker="o", ms=4, label=label)
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter("{x:g}")
    right.set_xlabel("mean network calls for a text")
    right.set_ylabel("nats per token")
    right.legend(frameon=False)
    for axes in (left, right):
        plain_axes(axes)
    return figure


def _in_bits(nats: Measured) -> Measured:
    error = None if nats.error is None else nats.error * BITS
    return Measured(nats.value * BITS, error)


def _text(price: Price) -> str:
    """The explanation that stands above the tables."""
    count = len(price.known_J)
    measured = (
        "h was measured at every number of known tokens."
        if count == price.length
        else f"h was measured at {count} of the {price.length} numbers of known tokens and "
        "interpolated linearly between them."
    )
    return (
        f"From {price.num_sequences} sequences of {price.length} tokens, {price.draws} network "
        "calls each. Tokens that are revealed by one network call are drawn independently of each "
        "other. The figures are the mean nats of the evaluated text under the law of such a "
        "sampler, for a known random order: 'equal groups' is ordered --order random, 'best plan' "
        "is planned, 'event_jump' divides time into as many intervals and takes the calls beside "
        "it on average. One call is the cross entropy of independent positions; as many calls as "
        "tokens are the bound that k-DCE estimates. The difference between the two is all that "
        "parallelism can cost.\n\n"
        f"h, the nats of a random unknown token given random known ones, is plotted. {measured} "
        "Errors are standard errors over sequences and contain the noise of the draws. The last "
        "column is a difference within sequences, so that its error is smaller. Each part of the "
        "text is priced by a plan that was chosen on the other parts."
    )
