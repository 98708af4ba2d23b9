from .detection import Detection as Detection
from .detection import detect as detect
from .scheme import Scheme as Scheme
from .scheme import read_secret as read_secret
