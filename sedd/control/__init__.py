"""Distributional control: texts whose features have wanted moments, and else stay a model's own.

arXiv:2012.11635. ``sample`` draws from a model; ``solve``, ``estimate``, ``curve``, ``reject`` and
``resample`` are its parts, for features of anything. See docs/control.md.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
