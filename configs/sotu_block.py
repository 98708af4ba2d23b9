"""A block model of the US State of the Union addresses: sotu_radd's network, in blocks of 16.

``--parameterization.block 4`` makes shorter blocks. To start from the RADD model of the same text,
train sotu_radd first and add ``--init-from RUN``.
"""

from sedd.configuration.components import options
from sedd.configuration.config import Config, DataOptions, EvaluationOptions, TrainingOptions
from sedd.training.optimizer import OptimizerOptions


def get_config() -> Config:
    """The configuration of this recipe."""
    return Config(
        aim="no published figure: a block model (arXiv:2503.09573) on 11 MB of text",
        data=DataOptions(corpus="sotu", tokenizer="bpe:4096", length=128),
        process=options("processes", "absorbing"),
        schedule=options("schedules", "log_linear"),
        parameterization=options("parameterizations", "block", block=16),
        network=options(
            "networks",
            "ddit",
            hidden_dim=256,
            num_layers=6,
            num_heads=8,
            norm_bias=True,
            dropout=0.05,
        ),
        objective=options("objectives", "block"),
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
        evaluation=EvaluationOptions(max_sequences=128),
        sampler=options("samplers", "semi_autoregressive"),
    )
