"""Find and build components by name: ``build("samplers", "euler", steps=64, schedule=…)``.

A family is a package under ``sedd``, such as ``sedd.samplers``. A module of it that defines
``make``, a frozen dataclass, is a component, and its name is that of the module. No list of
components is kept: a new component is one new file.

The fields of ``make`` with a default are options: a configuration and the command line may set
them. Fields without a default are context, which comes from the rest of the model: the number of
tokens of a process, the schedule of a sampler. ``Options`` are the options without the context, so
that a configuration can be written before the model exists.
"""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from typing import Any, ClassVar, get_type_hints

from sedd.errors import FieldError, UserError, did_you_mean, fields_within

COMPONENTS = {  # fields of a configuration, and the family from which each picks a component
    "process": "processes",
    "schedule": "schedules",
    "parameterization": "parameterizations",
    "network": "networks",
    "objective": "objectives",
    "sampler": "samplers",
}


@functools.cache
def makers(family: str) -> dict[str, type]:
    """Import every module of a family and return its components by name."""
    package = importlib.import_module(f"sedd.{family}")
    found = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        if hasattr(module, "make"):
            found[info.name] = module.make
    return found


def maker(family: str, name: str) -> type:
    """Return the dataclass of a component.

    Raises:
        UserError: the family has no component of this name; the message lists its components.
    """
    known = makers(family)
    if name not in known:
        raise UserError(
            f"{family} has no {name!r}{did_you_mean(name, known)}; "
            f"it has {', '.join(sorted(known))}"
        )
    return known[name]


def build(family: str, name: str, **fields: Any) -> Any:
    """Build a component from its fields.

    Args:
        family: the package, such as "samplers".
        name: the module, such as "euler".
        fields: options and context. Options that are left out take their defaults.

    Raises:
        UserError: the name or a field is unknown, or the values do not fit each other.
        FieldError: the value of one field is out of its range.
    """
    make = maker(family, name)
    accepted = [field.name for field in dataclasses.fields(make) if field.init]
    for field in fields:
        if field not in accepted:
            raise UserError(
                f"{family} {name!r} has no field {field!r}{did_you_mean(field, accepted)}; "
                f"it has {', '.join(accepted)}"
            )
    try:
        return make(**fields)
    except FieldError as error:
        raise FieldError(error.field, error.problem, f"{family} {name!r}") from error
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{family} {name!r}: {error}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Base class for the options of one component; ``options`` makes instances.

    Each component has a subclass of its own, whose fields are the component's options.
    """

    family: ClassVar[str]
    name: ClassVar[str]

    def build(self, **context: Any) -> Any:
        """Build the component with these options.

        Args:
            context: values of fields without a default. Values that the component has no field for
                are left out, so that a caller can pass the same context to a whole family.

        Raises:
            UserError: the component refuses its options; the error names the field, prefixed by its
                place in a configuration, such as ``process``.
        """
        known = {field.name for field in dataclasses.fields(maker(self.family, self.name))}
        given = {key: value for key, value in context.items() if key in known}
        place = next(key for key, family in COMPONENTS.items() if family == self.family)
        with fields_within(place):
            return build(self.family, self.name, **given, **values(self))


def values(options: Options) -> dict[str, Any]:
    """Return the options as a dictionary from field to value."""
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}


@functools.cache
def options_type(family: str, name: str) -> type[Options]:
    """Make the subclass of ``Options`` for a component, one class for each component.

    Its fields are those fields of ``make`` that have a default; its docstring is that of ``make``.

    Raises:
        UserError: the family has no component of this name.
    """
    make = maker(family, name)
    hints = get_type_hints(make)
    fields = [
        (field.name, hints[field.name], dataclasses.field(default=field.default))
        for field in dataclasses.fields(make)
        if field.init and field.default is not dataclasses.MISSING
    ]
    return dataclasses.make_dataclass(
        f"{make.__name__}Options",
        fields,
        bases=(Options,),
        namespace={"family": family, "name": name, "__doc__": inspect.getdoc(make)},
        frozen=True,
        kw_only=True,
    )


def options(family: str, name: str, **given: Any) -> Options:
    """Make the options of a component, as configurations do: ``options("schedules", "cosine")``.

    Args:
        family: the package, such as "schedules".
        name: the component.
        given: options that differ from their defaults. Their values are checked when the component
            is built.

    Raises:
        UserError: the component or an option is unknown.
    """
    kind = options_type(family, name)
    accepted = [field.name for field in dataclasses.fields(kind)]
    for field in given:
        if field not in accepted:
            raise UserError(
                f"{family} {name!r} has no option {field!r}{did_you_mean(field, accepted)}; "
                f"it has {', '.join(accepted) or 'none'}"
            )
    return kind(**given)
