"""An HMM head on a model of ``sotu_radd_small``; give the trunk by ``--init-from RUN``.

The trunk is frozen: it keeps its bounds, and the head draws the tokens of one call jointly.
"""

import dataclasses

import sotu_radd_small

from sedd.configuration.components import options, values
from sedd.configuration.config import Config
from sedd.training.optimizer import OptimizerOptions


def get_config() -> Config:
    """The configuration of this recipe."""
    trunk = sotu_radd_small.get_config()
    return dataclasses.replace(
        trunk,
        aim="no published figure: an HMM head (arXiv:2603.00045) on sotu_radd_small's model",
        network=options("networks", "hmm_head", states=128, **values(trunk.network)),
        objective=options("objectives", "hmm", window=32),
        optimizer=OptimizerOptions(
            learning_rate=1e-1,
            warmup_steps=20,
            schedule="cosine",
            beta2=0.99,
            ema_decay=0.99,
        ),
        training=dataclasses.replace(trunk.training, steps=1000, eval_every=250, sample_every=None),
    )
