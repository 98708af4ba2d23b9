"""The four RADD losses against the published implementation (tests/golden/README.md)."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from oracle import ConstantNetwork, f32, i32, keys

from sedd.objectives.base import Corrupted
from sedd.objectives.k_dce import KDCE
from sedd.objectives.lambda_dce import LambdaDCE
from sedd.objectives.score_entropy import ScoreEntropy
from sedd.objectives.t_dce import TDCE
from sedd.parameterizations.conditional import Conditional
from sedd.processes.absorbing import Absorbing
from sedd.schedules import LogLinear

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "radd.npz")
READING = Conditional(process=Absorbing(num_tokens=97))
SCHEDULE = LogLinear()
NETWORK = ConstantNetwork(num_states=98, time_conditioned=False)
MAKERS = {"t_DSE": ScoreEntropy, "t_DCE": TDCE, "lambda_DCE": LambdaDCE, "k_DCE": KDCE}


@pytest.mark.parametrize("name", MAKERS)
def test_loss(name):
    x, x0 = GOLDEN[f"{name}/x"], GOLDEN["x0"]
    objective = MAKERS[name](schedule=SCHEDULE, parameterization=READING)
    if name == "k_DCE":
        u = (GOLDEN["k_DCE/k"] - 0.5) / x0.shape[1]
    elif name == "lambda_DCE":
        u = 1 - GOLDEN["lambda_DCE/u"]  # ours masks with probability 1 - u
    else:
        u = GOLDEN[f"{name}/u"]
    # The weight that the objective gives, on a sequence long enough for some position to count
    tiled = i32(np.tile(x0, (1, 1 if name == "k_DCE" else 40)))
    drawn = objective.corrupt(keys(0, 4), f32(u), tiled, jnp.ones(tiled.shape, bool))
    weight_B = np.asarray(drawn.weight_BL.max(-1))
    corrupted = Corrupted(
        xt_BL=i32(x),
        weight_BL=f32(np.where(x == 97, weight_B[:, None], 0)),
        sigma=drawn.sigma,
    )
    loss = objective.nats(NETWORK, f32(GOLDEN[f"{name}/log_cond"]), corrupted, i32(x0)).sum(-1)
    if name == "t_DCE":  # the published loss keeps a term that is constant in the parameters
        sigma = np.asarray(drawn.sigma, np.float64)
        loss = loss + (x == 97).sum(-1) * weight_B * np.log(np.expm1(sigma))
    np.testing.assert_allclose(loss, GOLDEN[f"{name}/loss"], rtol=1e-5, atol=1e-6)
