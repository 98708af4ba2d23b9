"""Tasks of lm-evaluation-harness (lm-eval, the extra ``harness``); see ``docs/harness.md``."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
