import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sedd.errors import UserError
from sedd.interop.published import at_constant_sigma, load_published

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 2e-5

# These tests compile much and run little.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def raw(published, x, sigma=None):
    net = published.network
    sigma_B = None if sigma is None else jnp.asarray(sigma)
    return np.array(run(net, published.params, jnp.asarray(x, jnp.int32), sigma_B))


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def run(net, params, x, sigma_B):
    return net.raw(params, x, sigma_B=sigma_B)


@pytest.fixture
def copy(tmp_path):
    """A copy of a golden checkpoint, its configuration and tensors changed by two functions."""

    def make(name, *, config=None, tensors=None):
        path = shutil.copytree(GOLDEN / name, tmp_path / name)
        for file, change, load, save in (
            (path / "config.json", config, lambda p: json.loads(p.read_text()), _write_json),
            (path / "model.safetensors", tensors, load_file, save_file),
        ):
            if change is not None:
                content = load(file)
                change(content)
                save(content, file)
        return path

    return make


def _write_json(content, path):
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_sedd_gives_the_published_numbers(graph):
    published = load_published(GOLDEN / f"sedd_{graph}")
    golden = np.load(GOLDEN / "sedd.npz")
    for schedule in ("loglinear", "geometric"):
        x, sigma, log_score = (
            golden[f"{graph}/{schedule}/{name}"] for name in ("x", "sigma", "log_score")
        )
        ours = raw(published, x, sigma)
        if graph == "absorb":
            ours -= np.log(np.expm1(sigma))[:, None, None] + np.log(97)
        np.put_along_axis(ours, x[..., None], 0, axis=-1)
        np.testing.assert_allclose(ours, log_score, atol=TOLERANCE, rtol=0)
    assert published.description == {
        "process": {"absorb": "absorbing", "uniform": "uniform"}[graph],
        "parameterization": "score",
        "schedule": None,
        "num_tokens": 97,
        "length": 24,
    }


@pytest.mark.parametrize("loss", ["t_DSE", "t_DCE", "lambda_DCE", "k_DCE"])
def test_radd_gives_the_published_numbers(loss):
    published = load_published(GOLDEN / "radd")
    golden = np.load(GOLDEN / "radd.npz")
    log_cond = jax.nn.log_softmax(raw(published, golden[f"{loss}/x"])[..., :97], axis=-1)
    theirs = golden[f"{loss}/log_cond"][..., :97]
    np.testing.assert_allclose(log_cond, theirs, atol=TOLERANCE, rtol=0)
    assert published.description["process"] == "absorbing"
    assert published.description["parameterization"] == "conditional"
    assert published.network.dropout == 0.02


def test_mdlm_gives_the_published_numbers_without_a_sigma():
    published = load_published(GOLDEN / "mdlm")
    golden = np.load(GOLDEN / "mdlm.npz")
    assert not published.network.time_conditioned
    np.testing.assert_allclose(raw(published, golden["xt"]), golden["raw"], atol=TOLERANCE, rtol=0)
    assert published.description == {
        "process": "absorbing",
        "parameterization": "conditional",
        "schedule": None,
        "num_tokens": 97,
        "length": 24,
    }


def test_a_constant_sigma_folds_into_the_norms(copy):
    """At σ = 0 as MDLM does it, and at a σ that is not special; the fold is at that σ only."""
    conditioned = load_published(copy("mdlm", config=lambda c: c.update(time_conditioning=True)))
    assert conditioned.network.time_conditioned
    golden = np.load(GOLDEN / "mdlm.npz")
    zeros = np.zeros(len(golden["xt"]), np.float32)
    np.testing.assert_allclose(
        raw(conditioned, golden["xt"], zeros), golden["raw"], atol=TOLERANCE, rtol=0
    )
    net, params = at_constant_sigma(conditioned.network, conditioned.params, 0.7)
    folded = np.asarray(run(net, params, jnp.asarray(golden["xt"], jnp.int32), None))
    np.testing.assert_allclose(
        folded, raw(conditioned, golden["xt"], zeros + 0.7), atol=TOLERANCE, rtol=0
    )
    assert np.abs(folded - golden["raw"]).max() > 1e-2
    with pytest.raises(ValueError, match="time_conditioned"):
        at_constant_sigma(net, params, 0.0)


@pytest.mark.parametrize(
    ("noise", "schedule"),
    [
        ({"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20}, {"name": "log_linear"}),
        (
            {"type": "geometric", "sigma_min": "1e-4", "sigma_max": 20},
            {"name": "geometric", "sigma_min": 1e-4, "sigma_max": 20.0},
        ),
    ],
)
def test_a_stated_schedule_is_read(copy, noise, schedule):
    path = copy("sedd_absorb", config=lambda c: c.update(noise=noise))
    assert load_published(path).description["schedule"] == schedule


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_parameters_are_float32_whatever_was_saved(copy, dtype):
    def cast(tensors):
        tensors.update({name: x.astype(dtype) for name, x in tensors.items()})

    params = load_published(copy("radd", tensors=cast)).params
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    bias = load_file(GOLDEN / "radd" / "model.safetensors")["output_layer.linear.bias"]
    np.testing.assert_array_equal(params["head"]["bias"], bias.astype(dtype).astype(np.float32))


def test_all_tensors_that_do_not_fit_are_named(copy):
    def spoil(tensors):
        del tensors["blocks.1.norm2.weight"], tensors["vocab_embed.embedding"]
        tensors["blocks.0.attn_qkv.weight"] = tensors["blocks.0.attn_qkv.weight"].T.copy()
        tensors["output_layer.linear.bias"] = np.zeros(5, np.float32)
        tensors["blocks.2.norm1.weight"] = np.zeros(3, np.float32)
        tensors["lm_head"] = np.zeros(3, np.float32)

    path = copy("sedd_absorb", tensors=spoil)
    with pytest.raises(UserError) as error:
        load_published(path)
    message = str(error.value)
    assert message.startswith(str(path / "model.safetensors"))
    assert "\n" not in message
    assert "missing blocks.1.norm2.weight, vocab_embed.embedding;" in message
    assert "unexpected blocks.2.norm1.weight, lm_head;" in message
    assert "blocks.0.attn_qkv.weight is [64, 192], not [192, 64]" in message
    assert "output_layer.linear.bias is [5], not [98]" in message


def test_mdlm_tensors_are_named_with_their_prefix(copy):
    path = copy("mdlm", tensors=lambda t: t.pop("backbone.sigma_map.mlp.2.bias"))
    with pytest.raises(UserError, match=r"missing backbone\.sigma_map\.mlp\.2\.bias$"):
        load_published(path)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("sedd_absorb", lambda c: c.pop("tokens"), "the key tokens is missing"),
        ("sedd_absorb", lambda c: c["model"].pop("cond_dim"), "the key model.cond_dim is missing"),
        ("sedd_absorb", lambda c: c["graph"].update(type="roulette"), "absorb, uniform, got 'rou"),
        ("sedd_absorb", lambda c: c.update(tokens="many"), "tokens must be an integer, got 'many'"),
        ("sedd_absorb", lambda c: c.update(tokens=9.5), "tokens must be an integer, got 9.5"),
        ("sedd_absorb", lambda c: c.update(noise={"type": "cubic"}), "noise.type must be one of"),
        (
            "sedd_uniform",
            lambda c: c["model"].update(scale_by_sigma=True),
            "scale_by_sigma must be false where the graph is uniform, got true",
        ),
        ("radd", lambda c: c["model"].update(n_heads=5), "hidden_dim .* got 64 with 5 heads"),
        ("radd", lambda c: c.update(model=3), "the key model.hidden_size is missing"),
        ("mdlm", lambda c: c.pop("vocab_size"), "the key vocab_size is missing"),
    ],
)
def test_a_configuration_that_is_not_understood_is_refused(copy, name, change, words):
    with pytest.raises(UserError, match=words) as error:
        load_published(copy(name, config=change))
    assert "config.json: " in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_missing_or_damaged_are_named(copy, tmp_path):
    with pytest.raises(UserError, match=r"nowhere/config.json: No such file or directory"):
        load_published(tmp_path / "nowhere")
    path = copy("radd")
    (path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: Expecting property name"):
        load_published(path)
    (path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"expected a JSON object, got list"):
        load_published(path)
    shutil.copy(GOLDEN / "radd" / "config.json", path)
    (path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match=r"model.safetensors: "):
        load_published(path)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin is a pickle, .* convert it"):
        load_published(path)
