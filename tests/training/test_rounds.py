"""Rounds of self-distillation: who is the teacher, on one device and on several, after a stop."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_toy

from sedd.networks import mesh
from sedd.networks.rows import CHUNK_BYTES
from sedd.objectives.self_distill import SelfDistill
from sedd.parameterizations.conditional import Conditional
from sedd.processes.absorbing import Absorbing
from sedd.schedules import LogLinear
from sedd.training.loop import Cadence


def toy(**options):
    reading = Conditional(process=Absorbing(num_tokens=training_toy.N))
    options = {"rounds": 2, "round_steps": 4, "teacher_steps": 8} | options
    return lambda: SelfDistill(schedule=LogLinear(), parameterization=reading, **options)


def test_the_teacher_is_frozen_in_a_round_and_then_replaced():
    start, runner = training_toy.setup(training_toy.ADAMW, objective=toy())
    state, batches, seen = runner.place(start), training_toy.ToyBatches(), []
    for _ in range(8):
        state, metrics = runner(state, next(batches))
        seen.append(jax.tree.map(np.array, (state.teacher, state.ema_params)))
        assert np.isfinite(metrics["loss"])
    first = jax.tree.map(np.array, start.params)
    same = functools.partial(jax.tree.map, np.array_equal)
    for step, (teacher, average) in enumerate(seen, 1):
        held = first if step < 4 else seen[3][1] if step < 8 else average
        assert jax.tree.all(same(teacher, held))
        assert not jax.tree.all(same(average, first))


def test_the_steps_double_in_each_round():
    objective = toy(rounds=3, teacher_steps=64)()
    x0_BL, scored_BL = jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool)
    keys_B = jax.random.split(jax.random.key(0), 1)
    for step, length in ((0, 1), (3, 1), (4, 2), (8, 4), (11, 4), (40, 4)):
        drawn = objective.corrupt_at(step, keys_B, jnp.array([0.7]), x0_BL, scored_BL)
        times = objective.schedule.t_of_sigma(jnp.stack([drawn.sigma, drawn.lesson.sigma_B]))
        assert float(times[0, 0] - times[1, 0]) == pytest.approx(length / 64, rel=1e-4)


def test_a_skipped_step_at_the_end_of_a_round_still_ends_it():
    """The loss is nan in the last step of a round; the averages before it become the teacher."""
    start, runner = training_toy.setup(
        training_toy.ADAMW, objective=toy(round_steps=2), skip_nonfinite=True
    )
    state, batches = runner.place(start), training_toy.ToyBatches()
    state, _ = runner(state, next(batches))
    average = jax.tree.map(np.array, state.ema_params)
    broken = jax.tree.map(lambda x: x * np.nan, state.params)
    state, metrics = runner(dataclasses.replace(state, params=broken), next(batches))
    assert metrics["skipped"] == 1
    assert jax.tree.all(jax.tree.map(np.array_equal, state.teacher, average))


@pytest.mark.nightly
def test_devices_change_nothing_but_rounding(monkeypatch):
    monkeypatch.setattr(mesh, "LEAST_SPLIT", 16)  # arrays of a toy's size are split too
    runs = {
        setting: training_toy.history(6, objective=toy(), devices=setting[0], fsdp=setting[1])
        for setting in ((1, None), (2, None), (2, 2))
    }
    one, state = runs[1, None]
    for seen, other in runs.values():
        np.testing.assert_allclose(seen["loss"], one["loss"], rtol=1e-5)
        for a, b in zip(*map(jax.tree.leaves, (state.teacher, other.teacher)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.nightly
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    """Stopped in the middle of a round, also one whose teacher is not the first."""
    common = {
        "objective": toy(),
        "of_steps": 8,
        "cadence": Cadence(log_every=1, eval_every=None, checkpoint_every=3),
    }
    whole = training_toy.run(tmp_path / "whole", 8, **common)
    for stop in (3, 6, 8):
        parts = training_toy.run(tmp_path / "parts", stop, **common)
    ours, theirs = (
        jax.tree.map(np.asarray, (s.params, s.ema_params, s.teacher, s.opt_state))
        for s in (whole.state, parts.state)
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))
    assert training_toy.records(tmp_path / "whole") == training_toy.records(tmp_path / "parts")


def test_no_array_of_all_raw_outputs():
    """The gradient of the loss: peak memory of hidden states and a chunk, and no [B, L, V]."""
    batch, length, tokens, width = 32, 256, 20_000, 32
    reading = Conditional(process=Absorbing(num_tokens=tokens))
    objective = SelfDistill(schedule=LogLinear(), parameterization=reading)
    network = training_toy.Toy(num_states=tokens + 1, width=width, dropout=0.0)
    params = jax.eval_shape(network.init, jax.random.key(0))

    def gradient(params, teacher, keys_B, u_B, x0_BL, scored_BL):
        corrupted = objective.corrupt(keys_B, u_B, x0_BL, scored_BL)
        corrupted = objective.taught(network, teacher, corrupted)
        return jax.grad(lambda p: objective.summed_nats(network, p, corrupted, x0_BL))(params)

    given = (
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch)),
        jax.ShapeDtypeStruct((batch,), jnp.float32),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
        jax.ShapeDtypeStruct((batch, length), bool),
    )
    memory = jax.jit(gradient).lower(params, params, *given).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * batch * length * tokens / 2
    assert 8 * CHUNK_BYTES > 4 * batch * length * tokens / 2 > CHUNK_BYTES
