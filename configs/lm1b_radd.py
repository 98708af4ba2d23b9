"""RADD on One Billion Words, aiming at MDLM's perplexity of 27.04: arXiv:2406.07524, table 1.

RADD's own paper does not train on this corpus; MDLM's model without its time input is the same.
"""

from sedd.configuration.components import options
from sedd.configuration.config import Config, DataOptions, TrainingOptions
from sedd.training.optimizer import OptimizerOptions


def get_config() -> Config:
    """The configuration of this recipe."""
    return Config(
        aim="lm1b perplexity <= 27.04 (MDLM), arXiv:2406.07524, table 1",
        data=DataOptions(corpus="lm1b", tokenizer="bert-base-uncased", length=128, wrap=False),
        process=options("processes", "absorbing"),
        schedule=options("schedules", "log_linear"),
        parameterization=options("parameterizations", "conditional"),
        objective=options("objectives", "lambda_dce"),
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
