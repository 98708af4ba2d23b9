"""An autoregressive baseline of GPT-2-small's size on OpenWebText, beside owt_radd_small.

GPT-2 itself, trained on other data, has zero-shot perplexity 45.04 (LAMBADA), 42.43 (WikiText2),
138.43 (PTB), 41.60 (WikiText103) and 75.20 (1BW) in table 1 of arXiv:2310.16834. Network,
optimizer and number of steps are those of owt_radd_small; only the parameterization and the loss
differ.
"""

from sedd.configuration.components import options
from sedd.configuration.config import Config, DataOptions, TrainingOptions
from sedd.training.optimizer import OptimizerOptions


def get_config() -> Config:
    """The configuration of this recipe."""
    return Config(
        aim="GPT-2's zero-shot LAMBADA 45.04, WikiText2 42.43, arXiv:2310.16834, table 1; no paper "
        "trains this very model",
        data=DataOptions(corpus="openwebtext", tokenizer="gpt2", length=1024),
        process=options("processes", "absorbing"),
        schedule=options("schedules", "log_linear"),
        parameterization=options("parameterizations", "autoregressive"),
        objective=options("objectives", "autoregressive"),
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
        sampler=options("samplers", "ordered"),
    )
