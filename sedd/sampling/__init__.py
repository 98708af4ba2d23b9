"""Draw texts from a model: ``sedd.sample`` whole ones, ``sedd.stream`` block by block."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
