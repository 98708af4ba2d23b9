"""Frozen parameters: no gradient, no state of the optimizer, and no change."""

from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest
from training_toy import ADAMW, SGD, N, Toy, ToyBatches, history, run, setup
from training_toy import objective as t_dce

from sedd.errors import UserError
from sedd.networks import mesh
from sedd.networks.causal_head import CausalHead
from sedd.networks.decoder import Decoder
from sedd.networks.lora import Lora
from sedd.objectives.self_speculative import SelfSpeculative
from sedd.parameterizations.conditional import Conditional
from sedd.processes.absorbing import Absorbing
from sedd.schedules import LogLinear
from sedd.training.checkpoint import Checkpoints
from sedd.training.loop import Cadence

HEAD = CausalHead(
    num_states=N + 1,
    time_conditioned=False,
    hidden_dim=16,
    num_layers=2,
    num_heads=2,
    norm_bias=True,
    dropout=0.1,
)


# The output layer is the embedding: it is not 0 in fresh parameters, so that the loss depends on
# the adapters.
ADAPTED = Decoder(
    num_states=N + 1,
    time_conditioned=False,
    hidden_dim=16,
    num_layers=2,
    num_heads=2,
    tied=True,
    lora=Lora(rank=4),
)


def self_speculative():
    return SelfSpeculative(
        schedule=LogLinear(), parameterization=Conditional(process=Absorbing(num_tokens=N))
    )


@dataclass(frozen=True, kw_only=True)
class PartlyFrozen(Toy):
    """The toy of which only one matrix and the head are trained."""

    def trainable(self, params):
        return {name: params[name] for name in ("mix", "head")}


@pytest.mark.nightly
def test_frozen_parameters_have_no_gradient_no_state_and_never_change(monkeypatch):
    monkeypatch.setattr(mesh, "LEAST_SPLIT", 16)  # arrays of a toy's size are split too
    start, _ = setup(SGD)
    whole, _ = history(1, SGD)
    runs = {
        setting: history(20, ADAMW, network=PartlyFrozen(), devices=setting[0], fsdp=setting[1])
        for setting in ((1, None), (2, None), (2, 2))
    }
    one, _ = runs[1, None]
    assert one["loss"][-5:].mean() < one["loss"][:5].mean()  # the rest is trained
    assert one["loss"][0] == whole["loss"][0]
    assert one["grad_norm"][0] < whole["grad_norm"][0]
    for seen, state in runs.values():
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(seen[name], one[name], rtol=1e-5)
        np.testing.assert_array_equal(state.params["embed"], start.params["embed"])
        for tree in (state.params, state.ema_params):
            assert (tree["mix"] != start.params["mix"]).all()
        assert state.ema_params.keys() == {"mix", "head"}
        assert state.averaged["embed"] is state.params["embed"]
        moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
        assert len(moments) == 2 * 3  # Adam's two averages of mix, kernel and bias


@pytest.mark.nightly
def test_a_causal_head_is_the_same_on_two_devices_and_its_trunk_never_changes(monkeypatch):
    """The head of the trunk is random here, so that the loss depends on the causal block."""
    monkeypatch.setattr(mesh, "LEAST_SPLIT", 16)
    state, _ = setup(network=HEAD, objective=self_speculative)
    kernel = jax.random.normal(jax.random.key(5), (16, N + 1))
    params = state.params | {"head": state.params["head"] | {"kernel": kernel}}
    losses = {}
    for devices, fsdp in ((1, None), (2, None), (2, 2)):
        _, runner = setup(SGD, network=HEAD, objective=self_speculative, devices=devices, fsdp=fsdp)
        placed = runner.place(replace(state, params=params))
        batches, losses[devices, fsdp] = ToyBatches(), []
        for _ in range(6):
            placed, metrics = runner(placed, next(batches))
            losses[devices, fsdp] += [float(metrics["loss"]), float(metrics["grad_norm"])]
        for name in ("trunk", "head"):
            assert jax.tree.all(jax.tree.map(np.array_equal, placed.params[name], params[name]))
        for tree in (placed.params, placed.ema_params):
            assert tree["causal"]["out"]["kernel"].any()
    np.testing.assert_allclose(losses[2, None], losses[1, None], rtol=1e-5)
    np.testing.assert_allclose(losses[2, 2], losses[1, None], rtol=1e-5)


@pytest.mark.nightly
def test_adapters_are_the_same_on_two_devices_and_all_else_never_changes(monkeypatch):
    monkeypatch.setattr(mesh, "LEAST_SPLIT", 16)
    start, _ = setup(SGD, network=ADAPTED)
    runs = {
        setting: history(6, SGD, network=ADAPTED, devices=setting[0], fsdp=setting[1])
        for setting in ((1, None), (2, 2))
    }
    remat, _ = history(6, SGD, network=replace(ADAPTED, remat=True))
    one, _ = runs[1, None]
    assert one["grad_norm"].min() > 0
    np.testing.assert_allclose(remat["loss"], one["loss"], rtol=1e-5)
    for seen, state in runs.values():
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(seen[name], one[name], rtol=1e-4)
        assert state.ema_params.keys() == {"adapters"}
        trunk, before = state.params["trunk"], start.params["trunk"]
        assert jax.tree.all(jax.tree.map(np.array_equal, trunk, before))
        assert all(leaf.any() for leaf in jax.tree.leaves(state.params["adapters"]))


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("network", "objective", "trained"),
    [(HEAD, self_speculative, "causal"), (ADAPTED, t_dce, "adapters")],
    ids=["causal head", "adapters"],
)
def test_a_resumed_run_is_bit_exact(tmp_path, network, objective, trained):
    common = {
        "network": network,
        "objective": objective,
        "of_steps": 6,
        "cadence": Cadence(log_every=1, checkpoint_every=3),
    }
    whole = run(tmp_path / "whole", 6, **common)
    run(tmp_path / "parts", 3, **common)
    parts = run(tmp_path / "parts", 6, **common)
    state, resumed = (
        jax.tree.map(np.asarray, (s.params, s.ema_params, s.opt_state))
        for s in (whole.state, parts.state)
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, state, resumed))
    moments = [x for x in jax.tree.leaves(state[2]) if x.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(state[0][trained]))

    # The averaged parameters of the checkpoint are averages, and the frozen ones.
    checkpoints = Checkpoints(tmp_path / "whole" / "checkpoints")
    abstract = jax.eval_shape(lambda: whole.state).averaged
    for shardings in (None, jax.sharding.SingleDeviceSharding(jax.devices()[0])):
        _, params = checkpoints.restore_step(abstract_params=abstract, shardings=shardings)
        assert jax.tree.all(jax.tree.map(np.array_equal, params, whole.state.averaged))
    wider = {**abstract, "trunk": {**abstract["trunk"], "norm": {"scale": np.zeros(3)}}}
    with pytest.raises(UserError, match="of another configuration: params/trunk/norm"):
        checkpoints.restore_params(abstract_params=wider)
