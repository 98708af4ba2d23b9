"""Components by name: ``build("samplers", "euler", steps=64, …)``.

A family is a package under ``sedd``. A module of it that defines ``make``, a frozen dataclass, is a
component. The fields with a default are options, which a configuration may set; the other fields
are filled in from the rest of the model. A new component is one new file.
"""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from typing import Any, ClassVar, get_type_hints

from sedd.errors import FieldError, UserError, did_you_mean, fields_within

COMPONENTS = {  # fields of a configuration: the family that each chooses from
    "process": "processes",
    "schedule": "schedules",
    "parameterization": "parameterizations",
    "network": "networks",
    "objective": "objectives",
    "sampler": "samplers",
}


@functools.cache
def makers(family: str) -> dict[str, type]:
    """Every component of a family, by name."""
    package = importlib.import_module(f"sedd.{family}")
    found = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        if hasattr(module, "make"):
            found[info.name] = module.make
    return found


def maker(family: str, name: str) -> type:
    """The dataclass of a component; UserError with the known names for an unknown one."""
    known = makers(family)
    if name not in known:
        raise UserError(
            f"{family} has no {name!r}{did_you_mean(name, known)}; "
            f"it has {', '.join(sorted(known))}"
        )
    return known[name]


def build(family: str, name: str, **fields: Any) -> Any:
    """Build a component from its fields.

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
    """The options of one component in a configuration; ``options`` makes instances."""

    family: ClassVar[str]
    name: ClassVar[str]

    def build(self, **context: Any) -> Any:
        """Build the component with these options; ``context`` has the fields without a default."""
        known = {field.name for field in dataclasses.fields(maker(self.family, self.name))}
        given = {key: value for key, value in context.items() if key in known}
        place = next(key for key, family in COMPONENTS.items() if family == self.family)
        with fields_within(place):
            return build(self.family, self.name, **given, **values(self))


def values(options: Options) -> dict[str, Any]:
    """The options as a dictionary."""
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}


@functools.cache
def options_type(family: str, name: str) -> type[Options]:
    """The dataclass of a component's options: those fields of ``make`` that have a default."""
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
    """Options for a component, as configurations write them: ``options("schedules", "cosine")``."""
    kind = options_type(family, name)
    accepted = [field.name for field in dataclasses.fields(kind)]
    for field in given:
        if field not in accepted:
            raise UserError(
                f"{family} {name!r} has no option {field!r}{did_you_mean(field, accepted)}; "
                f"it has {', '.join(accepted) or 'none'}"
            )
    return kind(**given)
