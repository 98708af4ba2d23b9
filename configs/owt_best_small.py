"""What learned fastest at 1M and 6M parameters (docs/recipes.md), at GPT-2-small's size.

Data, batch and number of steps are those of owt_radd_small. The recipe has not been trained, and
its learning rate is a guess.
"""

import dataclasses

import owt_radd_decoder_small

from sedd.configuration.components import options
from sedd.configuration.config import Config
from sedd.training.optimizer import OptimizerOptions


def get_config() -> Config:
    """The configuration of this recipe."""
    base = owt_radd_decoder_small.get_config()
    return dataclasses.replace(
        base,
        objective=options("objectives", "lambda_dce", power=0.0),
        network=dataclasses.replace(base.network, qk_norm=True, embed_norm=True, tied=True),
        optimizer=OptimizerOptions(
            name="muon",
            learning_rate=1e-3,
            warmup_steps=2500,
            schedule="cosine",
            beta2=0.99,
            weight_decay=0.03,
        ),
    )
