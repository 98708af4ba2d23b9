from .any_subset import AnySubset as AnySubset
from .autoregressive import Autoregressive as Autoregressive
from .base import Inputs as Inputs
from .base import Parameterization as Parameterization
from .block import Block as Block
from .conditional import Conditional as Conditional
from .mean import Mean as Mean
from .score import Score as Score
