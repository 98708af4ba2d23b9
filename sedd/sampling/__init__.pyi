from .batch import SampleResult as SampleResult
from .by_block import Piece as Piece
from .by_block import stream as stream
from .whole import sample as sample
