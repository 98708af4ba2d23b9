"""RADD with 7 billion parameters: no published result, but a size that fits a TPU slice.

The state is split over 64 devices, so that v5e:16x16 holds four copies of it. Split over all 256
devices the parts are so narrow that the compiler reduces whole gradients, and 25 GiB travel in a
step instead of 2. The figures of ``sedd compile_check`` are in ``docs/training.md``.
"""

from sedd.configuration.components import options
from sedd.configuration.config import Config, DataOptions, TrainingOptions
from sedd.training.optimizer import OptimizerOptions


def get_config() -> Config:
    """The configuration of this recipe."""
    return Config(
        aim="no published figure: arXiv:2406.03736 at 7B, which fits v5e:16x16",
        data=DataOptions(corpus="openwebtext", tokenizer="gpt2", length=1024),
        process=options("processes", "absorbing"),
        schedule=options("schedules", "log_linear"),
        parameterization=options("parameterizations", "conditional"),
        objective=options("objectives", "lambda_dce"),
        network=options(
            "networks",
            "ddit",
            hidden_dim=4096,
            num_layers=32,
            num_heads=32,
            norm_bias=True,
            dropout=0.0,
            dtype="bfloat16",
            remat=True,
        ),
        optimizer=OptimizerOptions(
            learning_rate=1.5e-4, warmup_steps=2500, schedule="cosine", weight_decay=0.1, beta2=0.95
        ),
        training=TrainingOptions(
            steps=100_000,
            batch_size=1024,
            parallel="fsdp",
            fsdp=64,
        ),
        sampler=options("samplers", "event_jump", steps=128),
    )
