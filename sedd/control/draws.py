"""Draws from a control's law: rejection, quasi-rejection, resampling, and texts by the batch.

``reject`` and ``resample`` pick rows of features. ``Drawing`` runs the whole procedure on batches
of texts of any kind: it determines λ from a first pool, and draws from a second one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar, get_args

import numpy as np

from sedd.control.estimates import Curve, Estimate, curve, estimate
from sedd.control.features import Features
from sedd.control.law import Control, solve
from sedd.errors import FieldError, UserError

Text = TypeVar("Text")
Method = Literal["reject", "resample", "qrs", "particle", "weigh"]
POOL = 1024  # draws of a pool by default
TOTAL_VARIATION = 0.05  # of qrs by default
PENALTY = 20.0  # nats that a particle pays for a condition that it does not meet
TINY = 1e-12  # by which a feature may leave [0, 1] through rounding


def reject(control: Control, features_KF, uniform_K, log_beta: float | None = None) -> np.ndarray:
    """Pick the proposals that rejection accepts: independent draws of the control's law.

    A proposal is accepted with the probability min(1, exp(λ·φ)/β). If β is an upper bound on
    exp(λ·φ), as by default, the law is exactly p; with a smaller β it is proportional to
    a·min(exp(λ·φ), β) (quasi-rejection, arXiv:2112.05702).

    Args:
        control: from ``solve``.
        features_KF: the features of K draws of the sampler.
        uniform_K: independent uniform draws in [0, 1).
        log_beta: log β. By default the bound for features between 0 and 1.

    Returns:
        The indices of the accepted proposals, ascending.

    Raises:
        UserError: no ``log_beta`` is given, and a feature is not between 0 and 1.

    Example:
        >>> import numpy as np, sedd
        >>> draws = np.random.default_rng(0)
        >>> has_digit = (draws.random(1000) < 0.2).astype(float)[:, None]
        >>> law = sedd.control.solve(has_digit[:500], [0.5])
        >>> kept = sedd.control.reject(law, has_digit[500:], draws.random(500))
        >>> bool(0.4 < has_digit[500:][kept].mean() < 0.6)
        True
    """
    features_KF = np.asarray(features_KF, float)
    if log_beta is None:
        log_beta = control.log_bound
        soft_F = ~control.conditions
        for name, values_K, soft in zip(control.names, features_KF.T, soft_F, strict=True):
            if soft and not ((values_K >= -TINY) & (values_K <= 1 + TINY)).all():
                raise UserError(
                    f"feature {name} is {values_K[np.abs(values_K - 0.5).argmax()]:g} in a text, "
                    "and exact rejection needs features between 0 and 1: divide it by its largest "
                    "value, or use the method qrs"
                )
    log_ratio_K = control.log_weights(features_KF) - log_beta
    return np.flatnonzero(np.asarray(uniform_K) < np.exp(np.minimum(log_ratio_K, 0)))


def resample(
    control: Control, features_KF, num: int, rng: np.random.Generator, log_ratio_K=None
) -> np.ndarray:
    """Pick ``num`` of K draws with the probabilities exp(λ·φ) / Σ exp(λ·φ), with replacement.

    Sampling importance resampling: the law of a pick tends to p as K grows. Draws are repeated, the
    more often the smaller the effective number of draws.

    Args:
        control: from ``solve``.
        features_KF: the features of K draws of the sampler.
        num: number of picks.
        rng: the source of randomness.
        log_ratio_K: log a(x)/q(x) of each draw, as in ``solve``; it is added to λ·φ.

    Returns:
        The indices of the picks, in random order.

    Raises:
        UserError: no draw has a weight above 0.
    """
    exponent_K = control.log_weights(np.asarray(features_KF, float))
    if not np.isfinite(exponent_K).any():
        raise UserError(f"none of {len(exponent_K):,} texts meets the conditions")
    exponent_K = exponent_K + (0.0 if log_ratio_K is None else np.asarray(log_ratio_K, float))
    weight_K = np.exp(exponent_K - exponent_K.max())
    return rng.choice(len(weight_K), size=num, p=weight_K / weight_K.sum())


class Proposals(Generic[Text]):
    """An endless stream of draws of the sampler, with their features.

    Args:
        batches: yields the draws in lists.
        text_of: gives the text of a draw.
        features: the user's features.
    """

    def __init__(
        self,
        batches: Iterator[list[Text]],
        text_of: Callable[[Text], str],
        features: Features,
    ):
        self._batches, self._text_of, self._features = batches, text_of, features
        self._rest: list[tuple[Text, np.ndarray]] = []
        self.count = 0  # draws that were taken

    def take(self, num: int | None = None) -> tuple[list[Text], np.ndarray]:
        """The next ``num`` draws, or the next batch, with their features [K, F]."""
        taken, self._rest = self._rest, []
        while not taken or (num is not None and len(taken) < num):
            batch = next(self._batches)
            taken += zip(batch, self._features([self._text_of(one) for one in batch]), strict=True)
        if num is not None:
            taken, self._rest = taken[:num], taken[num:]
        self.count += len(taken)
        return [one for one, _ in taken], np.stack([row for _, row in taken])


@dataclass(kw_only=True)
class Drawing(Generic[Text]):
    """Draws ``num`` texts under a control: λ from a first pool, all else from later draws.

    ``texts`` does the work and fills the other attributes.

    Args:
        proposals: draws of the sampler's own law.
        features: the user's features.
        moments: the wanted moments, one for each feature.
        method: ``reject``, ``resample``, ``qrs``, ``particle`` or ``weigh``.
        num: number of texts; ``weigh`` yields the whole second pool.
        pool: draws of a pool, K. There are two: one for λ, one for the figures and to draw from.
        uniform: gives a uniform draw in [0, 1) that belongs to a proposal.
        rng: the source of randomness of ``resample``.
        total_variation: the largest total variation of ``qrs``, as estimated from the first pool.
        steered: for ``particle``: given the control, yields batches of texts of its sampler.
        log_ratio: if the proposals are draws of another law q: log a(x)/q(x) of some of them. Only
            ``resample`` and ``weigh`` can do with it, since the ratio has no known bound.
    """

    proposals: Proposals[Text]
    features: Features
    moments: np.ndarray
    method: Method
    num: int
    pool: int
    uniform: Callable[[Text], float]
    rng: np.random.Generator
    total_variation: float = TOTAL_VARIATION
    steered: Callable[[Control], Proposals[Text]] | None = None
    log_ratio: Callable[[list[Text]], np.ndarray] | None = None
    control: Control | None = None
    """The law, once λ is known."""
    estimate: Estimate | None = None
    """Its figures, from the second pool."""
    curve: Curve | None = None
    """The curve of ``qrs``, from the second pool."""
    log_beta: float | None = None
    """log β of ``qrs``."""
    drawn: list[np.ndarray] = field(default_factory=list)
    """The features of the texts that were yielded, [F] each."""
    distinct: int = 0
    """How many different proposals the texts are; with ``resample`` fewer than texts."""

    def __post_init__(self):
        if self.method not in get_args(Method):
            methods = ", ".join(get_args(Method))
            raise FieldError("method", f"must be one of {methods}, got {self.method!r}")
        if self.pool < 2:
            raise FieldError("pool", f"must be at least 2, got {self.pool}")
        if self.num < 1:
            raise FieldError("num", f"must be at least 1, got {self.num}")
        if not 0 <= self.total_variation < 1:
            raise FieldError("total_variation", f"must be in [0, 1), got {self.total_variation}")
        if self.log_ratio is not None and self.method not in ("resample", "weigh"):
            raise FieldError(
                "method",
                f"must be resample or weigh where another model proposes, got {self.method!r}: the "
                "ratio of two models has no known bound",
            )
        check_numbers(self.features, self.moments)
        self._ratio_K: np.ndarray | None = None  # of the second pool

    def texts(self) -> Iterator[list[tuple[Text, np.ndarray]]]:
        """Yield the texts with their features in lists, as they are drawn.

        Raises:
            UserError: a feature fails, the moments cannot be met, or ``reject`` has no bound.
        """
        pool, features_KF = self.proposals.take(self.pool)
        ratio_K = self.log_ratio and self.log_ratio(pool)
        control = self.control = solve(features_KF, self.moments, self.features.names, ratio_K)
        if self.method == "reject":
            reject(control, features_KF, np.ones(len(features_KF)))  # checks the bound
        if self.method == "qrs":
            self.log_beta = curve(control, features_KF).at_most(self.total_variation)
        pool, features_KF = self.proposals.take(self.pool)
        self._ratio_K = self.log_ratio and self.log_ratio(pool)
        self.estimate = estimate(control, features_KF, self.log_beta, self._ratio_K)
        if self.method == "qrs":
            self.curve = curve(control, features_KF)
        if self.method == "resample":
            batches = iter([self._resampled(control, pool, features_KF)])
        elif self.method == "weigh":
            self.distinct = self.pool
            batches = iter([list(zip(pool, features_KF, strict=True))])
        elif self.method == "particle":
            assert self.steered is not None
            batches = self._steered(self.steered(control))
        else:
            batches = self._accepted(control, pool, features_KF)
        for batch in batches:
            self.drawn += [row for _, row in batch]
            yield batch

    def _resampled(self, control: Control, pool: list[Text], features_KF: np.ndarray):
        """The picks of sampling importance resampling."""
        picked = resample(control, features_KF, self.num, self.rng, self._ratio_K)
        self.distinct = len(np.unique(picked))
        return [(pool[index], features_KF[index]) for index in picked]

    def _accepted(self, control: Control, texts: list[Text], features_KF: np.ndarray):
        """Accepted proposals: those of the second pool first, then of as many more as needed."""
        while True:
            uniform_K = np.array([self.uniform(one) for one in texts])
            kept = reject(control, features_KF, uniform_K, self.log_beta)
            kept = kept[: self.num - self.distinct]
            self.distinct += len(kept)
            if len(kept):
                yield [(texts[index], features_KF[index]) for index in kept]
            if self.distinct == self.num:
                return
            texts, features_KF = self.proposals.take()

    def _steered(self, steered: Proposals[Text]):
        """The texts of the particle sampler."""
        while self.distinct < self.num:
            texts, features_KF = steered.take()
            texts = texts[: self.num - self.distinct]
            self.distinct += len(texts)
            yield list(zip(texts, features_KF, strict=False))

    @property
    def weights(self) -> np.ndarray:
        """w(x) of the texts that ``weigh`` yielded, [K]: p(x) over the law of the proposals.

        Their mean is 1.
        """
        assert self.control is not None
        assert self.estimate is not None
        log_weights_K = self.control.log_weights(np.stack(self.drawn))
        if self._ratio_K is not None:
            log_weights_K = log_weights_K + self._ratio_K
        return np.exp(log_weights_K - self.estimate.log_partition)

    @property
    def achieved(self) -> np.ndarray:
        """Mean of each feature over the texts that were yielded, with ``weigh`` weighted, [F]."""
        if self.method == "weigh":
            assert self.estimate is not None
            return self.estimate.moments
        return np.mean(self.drawn, axis=0)

    @property
    def achieved_errors(self) -> np.ndarray:
        """Standard errors of ``achieved`` about the wanted moments, [F].

        They contain the error of λ, the draws, and with ``resample`` the error of the pool. The
        bias of ``qrs``, which ``estimate`` shows, and that of few particles are no part of them.
        """
        assert self.control is not None
        assert self.estimate is not None
        found, num = self.estimate, len(self.drawn)
        if self.method == "weigh":
            return found.errors
        if self.method == "resample":
            return np.sqrt(found.errors**2 + found.variances / num)
        law_F = self.control.moment_errors
        return np.sqrt(law_F**2 + found.variances / num)


def score_of(control: Control, features: Features) -> Callable[[list[str]], np.ndarray]:
    """The score λ·φ of texts, for the sampler ``particle`` at tilt 1.

    A condition that a text does not meet costs ``PENALTY`` nats, because scores must be finite.
    """
    hard_F = control.conditions

    def score(texts: list[str]) -> np.ndarray:
        features_RF = features(texts)
        missed_R = (features_RF[:, hard_F] != control.moments[hard_F]).sum(1)
        return features_RF[:, ~hard_F] @ control.weights[~hard_F] - PENALTY * missed_R

    return score


def check_numbers(features: Features, moments: np.ndarray) -> None:
    """Raise FieldError if there is no feature, or not one moment for each."""
    names = features.names
    if not names:
        raise FieldError("features", "must be at least one function")
    if len(names) != len(moments):
        raise FieldError(
            "moments",
            f"must be one for each feature: there are {len(names)} features ({', '.join(names)}) "
            f"and {len(moments)} moments",
        )
