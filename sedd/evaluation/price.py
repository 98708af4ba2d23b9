"""The price of parallelism: the nats that revealing several tokens in one network call costs.

Let h(j) be the expected nats of a random unknown token, given j random known tokens. If the tokens
of a text are revealed in random order, in groups of s_1, …, s_n, and those of one group are drawn
independently of each other, then the expected nats of the text, for a known order, are
Σ_b s_b·h(s_1 + … + s_(b-1)). This holds for every time-independent absorbing model and every text,
whether or not the conditionals of the model are consistent with each other. With groups of one it
is the bound that k-DCE estimates, and with one group the nats of independent positions. The excess
over groups of one is the price. arXiv:2510.25544, arXiv:2511.04647.

``sedd.evaluation.price_draws`` measures h.
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sedd.errors import FieldError, UserError
from sedd.evaluation.measured import Measured
from sedd.files import write_text
from sedd.samplers.planned import Profile, group_sizes
from sedd.samplers.reveal import revealed_share
from sedd.schedules import NoiseSchedule


@dataclass(frozen=True, kw_only=True, eq=False)
class Price:
    """A curve h and sums of it: h(j) is the nats of an unknown token, given j known tokens.

    h is measured at J numbers of known tokens, the levels. If there are fewer levels than tokens, h
    is interpolated linearly between them. The means of F parts of the sequences (folds) are kept
    apart, so that a plan can be priced on sequences that did not choose it.

    Args:
        model: the ``Model.digest`` of the measured model.
        length: tokens in a sequence, L.
        known_J: the levels, rising from 0 to L - 1.
        nats_FJ: h at the levels in each fold. Fold f has the sequences f, f + F, f + 2F, ….
        covariance_JJ: the covariance matrix of the mean of all sequences, over sequences and draws;
            nan if only one sequence was measured.
        num_sequences: measured sequences.
        draws: network calls for each sequence.
    """

    model: str
    length: int
    known_J: np.ndarray
    nats_FJ: np.ndarray
    covariance_JJ: np.ndarray
    num_sequences: int
    draws: int

    @property
    def _mean_nats(self) -> np.ndarray:
        """h at the levels, the mean over all sequences, [J]."""
        return self._fold_share @ self.nats_FJ

    @property
    def nats_by_known(self) -> np.ndarray:
        """h(j) for j = 0..L-1: the mean nats of a random token, given j random others, [L]."""
        return self._hats @ self._mean_nats

    @property
    def errors(self) -> np.ndarray:
        """The standard errors of ``nats_by_known``, over sequences and draws, [L]."""
        variance_L = ((self._hats @ self.covariance_JJ) * self._hats).sum(1)
        return np.sqrt(np.maximum(variance_L, 0))

    @cached_property
    def profile(self) -> Profile:
        """h as the sampler ``planned`` uses it: the closest curve that never rises.

        The fit is by least squares. A level is weighted by its number of unknown tokens, since h is
        the noisier, the fewer tokens are averaged.
        """
        return Profile(model=self.model, nats_L=self._falling(self._mean_nats))

    def plan(self, calls: int) -> list[int]:
        """Return the sizes of ``calls`` groups with the fewest nats, by the fit of ``profile``.

        ``plan_nats`` prices them.

        Raises:
            FieldError: if ``calls`` is not in 1..L.
        """
        self._check("calls", calls)
        return group_sizes(self.profile.nats_L, calls)

    def nats_per_token(self, groups: Sequence[int]) -> Measured:
        """Return the nats per token of revealing a random order in groups, with standard error.

        Args:
            groups: the sizes of the groups, each at least 1; their sum must be L.

        Raises:
            FieldError: if they are not.
        """
        return self._sum_of(self._weights_of(groups))

    def plan_nats(self, calls: int) -> Measured:
        """Return the nats per token of the best plan for a number of calls, with standard error.

        ``nats_per_token(plan(calls))`` would be too low: among all plans the best one is that for
        which the noise of h is the most favourable. Here each fold is priced by a plan that was
        made from the other folds. If only one sequence was measured, there are no others: it is
        priced by its own plan, and the result is too low.

        Raises:
            FieldError: if ``calls`` is not in 1..L.
        """
        return self._crossed(calls, 0.0)

    def plan_excess(self, calls: int) -> Measured:
        """Return by how much ``plan_nats`` exceeds one position a call; see ``excess``."""
        return self._crossed(calls, 1.0)

    def excess(self, groups: Sequence[int]) -> Measured:
        """Return by how much ``nats_per_token`` exceeds that of one position a call.

        The standard error is that of the difference within a sequence, which is smaller than the
        errors of both figures.
        """
        return self._sum_of(self._weights_of(groups) - 1)

    def event_jump(self, schedule: NoiseSchedule, intervals: int) -> Measured:
        """Return the nats per token of the sampler event_jump over intervals of time.

        In interval b every unknown token is revealed with the probability u_b. The number of tokens
        known before it is binomial, since the times of all tokens are independent.

        Args:
            schedule: the noise schedule, which determines u_b.
            intervals: the sampler's ``steps``, in 1..L.

        Raises:
            FieldError: if ``intervals`` is out of range.
        """
        from scipy.stats import binom  # slow to import

        self._check("intervals", intervals)
        share = _shares(schedule, intervals)
        known_L = np.arange(self.length)
        weight_L = np.zeros(self.length)
        for before, after in itertools.pairwise(share):
            revealed = (after - before) / max(1 - before, 1e-30)
            weight_L += binom.pmf(known_L, self.length, before) * revealed
        return self._sum_of(weight_L * (self.length - known_L))

    def event_jump_calls(self, schedule: NoiseSchedule, intervals: int) -> float:
        """Return the mean network calls of event_jump: the intervals that reveal a token."""
        return float((1 - (1 - np.diff(_shares(schedule, intervals))) ** self.length).sum())

    def equal_groups(self, calls: int) -> list[int]:
        """Return the sizes of ``calls`` groups that differ by at most 1, the larger ones last.

        Raises:
            FieldError: if ``calls`` is not in 1..L.
        """
        self._check("calls", calls)
        size, larger = divmod(self.length, calls)
        return [size] * (calls - larger) + [size + 1] * larger

    def to_json(self) -> dict[str, Any]:
        """Return the fields for ``json.dump``; of the covariance matrix its lower triangle."""
        triangle = self.covariance_JJ[np.tril_indices(len(self.known_J))]
        return {
            "model": self.model,
            "length": self.length,
            "num_sequences": self.num_sequences,
            "draws": self.draws,
            "known": self.known_J.tolist(),
            "nats": self.nats_FJ.tolist(),
            "covariance": None if self.num_sequences < 2 else triangle.tolist(),
        }

    def save(self, path: str | Path) -> None:
        """Write a JSON file that ``load`` and the sampler ``planned`` read.

        Raises:
            UserError: if the file cannot be written.
        """
        write_text(Path(path).expanduser(), f"{json.dumps({'price': self.to_json()})}\n")

    @classmethod
    def load(cls, path: str | Path) -> "Price":
        """Read a file of ``save``, or of ``evaluate.py --price … --json FILE``.

        Raises:
            UserError: if the file cannot be read, or holds no price profile.
        """
        path = Path(path).expanduser()
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not readable as JSON ({error})") from error
        try:
            return cls._of_json(data["price"])
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{path}: holds no price profile; evaluate.py --price 1 4 16 --json {path.name} "
                "writes one"
            ) from error

    @classmethod
    def _of_json(cls, data: dict[str, Any]) -> "Price":
        """Read what ``to_json`` returned; LookupError, TypeError or ValueError on anything else."""
        length, known_J = int(data["length"]), np.array(data["known"], int)
        nats_FJ, size = np.array(data["nats"], float), len(known_J)
        covariance_JJ = np.full((size, size), math.nan)
        if data["covariance"] is not None:
            rows, columns = np.tril_indices(size)
            triangle = np.array(data["covariance"], float).reshape(rows.shape)
            covariance_JJ[rows, columns] = covariance_JJ[columns, rows] = triangle
        whole = known_J.ndim == 1 and known_J[0] == 0 and known_J[-1] == length - 1
        if not whole or (np.diff(known_J) < 1).any():
            raise ValueError("the levels are wrong")
        count = int(data["num_sequences"])
        if nats_FJ.shape[1:] != (size,) or not 1 <= len(nats_FJ) <= count:
            raise ValueError("the folds are wrong")
        if not np.isfinite(nats_FJ).all():
            raise ValueError("the nats are not finite")
        return cls(
            model=str(data["model"]),
            length=length,
            known_J=known_J,
            nats_FJ=nats_FJ,
            covariance_JJ=covariance_JJ,
            num_sequences=count,
            draws=int(data["draws"]),
        )

    @property
    def _fold_share(self) -> np.ndarray:
        """The share of the sequences in each fold, [F]."""
        folds = len(self.nats_FJ)
        sizes_F = (self.num_sequences - np.arange(folds) + folds - 1) // folds
        return sizes_F / self.num_sequences

    def _falling(self, nats_J: np.ndarray) -> tuple[float, ...]:
        """The closest curve to h that never rises, [L]."""
        from scipy.optimize import isotonic_regression  # slow to import

        weights_J = self.length - self.known_J
        fit = isotonic_regression(nats_J, weights=weights_J, increasing=False)
        return tuple((self._hats @ fit.x).tolist())

    def _crossed(self, calls: int, minus: float) -> Measured:
        """The mean over folds of the nats by the plan of the other folds.

        ``minus`` is subtracted from the weight of every h(j). The error takes the folds as
        independent and the plans as given.
        """
        self._check("calls", calls)
        value = variance = 0.0
        for share, nats_J in zip(self._fold_share, self.nats_FJ, strict=True):
            others_J = self._mean_nats
            if share < 1:
                others_J = (self._mean_nats - share * nats_J) / (1 - share)
            groups = group_sizes(self._falling(others_J), calls)
            weight_J = (self._weights_of(groups) - minus) @ self._hats / self.length
            value += share * (weight_J @ nats_J)
            variance += share * (weight_J @ self.covariance_JJ @ weight_J)
        error = None if math.isnan(variance) else math.sqrt(max(variance, 0))
        return Measured(float(value), error)

    @cached_property
    def _hats(self) -> np.ndarray:
        """The weight of each level in the interpolated h(j), [L, J]."""
        known_L = np.arange(self.length)
        hats = [np.interp(known_L, self.known_J, hat_J) for hat_J in np.eye(len(self.known_J))]
        return np.stack(hats, 1)

    def _weights_of(self, groups: Sequence[int]) -> np.ndarray:
        """The weight of each h(j) in the nats of a text: the size of the group that starts at j."""
        sizes = np.asarray(groups)
        whole = sizes.ndim == 1 and sizes.size and np.issubdtype(sizes.dtype, np.integer)
        if not whole or sizes.min() < 1 or sizes.sum() != self.length:
            raise FieldError(
                "groups",
                f"must be sizes of at least 1 with the sum {self.length}, got {groups!r:.60}",
            )
        weight_L = np.zeros(self.length)
        weight_L[np.cumsum(sizes) - sizes] = sizes
        return weight_L

    def _sum_of(self, weight_L: np.ndarray) -> Measured:
        """Σ_j weight_j·h(j) / L, with its standard error; None from a single sequence."""
        weight_J = weight_L @ self._hats / self.length
        value = float(weight_J @ self._mean_nats)
        if self.num_sequences < 2:
            return Measured(value)
        return Measured(value, math.sqrt(max(weight_J @ self.covariance_JJ @ weight_J, 0)))

    def _check(self, field: str, number: int) -> None:
        if not 1 <= number <= self.length:
            raise FieldError(
                field, f"must be from 1 to {self.length}, the tokens of a sequence, got {number}"
            )


def _shares(schedule: NoiseSchedule, intervals: int) -> np.ndarray:
    """The share of tokens revealed by the beginning of each interval and by the end of the last."""
    t = 1 - jnp.arange(intervals + 1) / intervals
    return np.clip(np.asarray(revealed_share(schedule, t), np.float64), 0, 1)
