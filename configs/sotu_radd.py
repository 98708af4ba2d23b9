"""A larger RADD model of the US State of the Union addresses: an hour or a night on a CPU.

``make train-long``. The text has 2.6 million tokens, which an hour reads about three times: hence
the dropout, which the quick start does without.
"""

from sedd.configuration.components import options
from sedd.configuration.config import Config, DataOptions, EvaluationOptions, TrainingOptions
from sedd.training.optimizer import OptimizerOptions


def get_config() -> Config:
    """The configuration of this recipe."""
    return Config(
        aim="no published figure: RADD (arXiv:2406.03736) on 11 MB of text, an hour on two cores",
        data=DataOptions(corpus="sotu", tokenizer="bpe:4096", length=128),
        process=options("processes", "absorbing"),
        schedule=options("schedules", "log_linear"),
        parameterization=options("parameterizations", "conditional"),
        network=options(
            "networks",
            "ddit",
            hidden_dim=256,
            num_layers=6,
            num_heads=8,
            norm_bias=True,
            dropout=0.05,
        ),
        objective=options("objectives", "lambda_dce"),
        optimizer=OptimizerOptions(
            name="muon",
            learning_rate=7e-3,
            warmup_steps=100,
            schedule="cosine",
            beta2=0.99,
            ema_decay=0.995,
        ),
        training=TrainingOptions(
            steps=3000,
            batch_size=16,
            log_every=10,
            eval_every=250,
            sample_every=1000,
            checkpoint_every=250,
        ),
        evaluation=EvaluationOptions(draws=16, max_sequences=128),
        sampler=options("samplers", "event_jump", steps=128),
    )
