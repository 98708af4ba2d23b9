"""Block diffusion of GPT-2 small's size on OpenWebText, in blocks of 16. arXiv:2503.09573, table 3.

The paper trains an MDLM for 850 thousand steps first, and then each block length for 150 thousand
steps from there: train owt_radd_small with ``--objective mdlm``, and start from it by
``--init-from RUN``. Its levels of noise are clipped; ``--objective.min-level`` and
``--objective.max-level`` set such a range, which the paper chooses anew at each validation. The
default is the whole range, whose loss is the bound.
"""

from sedd.configuration.components import options
from sedd.configuration.config import Config, DataOptions, TrainingOptions
from sedd.training.optimizer import OptimizerOptions


def get_config() -> Config:
    """The configuration of this recipe."""
    return Config(
        aim="OpenWebText perplexity <= 22.27 in blocks of 16, 21.68 of 8, arXiv:2503.09573",
        data=DataOptions(corpus="openwebtext", tokenizer="gpt2", length=1024),
        process=options("processes", "absorbing"),
        schedule=options("schedules", "log_linear"),
        parameterization=options("parameterizations", "block", block=16),
        objective=options("objectives", "block"),
        network=options(
            "networks",
            "ddit",
            hidden_dim=768,
            num_layers=12,
            num_heads=12,
            norm_bias=True,
            dropout=0.1,
            dtype="bfloat16",
        ),
        optimizer=OptimizerOptions(
            learning_rate=3e-4, warmup_steps=2500, beta2=0.999, ema_decay=0.9999
        ),
        training=TrainingOptions(steps=150_000, batch_size=512),
        sampler=options("samplers", "semi_autoregressive"),
    )
