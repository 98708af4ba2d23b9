"""SEDD, absorbing, on text8: arXiv:2310.16834, table 2 (at most 1.39 bits per character).

``--process uniform`` trains the uniform model of the same table (at most 1.47).
"""

from sedd.configuration.components import options
from sedd.configuration.config import Config, DataOptions, TrainingOptions
from sedd.training.optimizer import OptimizerOptions


def get_config() -> Config:
    """The configuration of this recipe."""
    return Config(
        aim="text8 <= 1.39 bits per character, arXiv:2310.16834, table 2",
        data=DataOptions(corpus="text8", tokenizer="text8", length=256),
        process=options("processes", "absorbing"),
        schedule=options("schedules", "log_linear"),
        parameterization=options("parameterizations", "score"),
        objective=options("objectives", "score_entropy"),
        network=options(
            "networks",
            "ddit",
            hidden_dim=768,
            num_layers=12,
            num_heads=12,
            dropout=0.1,
            dtype="bfloat16",
        ),
        optimizer=OptimizerOptions(learning_rate=3e-4, warmup_steps=2500, weight_decay=0.0),
        training=TrainingOptions(steps=1_000_000, batch_size=512),
    )
