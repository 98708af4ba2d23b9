"""A student of a ``sotu_radd_small`` model with 8 steps; name the teacher by ``--teacher RUN``.

Self-distillation through time, arXiv:2410.21035, in three rounds on two CPU cores.
"""

import dataclasses

import sotu_radd_small

from sedd.configuration.components import options
from sedd.configuration.config import Config
from sedd.training.optimizer import OptimizerOptions


def get_config() -> Config:
    """The configuration of this recipe."""
    teacher = sotu_radd_small.get_config()
    return dataclasses.replace(
        teacher,
        aim="no published figure: an 8-step student (arXiv:2410.21035) of sotu_radd_small's model",
        objective=options(
            "objectives", "self_distill", rounds=3, round_steps=200, teacher_steps=64
        ),
        optimizer=OptimizerOptions(
            learning_rate=3e-4,
            warmup_steps=20,
            beta2=0.99,
            ema_decay=0.98,
        ),
        training=dataclasses.replace(
            teacher.training,
            steps=600,
            eval_every=200,
            sample_every=200,
            checkpoint_every=100,
        ),
        sampler=options("samplers", "event_jump", steps=8),
    )
