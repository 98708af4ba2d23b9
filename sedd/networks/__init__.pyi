from .base import Attend as Attend
from .base import Memory as Memory
from .base import Network as Network
from .base import read_out as read_out
from .causal_head import CausalHead as CausalHead
from .ddit import DDiT as DDiT
from .rows import Rows as Rows
