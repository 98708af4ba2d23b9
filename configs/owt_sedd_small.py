"""SEDD-small, absorbing, on OpenWebText: arXiv:2310.16834, table 1.

Zero-shot perplexity at most 50.92 (LAMBADA), 41.84 (WikiText2), 114.24 (PTB), 40.62
(WikiText103) and 79.29 (1BW).
"""

from sedd.configuration.components import options
from sedd.configuration.config import Config, DataOptions, TrainingOptions
from sedd.training.optimizer import OptimizerOptions


def get_config() -> Config:
    """The configuration of this recipe."""
    return Config(
        aim="zero-shot LAMBADA <= 50.92, WikiText2 <= 41.84, arXiv:2310.16834, table 1",
        data=DataOptions(corpus="openwebtext", tokenizer="gpt2", length=1024),
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
        training=TrainingOptions(steps=1_300_000, batch_size=512),
    )
