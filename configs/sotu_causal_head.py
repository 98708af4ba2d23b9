"""A causal head on a model of ``sotu_radd_small``; give the trunk by ``--init-from RUN``.

The trunk is frozen: it keeps its samples and its bounds, and the head predicts tokens that are
drawn in one call of the trunk given each other.
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
        aim="no published figure: a causal head (arXiv:2510.03929) on sotu_radd_small's model",
        network=options("networks", "causal_head", **values(trunk.network)),
        objective=options("objectives", "self_speculative"),
        optimizer=OptimizerOptions(
            learning_rate=1e-3,
            warmup_steps=100,
            schedule="cosine",
            beta2=0.99,
            ema_decay=0.99,
        ),
        training=dataclasses.replace(trunk.training, steps=1500, eval_every=250, sample_every=None),
    )
