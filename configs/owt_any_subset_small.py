"""The any-subset recipe for text of arXiv:2504.20456, from RADD-small in place of XLNet-base.

``--init-from hf://JingyangOu/radd-lambda-dce`` starts from the published RADD-small; without it the
model is trained from scratch. Rates, batch size, length, learning rate and number of updates are
those of the paper's code for text. Objective options for its other two recipes are in the
documentation (docs/parallel_decoding.md).
"""

from sedd.configuration.components import options
from sedd.configuration.config import Config, DataOptions, TrainingOptions
from sedd.training.optimizer import OptimizerOptions


def get_config() -> Config:
    """The configuration of this recipe."""
    return Config(
        aim="WikiText2, 26 of 512 tokens given, one token a call: GPT-2-large perplexity 107.9, "
        "arXiv:2504.20456, from XLNet-base; no paper trains it from RADD",
        data=DataOptions(corpus="openwebtext", tokenizer="gpt2", length=512),
        process=options("processes", "absorbing"),
        schedule=options("schedules", "log_linear"),
        parameterization=options("parameterizations", "any_subset"),
        objective=options(
            "objectives", "any_subset", min_rate=0.9, max_rate=0.99, start_rate=0.15, ramp=5000
        ),
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
        optimizer=OptimizerOptions(
            learning_rate=1.2e-4,
            warmup_steps=5000,
            schedule="linear",
            final_fraction=0.0,
            weight_decay=0.01,
        ),
        training=TrainingOptions(steps=210_000, batch_size=384),
        sampler=options("samplers", "ordered"),
    )
