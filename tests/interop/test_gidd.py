"""GIDD's layout: its sizes are the published ones, and its network is told GIDD's time."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_layouts import tokenizer_files

import sedd
from sedd.errors import UserError
from sedd.interop.layouts.base import read_layout

GOLDEN = Path(__file__).parents[1] / "golden" / "mdlm"  # the network of the two codes is the same
SMALL = {
    "architectures": ["DIT"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoModelForMaskedLM": "modeling_dit.DIT"},
    "hidden_size": 768,
    "max_seq_len": 512,
    "model_type": "dit",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "p_uniform": 0.1,
    "t_eps": 0.0001,
    "timestep_cond_dim": 128,
    "torch_dtype": "float32",
    "vocab_size": 50259,
}
BASE = {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24}
MDLM = json.loads((GOLDEN / "config.json").read_text())
STATES = MDLM["vocab_size"]
TINY = {
    "hidden_size": MDLM["hidden_dim"],
    "max_seq_len": MDLM["model_length"],
    "num_attention_heads": MDLM["n_heads"],
    "num_hidden_layers": MDLM["n_blocks"],
    "timestep_cond_dim": MDLM["cond_dim"],
    "vocab_size": STATES,
}


def checkpoint(path, *, mask=None, **changes):
    """The golden network of MDLM in the form of GIDD's code."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(SMALL | TINY | changes))
    tensors = load_file(GOLDEN / "model.safetensors")
    tensors = {name.removeprefix("backbone."): value for name, value in tensors.items()}
    tensors.pop("rotary_emb.inv_freq", None)
    for name in ("cos_cached", "sin_cached"):
        tensors[f"rotary_emb.{name}"] = np.ones((1, 8, 3, 1, 4), np.float32)
    save_file(tensors, path / "model.safetensors")
    if mask is not None:
        for name, content in tokenizer_files(size=STATES, mask=mask).items():
            (path / name).write_text(json.dumps(content))
    return path


def sigma_of(time, uniform):
    """Total noise at GIDD's time, from the weights of its code: 1 - t, t and c over 1 + c."""
    c = 2 * uniform / (1 - uniform) * np.sqrt(time * (1 - time))
    return -np.log((1 - time) / (1 + c))


@pytest.mark.parametrize(("changes", "millions"), [({}, 169.6), (BASE, 424.5)])
def test_parameters_are_as_many_as_published(changes, millions, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL | changes))
    network = read_layout(tmp_path / "config.json").network
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6, 1) == millions


@pytest.mark.parametrize("uniform", [0.2, 0.0])
def test_the_network_is_told_the_time(uniform, tmp_path):
    model = sedd.load(checkpoint(tmp_path / "gidd", p_uniform=uniform))
    assert type(model.process).__name__ == ("Hybrid" if uniform else "Absorbing")
    assert (model.process.num_tokens, model.length) == (STATES - 1, TINY["max_seq_len"])
    time = np.array([0.001, 0.3, 0.9])
    x_BL = np.random.default_rng(0).integers(0, STATES, (3, 6))
    sigma_B = jnp.asarray(sigma_of(time, uniform), jnp.float32)
    network, params = model.denoiser.network, model.denoiser.params
    (hidden_BLD,) = model.denoiser.hidden(jnp.asarray(x_BL), sigma_B)
    told_BLD = network.hidden(params, jnp.asarray(x_BL), sigma_B=jnp.asarray(time, jnp.float32))
    np.testing.assert_allclose(hidden_BLD, told_BLD, atol=1e-4)
    other_BLD = network.hidden(params, jnp.asarray(x_BL), sigma_B=sigma_B)
    assert float(jnp.abs(hidden_BLD - other_BLD).max()) > 1e-2


def test_its_noise_is_that_of_the_published_code(tmp_path):
    model = sedd.load(checkpoint(tmp_path / "gidd", p_uniform=0.2))
    for time in (0.01, 0.5, 0.99):
        c = 2 * 0.2 / 0.8 * math.sqrt(time * (1 - time))
        expected_V = np.full(STATES, c / (STATES - 1))
        expected_V[-1] = time
        expected_V[3] += 1 - time
        row_V = model.process.transition(jnp.asarray(3), jnp.float32(sigma_of(time, 0.2)))
        np.testing.assert_allclose(row_V, expected_V / (1 + c), rtol=1e-4)


def test_it_draws_and_has_a_bound(tmp_path):
    model = sedd.load(checkpoint(tmp_path / "gidd", mask=f"w{STATES - 1}"))
    assert model.config.sampler.name == "tweedie"
    assert model.tokenizer is not None
    assert model.tokenizer.num_tokens == STATES - 1
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
