"""The nightly tier: cases that repeat a theorem of the default tests on further settings."""

from collections.abc import Iterable

import pytest


def nightly(*values):
    """The parameters of a test that only ``make test-all`` runs."""
    return pytest.param(*values, marks=pytest.mark.nightly)


def daily(every: Iterable, of_each_day: Iterable) -> list:
    """All cases, those outside of ``of_each_day`` nightly; a case is a value or a tuple of them."""
    of_each_day = list(of_each_day)
    every = list(every)
    assert all(case in every for case in of_each_day), "a case that is none of them"
    return [
        case if case in of_each_day else nightly(*(case if isinstance(case, tuple) else (case,)))
        for case in every
    ]
