"""Draw whole texts from a model: ``sedd.sample``."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from sedd.constraints.clamp import Clamp
from sedd.constraints.spans import Given, Rule
from sedd.constraints.windows import BELOW, Joint
from sedd.errors import FieldError
from sedd.model import Model
from sedd.samplers.base import Sampler, SamplerOptions
from sedd.sampling.arguments import Scoring, ask, marking_of
from sedd.sampling.batch import SampleResult, draw
from sedd.types import Array, Key
from sedd.watermark.scheme import Scheme


def sample(
    model: Model,
    key: Key[Array, "..."] | int,
    *,
    num: int | None = None,
    length: int | None = None,
    sampler: str | SamplerOptions | Sampler | None = None,
    prompt: str | Sequence[str] | None = None,
    suffix: str | Sequence[str] | None = None,
    infill: str | Sequence[str] | None = None,
    messages: Sequence[Any] | None = None,
    regex: str | Sequence[Any] | None = None,
    json_schema: Mapping[str, Any] | Sequence[Any] | None = None,
    json_schema_depth: int | Sequence[int | None] | None = None,
    clamp: Clamp | Sequence[Clamp] | None = None,
    constraint: Given | Sequence[Given] = None,
    rule: Rule = "joint",
    verifier: Scoring | Sequence[Scoring] | None = None,
    trace: bool = False,
    watermark: Scheme | None = None,
    nonces: Sequence[int] | None = None,
    window: int | None = None,
    below: float = BELOW,
    **options: Any,
) -> SampleResult:
    """Draw sequences from a model.

    The arguments from ``prompt`` to ``constraint`` are one value for all sequences, or a list with
    one for each. Sequences of different lengths share a batch; attention excludes the padding. The
    number of sequences and the length are rounded up to a few sizes (``sedd.arrays.bucket``). Calls
    of equal rounded sizes share a compiled program, whatever their texts, seeds, temperatures,
    top-k and top-p. Calls that set temperature, top-k or top-p have one program, and calls that set
    none of them another; likewise calls with and without padding, and with and without guidance.

    Args:
        model: from ``sedd.load``.
        key: an integer seed or one key, from which each sequence derives its own, or a key for each
            sequence. ``jax.random.key`` and ``jax.random.PRNGKey`` make keys.
        num: number of sequences; by default the number of keys, the length of the lists, or 1.
        length: tokens in a sequence, the given ones included; by default the training length, or
            with ``infill`` the length of the text. Not with ``clamp``, which has its own length.
        sampler: a name, ``sedd.samplers.options(name, …)`` or a sampler. Default: event_jump;
            tweedie for a model that depends on the noise level or is not of the absorbing process;
            ordered for an autoregressive or any-subset one; semi_autoregressive for a block model.
        prompt: text at the start.
        suffix: text at the end.
        infill: text with gaps: ``{mask:12}`` leaves 12 tokens free, ``{mask}`` one.
        messages: a conversation to answer, as a list of objects with ``role`` and ``content``, or a
            list of such lists. The model's tokenizer must have a chat template.
        regex: regex that everything from the first free token to the last must match, given text in
            between included. The value for a sequence may also be a list with a regex or None for
            each gap; for one sequence of two gaps: ``regex=[["a+", None]]``.
        json_schema: a JSON Schema in place of ``regex``, for the same stretch of text: one value,
            or a list with one for each sequence. The value for a sequence may also be a list with a
            schema or None for each gap.
        json_schema_depth: how deep values nest where the schema sets no limit, 0 to 64: in a
            schema that allows any value, and in recursion by ``$ref``; by default 2.
        clamp: the given tokens as a ``sedd.constraints.clamp.Clamp``, instead of texts.
        constraint: compiled ``Automaton`` objects in place of ``regex``, single or in such lists.
        rule: how a step draws under a constraint: ``"joint"`` (a sample restricted to matches),
            ``"most_likely"`` (the most likely match) or ``"dingo"`` (arXiv:2505.23061); see
            ``sedd.constraints.spans.Spans``. At temperature 0, ``joint`` becomes ``most_likely``.
        verifier: for searches (best_of_n, particle, zero_order, search_paths): a function from a
            list of texts to one finite score each, higher is better; ``"self"`` for the likelihood
            of the text under the model itself (``sedd.samplers.SelfLikelihood``); or, where the law
            is not tilted by the score, a list of such, whose mean ranks count.
        trace: also return the tokens after every round.
        watermark: how the texts are watermarked, and by which secret.
        nonces: a number in [0, 2**32) for each sequence. Texts of equal nonces share the noise of
            their watermark; by default the nonces are random numbers of the keys.
        window: draw the tokens of one call jointly, within windows of this many positions, by the
            HMM head of the model; by default each token is drawn from its own conditional.
        below: with ``window``: a call draws jointly only if at most this share of the sequence is
            masked, in (0, 1]; otherwise it draws each token from its own conditional.
        options: options of the sampler (``steps=128``; for planned, ``profile`` is the result of
            ``sedd.price`` or a file of it), and of ``sedd.reshape.Reshape``: ``temperature``,
            ``top_k``, ``top_p``, ``guidance`` (one number, or one a sequence) and
            ``logit_processor``.

    Raises:
        UserError: for an unknown option, lists of different lengths, a text that does not fit, a
            sampler that the model does not support, a verifier that fails, or probabilities that
            are nan.
        FieldError: for a bad value; ``field`` is the name of the argument.

    Example:
        >>> import sedd
        >>> model = sedd.load("runs/tiny")
        >>> result = sedd.sample(model, 0, num=2, prompt="the ", sampler="event_jump", top_p=0.9)
        >>> [text.startswith("the ") for text in result.text]
        [True, True]
    """
    texts = {"prompt": prompt, "suffix": suffix, "infill": infill, "regex": regex}
    texts |= {"messages": messages, "json_schema": json_schema}
    texts |= {"json_schema_depth": json_schema_depth}
    asked = ask(
        model,
        key,
        texts,
        options,
        num=num,
        length=length,
        sampler=sampler,
        clamp=clamp,
        constraint=constraint,
        verifier=verifier,
    )
    if rule not in get_args(Rule):
        raise FieldError("rule", f"must be one of {', '.join(get_args(Rule))}, got {rule!r}")
    keys_B, built, clamps, spans, reshape = asked
    return draw(
        model,
        keys_B,
        built,
        clamps,
        spans,
        reshape=reshape,
        rule=rule,
        trace=trace,
        marking=marking_of(watermark, nonces, keys_B),
        joint=None if window is None else Joint(window, below),
    )
