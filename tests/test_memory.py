"""No program of validation or sampling holds the raw output of a batch: it is read in chunks.

The programs are compiled at a large vocabulary and never run.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import daily

from sedd.constraints import compile_regex
from sedd.constraints.spans import Span, batch_spans
from sedd.denoiser import Denoiser
from sedd.evaluation.diagnosis_draws import DiagnosisDraws
from sedd.evaluation.monte_carlo import sequence_nats
from sedd.evaluation.price_draws import ProfileDraws
from sedd.networks.ddit import DDiT
from sedd.networks.rows import CHUNK_BYTES
from sedd.parameterizations.any_subset import AnySubset
from sedd.parameterizations.conditional import Conditional
from sedd.parameterizations.score import Score
from sedd.processes.absorbing import Absorbing
from sedd.processes.uniform import Uniform
from sedd.samplers.confidence import Confidence
from sedd.samplers.event_jump import EventJump
from sedd.samplers.speculative import Speculative
from sedd.samplers.tweedie import Tweedie
from sedd.schedules import LogLinear
from sedd.watermark import Scheme

B, L, N, D = 32, 512, 50_257, 64
LOG_LINEAR = LogLinear()


def validate(denoiser, keys_B, x0_BL, scored_BL):
    return sequence_nats(denoiser, LOG_LINEAR, keys_B, x0_BL, scored_BL, draws=4)


def price(denoiser, keys_B, x0_BL, scored_BL):
    draws = ProfileDraws(known=(0, 255, 511), repeats=1)
    return draws(denoiser, LOG_LINEAR, keys_B, x0_BL, scored_BL)


def diagnose(denoiser, keys_B, x0_BL, scored_BL):
    draws = DiagnosisDraws(rates=(0.5, 0.95), repeats=1, padded=False)
    return draws(denoiser, LOG_LINEAR, keys_B, x0_BL, scored_BL, jnp.zeros(N))


def every_log_score(denoiser, keys_B, x_BL, scored_BL):
    """The negative control: it returns a number a position from all rows at once."""
    log_score_BLV = denoiser.log_score(x_BL, jnp.ones(len(x_BL)))
    return jnp.sort(log_score_BLV, -1)[..., 0]


def email_spans():
    """Every sequence is under one pattern as a whole; the vocabulary is of random pieces."""
    rng = np.random.default_rng(0)
    letters = list(b"abcdefghijklmnopqrstuvwxyz0123456789@.-+ ")
    pieces = [bytes([letter]) for letter in letters]
    pieces += [bytes(rng.choice(letters, size)) for size in rng.integers(2, 9, N - len(pieces))]
    automaton = compile_regex(r"[\w.+-]+@[\w-]+(\.[\w-]+)+", pieces)
    return batch_spans([[Span(start=0, length=L, automaton=automaton)]] * B, "joint")


TWEEDIE = Tweedie(schedule=LOG_LINEAR, steps=8)
PROGRAMS = {
    "validate, score entropy": (Score(process=Absorbing(num_tokens=N)), validate),
    "tweedie": (Score(process=Absorbing(num_tokens=N)), TWEEDIE),
    "tweedie, uniform": (Score(process=Uniform(num_tokens=N)), TWEEDIE),
    "validate, ordered": (AnySubset(process=Absorbing(num_tokens=N)), validate),
    "validate, k-DCE": (Conditional(process=Absorbing(num_tokens=N)), validate),
    "price": (Conditional(process=Absorbing(num_tokens=N)), price),
    "diagnose": (Conditional(process=Absorbing(num_tokens=N)), diagnose),
    "event_jump": (
        Conditional(process=Absorbing(num_tokens=N)),
        EventJump(schedule=LOG_LINEAR, steps=8),
    ),
    "event_jump under a constraint": (
        Conditional(process=Absorbing(num_tokens=N)),
        EventJump(schedule=LOG_LINEAR, steps=8),
    ),
    "event_jump, gumbel": (
        Conditional(process=Absorbing(num_tokens=N)),
        EventJump(schedule=LOG_LINEAR, steps=8),
    ),
    "event_jump, green": (
        Conditional(process=Absorbing(num_tokens=N)),
        EventJump(schedule=LOG_LINEAR, steps=8),
    ),
    "confidence": (Conditional(process=Absorbing(num_tokens=N)), Confidence(schedule=LOG_LINEAR)),
    "speculative": (
        Conditional(process=Absorbing(num_tokens=N)),
        Speculative(schedule=LOG_LINEAR, bonus=True),
    ),
    "control": (Score(process=Absorbing(num_tokens=N)), every_log_score),
}


@functools.cache
def compiled(name):
    parameterization, program = PROGRAMS[name]
    network = DDiT(
        num_states=parameterization.process.num_states,
        time_conditioned=not parameterization.time_independent,
        hidden_dim=D,
        num_layers=1,
        num_heads=1,
    )
    params = jax.eval_shape(network.init, jax.random.key(0))
    constraint = jax.eval_shape(email_spans) if "constraint" in name else None
    watermark = None
    if (kind := name.rpartition(", ")[2]) in ("gumbel", "green"):
        scheme = Scheme(secret=b"s", kind=kind)
        watermark = jax.eval_shape(lambda: scheme.batch(np.zeros(B), np.ones((B, L), bool)))
    denoiser = Denoiser(
        params=params,
        network=network,
        parameterization=parameterization,
        constraint=constraint,
        watermark=watermark,
    )
    keys_B = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), B))
    tokens_BL = jax.ShapeDtypeStruct((B, L), jnp.int32)
    select_BL = jax.ShapeDtypeStruct((B, L), bool)
    lowered = jax.jit(lambda *args: program(*args)).lower(denoiser, keys_B, tokens_BL, select_BL)
    parameters = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return lowered.compile(), parameters


def largest_array(text):
    """Elements of the largest array in a compiled program's text."""
    shapes = re.findall(r"\b(?:pred|[suf]\d+|bf16)\[([\d,]+)\]", text)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.parametrize(
    "name",
    daily(
        [name for name in PROGRAMS if name != "control"],
        ["validate, score entropy", "tweedie"],
    ),
)
def test_rows_are_read_in_chunks(name):
    """Peak memory below 1.2 x parameters + 8 [B, L, D] + a chunk of rows, and no [B, L, V]."""
    program, parameters = compiled(name)
    memory = program.memory_analysis()
    assert memory is not None
    peak = memory.temp_size_in_bytes
    print(f"\n{name}: {peak / 1e6:.0f} MB of temporaries, parameters {parameters / 1e6:.0f} MB")
    assert peak < 1.2 * parameters + 8 * 4 * B * L * D + CHUNK_BYTES
    assert largest_array(program.as_text()) < B * L * N


def test_the_reader_of_programs_finds_an_array_of_all_rows():
    program, _ = compiled("control")
    assert largest_array(program.as_text()) >= B * L * N
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes > 4 * B * L * N
