"""The samplers on a command line: one is picked by name, and its options are flags."""

import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Annotated, get_args

import tyro

from sedd.configuration.build import default_sampler
from sedd.configuration.components import Options, maker, makers, options_type
from sedd.errors import UserError
from sedd.parameterizations.base import Parameterization

DEFAULT = default_sampler(Parameterization)  # but for autoregressive models
INNER = "event_jump"  # what a sampler wraps, where nothing else is said


def pick(name: str | None, inner: str | None) -> list[type[Options]]:
    """The options of the sampler of that name, of what it wraps, and of what that wraps.

    UserError where there is no such sampler, or one does not wrap the other.
    """
    kinds = [_options_type("--sampler", DEFAULT if name is None else name)]
    outer = kinds[0].name
    if "inner" not in fields_of(outer):
        if inner is not None:
            raise UserError(f"--inner {inner}: {outer} wraps no other sampler")
        return kinds
    kinds.append(_options_type("--inner", INNER if inner is None else inner))
    inner = kinds[1].name
    if inner == outer or "verifier" in fields_of(inner):
        able = [n for n in makers("samplers") if n != outer and "verifier" not in fields_of(n)]
        raise UserError(f"--inner {inner}: {outer} wraps {', '.join(able[:-1])} or {able[-1]}")
    if "inner" in fields_of(inner):
        kinds.append(_options_type("--inner", INNER))
    return kinds


def fields_of(name: str) -> set[str]:
    """The names of what a sampler is built of."""
    return {field.name for field in dataclasses.fields(maker("samplers", name))}


def _options_type(flag: str, name: str) -> type[Options]:
    try:
        return options_type("samplers", name)
    except UserError as error:
        raise UserError(f"{flag} {name}: {error}") from error


def refuse_flags_of_others(
    arguments: Sequence[str], command: type, kinds: Sequence[type[Options]]
) -> None:
    """UserError on a flag of samplers that were not picked, which names them."""
    own = {field.name for kind in (command, *kinds) for field in dataclasses.fields(kind)}
    owners = {}
    for name in makers("samplers"):
        for field in dataclasses.fields(options_type("samplers", name)):
            owners.setdefault(field.name, []).append(name)
    for argument in arguments:
        flag = argument.partition("=")[0]
        option = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and option in owners and option not in own:
            raise UserError(
                f"{flag}: it is a flag of {' and '.join(owners[option])}, not of "
                f"{' or '.join(kind.name for kind in kinds)}"
            )


def shown(kind: type[Options]) -> type[Options]:
    """The options as flags: their help is the comments beside them."""
    make = maker(kind.family, kind.name)
    fields = []
    for field in dataclasses.fields(kind):
        types = [t for t in get_args(field.type) if t is not type(None)]
        optional = len(types) < len(get_args(field.type))
        arg = tyro.conf.arg(
            help=_comment(make, field.name),
            metavar="|".join(t.__name__.upper() for t in types) if optional else None,
            help_behavior_hint="" if optional else None,
        )
        default = dataclasses.field(default=field.default)
        fields.append((field.name, Annotated[field.type, arg], default))
    text = (inspect.getdoc(make) or "").replace("``", "")
    return dataclasses.make_dataclass(
        kind.__name__,
        fields,
        bases=(kind,),
        namespace={"__doc__": f"{kind.name}: {text}"},
        frozen=True,
        kw_only=True,
    )


def _comment(make: type, field: str) -> str | None:
    """What stands behind ``#`` where a dataclass declares a field."""
    for part in make.__mro__:
        if field in inspect.get_annotations(part):
            found = re.search(rf"^ +{field}:[^#\n]*#\s*(.+)$", inspect.getsource(part), re.M)
            return found and found[1][0].upper() + found[1][1:] + "."
    return None


def describe(kinds: Sequence[type[Options]]) -> str:
    """Every sampler in a line."""
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
        lines += ["", f"--inner NAME picks what {kinds[0].name} wraps (default {INNER})."]
    lines += ["", "Of an autoregressive run the default is ordered."]
    return "\n".join([f"--sampler NAME picks how (default {DEFAULT}), and which flags:", *lines])


def _headline(make: type) -> str:
    """Its module's first sentences, without the references."""
    line = (sys.modules[make.__module__].__doc__ or "").partition("\n")[0]
    caveat = getattr(make, "caveat", "")
    return line.partition(" arXiv:")[0] + (
        " Approximate." if isinstance(caveat, str) and caveat else ""
    )


def as_flags(message: str, names: Iterable[str]) -> str:
    """A message with the options in it as they are typed: --top-p for top_p."""
    words = "|".join(sorted(names, key=len, reverse=True))
    return re.sub(
        rf"(?<![\w'-])(?:{words})(?![\w'-])", lambda m: f"--{m[0].replace('_', '-')}", message
    )
