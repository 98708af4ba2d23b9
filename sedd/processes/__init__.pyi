from .absorbing import Absorbing as Absorbing
from .base import Interpolating as Interpolating
from .base import Process as Process
from .hybrid import Hybrid as Hybrid
from .uniform import Uniform as Uniform
