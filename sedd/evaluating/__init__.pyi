from .bound import evaluate as evaluate
from .diagnosis import diagnose as diagnose
from .frontier import frontier as frontier
from .marginals import marginals as marginals
from .price import price as price
