"""``sedd.frontier``: judged quality against entropy, of a model and of a second one."""

import math
from collections.abc import Callable, Iterable, Sequence
from operator import index
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from sedd.configuration.build import build_sampler, default_sampler
from sedd.configuration.build_data import pack_split
from sedd.errors import FieldError, UserError, mistakes_in
from sedd.evaluating.inputs import check_sizes, data_set_of, key_of, texts_of
from sedd.evaluation.datasets import DataSet, Track
from sedd.evaluation.frontier import Frontier, JudgedPoint
from sedd.evaluation.judges import Scorer
from sedd.evaluation.ngram_judge import NgramJudge
from sedd.evaluation.protocols import protocol
from sedd.model import Model
from sedd.parameterizations.mean import Mean
from sedd.sampling.whole import sample
from sedd.types import Array, Key

STEPS = (1, 2, 4, 8, 16, 32, 64)
TEMPERATURES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
TEXTS = 128
ORDER = 3  # of the n-grams of the judge ``ngram``


def frontier(
    model: Model,
    data: str | Path | Any,
    key: Key[Array, ""] | int = 0,
    *,
    judge: Scorer | Literal["ngram"] = "ngram",
    against: Model | None = None,
    steps: Iterable[int] = STEPS,
    temperatures: Iterable[float] | None = None,
    texts: int = TEXTS,
    batch_size: int = 32,
) -> Frontier:
    """Draw texts at several temperatures, and compare their judged nats at equal entropy.

    See ``docs/students.md``.

    Args:
        model: from ``load``; its default sampler must have steps.
        data: real text: token ids [S, L], or a corpus as ``evaluate`` takes it. Models are compared
            at its entropy.
        key: a key, or an integer seed. Texts of equal number have the same key in all settings.
        judge: "ngram" for 3-grams of the tokens of the model's training text, or a judge, such as
            from ``sedd.evaluation.hugging_face_judge``.
        against: a second model of the same tokenizer and length, such as a student's teacher.
        steps: numbers of steps of the sampler.
        temperatures: numbers above 0; by default .6, .7, …, 1.1, and 1 alone for models that have
            no temperature.
        texts: number of texts of each setting, at least 2. At most as many real texts are judged.
        batch_size: texts that are drawn together.

    Raises:
        UserError: the sampler has no steps, a model has no tokenizer, the data or the training text
            cannot be read, the data have fewer than 2 rows, or the judge scores no token of some
            texts.
        FieldError: a value is out of its range, or the second model has another tokenizer or
            length.

    Example:
        >>> import sedd
        >>> model = sedd.load("runs/tiny")
        >>> found = sedd.frontier(model, "my.txt", steps=[1, 4], temperatures=[0.5, 1], texts=8)
        >>> [point.steps for point in found.points]
        [1, 1, 4, 4]
        >>> nats, error = found.points[0].nats
        >>> 0 < error < nats
        True
    """
    check_sizes(batch_size, None)
    models = named_models(model, against)
    steps, temperatures = check_settings(models, steps, temperatures, texts)
    if judge == "ngram":
        with mistakes_in("judge"):
            judge = ngram_judge(model)
    if not isinstance(judge, Scorer):
        raise FieldError(
            "judge",
            f'must be "ngram" or a judge, such as sedd.evaluation.hugging_face_judge("gpt2-large"),'
            f" got {judge!r:.60}",
        )
    real = data_set_of(model, data, protocol("default"), "default", None, None, None)
    return frontier_of(
        models,
        real,
        key_of(key),
        judge=judge,
        steps=steps,
        temperatures=temperatures,
        texts=texts,
        batch_size=batch_size,
    )


def named_models(model: Model, against: Model | None) -> dict[str, Model]:
    """The models by their names: the last part of their source if that tells them apart.

    Raises:
        UserError: a model has no tokenizer.
        FieldError: they have another tokenizer or length.
    """
    models = {Path(model.source).name: model}
    _ = model.text_reader  # without a tokenizer there is none
    if against is not None:
        with mistakes_in("against"):
            _ = against.text_reader
        mine, theirs = (each.config.data for each in (model, against))
        for field in ("tokenizer", "length"):
            here, there = getattr(mine, field), getattr(theirs, field)
            if here != there:
                raise FieldError("against", f": its {field} is {there}, and here it is {here}")
        name, source = Path(against.source).name, against.source
        if name in models:
            name = source if source not in models else f"{source}, step {against.step}"
        models[name] = against
    return models


def check_settings(
    models: dict[str, Model],
    steps: Iterable[int],
    temperatures: Iterable[float] | None,
    texts: int,
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Check that all models can draw with every setting; return steps and temperatures, ascending.

    Raises:
        UserError: a model has no sampler with steps.
        FieldError: a value is out of its range, or a model has no temperature.
    """
    counts = _ascending("steps", steps, index, 1, "whole numbers of at least 1, such as [8, 64]")
    if texts < 2:
        raise FieldError("texts", f"must be at least 2, got {texts}")
    sweep = None
    if temperatures is not None:
        least = math.ulp(0.0)
        expected = "numbers above 0, such as [0.9, 1]"
        sweep = _ascending("temperatures", temperatures, float, least, expected)
    for model in models.values():
        for count in counts:
            _sampler(model, count).check(model.denoiser)
        mean = isinstance(model.denoiser.parameterization, Mean)
        if not (model.process.absorbing or mean):
            if sweep not in (None, (1.0,)):
                raise FieldError(
                    "temperatures",
                    f": {model.source} has no temperature: off the absorbing process it needs the "
                    "parameterization mean",
                )
            sweep = (1.0,)
    return counts, sweep or TEMPERATURES


def _ascending(field: str, values, kind: Callable[[Any], Any], least: float, expected: str):
    """The distinct values as numbers of a kind; FieldError unless all are finite and not below."""
    try:
        found = tuple(sorted({kind(each) for each in values}))
    except (TypeError, ValueError):
        found = ()
    if not found or not all(least <= each < math.inf for each in found):
        raise FieldError(field, f"must be {expected}, got {values!r:.60}")
    return found


def frontier_of(
    models: dict[str, Model],
    real: DataSet,
    key: Key[Array, ""],
    *,
    judge: Scorer,
    steps: Sequence[int],
    temperatures: Sequence[float],
    texts: int,
    batch_size: int,
    track: Track | None = None,
) -> Frontier:
    """Draw and judge the texts of every setting; see ``frontier``.

    Args:
        models: the evaluated model and possibly a second one, by their names.
        real: real text.
        key: the key of all settings.
        judge: scores the texts.
        steps: numbers of steps, from ``check_settings``.
        temperatures: the temperatures, likewise.
        texts: number of texts of each setting; at most as many real texts are judged.
        batch_size: texts that are drawn together.
        track: wraps the settings to show progress.

    Raises:
        UserError: there are fewer than 2 real texts, or the judge scores no token of some texts.
    """
    check_rows(real)
    keys_S = jax.random.split(key, texts)
    settings = [
        {"model": name, "steps": count, "temperature": temperature}
        for name in models
        for count in steps
        for temperature in temperatures
    ]
    # A process without temperatures refuses them, 1 included.
    tempered = tuple(temperatures) != (1.0,)
    points = []
    reference = JudgedPoint.of(texts_of(next(iter(models.values())), real, texts), judge)
    shown = settings if track is None else track(settings, "texts of --frontier", len(settings))
    for setting in shown:
        drawn, calls = _draw(
            models[setting["model"]],
            _sampler(models[setting["model"]], setting["steps"]),
            [keys_S[start : start + batch_size] for start in range(0, texts, batch_size)],
            length=real.length,
            **({"temperature": setting["temperature"]} if tempered else {}),
        )
        points.append(JudgedPoint.of(drawn, judge, calls=calls, **setting))
    name, *others = models
    return Frontier(
        judge=judge.name,
        points=points,
        real=reference,
        model=name,
        against=others[0] if others else None,
    )


def check_rows(real: DataSet) -> None:
    """Raise UserError if there are fewer than 2 rows of real text."""
    if len(real.chosen) < 2:
        raise UserError("at least 2 rows of text are needed, got 1")


def _draw(model: Model, sampler, keys: list, **options: Any) -> tuple[list[str], float]:
    """Draw a text for each key, and their mean network calls; ``keys`` has a batch in each item."""
    texts, calls = [], []
    for keys_B in keys:
        drawn = sample(model, keys_B, sampler=sampler, **options)
        texts += drawn.text or []
        calls.append(drawn.calls)
    return texts, float(np.concatenate(calls).mean())


def _sampler(model: Model, steps: int):
    """The default sampler of a model, with so many steps.

    Raises:
        UserError: it has no steps.
    """
    name = default_sampler(model.parts.parameterization)
    try:
        return build_sampler(name, model.schedule, steps=steps)
    except UserError as error:
        raise UserError(f"{model.source}: {error}") from error


def ngram_judge(model: Model) -> NgramJudge:
    """The judge ``ngram``: n-grams of the tokens that the model was trained on.

    Raises:
        UserError: the model has no tokenizer, or its corpus cannot be read.
    """
    tokenizer, data = model.text_reader.tokenizer, model.config.data
    packed, _ = pack_split(
        data.corpus, "train", tokenizer, data, cache_dir=Path(data.cache_dir).expanduser()
    )
    x0_BL, scored_BL, *_ = packed.rows(np.arange(packed.num_rows))
    return NgramJudge.of(
        x0_BL[scored_BL], model.process.num_tokens, ORDER, encode=tokenizer.encode_batch
    )
