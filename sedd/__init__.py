"""Discrete diffusion language models in JAX: train, sample, infill and evaluate.

Names are imported when first used, so that a command can set up devices before JAX is loaded.
"""

import lazy_loader

__version__ = "0.2.0.dev0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
