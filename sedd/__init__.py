"""Discrete diffusion language models in JAX: train, sample, infill and evaluate SEDD and RADD."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sedd.errors import UserError
    from sedd.model import Model, evaluate, load
    from sedd.sampling import SampleResult, sample

__version__ = "0.1.0"
__all__ = ["Model", "SampleResult", "UserError", "evaluate", "load", "sample"]


def __getattr__(name: str):
    # Imported when first asked for: a command must be able to set up devices before jax is loaded.
    if name == "constraints":
        return importlib.import_module("sedd.constraints")
    if name not in __all__:
        raise AttributeError(f"module 'sedd' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME.get(name, "sedd.model")), name)


_HOME = {
    "UserError": "sedd.errors",
    "SampleResult": "sedd.sampling",
    "sample": "sedd.sampling",
}
