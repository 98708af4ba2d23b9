"""A student of a ``sotu_radd_small`` model that draws a call's tokens given a common latent.

Name the teacher by ``--teacher RUN``. Di4C's idea (arXiv:2410.08709), on two CPU cores.
"""

import dataclasses

import sotu_radd_small

from sedd.configuration.components import options, values
from sedd.configuration.config import Config
from sedd.training.optimizer import OptimizerOptions


def get_config() -> Config:
    """The configuration of this recipe."""
    teacher = sotu_radd_small.get_config()
    return dataclasses.replace(
        teacher,
        aim="no published figure: a student with a latent (arXiv:2410.08709)",
        network=options("networks", "latent", latents=16, **values(teacher.network)),
        objective=options("objectives", "latent_distill", calls=8, samples=8),
        optimizer=OptimizerOptions(
            learning_rate=1e-3,
            warmup_steps=20,
            beta2=0.99,
            ema_decay=0.98,
        ),
        training=dataclasses.replace(
            teacher.training,
            steps=300,
            batch_size=8,
            eval_every=300,
            sample_every=None,
            checkpoint_every=100,
        ),
        evaluation=dataclasses.replace(teacher.evaluation, max_sequences=64),
        sampler=options("samplers", "event_jump", steps=8),
    )
