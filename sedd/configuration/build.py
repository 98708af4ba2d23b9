"""Build the objects of a run from its configuration.

Components depend on each other in one order. The process needs the number of tokens. The
parameterization needs the process. The network needs the number of states, and whether it is given
the noise level. The objective needs the schedule and the parameterization, and the sampler needs
the schedule. ``build_parts`` follows this order, and ``build_step`` and ``build_parallel`` add what
training needs.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sedd.configuration.components import build, maker, makers, options, values
from sedd.configuration.config import Config, with_component
from sedd.configuration.user_function import UserLogProb
from sedd.constraints.windows import check_window
from sedd.data.packing import Packed
from sedd.denoiser import Denoiser
from sedd.errors import FieldError, UserError, fields_within, mistakes_in
from sedd.evaluation.price import Price
from sedd.networks.base import Attend, Network
from sedd.objectives.base import Objective
from sedd.objectives.hmm import Hmm
from sedd.parameterizations.any_subset import AnySubset
from sedd.parameterizations.base import Parameterization
from sedd.parameterizations.block import Block
from sedd.processes.base import Process
from sedd.samplers.base import Sampler, SamplerOptions
from sedd.samplers.planned import Profile
from sedd.samplers.verifier import Verifiers
from sedd.schedules import ByPosition, NoiseSchedule
from sedd.training.optimizer import make_optimizer
from sedd.training.parallel import DataParallel, FullySharded
from sedd.training.step import Step
from sedd.types import Params


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The components of a model, built for each other by ``build_parts``."""

    process: Process
    schedule: NoiseSchedule
    parameterization: Parameterization
    network: Network
    objective: Objective
    sampler: Sampler

    def denoiser(self, params: Params, attend: Attend | None = None) -> Denoiser:
        """The network with these parameters as a ``Denoiser``.

        Args:
            params: the parameters; None for checks that do not call the network.
            attend: which positions see which; all see all by default.
        """
        return Denoiser(
            params=params,
            network=self.network,
            parameterization=self.parameterization,
            attend=attend,
        )


def build_parts(config: Config, num_tokens: int) -> Parts:
    """Build every component for a vocabulary of ``num_tokens`` tokens, the mask not counted.

    Raises:
        FieldError: an option is out of range.
        UserError: two components do not fit each other; the message names one of them.
    """
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
        objective=config.objective.build(
            schedule=schedule,
            parameterization=parameterization,
            log_prob=UserLogProb(getattr(config.objective, "function", "")),
        ),
        sampler=sampler,
    )
    for kind, what in ((AnySubset, "the passes over an order"), (Block, "the blocks")):
        name = config.parameterization.name
        if isinstance(parameterization, kind) and config.objective.name != name:
            raise FieldError(
                "objective",
                f"{config.objective.name} does not train {what} of the parameterization {name}: "
                f"use {name}",
            )
    if isinstance(parameterization, Block):
        with fields_within("parameterization"):
            parameterization.check_length(config.data.length)
    if isinstance(parts.objective, Hmm):
        with fields_within("objective"):
            check_window(parts.objective.window, config.data.length)
    check_padding(config, parts)
    check_positions(config, parts)
    try:
        parts.objective.check(parts.network)
    except UserError as error:
        raise FieldError("objective", f"{config.objective.name} {error}") from None
    parts.sampler.check(parts.denoiser(None))
    return parts


def check_positions(config: Config, parts: Parts) -> None:
    """Check that a schedule with weights of positions fits the model, and the length of a row.

    Raises:
        FieldError: it does not.
    """
    if not isinstance(parts.schedule, ByPosition) or not parts.schedule.by_position:
        return
    if not (parts.process.absorbing and parts.parameterization.time_independent):
        raise FieldError(
            "schedule",
            "by_position needs a model of the absorbing process that is independent of the noise "
            f"level, got {config.parameterization.name} on {config.process.name}",
        )
    if not parts.objective.by_position:
        raise FieldError(
            "objective",
            f"{config.objective.name} does not train with the weights of the schedule by_position: "
            "use t_dce or score_entropy",
        )
    with fields_within("schedule"):
        parts.schedule.check_length(config.data.length)


def check_padding(config: Config, parts: Parts, *, segmented: bool | None = None) -> None:
    """Check that the model can be trained on rows of several texts, if the data are such rows.

    Args:
        config: ``data.padding`` says what the rows are, as far as it is known without the data.
        parts: the components of the model.
        segmented: whether the rows have segments; None if the data are not known yet.

    Raises:
        FieldError: rows have segments, and the objective does not take them, or the network depends
            on the noise level, which differs among the texts of a row.
    """
    if not (config.data.padding == "none" if segmented is None else segmented):
        return
    reason = None
    if not parts.objective.packs:
        reason = f"which the objective {config.objective.name} does not take"
    elif not parts.parameterization.time_independent:
        reason = "each with its own noise level, and this network depends on that of a row"
    if reason is not None:
        raise FieldError(
            "data.padding", f"none packs several texts into a row, {reason}; use eos, or unified"
        )


def check_whole_rows(config: Config, parts: Parts, rows: Sequence[Packed]) -> None:
    """Check that a marginal head is trained on rows of which every token is scored.

    Raises:
        FieldError: a row has padding or given tokens.
    """
    whole = all(packed.num_tokens_total == packed.num_rows * packed.length for packed in rows)
    if parts.objective.trains_marginal_head and not whole:
        raise FieldError(
            "objective",
            f"{config.objective.name} needs rows without padding and without given tokens: join "
            "the texts by --data.wrap, or records by --data.padding unified",
        )


def default_sampler(parameterization: Parameterization) -> str:
    """Return the name of the sampler that a model gets if the user names none.

    - ``event_jump`` for a time-independent absorbing model: there it is exact at one network call a
      position, and never takes more calls than τ-leaping;
    - ``tweedie`` for a model that depends on the noise level, or of another process;
    - ``ordered``, from left to right, for an autoregressive model, and for an any-subset model,
      which is trained to fill gaps from left to right;
    - ``semi_autoregressive``, block by block with ``event_jump``, for a block model.
    """
    if isinstance(parameterization, Block):
        return "semi_autoregressive"
    if parameterization.causal or isinstance(parameterization, AnySubset):
        return "ordered"
    any_order = parameterization.process.absorbing and parameterization.time_independent
    return "event_jump" if any_order else "tweedie"


def default_sampler_of(config: Config) -> str:
    """The default sampler of the model that a configuration describes; see ``default_sampler``.

    Raises:
        UserError: the parameterization does not go with the process.
    """
    # The number of tokens makes no difference here; options may be ids of any of them.
    process = config.process.build(num_tokens=2**30)
    return default_sampler(config.parameterization.build(process=process))


def with_default_sampler(config: Config, before: Config) -> Config:
    """Replace the sampler by the default one if the defaults of ``config`` and ``before`` differ.

    Used where process or parameterization were changed and the sampler was not named: event_jump,
    for example, cannot draw from a model that depends on the noise level. ``steps`` is kept, except
    for ``ordered``, which draws from left to right without it. A configuration whose parts
    do not fit is returned as it is; ``build_parts`` reports it.

    Args:
        config: the configuration whose sampler is replaced.
        before: the configuration before the change.
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
    verifier: Verifiers | None = None,
    profile: Price | Profile | str | Path | None = None,
    **values: Any,
) -> Sampler:
    """Build a sampler from its name and options, and the samplers that it wraps.

    Args:
        sampler: the name, or the name with its options.
        schedule: the noise schedule of the model.
        verifier: what a search scores by, as the field ``verifier`` of searches describes it: for
            example ``text_verifier(function, tokenizer)``, with a function of texts.
        profile: the price profile of planned, or of a search whose inner sampler is planned: a
            ``Price`` or its file.
        values: more options. ``inner`` of a sampler that wraps another one is a name, options or
            a sampler; by default ``Sampler.default_inner``.

    Raises:
        UserError: the name or an option is unknown, ``inner``, ``verifier`` or ``profile`` is given
            to a sampler that takes none, or the verifier of a search or the profile of planned is
            missing.
        FieldError: a value is out of range, or the file of the profile cannot be read; the field is
            a path such as ``inner.steps``.
    """
    if isinstance(sampler, SamplerOptions):
        name, values = sampler.name, {**sampler.values, **values}
        profile = values.pop("profile", profile)
    else:
        name = sampler
    fields = {field.name for field in dataclasses.fields(maker("samplers", name))}
    context: dict[str, Any] = {"schedule": schedule}
    for what, given in (
        ("inner", values.get("inner")),
        ("verifier", verifier),
        ("profile", None if "inner" in fields else profile),
    ):
        if given is not None and what not in fields:
            raise UserError(f"sampler {name!r} takes no {what}; {takers(what)}")
    inner = values.pop("inner", None) or maker("samplers", name).default_inner
    if "verifier" in fields:
        if verifier is None:
            raise UserError(f"sampler {name!r} needs a verifier: a function that scores texts")
        context["verifier"] = verifier
    if "profile" in fields:
        if profile is None:
            raise UserError(
                f"sampler {name!r} needs a profile: the price of the model, as sedd.price or "
                "evaluate.py --price … --json FILE measure it"
            )
        with mistakes_in("profile"):
            context["profile"] = _profile(profile)
    if "inner" in fields:
        if not isinstance(inner, Sampler):
            with fields_within("inner"):
                inner = build_sampler(inner, schedule, profile=profile)
        context["inner"] = inner
    return build("samplers", name, **context, **values)


def takers(field: str) -> str:
    """The samplers that have a field, for the end of a message: "a and b do", "c does"."""
    able = [
        name
        for name, make in makers("samplers").items()
        if field in {each.name for each in dataclasses.fields(make)}
    ]
    return f"{', '.join(able[:-1])} and {able[-1]} do" if len(able) > 1 else f"{able[0]} does"


def _profile(profile: Price | Profile | str | Path) -> Profile:
    """The profile of a measured price or of its file; UserError if it is none."""
    if isinstance(profile, str | Path):
        profile = Price.load(profile)
    if isinstance(profile, Price):
        return profile.profile
    if not isinstance(profile, Profile):
        raise UserError(f"must be a Price or its file, got {profile!r}")
    return profile


def build_step(config: Config, parts: Parts) -> Step:
    """Build the training step, a function from state and batch to the next state and metrics."""
    return Step(
        network=parts.network,
        objective=parts.objective,
        optimizer=make_optimizer(config.optimizer, config.training.steps),
        ema_decay=config.optimizer.ema_decay,
        batch_size=config.training.batch_size,
        stratified=config.training.stratified,
        by_text=config.training.average == "texts",
        skip_nonfinite=config.training.nonfinite == "skip",
    )


def build_parallel(
    config: Config, step: Step, devices: Sequence[Any] | None = None
) -> DataParallel | FullySharded:
    """Return the step on several devices, replicated or sharded by the option ``parallel``.

    It is compiled at its first call.

    Args:
        config: its ``training`` has the options ``parallel``, ``fsdp`` and ``accumulate``.
        step: the step on one device.
        devices: the devices; by default all devices of all processes.

    Raises:
        UserError: the batch size or ``fsdp`` does not fit the number of devices.
    """
    options = {"accumulate": config.training.accumulate, "devices": devices}
    if config.training.parallel == "fsdp":
        return FullySharded(step, fsdp=config.training.fsdp, **options)
    return DataParallel(step, **options)
