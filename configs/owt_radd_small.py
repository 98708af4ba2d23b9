"""RADD-small with λ-DCE on OpenWebText: the zero-shot table of arXiv:2406.03736.

Zero-shot perplexity at most 51.70 (LAMBADA), 39.98 (WikiText2), 107.85 (PTB), 37.98
(WikiText103) and 72.99 (1BW) after 400 thousand steps. ``--objective t_dce``, ``k_dce`` and
``score_entropy`` train the other rows of that table.
"""

from sedd.configuration.components import options
from sedd.configuration.config import Config, DataOptions, TrainingOptions
from sedd.training.optimizer import OptimizerOptions


def get_config() -> Config:
    """The configuration of this recipe."""
    return Config(
        aim="zero-shot LAMBADA <= 51.70, WikiText2 <= 39.98, arXiv:2406.03736, zero-shot table",
        data=DataOptions(corpus="openwebtext", tokenizer="gpt2", length=1024),
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
        training=TrainingOptions(steps=400_000, batch_size=512),
        sampler=options("samplers", "event_jump", steps=128),
    )
