"""The base of samplers that search: they draw candidates, and choose among them by a verifier."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from sedd.arrays import along, fold
from sedd.denoiser import Denoiser
from sedd.errors import FieldError
from sedd.samplers.base import Sampler, Samples
from sedd.samplers.drafters import zeros_like
from sedd.samplers.self_likelihood import SelfLikelihood
from sedd.samplers.verifier import Scores, Verifiers, verifiers_of, verify
from sedd.types import Array, Bool, Float, Int, Key

VERIFIER = 2**31 - 4  # folded into a request's key for its verifiers; no other number is as large
MOVES = 2**31 - 5  # folded into a request's key for what a search draws itself
AGAIN = 2**31 - 6  # folded into a request's key for draws after the first


@dataclass(frozen=True, kw_only=True)
class Search(Sampler):
    """A sampler that draws ``candidates`` sequences of ``inner`` at a time for each request.

    Row b·C + c of a batch is candidate c of request b. Network calls are those of all candidates,
    and those that verifiers make themselves. ``verifier_calls_B`` counts the texts that were
    scored, once for each verifier.

    Several verifiers are an ensemble: candidates are compared by the mean of their ranks.
    """

    inner: Sampler
    verifier: Verifiers
    """Scores the candidates. One of

    - ``text_verifier(function, tokenizer)``, with a function of texts;
    - a function of tokens [R, L] and of a bool [R, L], False on padding, that returns scores [R];
    - ``SelfLikelihood``;
    - a tuple of these, an ensemble."""

    def __post_init__(self):
        if isinstance(self.inner, Search):
            raise FieldError("inner", "must not be a search, which has a verifier of its own")

    @property
    @abstractmethod
    def candidates(self) -> int:
        """Sequences of the inner sampler that are in memory for each request, C."""

    @property
    def caveat(self):
        return self.inner.caveat

    @property
    def by_block(self):
        return self.inner.by_block

    @property
    def width(self):
        return self.candidates * self.inner.width

    def check(self, denoiser):
        super().check(denoiser)
        self.inner.check(denoiser)
        for verifier in verifiers_of(self.verifier):
            if isinstance(verifier, SelfLikelihood):
                verifier.check(denoiser)

    def check_one_verifier(self) -> None:
        """Raise FieldError for an ensemble, where scores have to have a meaning of their own."""
        count = len(verifiers_of(self.verifier))
        if count > 1:
            raise FieldError(
                "verifier",
                f"must be one where the law is tilted, got an ensemble of {count}: mean ranks "
                "compare candidates, and no law is proportional to them",
            )

    def scores(
        self,
        denoiser: Denoiser,
        keys_B: Key[Array, " B"],
        tokens_RL: Int[Array, "R L"],
        fixed_RL: Bool[Array, "R L"],
    ) -> Scores:
        """Score the candidates of all requests.

        Every text of a request is scored with the same keys, so that a score is a function of the
        text.

        Args:
            denoiser: the model, with a row for each candidate.
            keys_B: the keys of the requests.
            tokens_RL: the candidates.
            fixed_RL: positions that were given.
        """
        keys_R = jnp.repeat(fold(keys_B, VERIFIER), len(tokens_RL) // len(keys_B))
        return verify(self.verifier, denoiser, keys_R, tokens_RL, ~fixed_RL)


def preference(score_BCE: Float[Array, "B C E"]) -> Float[Array, "B C"]:
    """The numbers by which the C candidates of each request are compared; the highest is the best.

    They are the scores of a single verifier. Of an ensemble they are the means over verifiers of
    the candidate's rank among the C; equal scores have the mean of their ranks.
    """
    if score_BCE.shape[-1] == 1:
        return score_BCE[..., 0]

    def ranks(score_C):
        below, up_to = (jnp.searchsorted(jnp.sort(score_C), score_C, side=s) for s in SIDES)
        return (below + up_to) / 2

    rank_BEC = jax.vmap(jax.vmap(ranks))(jnp.swapaxes(score_BCE, 1, 2))
    return rank_BEC.mean(1)


SIDES = ("left", "right")


def shown(score_BE: Float[Array, "B E"]) -> Float[Array, "B ..."]:
    """Scores as ``Samples`` has them: [B] of a single verifier, [B, E] of an ensemble."""
    return score_BE[:, 0] if score_BE.shape[1] == 1 else score_BE


def summed(count_R: Int[Array, " R"], batch: int) -> Int[Array, " B"]:
    """The counts of all candidates of each request."""
    return count_R.reshape(batch, -1).sum(1, dtype=count_R.dtype)


def take(samples: Samples, row_B: Int[Array, " B"]) -> Samples:
    """The samples of some rows, in this order."""
    return _by_row(lambda leaf: leaf[row_B], samples)


def either(choose_B: Bool[Array, " B"], yes: Samples, no: Samples) -> Samples:
    """The samples of ``yes`` where ``choose_B``, and of ``no`` elsewhere."""
    found = _by_row(lambda a, b: jnp.where(along(choose_B, a), a, b), yes, no)
    if yes.rounds is None or no.rounds is None:
        return found
    return replace(found, rounds=jnp.maximum(yes.rounds, no.rounds))


def added(samples: Samples, *parts: Samples) -> Samples:
    """The samples, with the calls of all parts of a search."""
    counts = ("calls_B", "rows_B", "verifier_calls_B")
    return replace(samples, **{name: sum(getattr(one, name) for one in parts) for name in counts})


def nothing_like(draw: Callable[[], Samples]) -> Samples:
    """Samples of zeros, with the shapes of those that ``draw`` would return."""
    shapes = jax.eval_shape(lambda: vars(draw()))
    return Samples(**zeros_like(shapes))


def _by_row(function: Callable[..., Any], *samples: Samples) -> Samples:
    """Apply a function to all arrays of some samples, with the sequences on their first axis."""

    def rows(one: Samples) -> dict[str, Any]:
        leaves = {k: v for k, v in vars(one).items() if k not in ("rounds", "times_T")}
        return {**leaves, "trace_TBL": _swapped(one.trace_TBL)}

    found = jax.tree.map(function, *map(rows, samples))
    trace_TBL = _swapped(found.pop("trace_TBL"))
    first = samples[0]
    return Samples(**found, trace_TBL=trace_TBL, rounds=first.rounds, times_T=first.times_T)


def _swapped(frames: Any) -> Any:
    return None if frames is None else jnp.swapaxes(frames, 0, 1)
