"""RADD's objective on a decoder of GPT-2-small's size, on OpenWebText, beside owt_radd_small.

Data, optimizer and number of steps are those of owt_radd_small, and so is the number of parameters
within a thousandth. The network has RMSNorm and SwiGLU, no biases and no dropout.
"""

from sedd.configuration.components import options
from sedd.configuration.config import Config, DataOptions, TrainingOptions
from sedd.training.optimizer import OptimizerOptions


def get_config() -> Config:
    """The configuration of this recipe."""
    return Config(
        aim="no published figure; owt_radd_small aims at zero-shot LAMBADA <= 51.70, "
        "arXiv:2406.03736",
        data=DataOptions(corpus="openwebtext", tokenizer="gpt2", length=1024),
        process=options("processes", "absorbing"),
        schedule=options("schedules", "log_linear"),
        parameterization=options("parameterizations", "conditional"),
        objective=options("objectives", "lambda_dce"),
        network=options(
            "networks",
            "decoder",
            hidden_dim=768,
            num_layers=12,
            num_heads=12,
            mlp_dim=2048,
            dtype="bfloat16",
        ),
        optimizer=OptimizerOptions(learning_rate=3e-4, warmup_steps=2500, weight_decay=0.03),
        training=TrainingOptions(steps=400_000, batch_size=512),
        sampler=options("samplers", "event_jump", steps=128),
    )
