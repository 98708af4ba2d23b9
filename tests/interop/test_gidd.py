"""GIDD's layout: its numbers are those of the published code, and its sizes the published ones."""

import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_layouts import tokenizer_files

import sedd
from sedd.errors import UserError
from sedd.interop.layouts.base import read_layout

GOLDEN = Path(__file__).parents[1] / "golden" / "gidd"
NUMBERS = np.load(GOLDEN.with_suffix(".npz"))
TINY = json.loads((GOLDEN / "config.json").read_text())
STATES, UNIFORM = TINY["vocab_size"], TINY["p_uniform"]
SMALL = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12}
BASE = {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24}
PUBLISHED = {"timestep_cond_dim": 128, "vocab_size": 50259}


def checkpoint(path, *, mask=None, **changes):
    """The golden checkpoint with changes, and a tokenizer that names a mask."""
    shutil.copytree(GOLDEN, path)
    (path / "config.json").write_text(json.dumps(TINY | changes))
    if mask is not None:
        for name, content in tokenizer_files(size=STATES, mask=mask).items():
            (path / name).write_text(json.dumps(content))
    return path


def sigma_of(time, uniform=UNIFORM):
    """Total noise at GIDD's time, from the weights of its code: 1 - t, t and c over 1 + c."""
    c = 2 * uniform / (1 - uniform) * np.sqrt(time * (1 - time))
    return jnp.asarray(-np.log((1 - time) / (1 + c)), jnp.float32)


def log_scores(model):
    """The log scores of the golden batch at its times."""
    return model.log_score(NUMBERS["x"], sigma_of(NUMBERS["t"].astype(float)))


@pytest.mark.parametrize(("sizes", "millions"), [(SMALL, 169.6), (BASE, 424.5)])
def test_parameters_are_as_many_as_published(sizes, millions, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY | PUBLISHED | sizes))
    network = read_layout(tmp_path / "config.json").network
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6, 1) == millions


def test_the_network_is_told_the_time():
    model = sedd.load(GOLDEN)
    network, params = model.denoiser.network, model.denoiser.params
    sigma_B = sigma_of(NUMBERS["t"].astype(float))
    (hidden_BLD,) = model.denoiser.hidden(jnp.asarray(NUMBERS["x"]), sigma_B)
    kernel_DV, bias_V = network.head(params)
    np.testing.assert_allclose(hidden_BLD @ kernel_DV + bias_V, NUMBERS["logits"], atol=2e-5)


def test_its_noise_is_that_of_the_published_code():
    process = sedd.load(GOLDEN).process
    for time, kept, noise_V in zip(
        NUMBERS["t"], NUMBERS["alpha"][:, 0], NUMBERS["beta_pi"], strict=True
    ):
        row_V = process.transition(jnp.asarray(3), sigma_of(float(time)))
        expected_V = noise_V + kept * np.eye(STATES)[3]
        np.testing.assert_allclose(row_V, expected_V, rtol=1e-4)


def test_a_step_is_that_of_the_published_sampler():
    model = sedd.load(GOLDEN)
    now_B, then_B = (sigma_of(NUMBERS[name].astype(float)) for name in "ts")
    steps_BLV = model.process.tweedie(
        log_scores(model), jnp.asarray(NUMBERS["x"]), now_B, now_B - then_B
    )
    steps_BLV = steps_BLV / steps_BLV.sum(-1, keepdims=True)
    np.testing.assert_allclose(steps_BLV, NUMBERS["step"], atol=5e-6)


def test_the_loss_is_that_of_the_published_code():
    """Their integrand is over GIDD's time, and ours over σ."""
    model = sedd.load(GOLDEN)
    time_B = NUMBERS["t"].astype(float)
    c_B = 2 * UNIFORM / (1 - UNIFORM) * np.sqrt(time_B * (1 - time_B))
    growth_B = c_B * (1 - 2 * time_B) / (2 * time_B * (1 - time_B))
    per_time_B = 1 / (1 - time_B) + growth_B / (1 + c_B)  # dσ/dt
    loss_BL = model.process.score_entropy(
        log_scores(model), jnp.asarray(NUMBERS["x"]), jnp.asarray(NUMBERS["x0"]), sigma_of(time_B)
    )
    np.testing.assert_allclose(loss_BL * per_time_B[:, None], NUMBERS["elbo"], rtol=5e-5)


def test_without_uniform_tokens_it_is_absorbing(tmp_path):
    model = sedd.load(checkpoint(tmp_path / "gidd", p_uniform=0.0))
    assert model.process.absorbing
    time_B = np.array([0.001, 0.3, 0.9])
    x_BL, sigma_B = jnp.asarray(NUMBERS["x"]), sigma_of(time_B, 0.0)
    network, params = model.denoiser.network, model.denoiser.params
    (hidden_BLD,) = model.denoiser.hidden(x_BL, sigma_B)
    told_BLD = network.hidden(params, x_BL, sigma_B=jnp.asarray(time_B, jnp.float32))
    np.testing.assert_allclose(hidden_BLD, told_BLD, atol=1e-4)


def test_its_tokenizer_has_the_mask(tmp_path):
    model = sedd.load(checkpoint(tmp_path / "gidd", mask=f"w{STATES - 1}"))
    assert model.tokenizer is not None
    assert model.tokenizer.num_tokens == STATES - 1


@pytest.mark.nightly
def test_it_draws_and_has_a_bound():
    model = sedd.load(GOLDEN)
    assert model.config.sampler.name == "tweedie"
    drawn = sedd.sample(model, jax.random.key(0), num=2, length=6, steps=4)
    assert drawn.tokens.shape == (2, 6)
    assert drawn.tokens.max() < STATES - 1
    result = sedd.evaluate(model, drawn.tokens)
    assert 0 < result.nats_per_token < math.inf


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"p_uniform": 1.0}, "p_uniform must be in [0, 1), got 1.0"),
        ({"t_eps": 0}, "t_eps must be in (0, 0.5), got 0.0"),
        ({"p_uniform": None}, "p_uniform must be a number, got None"),
        ({"mask": "w2"}, f"mask_token is 2, and GIDD has the mask as its last id, {STATES - 1}"),
    ],
)
def test_mistakes_of_the_files(changes, words, tmp_path):
    with pytest.raises(UserError) as error:
        sedd.load(checkpoint(tmp_path / "gidd", **changes))
    assert words in str(error.value)
