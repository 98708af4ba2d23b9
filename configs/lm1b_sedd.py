"""SEDD, absorbing, on One Billion Words: at most 32.79 in table 3 of arXiv:2310.16834."""

from sedd.configuration.components import options
from sedd.configuration.config import Config, DataOptions, TrainingOptions
from sedd.training.optimizer import OptimizerOptions


def get_config() -> Config:
    """The configuration of this recipe."""
    return Config(
        aim="lm1b perplexity <= 32.79, arXiv:2310.16834, table 3",
        data=DataOptions(corpus="lm1b", tokenizer="bert-base-uncased", length=128, wrap=False),
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
