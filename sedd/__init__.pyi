from . import constraints as constraints
from . import control as control
from . import samplers as samplers
from . import watermark as watermark
from .errors import UserError as UserError
from .evaluating import diagnose as diagnose
from .evaluating import evaluate as evaluate
from .evaluating import frontier as frontier
from .evaluating import marginals as marginals
from .evaluating import price as price
from .model import Model as Model
from .model import load as load
from .networks.mesh import device_mesh as device_mesh
from .sampling import Piece as Piece
from .sampling import SampleResult as SampleResult
from .sampling import sample as sample
from .sampling import stream as stream

__version__: str
