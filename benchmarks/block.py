"""What the cache of finished blocks saves when a block model draws a long text.

The network has random weights and the given shape. The same texts are drawn with the cache, and by
network calls on all positions. The columns:

- ``calls``: network calls of a text, counted by the sampler.
- ``rows``: rows of the network in these calls, summed, without those that write a prompt.
- ``s/text``: the time of a text, without compilation.
- ``speed-up``: the time without the cache divided by that with it.

    python benchmarks/block.py --length 1024 --block 16
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from report import report, start
from sampling import fastest

from sedd.configuration.build import build_sampler
from sedd.configuration.components import build
from sedd.denoiser import Denoiser
from sedd.errors import UserError
from sedd.schedules import LogLinear


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The texts, the sampler and the shape of the network."""

    length: int = 1024
    """Tokens in a text."""
    block: int = 16
    """Tokens in a block."""
    batch: int = 1
    """Texts that are drawn at the same time."""
    inner: str = "event_jump"
    """The sampler of a block, with its default options."""
    hidden_dim: int = 256
    num_layers: int = 6
    num_heads: int = 4
    vocabulary: int = 2048
    repeats: int = 1
    """Timed runs of each program, of which the fastest counts."""


def model(settings: Settings) -> Denoiser:
    """A block model with random output."""
    process = build("processes", "absorbing", num_tokens=settings.vocabulary)
    network = build(
        "networks",
        "ddit",
        num_states=process.num_states,
        time_conditioned=False,
        hidden_dim=settings.hidden_dim,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        norm_bias=True,
    )
    params = network.init(jax.random.key(0))
    shape = params["head"]["kernel"].shape
    params["head"]["kernel"] = 0.2 * jax.random.normal(jax.random.key(1), shape)
    parameterization = build("parameterizations", "block", process=process, block=settings.block)
    return Denoiser(params=params, network=network, parameterization=parameterization)


def main(settings: Settings) -> None:
    """Draw the texts in both ways, check that they are the same, and print the table."""
    denoiser = model(settings)
    batch, length, block = settings.batch, settings.length, settings.block
    free_BL, tokens_BL = jnp.zeros((batch, length), bool), jnp.zeros((batch, length), jnp.int32)
    arguments = (denoiser, jax.random.split(jax.random.key(2), batch), tokens_BL, free_BL)
    rows, drawn = [], []
    for label, cache in (("all positions", False), ("cache", True)):
        sampler = build_sampler(
            "semi_autoregressive", LogLinear(), inner=settings.inner, cache=cache
        )
        run = jax.jit(functools.partial(_draw, sampler)).lower(*arguments).compile()
        seconds, samples = fastest(lambda run=run: run(*arguments), settings.repeats)
        drawn.append(np.asarray(samples.tokens_BL))
        calls = float(samples.calls_B.mean())
        written = (length - 1) // block * block  # all blocks but the last, with the next one's rows
        rows.append(
            {
                "network calls on": label,
                "calls": calls,
                "rows": calls * block + written if cache else calls * length,
                "s/text": seconds / batch,
                "speed-up": rows[0]["s/text"] * batch / seconds if rows else 1.0,
            }
        )
    if (drawn[0] != drawn[1]).any():
        raise UserError("the cache changed a token: rounding reversed a draw, or it is not exact")
    report("block", rows, **dataclasses.asdict(settings))


def _draw(sampler, denoiser, keys_B, tokens_BL, fixed_BL):
    return sampler(denoiser, keys_B, tokens_BL, fixed_BL)


if __name__ == "__main__":
    start(main, Settings, __doc__)
