from .absorbing import Absorbing as Absorbing
from .base import Process as Process
from .uniform import Uniform as Uniform
