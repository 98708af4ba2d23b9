"""The quick start: masked diffusion of the US State of the Union addresses, on a CPU.

It aims at no paper's table, but at text that a reader recognises as language, after ten minutes on
two cores. Network and loss are those that learned fastest in docs/recipes.md; vocabularies and
optimizers are compared in docs/training.md.
"""

from sedd.configuration.components import options
from sedd.configuration.config import Config, DataOptions, EvaluationOptions, TrainingOptions
from sedd.training.optimizer import OptimizerOptions


def get_config() -> Config:
    """The configuration of this recipe."""
    return Config(
        aim="at most 1.6 bits per character after ten minutes on two cores",
        data=DataOptions(corpus="sotu", tokenizer="bpe:4096", length=64),
        process=options("processes", "absorbing"),
        schedule=options("schedules", "log_linear"),
        parameterization=options("parameterizations", "conditional"),
        network=options(
            "networks",
            "decoder",
            hidden_dim=128,
            num_layers=4,
            num_heads=4,
            qk_norm=True,
            embed_norm=True,
            rope_theta=100.0,
            tied=True,
        ),
        objective=options("objectives", "lambda_dce", power=0.0),
        optimizer=OptimizerOptions(
            name="muon",
            learning_rate=2e-2,
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
