"""SEDD-medium, absorbing, on OpenWebText: arXiv:2310.16834, table 1."""

from sedd.configuration.components import options
from sedd.configuration.config import Config, DataOptions, TrainingOptions
from sedd.training.optimizer import OptimizerOptions


def get_config() -> Config:
    """The configuration of this recipe."""
    return Config(
        aim="SEDD-medium, arXiv:2310.16834, table 1",
        data=DataOptions(corpus="openwebtext", tokenizer="gpt2", length=1024),
        process=options("processes", "absorbing"),
        schedule=options("schedules", "log_linear"),
        parameterization=options("parameterizations", "score"),
        objective=options("objectives", "score_entropy"),
        network=options(
            "networks",
            "ddit",
            hidden_dim=1024,
            num_layers=24,
            num_heads=16,
            dropout=0.1,
            dtype="bfloat16",
        ),
        optimizer=OptimizerOptions(learning_rate=3e-4, warmup_steps=2500, weight_decay=0.0),
        training=TrainingOptions(steps=1_300_000, batch_size=512),
    )
