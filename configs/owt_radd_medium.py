"""RADD-medium with λ-DCE on OpenWebText: arXiv:2406.03736."""

from sedd.configuration.components import options
from sedd.configuration.config import Config, DataOptions, TrainingOptions
from sedd.training.optimizer import OptimizerOptions


def get_config() -> Config:
    """The configuration of this recipe."""
    return Config(
        aim="RADD-medium, arXiv:2406.03736",
        data=DataOptions(corpus="openwebtext", tokenizer="gpt2", length=1024),
        process=options("processes", "absorbing"),
        schedule=options("schedules", "log_linear"),
        parameterization=options("parameterizations", "conditional"),
        objective=options("objectives", "lambda_dce"),
        network=options(
            "networks",
            "ddit",
            hidden_dim=1024,
            num_layers=24,
            num_heads=16,
            norm_bias=True,
            dropout=0.02,
            dtype="bfloat16",
        ),
        optimizer=OptimizerOptions(learning_rate=3e-4, warmup_steps=2500, weight_decay=0.03),
        training=TrainingOptions(steps=400_000, batch_size=512),
        sampler=options("samplers", "event_jump", steps=128),
    )
