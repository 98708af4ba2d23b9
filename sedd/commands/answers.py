"""Draw the answers to many requests in batches, in memory that does not grow with their number.

A batch runs one compiled program, so its requests must agree in everything that is compiled in:
``Program``. Lengths, temperatures and given tokens are data of the program and may differ. Requests
are taken in windows of a few batches and sorted by program within a window; answers leave in the
order of the requests.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import jax
import numpy as np

from sedd.constraints.clamp import Clamp
from sedd.constraints.spans import Rule, Shape, Span
from sedd.constraints.windows import Joint
from sedd.data.packing import unigram_entropy
from sedd.model import Model
from sedd.requests import Request
from sedd.reshape import LogitProcessor
from sedd.samplers.base import Sampler
from sedd.samplers.best_of_n import BestOfN
from sedd.sampling.arguments import reshape_of
from sedd.sampling.batch import Marking, draw
from sedd.watermark.scheme import Scheme, runs_of

WINDOW = 8  # batches' worth of requests that are sorted by program at a time


class Program(NamedTuple):
    """The properties of a request that are compiled into the program that draws it."""

    sampler: Sampler
    guided: bool
    """Whether guidance acts, which doubles the network calls."""
    most_likely: bool
    """Whether constraints are filled with their most likely string (temperature 0), not drawn."""


class Asked(NamedTuple):
    """A request in tokens, with its sampler and all of its numbers."""

    request: Request
    clamp: Clamp
    spans: Sequence[Span]
    sampler: Sampler
    numbers: Mapping[str, Any]
    """Temperature, top_k, top_p and guidance."""

    @property
    def program(self) -> Program:
        """The program that draws the request; guidance without given tokens does nothing."""
        guided = self.numbers["guidance"] > 0 and bool(self.clamp.fixed_L.any())
        most_likely = self.numbers["temperature"] == 0 and bool(self.spans)
        return Program(self.sampler, guided, most_likely)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The sequence drawn for one request."""

    request: Request
    clamp: Clamp
    spans: Sequence[Span]
    tokens: np.ndarray
    """Token ids [L]."""
    text: str
    calls: int
    """Network calls that the sequence needed."""
    rows: int
    """Rows that it had in the batches of these calls."""
    score: float | list[float] | None
    """The verifier's score if the sampler is a search, or one for each of several; else None."""
    verifier_calls: int | None
    """Texts that a search scored, once for each verifier."""
    log_partition: float | None
    """Estimate of log E[exp(tilt·score)], if the sampler is particle."""
    log_prob: float | None
    """Log probability of the drawn tokens in nats; None if the sampler does not compute it."""
    frames: np.ndarray | None
    """Token ids at the start and after every round, [T, L], where a trace is kept."""
    times: np.ndarray | None
    """The diffusion times of the frames, [T]."""
    watermark: dict[str, Any] | None
    """What ``sedd detect`` has to know beside the secret; None without a watermark."""
    features: Mapping[str, float] | None = None
    """The user's features of the text, by name; None without a control."""
    weight: float | None = None
    """w(x) of ``--method weigh``; None otherwise."""

    @property
    def entropy(self) -> float:
        """Unigram entropy of the drawn tokens in nats; low where the text repeats itself."""
        drawn = self.tokens[~self.clamp.fixed_L]
        return unigram_entropy(np.bincount(drawn)) if len(drawn) else 0.0

    @property
    def work(self) -> str:
        """The network calls, what they achieved where one took several rows, and verifier calls."""
        calls = f"{self.calls} network calls"
        if self.rows != self.calls:
            tokens = int((~self.clamp.fixed_L).sum())
            calls = f"{calls} of {self.rows} rows · {tokens / self.calls:.2f} tokens a call"
        if self.verifier_calls is not None:
            calls += f" · {self.verifier_calls} verifier calls"
        return calls

    @property
    def _given(self) -> dict[str, list[int]]:
        """The given positions, if there are any."""
        given = np.flatnonzero(self.clamp.fixed_L).tolist()
        return {"given": given} if given else {}

    def to_json(self) -> dict[str, Any]:
        """The line of the output file."""
        return {
            "id": self.request.id,
            "text": self.text,
            "tokens": self.tokens.tolist(),
            "calls": self.calls,
            "rows": self.rows,
            "entropy": round(self.entropy, 6),
            "seed": self.request.seed,
            **{
                name: value
                for name in ("score", "verifier_calls", "log_partition", "log_prob", "watermark")
                if (value := getattr(self, name)) is not None
            },
            **({} if self.features is None else {"features": self.features}),
            **({} if self.weight is None else {"weight": self.weight, **self._given}),
        }


@dataclass(frozen=True, kw_only=True)
class Answering:
    """The settings that all batches of a run share; ``answers`` draws them.

    Args:
        model: the model.
        counts: number of requests of each program in the whole run. All batches of a program have
            the same size, which depends on this number and ``batch_size``. The last batch is padded
            to it, so that no second program is compiled.
        batch_size: sequences in memory at the same time; the candidates of a search count.
        reshaped: whether any request of the run changes the conditionals. If so, every batch gets
            temperature, top-k and top-p as data, neutral for requests that set none, and all
            batches share a program.
        processor: the user's function on log probabilities, or None.
        rule: how a step draws under a constraint.
        scheme: the watermarking scheme, whose nonces are the seeds of the requests; or None.
        joint: the windows in which tokens are drawn jointly; or None.
        shape: the shape that holds the constraints of every request, so that batches share a
            program; None without constraints.
        traced: number of requests, from the first on, that keep their trace.
    """

    model: Model
    counts: Mapping[Program, int]
    batch_size: int
    reshaped: bool = False
    processor: LogitProcessor | None = None
    rule: Rule = "joint"
    scheme: Scheme | None = None
    joint: Joint | None = None
    shape: Shape | None = None
    traced: int = 0

    def answers(self, asked: Iterable[Asked]) -> Iterator[list[Answer]]:
        """Yield the answers in the order of the requests, in lists.

        An answer can be yielded when all answers before it are drawn. After each batch, the answers
        that have become ready are yielded as one list, if there are any. On an error or an
        interruption, the answers that are drawn but not yet ready are yielded before it is raised.
        A request's noise depends on its seed alone, not on its batch.
        """
        requests, first = iter(asked), 0
        while window := list(islice(requests, WINDOW * self.batch_size)):
            done: dict[int, Answer] = {}
            given = 0
            try:
                for places in self._batches(window):
                    trace = first + places[0] < self.traced
                    batch = [window[place] for place in places]
                    done.update(zip(places, self._draw(batch, trace), strict=True))
                    ready = []
                    while given in done:
                        ready.append(done.pop(given))
                        given += 1
                    if ready:
                        yield ready
            except (Exception, KeyboardInterrupt, SystemExit):
                if done:
                    yield [done[place] for place in sorted(done)]
                raise
            first += len(window)

    def size(self, program: Program) -> int:
        """Number of requests in a batch of a program, after padding."""
        return min(max(self.batch_size // program.sampler.width, 1), self.counts[program])

    def _batches(self, window: Sequence[Asked]) -> Iterator[list[int]]:
        """Yield the indices into the window of each batch, by order of each program's first one."""
        groups: dict[Program, list[int]] = defaultdict(list)
        for place, one in enumerate(window):
            groups[one.program].append(place)
        for program, places in groups.items():
            size = self.size(program)
            yield from (places[start : start + size] for start in range(0, len(places), size))

    def _draw(self, batch: Sequence[Asked], trace: bool) -> list[Answer]:
        """Draw one batch, padded with copies of its last request, which are not returned."""
        size = self.size(batch[0].program)
        padded = [*batch, *[batch[-1]] * (size - len(batch))]
        reshape = None
        if self.reshaped:
            numbers = {name: [one.numbers[name] for one in padded] for name in batch[0].numbers}
            reshape = reshape_of(size, numbers, self.processor)
        seeds = np.array([one.request.seed for one in padded], np.uint32)
        result = draw(
            self.model,
            jax.vmap(jax.random.key)(seeds),
            batch[0].sampler,
            [one.clamp for one in padded],
            [one.spans for one in padded],
            reshape=reshape,
            rule=self.rule,
            shape=self.shape,
            trace=trace,
            marking=None if self.scheme is None else Marking(self.scheme, seeds),
            joint=self.joint,
        )
        return [
            Answer(
                request=one.request,
                clamp=one.clamp,
                spans=one.spans,
                tokens=result.tokens[row, : one.clamp.length],
                text=result.text[row] if result.text else "",
                calls=int(result.calls[row]),
                rows=int(result.rows[row]),
                score=_shortest(result.score, row),
                verifier_calls=None
                if result.verifier_calls is None
                else int(result.verifier_calls[row]),
                log_partition=_shortest(result.log_partition, row),
                log_prob=_shortest(result.log_prob, row),
                frames=None if result.trace is None else result.trace[:, row, : one.clamp.length],
                times=result.times,
                watermark=self._mark(one, result.scored, row),
            )
            for row, one in enumerate(batch)
        ]

    def _mark(self, one: Asked, scored_BL: np.ndarray | None, row: int) -> dict[str, Any] | None:
        """What ``sedd detect`` has to know of one answer; None without a watermark."""
        if self.scheme is None or scored_BL is None:
            return None
        known: dict[str, Any] = {"kind": self.scheme.kind}
        if self.scheme.kind == "gumbel":
            count = one.sampler.n if isinstance(one.sampler, BestOfN) else 1
            known |= {"nonce": one.request.seed, "candidates": count}
        else:
            known |= {"gamma": self.scheme.gamma}
        return {**known, "scored": runs_of(scored_BL[row, : one.clamp.length])}


def _shortest(values: np.ndarray | None, row: int) -> Any:
    """A float32, or a list of them, as the floats with the fewest digits; None without values."""
    if values is None:
        return None
    of_row = [float(str(value)) for value in np.ravel(values[row])]
    return of_row if values.ndim > 1 else of_row[0]
