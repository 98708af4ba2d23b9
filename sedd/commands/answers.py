"""Answers to many requests: batches of one program each, in the order of the requests."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import jax
import numpy as np

from sedd.constraints.clamp import Clamp
from sedd.constraints.spans import Rule, Shape, Span
from sedd.data.packing import unigram_entropy
from sedd.model import Model
from sedd.requests import Request
from sedd.reshape import LogitProcessor
from sedd.samplers.base import Sampler
from sedd.sampling import draw, reshape_of

WINDOW = 8  # batches within which requests are sorted by program


class Program(NamedTuple):
    """What the requests of a batch must have in common, because it is compiled into the program."""

    sampler: Sampler
    guided: bool
    """Whether guidance acts: a network call is then two."""
    most_likely: bool
    """Whether a constraint is filled with its most likely string, at temperature 0."""


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
        """The kind of batch that the request can be drawn in."""
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
    score: float | None
    """The verifier's score, of a search."""
    frames: np.ndarray | None
    """Token ids at the start and after every round, [T, L], where a trace is kept."""
    times: np.ndarray | None
    """The diffusion times of the frames, [T]."""

    @property
    def entropy(self) -> float:
        """Unigram entropy of the drawn tokens in nats; low where the text repeats itself."""
        drawn = self.tokens[~self.clamp.fixed_L]
        return abs(unigram_entropy(np.bincount(drawn))) if len(drawn) else 0.0

    def to_json(self) -> dict[str, Any]:
        """The line of the output file."""
        return {
            "id": self.request.id,
            "text": self.text,
            "tokens": self.tokens.tolist(),
            "calls": self.calls,
            "entropy": round(self.entropy, 6),
            "seed": self.request.seed,
            **({} if self.score is None else {"score": self.score}),
        }


@dataclass(frozen=True, kw_only=True)
class Answering:
    """How requests are drawn: what all batches of a run share.

    Args:
        model: the model.
        counts: requests of each program in the whole run. A batch is filled up to a size that
            depends on nothing else, so that its last batch compiles no program of its own.
        batch_size: sequences held at once; the candidates of a search count.
        reshaped: whether any request of the run changes the conditionals. Then all batches do, by
            numbers that change nothing where need be, and share a program.
        processor: the user's function on log probabilities, or None.
        rule: how a step draws under a constraint.
        shape: that of all constraints of the run, so that its batches share a program.
        traced: how many requests, from the first on, keep their trace.
    """

    model: Model
    counts: Mapping[Program, int]
    batch_size: int
    reshaped: bool = False
    processor: LogitProcessor | None = None
    rule: Rule = "joint"
    shape: Shape | None = None
    traced: int = 0

    def answers(self, asked: Iterable[Asked]) -> Iterator[list[Answer]]:
        """The answers in the order of the requests, a list whenever a batch is done.

        Within a window of a few batches requests are sorted by program. An answer is kept back
        until those before it are there; on an error or interruption it is yielded first, and the
        error raised afterwards. A request's noise is that of its seed, whatever is in its batch.
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
        """Requests in a batch of a program."""
        return min(max(self.batch_size // program.sampler.width, 1), self.counts[program])

    def _batches(self, window: Sequence[Asked]) -> Iterator[list[int]]:
        """The places in the window of each batch: programs in the order of their first request."""
        groups: dict[Program, list[int]] = defaultdict(list)
        for place, one in enumerate(window):
            groups[one.program].append(place)
        for program, places in groups.items():
            size = self.size(program)
            yield from (places[start : start + size] for start in range(0, len(places), size))

    def _draw(self, batch: Sequence[Asked], trace: bool) -> list[Answer]:
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
        )
        return [
            Answer(
                request=one.request,
                clamp=one.clamp,
                spans=one.spans,
                tokens=result.tokens[row, : one.clamp.length],
                text=result.text[row] if result.text else "",
                calls=int(result.calls[row]),
                score=None if result.score is None else float(str(result.score[row])),
                frames=None if result.trace is None else result.trace[:, row, : one.clamp.length],
                times=result.times,
            )
            for row, one in enumerate(batch)
        ]
