"""Samplers: decoders of a denoiser, each with a stated law.

A sampler is *exact*, and its law is *the model's own*, if its samples follow the joint distribution
whenever the conditionals of the network are those of one joint distribution. The conditionals of a
trained network are only nearly consistent: the law of an exact sampler then depends on the order in
which it reveals positions.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
