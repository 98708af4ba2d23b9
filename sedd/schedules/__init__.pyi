from .base import NoiseSchedule as NoiseSchedule
from .by_position import ByPosition as ByPosition
from .cosine import Cosine as Cosine
from .geometric import Geometric as Geometric
from .log_linear import LogLinear as LogLinear
from .polynomial import Polynomial as Polynomial
