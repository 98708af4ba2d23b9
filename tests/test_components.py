"""Components by name: what a name builds, which fields are options, and what mistakes say."""

import dataclasses
import inspect

import pytest

from sedd.configuration.components import build, maker, makers, options, options_type, values
from sedd.configuration.config import COMPONENTS
from sedd.errors import UserError, did_you_mean
from sedd.schedules import LogLinear

EVERY = [(family, name) for family in COMPONENTS.values() for name in makers(family)]


def test_every_family_has_its_components():
    assert set(makers("processes")) == {"absorbing", "uniform", "hybrid"}
    assert {"euler", "tweedie"} <= set(makers("samplers"))
    schedules = {"log_linear", "geometric", "cosine", "polynomial", "by_position"}
    assert schedules == set(makers("schedules"))


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_a_component_is_a_frozen_keyword_only_dataclass(family, name):
    make = maker(family, name)
    parameters = list(inspect.signature(make).parameters.values())
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters)
    assert make.__dataclass_params__.frozen


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_options_are_exactly_the_fields_with_a_default(family, name):
    defaults = {
        p.name: p.default
        for p in inspect.signature(maker(family, name)).parameters.values()
        if p.default is not inspect.Parameter.empty
    }
    kind = options_type(family, name)
    assert values(kind()) == defaults
    assert {f.name: f.type for f in dataclasses.fields(kind)}.keys() == defaults.keys()
    assert (kind.family, kind.name) == (family, name)
    assert kind is options_type(family, name)  # equal options are equal values


def test_options_build_with_what_the_rest_of_the_model_determines():
    sampler = options("samplers", "euler", steps=3).build(schedule=LogLinear(), unrelated=1)
    assert (sampler.steps, sampler.schedule) == (3, LogLinear())


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda: maker("samplers", "tweedi"), "'tweedi'; did you mean 'tweedie'"),
        (lambda: maker("samplers", "xyz"), "has no 'xyz'; it has best_of_n, .*euler"),
        (lambda: options("samplers", "tweedie", step=3), "'step'; did you mean 'steps'"),
        (lambda: options("processes", "uniform", steps=3), "no option 'steps'; it has none"),
        (
            lambda: build("samplers", "euler", schedule=LogLinear(), setps=3),
            "no field 'setps'; did you mean 'steps'",
        ),
        (lambda: build("samplers", "euler", steps=3), "samplers 'euler': .*'schedule'"),
        (lambda: build("schedules", "log_linear", eps=2.0), "schedules 'log_linear': eps .* 2.0"),
    ],
)
def test_a_mistake_is_named(do, message):
    with pytest.raises(UserError, match=message):
        do()


def test_no_suggestion_where_nothing_is_close():
    assert did_you_mean("xyz", ["steps"]) == ""
