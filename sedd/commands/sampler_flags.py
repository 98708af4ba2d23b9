"""Samplers on a command line: ``--sampler`` and ``--inner`` pick by name, options become flags."""

import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Sequence
from typing import Annotated, Any, get_args

import docstring_parser
import tyro

from sedd.commands.mistakes import as_flag
from sedd.configuration.components import Options, maker, makers, options_type, values
from sedd.errors import FieldError, UserError
from sedd.samplers.base import SamplerOptions

DEFAULT = "tweedie"  # for a model of which nothing is known yet: works on every diffusion model
INNER = "event_jump"  # default of --inner


def pick(name: str | None, inner: str | None, innermost: str | None) -> list[type[Options]]:
    """The option classes of ``--sampler``, ``--inner`` and ``--inner.inner``, outermost first.

    Raises UserError on an unknown sampler, and where one does not wrap the other.
    """
    kinds = [_options_type("--sampler", DEFAULT if name is None else name)]
    for flag, wanted in (("--inner", inner), ("--inner.inner", innermost)):
        outer = kinds[-1].name
        if "inner" not in fields_of(outer):
            if wanted is not None:
                raise UserError(f"{flag} {wanted}: {outer} wraps no other sampler")
            break
        kind = _options_type(flag, INNER if wanted is None else wanted)
        nested = flag != "--inner"
        if not _wraps(outer, kind.name, nested):
            able = [n for n in makers("samplers") if _wraps(outer, n, nested)]
            raise UserError(f"{flag} {wanted}: {outer} wraps {', '.join(able[:-1])} or {able[-1]}")
        kinds.append(kind)
    return kinds


def _wraps(outer: str, inner: str, nested: bool) -> bool:
    """Whether ``outer`` may wrap ``inner``; at the second level, where nothing is wrapped again."""
    fields = fields_of(inner)
    return inner != outer and "verifier" not in fields and not (nested and "inner" in fields)


def fields_of(name: str) -> set[str]:
    """The names of a sampler's fields: options, and what a model or a user supplies."""
    return {field.name for field in dataclasses.fields(maker("samplers", name))}


def _options_type(flag: str, name: str) -> type[Options]:
    try:
        return options_type("samplers", name)
    except UserError as error:
        raise UserError(f"{flag} {name}: {error}") from error


def refuse_flags_of_others(
    arguments: Sequence[str], command: type, kinds: Sequence[type[Options]]
) -> None:
    """Raise UserError on a sampler's flag that the picked samplers do not have at that place."""
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


def flags_of(kinds: Sequence[type[Options]]) -> type[Options]:
    """The option class of the outermost sampler as tyro shows it, with the inner ones nested.

    The help of a flag is the attribute docstring of the sampler's field.
    """
    kind, *wrapped = kinds
    make = maker(kind.family, kind.name)
    described = _attribute_docstrings(make)
    fields: list[Any] = []
    for field in dataclasses.fields(kind):
        types = [t for t in get_args(field.type) if t is not type(None)]
        optional = len(types) < len(get_args(field.type))
        arg = tyro.conf.arg(
            help=described.get(field.name),
            metavar="|".join(t.__name__.upper() for t in types) if optional else None,
            help_behavior_hint="" if optional else None,
        )
        default = dataclasses.field(default=field.default)
        fields.append((field.name, Annotated[field.type, arg], default))
    if wrapped:
        inner = flags_of(wrapped)
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
    """The parsed flags as options that ``build_sampler`` takes, the inner sampler's nested."""
    given = values(flags)
    if isinstance(given.get("inner"), Options):
        given["inner"] = sampler_options(given["inner"])
    return SamplerOptions(flags.name, given)


def flat(options: SamplerOptions, prefix: str = "") -> dict[str, Any]:
    """Every option by its path, such as ``inner.steps``."""
    found: dict[str, Any] = {}
    for name, value in options.values.items():
        if isinstance(value, SamplerOptions):
            found |= {f"{prefix}inner": value.name, **flat(value, f"{prefix}inner.")}
        else:
            found[prefix + name] = value
    return found


def check_integers(options: SamplerOptions) -> None:
    """Raise FieldError on a whole number that a compiled program cannot hold."""
    for field, value in flat(options).items():
        if isinstance(value, int) and value >= 2**31:
            raise FieldError(field, f"must be below 2**31, got {value}")


def _attribute_docstrings(make: type) -> dict[str, str]:
    """The string under each field of a dataclass, inherited fields included."""
    return {
        param.arg_name: " ".join(param.description.split())
        for part in reversed(make.__mro__[:-1])
        for param in docstring_parser.parse_from_object(part).params
        if param.description
    }


def describe(kinds: Sequence[type[Options]]) -> str:
    """One line of help for each sampler, and what ``--inner`` does."""
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
        lines += ["", f"--inner NAME picks what {kinds[0].name} wraps (default {INNER}):"]
        lines += ["  its options are the flags --inner.OPTION"]
    lines += [
        "",
        "Default: event_jump if time-independent, ordered if causal, tweedie otherwise.",
    ]
    return "\n".join(["--sampler NAME picks a sampler:", *lines])


def _headline(make: type) -> str:
    """The first sentences of the sampler's module, without references."""
    line = (sys.modules[make.__module__].__doc__ or "").partition("\n")[0]
    caveat = getattr(make, "caveat", "")
    return line.partition(" arXiv:")[0] + (
        " Approximate." if isinstance(caveat, str) and caveat else ""
    )
