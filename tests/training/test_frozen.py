"""Frozen parameters: no gradient, no state of the optimizer, and no change."""

from dataclasses import dataclass

import jax
import numpy as np
from training_toy import ADAMW, SGD, Toy, history, setup

from sedd.training import parallel


@dataclass(frozen=True, kw_only=True)
class PartlyFrozen(Toy):
    """The toy of which only one matrix and the head are trained."""

    def trainable(self, params):
        return {name: params[name] for name in ("mix", "head")}


def test_frozen_parameters_have_no_gradient_no_state_and_never_change(monkeypatch):
    monkeypatch.setattr(parallel, "LEAST_SPLIT", 16)  # arrays of a toy's size are split too
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
        for tree in (state.params, state.ema_params):
            np.testing.assert_array_equal(tree["embed"], start.params["embed"])
            assert (tree["mix"] != start.params["mix"]).all()
        moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
        assert len(moments) == 2 * 3  # Adam's two averages of mix, kernel and bias
