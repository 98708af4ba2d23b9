from .bound import BoundResult as BoundResult
from .bound import MonteCarlo as MonteCarlo
from .bound import evaluate_bound as evaluate_bound
from .protocols import Protocol as Protocol
from .protocols import protocol as protocol
