"""A first pass over all requests of ``sedd sample``, which keeps none of them.

It collects the refused lines, the sizes that let batches share compiled programs, and what a user
should know before anything is drawn.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

import sedd
from sedd.commands.answers import Asked, Program
from sedd.commands.sample_flags import (
    SampleCommand,
)
from sedd.commands.watermark_flags import notes_on_secret
from sedd.constraints.spans import Shape, shape_of
from sedd.errors import UserError
from sedd.samplers.base import Sampler, layers
from sedd.samplers.semi_autoregressive import SemiAutoregressive
from sedd.sampling.arguments import reshape_of

TRACED = 64  # sequences on a trace page, which holds every frame of each of them
REFUSALS = 20  # printed refusals: a file that holds no requests at all may have thousands of lines


@dataclasses.dataclass(kw_only=True)
class Survey:
    """The result of a first pass over all requests.

    The second pass draws them in batches. Batches of one program are given the same shapes, which
    depend on all requests, so that each program is compiled once.
    """

    counts: Counter[Program] = dataclasses.field(default_factory=Counter)
    """Number of requests for each compiled program."""
    refused: list[str] = dataclasses.field(default_factory=list)
    """Messages of the first ``REFUSALS`` requests that were refused."""
    num_refused: int = 0
    """Number of all refused requests."""
    given: bool = False
    """Whether any request has given tokens."""
    guided: bool = False
    """Whether any line sets ``guidance`` itself."""
    reshaped: bool = False
    """Whether temperature, top-k, top-p, guidance or a processor changes any conditional."""
    shape: Shape | None = None
    """The smallest shape into which the constraints of every request fit; None without any."""
    spanned: bool = False
    """Whether any request has one constraint for several gaps together."""
    repeated: str | int | None = None
    """The first id that occurs twice; None if all differ."""
    reused: str | int | None = None
    """The first id whose seed and given text occur twice; None if all differ."""

    @classmethod
    def of(cls, requests: Iterable[Asked | UserError], processor: Any) -> "Survey":
        """Read every request once and keep none of them.

        Args:
            requests: the requests, with an error in the place of each that was refused.
            processor: the user's logit processor, or None.
        """
        found, seen, noises = cls(reshaped=processor is not None), set(), set()
        for one in requests:
            if isinstance(one, UserError):
                found.num_refused += 1
                found.refused += [str(one)] if len(found.refused) < REFUSALS else []
                continue
            found.counts[one.program] += 1
            found.given |= bool(one.clamp.fixed_L.any())
            found.guided |= one.request.guidance is not None
            if one.spans:
                shape = shape_of([one.spans])
                found.shape = shape if found.shape is None else found.shape.joined(shape)
                gaps = one.clamp.gaps
                found.spanned |= any((span.start, span.length) not in gaps for span in one.spans)
            found.reshaped |= reshape_of(1, one.numbers) is not None
            name = hash(str(one.request.id))  # 8 bytes a request instead of its id
            if found.repeated is None and name in seen:
                found.repeated = one.request.id
            seen.add(name)
            given = np.where(one.clamp.fixed_L, one.clamp.tokens_L, -1).tobytes()
            noise = hash((one.request.seed, given))
            if found.reused is None and noise in noises:
                found.reused = one.request.id
            noises.add(noise)
        return found


def check_guidance(command: SampleCommand, survey: Survey) -> None:
    """Check that ``--guidance`` has an effect.

    Raises:
        UserError: ``--guidance`` is above 0, but no request has given text. Guidance compares
            predictions with and without it.
    """
    if command.guidance and not survey.given and not survey.guided:
        raise UserError(
            f"--guidance {command.guidance} has no effect without given text; give --prompt, "
            "--suffix, --infill or --chat, or --requests with such lines"
        )


def notes(
    command: SampleCommand, model: sedd.Model, sampler: Sampler, survey: Survey
) -> Iterator[str]:
    """Yield warnings about the samples to come: approximations, sizes and likely mistakes."""
    if sampler.caveat:
        yield sampler.caveat
    gibbs = getattr(sampler, "positions", None) == "random"  # it tends to the conditional
    if not model.process.absorbing and survey.given and not gibbs:
        kind = type(model.process).__name__.lower()
        yield (
            f"given text is approximate on a {kind} process: the model reads given tokens as noisy "
            "ones, so that the rest does not tend to its true conditional at any number of steps"
        )
    blocks = any(isinstance(part, SemiAutoregressive) for part in layers(sampler))
    if blocks and not model.time_independent:
        yield (
            "semi_autoregressive is approximate here: this model depends on the noise level, and "
            "is given the noise level of one block as that of the whole sequence"
        )
    if sampler.width > command.batch_size:
        yield (
            f"--batch-size {command.batch_size} is exceeded: {command.sampler.name} draws "
            f"{sampler.width} sequences at the same time for each one that it returns"
        )
    if survey.spanned:
        yield (
            "one regex or schema for several gaps must match the whole stretch from the first gap "
            "to the last, the given text between included; to constrain each gap alone, give one "
            "for each gap"
        )
    if survey.repeated is not None:
        yield f"--requests {command.requests}: the id {survey.repeated!r} stands in several lines"
    scheme = command.mark.scheme
    if scheme is not None and command.mark.watermark_key is not None:
        yield from notes_on_secret(command.mark.watermark_key, scheme.secret)
        if scheme.kind == "green":
            yield (
                "--watermark green changes the distribution of the samples: by at most "
                f"{scheme.delta**2 / 2:.3g} nats a token, as a KL divergence"
            )
        if survey.reused is not None and scheme.kind == "gumbel":
            yield (
                f"--requests {command.requests}: seed (the nonce of the watermark) and given text "
                f"of {survey.reused!r} stand in several lines: these texts share their noise, and "
                "are no separate evidence of the watermark"
            )
    if command.trace is not None and survey.counts.total() > TRACED:
        yield f"--trace shows the first {TRACED} of {survey.counts.total()} sequences"
