"""From a configuration to the objects of a run."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sedd.configuration.components import build, maker, options, values
from sedd.configuration.config import Config, DataOptions, with_component
from sedd.data.corpora import Mixture, open_corpus, parse_mixture
from sedd.data.packing import Packed, pack, validation_rows
from sedd.data.tokenizer_sources import build_tokenizer
from sedd.data.tokenizers import Tokenizer
from sedd.denoiser import Denoiser
from sedd.errors import UserError, fields_within
from sedd.networks.base import Attend, Network
from sedd.objectives.base import Objective
from sedd.parameterizations.base import Parameterization
from sedd.processes.base import Process
from sedd.samplers.base import Sampler, SamplerOptions
from sedd.samplers.verifier import Verifier
from sedd.schedules import NoiseSchedule
from sedd.training.optimizer import make_optimizer
from sedd.training.parallel import DataParallel, FullySharded
from sedd.training.step import Step
from sedd.types import Params


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The components of a model, built and fitted to each other."""

    process: Process
    schedule: NoiseSchedule
    parameterization: Parameterization
    network: Network
    objective: Objective
    sampler: Sampler

    def denoiser(self, params: Params, attend: Attend | None = None) -> Denoiser:
        """The network with these parameters."""
        return Denoiser(
            params=params,
            network=self.network,
            parameterization=self.parameterization,
            attend=attend,
        )


def build_parts(config: Config, num_tokens: int) -> Parts:
    """Every component for a vocabulary of ``num_tokens``; UserError where two do not fit."""
    process = config.process.build(num_tokens=num_tokens)
    schedule = config.schedule.build()
    parameterization = config.parameterization.build(process=process)
    with fields_within("sampler"):
        sampler = build_sampler(config.sampler.name, schedule, **values(config.sampler))
    parts = Parts(
        process=process,
        schedule=schedule,
        parameterization=parameterization,
        network=config.network.build(
            num_states=process.num_states,
            time_conditioned=not parameterization.time_independent,
        ),
        objective=config.objective.build(schedule=schedule, parameterization=parameterization),
        sampler=sampler,
    )
    parts.sampler.check(parts.denoiser(None))
    return parts


def default_sampler(parameterization: Parameterization) -> str:
    """The sampler of a model if none is named.

    ``event_jump`` for time-independent models, on which it is exact in one network call a position
    and never takes more calls than τ-leaping; ``tweedie``, which works on every process, for models
    that depend on the noise level; ``ordered``, from left to right, for autoregressive models.
    """
    if parameterization.causal:
        return "ordered"
    return "event_jump" if parameterization.time_independent else "tweedie"


def default_sampler_of(config: Config) -> str:
    """The default sampler of the model that a configuration describes; see ``default_sampler``.

    Raises:
        UserError: the parameterization does not go with the process.
    """
    process = config.process.build(num_tokens=2)  # the number of tokens makes no difference here
    return default_sampler(config.parameterization.build(process=process))


def with_default_sampler(config: Config, before: Config) -> Config:
    """Replace the sampler where ``config`` has another default sampler than ``before``.

    Used where process or parameterization were changed and the sampler was not named: event_jump,
    for example, cannot draw from a model that depends on the noise level. ``steps`` is kept, except
    for ``ordered``, which draws from autoregressive models without it. A configuration whose parts
    do not fit is returned as it is; ``build_parts`` reports it.
    """
    try:
        name = default_sampler_of(config)
        if name == default_sampler_of(before):
            return config
    except UserError:
        return config
    if name == "ordered":
        return dataclasses.replace(config, sampler=options("samplers", name))
    return with_component(config, "sampler", name)


def build_sampler(
    sampler: str | SamplerOptions,
    schedule: NoiseSchedule,
    *,
    verifier: Verifier | None = None,
    **values: Any,
) -> Sampler:
    """Build a sampler from its name and options.

    Args:
        sampler: the name, or a name with options.
        schedule: the noise schedule of the model.
        verifier: the scoring function of a search (best_of_n, particle).
        values: more options. ``inner`` of a sampler that wraps another one is a name, options or
            a sampler; event_jump by default.

    Raises UserError on an unknown name or option, on ``inner`` or ``verifier`` for a sampler that
    takes none, and on a missing verifier; FieldError on a bad value, whose field is a path such as
    ``inner.steps``.
    """
    if isinstance(sampler, SamplerOptions):
        name, values = sampler.name, {**sampler.values, **values}
    else:
        name = sampler
    fields = {field.name for field in dataclasses.fields(maker("samplers", name))}
    context: dict[str, Any] = {"schedule": schedule}
    for what, given, takers in (
        ("inner", values.get("inner"), "semi_autoregressive, best_of_n and particle"),
        ("verifier", verifier, "best_of_n and particle"),
    ):
        if given is not None and what not in fields:
            raise UserError(f"sampler {name!r} takes no {what}; {takers} do")
    inner = values.pop("inner", None) or "event_jump"
    if "verifier" in fields:
        if verifier is None:
            raise UserError(f"sampler {name!r} needs a verifier: a function that scores texts")
        context["verifier"] = verifier
    if "inner" in fields:
        if not isinstance(inner, Sampler):
            with fields_within("inner"):
                inner = build_sampler(inner, schedule)
        context["inner"] = inner
    return build("samplers", name, **context, **values)


def build_step(config: Config, parts: Parts) -> Step:
    """One training step of this configuration."""
    return Step(
        network=parts.network,
        objective=parts.objective,
        optimizer=make_optimizer(config.optimizer, config.training.steps),
        ema_decay=config.optimizer.ema_decay,
        batch_size=config.training.batch_size,
        stratified=config.training.stratified,
        skip_nonfinite=config.training.nonfinite == "skip",
    )


def build_parallel(
    config: Config, step: Step, devices: Sequence[Any] | None = None
) -> DataParallel | FullySharded:
    """The step on ``devices``, all that there are by default, as the configuration says."""
    options = {"accumulate": config.training.accumulate, "devices": devices}
    if config.training.parallel == "fsdp":
        return FullySharded(step, fsdp=config.training.fsdp, **options)
    return DataParallel(step, **options)


@dataclass(frozen=True, kw_only=True)
class Data:
    """The tokenizer, and the packed splits of every part of the mixture with its weight."""

    tokenizer: Tokenizer
    train: list[tuple[Packed, float]]
    validation: list[tuple[Packed, float]]


def build_data(config: Config, *, tokenizer: Tokenizer | None = None, progress=None) -> Data:
    """Open, tokenise and pack; ``tokenizer`` is that of the run that is resumed, if any."""
    cache_dir = Path(config.data.cache_dir).expanduser()
    weighted = parse_mixture(config.data.corpus)
    corpora = [open_corpus(spec, cache_dir=cache_dir) for spec, _ in weighted]
    for corpus in corpora:
        for split in ("train", "validation"):
            if split not in corpus.splits:
                raise UserError(
                    f"corpus {corpus.name!r} has no {split} split to train with: it has "
                    f"{', '.join(corpus.splits)}"
                )
    if tokenizer is None:
        whole = corpora[0] if len(corpora) == 1 else Mixture.of(corpora)
        tokenizer = build_tokenizer(
            config.data.tokenizer,
            whole,
            cache_dir=cache_dir,
            end_of_text=config.data.end_of_text,
        )
    parts = {
        split: [
            (_pack(corpus, split, tokenizer, config.data, cache_dir, progress), weight)
            for corpus, (_, weight) in zip(corpora, weighted, strict=True)
        ]
        for split in ("train", "validation")
    }
    return Data(tokenizer=tokenizer, **parts)


def pack_split(
    spec: str,
    split: str | None,
    tokenizer: Tokenizer,
    data: DataOptions,
    *,
    cache_dir: Path,
    progress=None,
) -> tuple[Packed, str]:
    """A corpus to evaluate on, cut as ``data`` says, and the split that it is."""
    corpus = open_corpus(spec, cache_dir=cache_dir)
    split = split or corpus.evaluation_split
    return _pack(corpus, split, tokenizer, data, cache_dir, progress), split


def _pack(corpus, split, tokenizer, data: DataOptions, cache_dir, progress) -> Packed:
    return pack(
        corpus,
        tokenizer,
        split,
        length=data.length,
        wrap=data.wrap,
        cache_dir=cache_dir,
        progress=progress,
    )


@dataclass(frozen=True, kw_only=True)
class ValidationRows:
    """Evenly spread rows of every part, in batches. Iterable any number of times."""

    parts: Sequence[Packed]
    max_sequences: int | None
    batch_size: int

    def __len__(self) -> int:
        return sum(-(-len(rows) // self.batch_size) for _, rows in self._rows())

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for packed, rows in self._rows():
            for first in range(0, len(rows), self.batch_size):
                yield packed.rows(rows[first : first + self.batch_size])

    def counts(self) -> np.ndarray:
        """How often each token is scored, [N]."""
        counts_N = np.zeros(self.parts[0].counts.size, np.int64)
        for x0_BL, scored_BL in self:
            counts_N += np.bincount(x0_BL[scored_BL], minlength=counts_N.size)
        return counts_N

    def _rows(self):
        each = None if self.max_sequences is None else -(-self.max_sequences // len(self.parts))
        return [(packed, validation_rows(packed, each)) for packed in self.parts]
