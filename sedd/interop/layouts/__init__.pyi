from .base import Description as Description
from .base import Layout as Layout
from .base import PublishedConfig as PublishedConfig
from .base import find_config as find_config
from .base import layout_for as layout_for
from .base import read_layout as read_layout
