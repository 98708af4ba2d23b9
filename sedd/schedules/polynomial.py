"""MD4's polynomial schedule: the share of touched tokens is a power of the time."""

from dataclasses import dataclass

from sedd.errors import FieldError
from sedd.schedules.base import Clamped


@dataclass(frozen=True, kw_only=True)
class Polynomial(Clamped):
    """1 - exp(-σ), the share of touched tokens, is clamp + (1 - 2·clamp)·t^power.

    arXiv:2406.04329, section 3.
    """

    power: float = 2.0
    """Exponent, at least 1; above 1, more of the time is spent at low noise."""

    def __post_init__(self):
        super().__post_init__()
        if self.power < 1:
            raise FieldError("power", f"must be at least 1, got {self.power}")

    def _moved(self, t):
        return t**self.power

    def _moved_rate(self, t):
        return self.power * t ** (self.power - 1)

    def _t_of_moved(self, moved):
        return moved ** (1 / self.power)


make = Polynomial
