"""Answers the requests of evaluation tasks with a model: scores of continuations, and texts.

``Harness`` does not know lm-eval: ``sedd.harness.tasks`` brings the requests.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import jax
import numpy as np

from sedd.arrays import bucket
from sedd.configuration.build import build_sampler, default_sampler
from sedd.constraints.clamp import Clamp
from sedd.data.chat import PROBE, check_messages, end_ids, render
from sedd.data.tokenizers import Tokenizer
from sedd.errors import FieldError, UserError
from sedd.evaluation.continuations import (
    ContinuationScores,
    Likelihood,
    Pair,
    decodes_greedily,
    estimator_of,
    number_of,
    score_continuations,
)
from sedd.evaluation.datasets import Track
from sedd.evaluation.estimators import check_draws, is_exact
from sedd.model import Model
from sedd.samplers.base import Sampler, SamplerOptions
from sedd.sampling.arguments import reshape_of, stopping
from sedd.sampling.batch import check_profile, draw

MAX_NEW_TOKENS = 256  # of an answer whose task sets no limit, as in lm-eval


@dataclass(frozen=True, kw_only=True)
class Question:
    """A request for an answer.

    Args:
        context: the text before the answer.
        until: strings of which the first occurrence ends the answer; they are cut off.
        max_new_tokens: tokens that are drawn.
        temperature: see ``sedd.reshape.Reshape``; also for the next two.
        top_k: number of tokens to draw from.
        top_p: probability of the tokens to draw from.
    """

    context: str
    until: tuple[str, ...] = ()
    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    @property
    def changes_conditionals(self) -> bool:
        """Whether the answer is not drawn from the model's own conditionals."""
        return (self.temperature, self.top_k, self.top_p) != (1.0, None, None)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The answer to a question.

    Args:
        text: the answer, up to its end.
        tokens: how many tokens were drawn up to the end of the text, before ``until`` cut it.
        calls: network calls.
    """

    text: str
    tokens: int
    calls: int


@dataclass(frozen=True, kw_only=True)
class Harness:
    """Answers requests of evaluation tasks from a model.

    What is drawn for a request depends on its tokens and on the seed, not on other requests. There
    is one exception: questions of one call of ``answer`` that have the same context get different
    noise, as they would be equal otherwise.

    Args:
        model: from ``sedd.load``; it needs a tokenizer.
        likelihood: ``bound``, by Monte Carlo, or ``ordered``, the exact likelihood from left to
            right, for time-independent absorbing models. Autoregressive models take ``bound`` and
            are scored exactly.
        draws: noise levels for each bound; a multiple of 4.
        seed: the seed of all draws.
        batch_size: sequences in a batch, over all devices.
        max_length: the most tokens of a request, context and answer together; by default the
            length of the model's training.
        sampler: draws answers: a name, ``sedd.samplers.options(name, …)`` or a sampler; by default
            the default sampler of the model.
        chat: whether contexts are written by the tokenizer's chat template. Names of special tokens
            in them are then special tokens, and an answer ends where the template ends a turn.
        track: wraps batches to show progress; see ``sedd.evaluation.datasets.Track``.

    Raises:
        FieldError: if a value is out of range, or ``likelihood`` is ordered and the model is not a
            time-independent absorbing one.
        UserError: if the model has no tokenizer, or the sampler cannot draw from it.
    """

    model: Model
    likelihood: Likelihood = "bound"
    draws: int = 128
    seed: int = 0
    batch_size: int = 32
    max_length: int | None = None
    sampler: str | SamplerOptions | Sampler | None = None
    chat: bool = False
    track: Track | None = None

    def __post_init__(self):
        if self.model.tokenizer is None:
            raise UserError(f"checkpoint {self.model.source}: it has no tokenizer for text")
        if self.likelihood not in get_args(Likelihood):
            names = ", ".join(get_args(Likelihood))
            raise FieldError("likelihood", f"must be one of {names}, got {self.likelihood!r}")
        check_draws(self.draws)
        for name in ("batch_size", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FieldError(name, f"must be at least 1, got {value}")
        if not 0 <= self.seed < 2**32:
            raise FieldError("seed", f"must be in [0, 2**32), got {self.seed}")
        if self.chat and self.tokenizer.turns.template is None:
            raise UserError(f"tokenizer {self.tokenizer.name!r} has no chat template")
        estimator_of(self.model.denoiser, self.likelihood)
        self.built_sampler.check(self.model.denoiser)
        check_profile(self.built_sampler, self.model)

    @cached_property
    def built_sampler(self) -> Sampler:
        """The sampler that draws answers."""
        sampler = self.sampler or default_sampler(self.model.parts.parameterization)
        if isinstance(sampler, Sampler):
            return sampler
        return build_sampler(sampler, self.model.schedule)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        assert self.model.tokenizer is not None  # checked above
        return self.model.tokenizer

    @property
    def limit(self) -> int:
        """The most tokens of a request."""
        return self.model.length if self.max_length is None else self.max_length

    @property
    def start(self) -> list[int]:
        """The context of a text without one: the token that opens a document, if there is any."""
        return [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]

    def encode(self, text: str) -> list[int]:
        """Encode a text; names of special tokens are special in chats only."""
        if self.chat:
            return self.tokenizer.encode_spans(text)[0].tolist()
        return self.tokenizer.encode_batch([text])[0].tolist()

    def score(self, pairs: Sequence[Pair]) -> ContinuationScores:
        """Score continuations given their contexts, in nats.

        Args:
            pairs: the token ids of a context, which may be empty, and those of its continuation.

        Returns:
            -log p of each continuation or a bound on it, with errors, in the order of the pairs.

        Raises:
            UserError: if a pair is too long, or a continuation is empty.
        """
        for context, continuation in pairs:
            if not len(continuation):
                end = self.tokenizer.decode(context[-20:])
                raise UserError(f"a continuation has no tokens, behind the context …{end!r}")
            self._check_length(context, len(continuation))
        track = self.track
        return score_continuations(
            self.model.denoiser,
            self.model.schedule,
            jax.random.key(self.seed),
            pairs,
            likelihood=self.likelihood,
            draws=self.draws,
            batch_size=self.batch_size,
            track=track and (lambda batches, total: track(batches, "scoring", total)),
        )

    def windows(self, text: str) -> list[Pair]:
        """Cut a text into continuations that fit the model, each token in one of them.

        The context of the first is ``start``, that of the last is as long as possible, and those of
        the others are the token before them.
        """
        ids = self.encode(text)
        size = max(self.limit - 1, 1)
        pairs = []
        for place in range(0, len(ids), size):
            end = min(place + size, len(ids))
            context = ids[max(end - self.limit, 0) : place] if place else self.start
            pairs.append((context, ids[place:end]))
        return pairs

    def answer(self, questions: Sequence[Question]) -> list[Drawn]:
        """Draw an answer to each question, in their order.

        Questions with the same context, in one call, have different noise.

        Raises:
            UserError: if a question is too long for the model.
        """
        contexts = [self.encode(question.context) or self.start for question in questions]
        for context, question in zip(contexts, questions, strict=True):
            self._check_length(context, question.max_new_tokens)
        seen: dict[tuple[int, ...], int] = defaultdict(int)
        repeats = []
        groups: dict[int, list[int]] = defaultdict(list)
        for place, (context, question) in enumerate(zip(contexts, questions, strict=True)):
            repeats.append(seen[tuple(context)])
            seen[tuple(context)] += 1
            groups[bucket(len(context) + question.max_new_tokens)].append(place)
        size = max(self.batch_size // self.built_sampler.width, 1)
        batches = [
            places[begin : begin + size]
            for _, places in sorted(groups.items(), reverse=True)
            for begin in range(0, len(places), size)
        ]
        tracked = batches if self.track is None else self.track(batches, "drawing", len(batches))
        reshaped = any(question.changes_conditionals for question in questions)
        answers: dict[int, Drawn] = {}
        for places in tracked:
            drawn = self._draw(
                [contexts[place] for place in places],
                [questions[place] for place in places],
                [repeats[place] for place in places],
                reshaped=reshaped,
            )
            answers.update(zip(places, drawn, strict=True))
        return [answers[place] for place in range(len(questions))]

    def _draw(
        self,
        contexts: Sequence[list[int]],
        questions: Sequence[Question],
        repeats: Sequence[int],
        *,
        reshaped: bool,
    ) -> list[Drawn]:
        """Draw the answers of a batch; ``reshaped`` if those of any batch are not drawn as is."""
        eos_id = self.tokenizer.eos_id
        ends = end_ids(self.tokenizer) if self.chat else () if eos_id is None else (eos_id,)
        clamps = []
        for context, question in zip(contexts, questions, strict=True):
            length = len(context) + question.max_new_tokens
            tokens_L, fixed_L = np.zeros(length, np.int32), np.arange(length) < len(context)
            tokens_L[: len(context)] = context
            clamps.append(Clamp(tokens_L=tokens_L, fixed_L=fixed_L, end_ids=ends))
        numbers = np.array([number_of(context) for context in contexts], np.uint32)
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(self.seed), numbers)
        names = ("temperature", "top_k", "top_p")
        settings = {name: [getattr(question, name) for question in questions] for name in names}
        result = draw(
            self.model,
            jax.vmap(jax.random.fold_in)(keys_B, np.array(repeats, np.uint32)),
            stopping(self.built_sampler, clamps),
            clamps,
            [()] * len(clamps),
            reshape=reshape_of(len(clamps), settings) if reshaped else None,
        )
        answers = []
        for row, (context, question) in enumerate(zip(contexts, questions, strict=True)):
            ids = result.tokens[row, len(context) : clamps[row].length]
            found = np.flatnonzero(np.isin(ids, ends))
            ids = ids[: found[0]] if len(found) else ids
            answers.append(
                Drawn(
                    text=cut(continued(self.tokenizer, context, ids.tolist()), question.until),
                    tokens=len(ids),
                    calls=int(result.calls[row]),
                )
            )
        return answers

    def _check_length(self, context: Sequence[int], more: int) -> None:
        """Raise UserError if a context with so many further tokens is too long for the model."""
        if len(context) + more > self.limit:
            raise UserError(
                f"a request of {len(context) + more} tokens ({len(context)} of context, {more} of "
                f"answer) is longer than the limit of {self.limit}: give fewer examples, a smaller "
                "max_gen_toks, or a larger max_length if the model can read it"
            )

    def conversation(self, messages: Sequence[Mapping[str, str]], *, answer: bool) -> str:
        """Write messages by the tokenizer's chat template, for ``encode``.

        Args:
            messages: objects with ``role`` and ``content``.
            answer: whether the text ends with the opening of an answer. Otherwise it ends with the
                last message, as the first part of an answer.

        Raises:
            UserError: if the template is missing or refuses the messages.
        """
        check_messages(messages)
        if answer:
            return render(self.tokenizer, messages, answer=True)
        last = {**messages[-1], "content": messages[-1]["content"] + PROBE}
        return render(self.tokenizer, [*messages[:-1], last], answer=False).rpartition(PROBE)[0]

    def describe(self) -> dict[str, Any]:
        """Describe the model and how it is scored, for the results."""
        estimator = estimator_of(self.model.denoiser, self.likelihood)
        exact = is_exact(estimator)
        return {
            "checkpoint": self.model.source,
            "step": self.model.step,
            "model_digest": self.model.digest,
            "likelihood": "exact" if exact else "bound",
            "estimator": estimator,
            "draws": 0 if exact else self.draws,
            "seed": self.seed,
            "max_length": self.limit,
            "is_greedy": "left to right" if decodes_greedily(self.model.denoiser) else "unknown",
        }


def continued(tokenizer: Tokenizer, context: list[int], ids: list[int]) -> str:
    """The text of ids behind a context; many tokenizers drop the leading space of ids alone."""
    before, whole = tokenizer.decode(context), tokenizer.decode([*context, *ids])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids)


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first occurrence of any of the strings."""
    places = [text.find(end) for end in until if end]
    return text[: min((place for place in places if place >= 0), default=len(text))]
