"""Draw texts of a model under a control, in Python: ``sedd.control.sample``."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sedd.control.draws import (
    POOL,
    TOTAL_VARIATION,
    Drawing,
    Method,
    Proposals,
    check_numbers,
    score_of,
)
from sedd.control.estimates import Curve, Estimate
from sedd.control.features import Features
from sedd.control.law import Control
from sedd.control.ratio import proposal_ratio
from sedd.errors import UserError
from sedd.model import Model
from sedd.samplers.verifier import TextScorer
from sedd.sampling.whole import sample as sample_model

STEERING = ("particles", "resample_every")  # options of the sampler ``particle``


class Drawn(NamedTuple):
    """One draw of the sampler."""

    number: int  # of the draw; its key is the seed's, folded with it
    tokens: np.ndarray  # [L]
    text: str
    calls: int


@dataclass(frozen=True, kw_only=True)
class ControlledTexts:
    """Texts that ``sample`` has drawn, and the figures of their law."""

    text: list[str]
    tokens: np.ndarray
    """Token ids, [B, L]."""
    features: np.ndarray
    """The features of the texts, [B, F]."""
    control: Control
    """The law, from the first pool."""
    estimate: Estimate
    """Its figures, from the second pool."""
    curve: Curve | None
    """Acceptance and divergence of ``qrs`` over β, from the second pool; None for other methods."""
    log_beta: float | None
    """log β of ``qrs``; None for other methods."""
    moments: np.ndarray
    """Mean of each feature over the texts, [F]; of ``weigh`` by their ``weights``."""
    errors: np.ndarray
    """Standard errors of ``moments`` about the wanted ones, [F]. They contain the error of λ."""
    distinct: int
    """How many different draws the texts are; fewer than texts with ``resample``."""
    weights: np.ndarray | None
    """w(x) of each text of ``weigh``, [B], p(x)/a(x) with mean 1; None for other methods. With a
    ``base`` it is p over the law of the model that proposes."""
    proposals: int
    """Draws of the sampler's own law in all, both pools included. Of ``particle`` these are the two
    pools; the steered draws are not counted."""


def sample(
    model: Model,
    seed: int = 0,
    *,
    features: Mapping[str, TextScorer],
    moments: Mapping[str, float] | Sequence[float],
    method: Method = "reject",
    num: int = 1,
    pool: int = POOL,
    batch_size: int = 32,
    total_variation: float = TOTAL_VARIATION,
    base: Model | None = None,
    **options: Any,
) -> ControlledTexts:
    """Draw texts whose features have wanted moments, and which else follow the model.

    Their law is p(x) = a(x)·exp(λ·φ(x)) / Z, where a is the law of the sampler with these options,
    whatever it is. λ is determined from ``pool`` draws; all figures are of as many others. See
    docs/control.md.

    Args:
        model: from ``sedd.load``, with a tokenizer.
        seed: of all draws.
        features: functions by name, each from a list of texts to one finite number for each.
        moments: the wanted mean of each feature, by name or in their order. 1 or 0 for a feature
            with the values 0 and 1 is a condition that every text meets.
        method: ``reject`` is exact up to the error of λ, and needs features between 0 and 1;
            ``qrs`` accepts more and deviates; ``resample`` picks from the second pool, with
            repeats; ``particle`` steers the sampler ``inner`` by the score λ·φ, and is approximate;
            ``weigh`` returns the whole second pool, with a weight for each text.
        num: number of texts.
        pool: draws of the sampler in each of the two pools.
        batch_size: draws at the same time.
        total_variation: the largest total variation between ``qrs`` and p, as the first pool
            estimates it.
        base: the model whose law a is controlled, if ``model`` is only to propose texts, for
            ``resample`` and ``weigh``. Both must be time-independent absorbing models of the same
            tokens, and the sampler must be "ordered" with one position a call in a fixed order,
            because its law is known. No other options than ``order`` and ``length`` are allowed.
        options: arguments of ``sedd.sample`` that are the same for all texts: sampler and its
            options, length, prompt, infill, regex, temperature and so on. With ``particle``:
            ``inner``, ``particles`` and ``resample_every``.

    Raises:
        UserError: a feature fails, the moments cannot be met, an argument is wrong, or an option
            has a list with a value for each text.

    Example:
        >>> import sedd
        >>> model = sedd.load("runs/tiny")
        >>> def vowel(texts):
        ...     return [text[0] in "aeiou" for text in texts]
        >>> drawn = sedd.control.sample(
        ...     model, features={"vowel": vowel}, moments={"vowel": 0.5}, num=8, pool=64
        ... )
        >>> len(drawn.text), drawn.proposals >= 128
        (8, True)
    """
    functions = Features(features)
    moments_F = np.asarray(_in_order(moments, functions.names), float)
    check_numbers(functions, moments_F)
    options = _one_form(options)
    steering = {name: options.pop(name) for name in STEERING if name in options}
    proposing = dict(options)
    if method == "particle":
        if options.pop("sampler", "particle") != "particle":
            raise UserError(
                "the method particle is the sampler particle: give inner=, the one to steer"
            )
        proposing = {**options, "sampler": options.get("inner", "event_jump")}
        proposing.pop("inner", None)
    elif steering:
        raise UserError(f"{', '.join(steering)}: options of the method particle, not of {method}")

    def steered(control: Control) -> Proposals[Drawn]:
        search = {**options, **steering, "sampler": "particle", "tilt": 1.0}
        search["verifier"] = score_of(control, functions)
        size = max(batch_size // steering.get("particles", 8), 1)
        draws = _draws(model, seed, 2 * pool, size, search)
        return Proposals(draws, lambda one: one.text, functions)

    ratio = None if base is None else proposal_ratio(base, model, options, batch_size)
    drawing = Drawing(
        proposals=Proposals(
            _draws(model, seed, 0, batch_size, proposing), lambda one: one.text, functions
        ),
        features=functions,
        moments=moments_F,
        method=method,
        num=num,
        pool=pool,
        uniform=lambda one: np.random.default_rng([seed, one.number, 1]).random(),
        rng=np.random.default_rng([seed, 0, 2]),
        total_variation=total_variation,
        steered=steered,
        log_ratio=None if ratio is None else lambda texts: ratio([one.tokens for one in texts]),
    )
    texts = [one for batch in drawing.texts() for one, _ in batch]
    assert drawing.control is not None
    assert drawing.estimate is not None
    return ControlledTexts(
        text=[one.text for one in texts],
        tokens=np.stack([one.tokens for one in texts]),
        features=np.stack(drawing.drawn),
        control=drawing.control,
        estimate=drawing.estimate,
        curve=drawing.curve,
        log_beta=drawing.log_beta,
        moments=drawing.achieved,
        errors=drawing.achieved_errors,
        distinct=drawing.distinct,
        weights=drawing.weights if method == "weigh" else None,
        proposals=drawing.proposals.count,
    )


def _draws(
    model: Model, seed: int, first: int, size: int, options: Mapping[str, Any]
) -> Iterator[list[Drawn]]:
    """Yield draws number ``first``, ``first`` + 1, … of the sampler, ``size`` at a time."""
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    for start in itertools.count(first, size):
        keys_B = fold(jax.random.key(seed), jnp.arange(start, start + size))
        result = sample_model(model, keys_B, **options)
        if result.text is None:
            raise UserError(
                f"checkpoint {model.source}: it has no tokenizer, and features are of texts"
            )
        rows = zip(result.tokens, result.text, result.calls, strict=True)
        yield [
            Drawn(start + i, tokens, text, int(calls))
            for i, (tokens, text, calls) in enumerate(rows)
        ]


def _in_order(moments: Mapping[str, float] | Sequence[float], names: Sequence[str]):
    """The moments in the order of the features; UserError for other names."""
    if not isinstance(moments, Mapping):
        return moments
    if set(moments) != set(names):
        raise UserError(
            f"there are the features {', '.join(names)}, and the moments of {', '.join(moments)}: "
            "give one moment for each feature"
        )
    return [moments[name] for name in names]


SINGLE = ("prompt", "suffix", "infill", "length", "temperature", "top_k", "top_p", "guidance")


def _one_form(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of ``sedd.sample``; UserError for lists, which are requests of several forms."""
    for name in SINGLE:
        if isinstance(options.get(name), list | tuple):
            raise UserError(
                f"{name} is a list: a control belongs to one form of request, give one value"
            )
    if "trace" in options:
        raise UserError("trace: a control draws texts that are not returned")
    return dict(options)
