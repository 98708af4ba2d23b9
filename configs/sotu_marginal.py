"""A marginal head on a model of ``sotu_radd_small``; give the trunk by ``--init-from RUN``.

The trunk is frozen: it keeps its samples and its bounds, and the head gives approximate log
marginals of texts with gaps, from one network call each.
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
        aim="no published figure: a marginal head (arXiv:2310.12920) on sotu_radd_small's model",
        network=options("networks", "marginal_head", **values(trunk.network)),
        objective=options("objectives", "marginal", window=64),
        optimizer=OptimizerOptions(
            learning_rate=1.5e-3,
            warmup_steps=10,
            beta2=0.99,
            ema_decay=0.97,
        ),
        training=dataclasses.replace(
            trunk.training,
            steps=200,
            batch_size=8,
            eval_every=200,
            sample_every=None,
            checkpoint_every=50,
        ),
        evaluation=dataclasses.replace(trunk.evaluation, max_sequences=32),
    )
