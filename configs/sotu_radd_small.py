"""RADD's network and loss (arXiv:2406.03736) on the quick start's text, for ten minutes.

The recipes of heads and students, whose networks are built on ``ddit``, start from its model.
"""

import dataclasses

import quickstart

from sedd.configuration.components import options
from sedd.configuration.config import Config


def get_config() -> Config:
    """The configuration of this recipe."""
    return dataclasses.replace(
        quickstart.get_config(),
        aim="no published figure: RADD (arXiv:2406.03736) on 11 MB of text",
        network=options(
            "networks",
            "ddit",
            hidden_dim=128,
            num_layers=4,
            num_heads=4,
            norm_bias=True,
            dropout=0.0,
        ),
        objective=options("objectives", "lambda_dce"),
    )
