"""The denoiser gives the network's time where there is one, and the exact world back."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import Oracle, f32, i32

from sedd.denoiser import Denoiser
from sedd.parameterizations.conditional import Conditional
from sedd.processes.absorbing import Absorbing


@pytest.mark.parametrize("kind", oracle.PROCESSES)
def test_log_score_of_the_exact_world(kind):
    world = Oracle(kind)
    denoiser = world.score_denoiser()
    for sigma in (1e-5, 0.3, 6.9):
        got = jax.jit(Denoiser.log_score)(
            denoiser, i32(world.states), f32(np.full(len(world.states), sigma))
        )
        np.testing.assert_allclose(got, world.log_score(sigma), atol=1e-5)


def test_conditional_and_score_denoisers_agree_on_the_exact_world():
    world = Oracle("absorbing")
    x, sigma = i32(world.states), f32(np.full(256, 0.8))
    masked = world.states == 3
    score = world.score_denoiser()
    conditional = world.conditional_denoiser()
    np.testing.assert_allclose(
        np.asarray(score.log_score(x, sigma))[masked][:, :3],
        np.asarray(conditional.log_score(x, sigma))[masked][:, :3],
        atol=1e-5,
    )
    for log_probs in (score.log_conditional(x, sigma), conditional.log_conditional(x)):
        np.testing.assert_allclose(np.exp(log_probs), world.conditional(), atol=1e-5)


def test_a_time_dependent_model_needs_sigma():
    denoiser = Oracle("absorbing").score_denoiser()
    for call in (denoiser.log_conditional, denoiser.hidden):
        with pytest.raises(ValueError, match=r"^sigma is missing: .*pass .* as model.schedule"):
            call(i32([[0, 1, 2, 3]]))


def test_a_time_independent_network_never_sees_sigma():
    denoiser = Oracle("absorbing").conditional_denoiser()
    x = i32([[0, 3, 2, 3]])
    with_sigma = denoiser.log_conditional(x, f32([0.3]))  # the table would raise
    np.testing.assert_array_equal(with_sigma, denoiser.log_conditional(x))


def test_no_conditional_on_a_uniform_process():
    with pytest.raises(ValueError, match="absorbing"):
        Oracle("uniform").score_denoiser().log_conditional(i32([[0, 1, 2, 0]]), f32([0.3]))


def test_a_denoiser_is_a_pytree_whose_parameters_are_traced():
    world = Oracle("absorbing")
    denoiser = world.conditional_denoiser()
    traces = []

    @jax.jit
    def call(denoiser, x):
        traces.append(1)
        return denoiser.log_conditional(x)

    x = i32(world.states[:8])
    first = call(denoiser, x)
    other = jax.tree.map(lambda a: 2 * a, denoiser)
    assert np.abs(np.asarray(call(other, x) - first)).max() > 1e-3
    assert len(traces) == 1


def test_golden_mdlm():
    golden = np.load(Path(__file__).parents[1] / "golden" / "mdlm.npz")
    process = Absorbing(num_tokens=97)
    denoiser = Denoiser(
        params=jnp.asarray(golden["raw"]),
        network=oracle.ConstantNetwork(num_states=98, time_conditioned=False),
        parameterization=Conditional(process=process),
    )
    got = denoiser.log_conditional(i32(golden["xt"]))
    assert (golden["log_conditional"][..., 97][golden["xt"] == 97] < -1e5).all()
    np.testing.assert_allclose(got, golden["log_conditional"][..., :97], rtol=1e-5, atol=1e-5)
