"""Hybrid noise on the US State of the Union addresses: masks and wrong tokens, as in GIDD.

Visible tokens may be wrong, and ``--sampler self_correct`` revises texts (docs/processes.md). Start
from a model of the quick start by ``--init-from RUN``: a few hundred steps then change its noise.
The network is not told the noise level, so that it has the parameters of that model.
"""

import dataclasses

import quickstart

from sedd.configuration.components import options
from sedd.configuration.config import Config


def get_config() -> Config:
    """The configuration of this recipe."""
    base = quickstart.get_config()
    return dataclasses.replace(
        base,
        aim="no published figure: hybrid noise (arXiv:2503.04482) on 11 MB of text",
        process=options("processes", "hybrid", uniform=0.2, gamma=1.0),
        parameterization=options("parameterizations", "mean", time_independent=True),
        objective=options("objectives", "score_entropy", weighting="dynamic"),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=3e-3, warmup_steps=20),
        training=dataclasses.replace(base.training, steps=1000, sample_every=None),
        sampler=options("samplers", "tweedie", steps=64),
    )
