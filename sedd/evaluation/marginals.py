"""The log marginals of a marginal head, and how well they agree with the model's own likelihoods.

``MarginalDraws`` computes them; ``Marginals`` holds those of some texts, and ``LevelIdentity`` a
check that needs no further network calls than those of the bound. See ``docs/marginals.md``.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sedd.arrays import fold
from sedd.denoiser import Denoiser
from sedd.errors import UserError
from sedd.evaluation.bound import estimates
from sedd.evaluation.measured import Measured, ratio_of
from sedd.evaluation.ordered import nats_over_orders
from sedd.evaluation.report import Section, Table, plain_axes
from sedd.schedules import LogLinear
from sedd.types import Array, Key

APART = 10.0  # nats between the texts that the paper's correlations are computed on
SHOWN = 60  # characters of a text in a table


class Agreement(NamedTuple):
    """Correlations of two quantities over some texts; None for fewer than 3, or without spread."""

    pearson: float | None
    spearman: float | None
    texts: int


@dataclass(frozen=True, kw_only=True)
class MarginalDraws:
    """The estimate of ``log_marginals``: f of each sequence, then log p over random orders.

    ``orders`` are drawn independently for each sequence. The result is [B, 1 + orders].
    """

    orders: int = 0

    def __call__(self, denoiser, schedule, keys_B, x0_BL, scored_BL) -> Array:
        """Evaluate x_S for the scored positions S; the tokens at the others are ignored."""
        x_BL = jnp.where(scored_BL, x0_BL, denoiser.mask_id)
        value_B = denoiser.log_marginal(x_BL)
        if not self.orders:
            return value_B[:, None]

        def draw(number):
            order_keys_B = fold(keys_B, number)
            return -nats_over_orders(denoiser, order_keys_B, x_BL, scored_BL, order="random")

        log_probs_KB = jax.lax.map(draw, jnp.arange(self.orders))
        return jnp.concatenate([value_B[None], log_probs_KB]).T


@dataclass(frozen=True, kw_only=True)
class Marginals:
    """Log marginals of S texts by the marginal head, and by orders for comparison.

    The head's values rank texts. They are no normalised log likelihoods: the conditionals of a
    masked model do not belong to one distribution, so that exp(f) does not sum to 1 over all texts.

    Args:
        log_marginal_S: f of each text, in nats.
        known_S: the number of its visible tokens.
        log_probs_SK: log p of the visible tokens in K random orders of each text; [S, 0] if not
            computed. The last one is only compared with the others.
    """

    log_marginal_S: np.ndarray
    known_S: np.ndarray
    log_probs_SK: np.ndarray

    @property
    def orders(self) -> int:
        """The number of orders of ``log_mean``; 0 if none were computed."""
        return max(self.log_probs_SK.shape[1] - 1, 0)

    @property
    def log_mean(self) -> np.ndarray:
        """Log of the mean probability over ``orders`` random orders; only if these were drawn."""
        return np.logaddexp.reduce(self.log_probs_SK[:, :-1], axis=1) - math.log(self.orders)

    def agreement(self, *, apart: float | None = None, with_one: bool = False) -> Agreement:
        """Correlate f with ``log_mean`` over the texts.

        Args:
            apart: take only texts whose log means differ by more than this, in nats, as the paper
                does: the likeliest text, then the next one that lies further below it, and so on.
                This leaves out texts that are hard to tell apart, and raises the correlations.
            with_one: correlate one other order with ``log_mean`` instead of f.
        """
        mean_S = self.log_mean
        value_S = self.log_probs_SK[:, -1] if with_one else self.log_marginal_S
        chosen = slice(None) if apart is None else pick_apart(mean_S, apart)
        return _agreement(value_S[chosen], mean_S[chosen])

    def to_json(self) -> dict[str, Any]:
        """Return the figures of each text and the correlations, for ``json.dump``."""
        texts = [
            {"known": int(known), "log_marginal": float(value)}
            for known, value in zip(self.known_S, self.log_marginal_S, strict=True)
        ]
        if not self.orders:
            return {"texts": texts}
        for text, mean, one in zip(texts, self.log_mean, self.log_probs_SK[:, -1], strict=True):
            text |= {"log_mean": float(mean), "one_order": float(one)}
        named = {name: found._asdict() for name, found in self._agreements().items()}
        return {"texts": texts, "orders": self.orders, "agreement": named}

    def table(self, texts: Iterable[str]) -> Table:
        """A row for each text, with at most ``SHOWN`` of its characters."""
        columns = ["text", "known tokens", "f, nats"]
        cells = [
            [_short(text) for text in texts],
            self.known_S.tolist(),
            self.log_marginal_S.tolist(),
        ]
        if self.orders:
            columns += [f"log-mean of {self.orders} orders", "another order"]
            cells += [self.log_mean.tolist(), self.log_probs_SK[:, -1].tolist()]
        title = "Approximate log marginals f: they rank texts, and exp(f) does not sum to 1"
        return Table(title=title, columns=columns, rows=list(zip(*cells, strict=True)))

    def agreement_table(self) -> Table:
        """The correlations with the log-mean, of f and of one other order."""
        rows = [(name, *found) for name, found in self._agreements().items()]
        title = f"Agreement with the log-mean of {self.orders} orders"
        return Table(title=title, columns=("", "Pearson", "Spearman", "texts"), rows=rows)

    def _agreements(self) -> dict[str, Agreement]:
        return {
            f"{name}, {which}": self.agreement(apart=apart, with_one=with_one)
            for name, with_one in (("f", False), ("one other order", True))
            for which, apart in (("all texts", None), (f"{APART:g} nats apart", APART))
        }

    def figure(self):
        """Plot f against the log-mean of orders, a point for each text."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.4, 5), dpi=150, layout="constrained")
        axes = figure.subplots()
        axes.axline((self.log_mean[0],) * 2, slope=1, color="#555555", lw=1, ls="--")
        axes.plot(self.log_mean, self.log_marginal_S, "o", color="#2f6fb0", ms=4, alpha=0.6)
        axes.set_xlabel(f"log-mean of {self.orders} random orders, nats")
        axes.set_ylabel("f from one network call, nats")
        plain_axes(axes)
        return figure


@dataclass(frozen=True, kw_only=True)
class LevelIdentity:
    """The mean of f over texts beside minus the k-DCE bound, which it equals after training.

    Args:
        value: the mean of f, in nats per token.
        bound: minus the bound, in nats per token.
        difference: value - bound, with an error over texts.
    """

    value: Measured
    bound: Measured
    difference: Measured

    @classmethod
    def of(cls, log_marginal_S: np.ndarray, nats_S: np.ndarray, tokens_S: np.ndarray):
        """From f, the k-DCE nats and the numbers of tokens of the same texts."""
        each = (log_marginal_S, -nats_S, log_marginal_S + nats_S)
        value, bound, difference = (ratio_of(top_S, tokens_S) for top_S in each)
        return cls(value=value, bound=bound, difference=difference)

    def to_json(self) -> dict[str, Any]:
        """Return values and errors, for ``json.dump``."""
        return {name: measured._asdict() for name, measured in vars(self).items()}

    def table(self) -> Table:
        """The two sides and their difference."""
        row = (self.value, self.bound, self.difference)
        columns = ("mean of f", "− bound (k-DCE)", "difference")
        return Table(title="Level identity, nats per token", columns=columns, rows=[row])


def log_marginals(
    denoiser: Denoiser,
    key: Key[Array, ""],
    batches: Iterable[tuple[np.ndarray, ...]],
    *,
    orders: int = 0,
) -> Marginals:
    """Compute the log marginals of texts by the marginal head, one network call each.

    Args:
        denoiser: the model; its network has a marginal head.
        key: the orders of text i depend on ``fold_in(key, i)``.
        batches: pairs of tokens x_BL and of the visible positions [B, L].
        orders: compare with the log-mean probability over so many random orders, and one more for
            itself: (orders + 1)·L network calls for each text. 0 for no comparison.

    Raises:
        UserError: the network has no marginal head.
    """
    check_head(denoiser)
    draws = MarginalDraws(orders=orders + 1 if orders else 0)
    values, known = [], []
    # The orders depend on no noise schedule.
    for _, visible_BL, value_BK in estimates(denoiser, LogLinear(), key, batches, draws):
        values.append(value_BK.astype(np.float64))
        known.append(visible_BL.sum(-1))
    value_SK = np.concatenate(values)
    return Marginals(
        log_marginal_S=value_SK[:, 0],
        known_S=np.concatenate(known),
        log_probs_SK=value_SK[:, 1:],
    )


def check_head(denoiser: Denoiser) -> None:
    """Raise UserError if the network has no marginal head."""
    if not denoiser.network.has_marginal_head:
        raise UserError(
            f"the network {type(denoiser.network).__name__} has no marginal head: train one by "
            "--config sotu_marginal --init-from RUN, see docs/marginals.md"
        )


def pick_apart(values_S: np.ndarray, apart: float) -> np.ndarray:
    """Choose indices from the largest value downwards, each more than ``apart`` below the last."""
    chosen: list[int] = []
    for index in np.argsort(-values_S):
        if not chosen or values_S[chosen[-1]] - values_S[index] > apart:
            chosen.append(int(index))
    return np.array(chosen, int)


def marginals_section(
    texts: Iterable[str], found: Marginals | None, rows: Marginals, identity: LevelIdentity
) -> Section:
    """Make a part of a report.

    Args:
        texts: the texts of ``found``.
        found: their log marginals; None without texts.
        rows: those of the rows of a data set.
        identity: the level identity of these rows.
    """
    tables = [] if found is None else [found.table(texts)]
    tables.append(identity.table())
    if rows.orders:
        tables.append(rows.agreement_table())
    figures = [rows.figure()] if rows.orders else []
    return Section(title="Log marginals", text=EXPLANATION, tables=tables, figures=figures)


def _agreement(a_S: np.ndarray, b_S: np.ndarray) -> Agreement:
    from scipy import stats  # which changes the filters of warnings

    if len(a_S) < 3 or np.ptp(a_S) == 0 or np.ptp(b_S) == 0:
        return Agreement(None, None, len(a_S))
    pearson = np.corrcoef(a_S, b_S)[0, 1]
    spearman = np.corrcoef(stats.rankdata(a_S), stats.rankdata(b_S))[0, 1]
    return Agreement(float(pearson), float(spearman), len(a_S))


def _short(text: str) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 1]}…"


EXPLANATION = (
    "f approximates the log probability of the visible tokens of a text, with all others summed "
    "out, by one network call. It ranks texts. It is no log likelihood: the conditionals of a "
    "masked model do not belong to one distribution, so that exp(f) does not sum to 1.\n\n"
    "After training, the mean of f over the data equals minus the bound that k-DCE estimates; the "
    "error of the difference is over sequences. Correlations over texts that lie 10 nats apart are "
    "the published kind, and higher than those over all texts."
)
