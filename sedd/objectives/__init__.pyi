from .autoregressive import Autoregressive as Autoregressive
from .base import Corrupted as Corrupted
from .base import Objective as Objective
from .k_dce import KDCE as KDCE
from .lambda_dce import LambdaDCE as LambdaDCE
from .mdlm import MDLM as MDLM
from .score_entropy import ScoreEntropy as ScoreEntropy
from .t_dce import TDCE as TDCE
