"""Hybrid noise on the US State of the Union addresses: the quick start's network, GIDD's noise.

Visible tokens may be wrong, and ``--sampler self_correct`` revises texts (docs/processes.md).
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
        parameterization=options("parameterizations", "mean"),
        objective=options("objectives", "score_entropy", weighting="dynamic"),
        training=dataclasses.replace(base.training, steps=1500),
        sampler=options("samplers", "tweedie", steps=64),
    )
