"""RADD on text8, aiming at MD4's 1.37 bits per character: arXiv:2406.04329, table 1.

RADD's own paper has no figure for text8. MD4's bound is the same objective, with a network that is
given the time.
"""

from sedd.configuration.components import options
from sedd.configuration.config import Config, DataOptions, TrainingOptions
from sedd.training.optimizer import OptimizerOptions


def get_config() -> Config:
    """The configuration of this recipe."""
    return Config(
        aim="text8 <= 1.37 bits per character (MD4), arXiv:2406.04329",
        data=DataOptions(corpus="text8", tokenizer="text8", length=256),
        process=options("processes", "absorbing"),
        schedule=options("schedules", "log_linear"),
        parameterization=options("parameterizations", "conditional"),
        objective=options("objectives", "t_dce"),
        network=options(
            "networks",
            "ddit",
            hidden_dim=768,
            num_layers=12,
            num_heads=12,
            norm_bias=True,
            dropout=0.02,
            dtype="bfloat16",
        ),
        optimizer=OptimizerOptions(learning_rate=3e-4, warmup_steps=2500, weight_decay=0.03),
        training=TrainingOptions(steps=1_000_000, batch_size=512),
        sampler=options("samplers", "event_jump", steps=128),
    )
