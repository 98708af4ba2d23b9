from .base import NoiseSchedule as NoiseSchedule
from .cosine import Cosine as Cosine
from .geometric import Geometric as Geometric
from .log_linear import LogLinear as LogLinear
from .polynomial import Polynomial as Polynomial
