"""Samplers on a command line: ``--sampler`` and ``--inner`` pick by name, options become flags.

A sampler may wrap another one, which may wrap a third: ``--sampler best_of_n --inner
semi_autoregressive --inner.inner confidence``. The option ``by`` of the third is then
``--inner.inner.by``. The picked samplers are a list of option classes, outermost first.
``nested_type`` nests them into one dataclass, of which tyro makes flags with these names.
"""

import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Sequence
from typing import Annotated, Any, get_args, get_type_hints

import tyro

from sedd.commands.mistakes import as_flag
from sedd.configuration.components import (
    Options,
    maker,
    makers,
    options_type,
    values,
)
from sedd.errors import FieldError, UserError
from sedd.samplers.base import SamplerOptions

DEFAULT = "tweedie"  # if the model is not known yet: it works on every diffusion model


def pick(name: str | None, inner: str | None, innermost: str | None) -> list[type[Options]]:
    """Find the option classes of the named samplers, outermost first.

    Args:
        name: the value of ``--sampler``; None stands for ``DEFAULT``.
        inner: the value of ``--inner``. None stands for the ``default_inner`` of a sampler that
            wraps another one.
        innermost: the value of ``--inner.inner``; None as for ``inner``.

    Raises:
        UserError: a sampler is unknown, or does not wrap the one that is named as its inner one.
    """
    kinds = [_options_type("--sampler", DEFAULT if name is None else name)]
    for flag, wanted in (("--inner", inner), ("--inner.inner", innermost)):
        outer = kinds[-1].name
        if "inner" not in fields_of(outer):
            if wanted is not None:
                raise UserError(f"{flag} {wanted}: {outer} wraps no other sampler")
            break
        own = maker("samplers", outer).default_inner
        kind = _options_type(flag, own if wanted is None else wanted)
        nested = flag != "--inner"
        if not _wraps(outer, kind.name, nested):
            able = [n for n in makers("samplers") if _wraps(outer, n, nested)]
            raise UserError(f"{flag} {wanted}: {outer} wraps {', '.join(able[:-1])} or {able[-1]}")
        kinds.append(kind)
    return kinds


def _wraps(outer: str, inner: str, nested: bool) -> bool:
    """Whether ``outer`` may wrap ``inner``; if ``nested``, ``inner`` may not wrap a further one.

    A search (a sampler with a verifier) cannot be an inner sampler, and a sampler with a profile,
    which plans whole sequences, cannot fill blocks. A sampler may ask for a kind of inner sampler
    by the type of its field.
    """
    fields = fields_of(inner)
    if "profile" in fields and "stop" in fields_of(outer):
        return False
    if not issubclass(maker("samplers", inner), get_type_hints(maker("samplers", outer))["inner"]):
        return False
    return inner != outer and "verifier" not in fields and not (nested and "inner" in fields)


def fields_of(name: str) -> set[str]:
    """The names of a sampler's fields: its options, and those that a model or a user supplies."""
    return {field.name for field in dataclasses.fields(maker("samplers", name))}


def _options_type(flag: str, name: str) -> type[Options]:
    try:
        return options_type("samplers", name)
    except UserError as error:
        raise UserError(f"{flag} {name}: {error}") from error


def refuse_flags_of_others(
    arguments: Sequence[str], command: type, kinds: Sequence[type[Options]]
) -> None:
    """Refuse flags of samplers that were not picked, or flags at the wrong depth.

    Tyro would call such a flag unrecognised. The error here names the samplers that have the flag,
    or its right spelling, such as ``--inner.by`` for ``--by``.

    Args:
        arguments: the command line.
        command: the dataclass of the command, whose own flags are left alone.
        kinds: the picked samplers, outermost first.

    Raises:
        UserError: a flag is that of another sampler or another depth.
    """
    names = [{field.name for field in dataclasses.fields(kind)} for kind in kinds]
    own = {field.name for field in dataclasses.fields(command)}
    owners: dict[str, list[str]] = {}
    for name in makers("samplers"):
        for field in dataclasses.fields(options_type("samplers", name)):
            owners.setdefault(field.name, []).append(name)
    for argument in arguments:
        flag = argument.partition("=")[0]
        *path, option = flag.removeprefix("--").replace("-", "_").split(".")
        if not flag.startswith("--") or option not in owners or set(path) - {"inner"}:
            continue
        depth = len(path)
        if (depth < len(kinds) and option in names[depth]) or (not path and option in own):
            continue
        if depth >= len(kinds):
            raise UserError(f"{flag}: {kinds[-1].name} wraps no other sampler")
        if any(option in each for each in names):
            place = next(i for i, each in enumerate(names) if option in each)
            spelt = as_flag("inner." * place + option)
            raise UserError(f"{flag}: it is a flag of {kinds[place].name}: write {spelt}")
        raise UserError(
            f"{flag}: it is a flag of {' and '.join(owners[option])}, not of {kinds[depth].name}"
        )


def nested_type(kinds: Sequence[type[Options]]) -> type[Options]:
    """Make the dataclass whose fields tyro shows as flags.

    Its fields are the options of the outermost sampler and ``inner``, a dataclass made in the same
    way from the other samplers. The help of a flag is the string below the field in the sampler's
    own class.

    Args:
        kinds: the picked samplers, outermost first.
    """
    kind, *wrapped = kinds
    make = maker(kind.family, kind.name)
    fields: list[Any] = []
    for field in dataclasses.fields(kind):
        types = [t for t in get_args(field.type) if t is not type(None)]
        optional = len(types) < len(get_args(field.type))
        arg = tyro.conf.arg(
            metavar="|".join(t.__name__.upper() for t in types) if optional else None,
            help_behavior_hint="" if optional else None,
        )
        default = dataclasses.field(default=field.default)
        fields.append((field.name, Annotated[field.type, arg], default))
    if wrapped:
        inner = nested_type(wrapped)
        fields.append(("inner", inner, dataclasses.field(default_factory=inner)))
    text = (inspect.getdoc(make) or "").replace("``", "")
    return dataclasses.make_dataclass(
        kind.__name__,
        fields,
        bases=(kind,),
        namespace={"__doc__": f"{kind.name}: {text}"},
        frozen=True,
        kw_only=True,
    )


def sampler_options(flags: Options) -> SamplerOptions:
    """Convert the parsed flags to the nested options that ``build_sampler`` takes."""
    given = values(flags)
    if isinstance(given.get("inner"), Options):
        given["inner"] = sampler_options(given["inner"])
    return SamplerOptions(flags.name, given)


def flat(options: SamplerOptions, prefix: str = "") -> dict[str, Any]:
    """Flatten nested options: the value of each by its path, such as ``inner.steps``."""
    found: dict[str, Any] = {}
    for name, value in options.values.items():
        if isinstance(value, SamplerOptions):
            found |= {f"{prefix}inner": value.name, **flat(value, f"{prefix}inner.")}
        else:
            found[prefix + name] = value
    return found


def check_integers(options: SamplerOptions) -> None:
    """Check that whole numbers fit into the 32 bits of a compiled program.

    Raises:
        FieldError: an option is 2**31 or more.
    """
    for field, value in flat(options).items():
        if isinstance(value, int) and value >= 2**31:
            raise FieldError(field, f"must be below 2**31, got {value}")


def describe(kinds: Sequence[type[Options]]) -> str:
    """Write the help on samplers: one entry for each, how to set ``--inner``, and the default."""
    known = makers("samplers")
    width = max(map(len, known)) + 4
    lines = [
        textwrap.fill(
            _headline(make),
            79,
            initial_indent=f"  {name}".ljust(width),
            subsequent_indent=" " * width,
        )
        for name, make in known.items()
    ]
    if len(kinds) > 1:
        lines += [
            "",
            f"--inner NAME picks the sampler that {kinds[0].name} wraps (default "
            f"{maker('samplers', kinds[0].name).default_inner}):",
            "  its options are the flags --inner.OPTION",
        ]
    lines += [
        "",
        "The default for",
        "  time-independent models: event_jump",
        "  autoregressive models: ordered",
        "  block models: semi_autoregressive",
        "  all others: tweedie",
    ]
    return "\n".join(["--sampler NAME picks a sampler:", *lines])


def _headline(make: type) -> str:
    """The first line of the sampler's module without references, and whether it is biased."""
    line = (sys.modules[make.__module__].__doc__ or "").partition("\n")[0]
    caveat = getattr(make, "caveat", "")
    return line.partition(" arXiv:")[0] + (
        " Approximate." if isinstance(caveat, str) and caveat else ""
    )
