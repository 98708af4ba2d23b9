"""The time that each sampler takes for a sample, and the network's share of it.

The network has random weights and the given shape. Its output does not affect the time, except for
entropy_bounded, whose number of calls depends on the text. All times are those of a batch divided
by the number of its sequences. The columns:

- ``calls``: network calls that a sequence needs, on average.
- ``of the batch``: network calls that are run for the whole batch.
- ``s/sample``: the time of a sample.
- ``network``: the time of ``of the batch`` calls of the transformer alone, scaled from at most 64
  timed calls.
- ``rest``: the other time: output layer, noise, and the sampler's own work.
- ``total/network``: ``s/sample`` divided by ``network``.
- ``speed-up``: the time of the first row divided by that of the row.

    python benchmarks/sampling.py --length 128 --batch 8 --steps 1024
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from report import report, start

import sedd
from sedd.configuration.build import build_sampler
from sedd.configuration.components import build
from sedd.denoiser import Denoiser
from sedd.schedules import LogLinear

CALLS = 64  # the most calls of the network alone that are timed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The shape of the network and of the batch, and the samplers to measure."""

    length: int = 128
    batch: int = 8
    steps: int = 1024
    hidden_dim: int = 256
    num_layers: int = 6
    num_heads: int = 4
    vocabulary: int = 2048
    dtype: str = "float32"
    repeats: int = 1
    """Timed runs of each compiled program, of which the fastest counts."""
    samplers: tuple[str, ...] = ()
    """Rows to measure, by the beginning of their names; all by default."""


def cases(settings: Settings):
    """Yield the label and the sampler of each row."""
    schedule, steps = LogLinear(), settings.steps

    def of(name, **options):
        return build_sampler(name, schedule, **options)

    yield f"tweedie, {steps} steps", of("tweedie", steps=steps)
    yield f"euler, {steps} steps", of("euler", steps=steps)
    yield f"event_jump, {steps} steps", of("event_jump", steps=steps)
    yield "event_jump, first hitting", of("event_jump")
    yield "ordered, forward", of("ordered")
    yield "confidence, one a call", of("confidence")
    yield "confidence, 32 steps", of("confidence", steps=32)
    yield "entropy_bounded, gamma 10", of("entropy_bounded", gamma=10.0)
    yield "token_confidence, 32 steps", of("token_confidence", steps=32)
    yield f"remdm, {steps} steps", of("remdm", steps=steps)
    yield "semi_autoregressive, 32", of("semi_autoregressive", inner="event_jump")
    inner = sedd.samplers.options("event_jump", steps=32)
    verifier = {"verifier": favourite, "inner": inner}
    yield "best_of_n, 4 × 32 steps", of("best_of_n", n=4, **verifier)
    yield "particle, 4 × 32 steps", of("particle", particles=4, **verifier)


def favourite(tokens_RL, real_RL):
    """A verifier that takes no time: the score is the first token."""
    return np.asarray(tokens_RL)[:, 0].astype(np.float32)


def model(settings: Settings) -> Denoiser:
    """A RADD network with random output."""
    process = build("processes", "absorbing", num_tokens=settings.vocabulary)
    parameterization = build("parameterizations", "conditional", process=process)
    network = build(
        "networks",
        "ddit",
        num_states=process.num_states,
        time_conditioned=False,
        hidden_dim=settings.hidden_dim,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        norm_bias=True,
        dtype=settings.dtype,
    )
    params = network.init(jax.random.key(0))
    shape = params["head"]["kernel"].shape
    params["head"]["kernel"] = 0.2 * jax.random.normal(jax.random.key(1), shape)
    return Denoiser(params=params, network=network, parameterization=parameterization)


def fastest(run, repeats: int):
    """The seconds of the fastest of ``repeats`` runs of a compiled program, and the last result."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times), result


@jax.jit
def network_calls(denoiser, tokens_BL, count):
    """Run the transformer ``count`` times; the input of a call depends on the call before it."""

    def one(_, tokens_BL):
        (hidden_BLD,) = denoiser.hidden(tokens_BL)
        return tokens_BL.at[:, 0].set((hidden_BLD[:, 0, 0] > 0).astype(tokens_BL.dtype))

    return jax.lax.fori_loop(0, count, one, tokens_BL)


def main(settings: Settings) -> None:
    """Measure every sampler, and print the table."""
    denoiser = model(settings)
    batch, length = settings.batch, settings.length
    free_BL, tokens_BL = jnp.zeros((batch, length), bool), jnp.zeros((batch, length), jnp.int32)
    keys_B = jax.random.split(jax.random.key(2), batch)
    arguments = (denoiser, keys_B, tokens_BL, free_BL)
    rows = []
    for label, sampler in cases(settings):
        if settings.samplers and not label.startswith(settings.samplers):
            continue
        run = jax.jit(functools.partial(_draw, sampler)).lower(*arguments).compile()
        total, samples = fastest(lambda run=run: run(*arguments), settings.repeats)
        # A search draws ``width`` candidates of each sequence in one batch. ``calls_B`` counts each
        # candidate, but one network call serves all of them.
        wide_BL = jnp.repeat(tokens_BL, sampler.width, 0)
        calls = round(float(samples.calls_B.max()) / sampler.width)
        some = min(calls, CALLS)
        jax.block_until_ready(network_calls(denoiser, wide_BL, 1))
        network, _ = fastest(
            lambda w=wide_BL, c=some: network_calls(denoiser, w, c), settings.repeats
        )
        network *= calls / some
        rows.append(
            {
                "sampler": label,
                "calls": float(samples.calls_B.mean()),
                "of the batch": calls,
                "s/sample": total / batch,
                "network": network / batch,
                "rest": (total - network) / batch,
                "total/network": total / network,
            }
        )
    first = rows[0]
    for row in rows:
        row["speed-up"] = first["s/sample"] / row["s/sample"]
    report("sampling", rows, **dataclasses.asdict(settings))


def _draw(sampler, denoiser, keys_B, tokens_BL, fixed_BL):
    return sampler(denoiser, keys_B, tokens_BL, fixed_BL)


if __name__ == "__main__":
    start(main, Settings, __doc__)
