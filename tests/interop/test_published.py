import collections
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
from torch_writer import View, write

from sedd.errors import UserError
from sedd.interop.folding import at_constant_sigma
from sedd.interop.layouts import Description, read_layout
from sedd.interop.published import load_published

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
    assert published.description == Description(
        process={"absorb": "absorbing", "uniform": "uniform"}[graph],
        parameterization="score",
        schedule={"name": "log_linear"},
        num_tokens=97,
        length=24,
        corpus=None,
    )


@pytest.mark.parametrize("loss", ["t_DSE", "t_DCE", "lambda_DCE", "k_DCE"])
def test_radd_gives_the_published_numbers(loss):
    published = load_published(GOLDEN / "radd")
    golden = np.load(GOLDEN / "radd.npz")
    log_cond = jax.nn.log_softmax(raw(published, golden[f"{loss}/x"])[..., :97], axis=-1)
    theirs = golden[f"{loss}/log_cond"][..., :97]
    np.testing.assert_allclose(log_cond, theirs, atol=TOLERANCE, rtol=0)
    assert published.description.process == "absorbing"
    assert published.description.parameterization == "conditional"
    assert published.network.dropout == 0.02


def test_mdlm_gives_the_published_numbers_without_a_sigma():
    published = load_published(GOLDEN / "mdlm")
    golden = np.load(GOLDEN / "mdlm.npz")
    assert not published.network.time_conditioned
    np.testing.assert_allclose(raw(published, golden["xt"]), golden["raw"], atol=TOLERANCE, rtol=0)
    assert published.description == Description(
        process="absorbing",
        parameterization="conditional",
        schedule={"name": "log_linear"},
        num_tokens=97,
        length=24,
        corpus=None,
    )


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
    assert load_published(path).description.schedule == schedule


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
    assert "blocks.0.attn_qkv.weight is transposed: [64, 192], not [192, 64];" in message
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
        (
            "sedd_absorb",
            lambda c: c.update(tokens="many"),
            "tokens must be a positive integer, got 'many'",
        ),
        (
            "sedd_absorb",
            lambda c: c.update(tokens=9.5),
            "tokens must be a positive integer, got 9.5",
        ),
        ("sedd_absorb", lambda c: c.update(noise={"type": "cubic"}), "noise.type must be one of"),
        (
            "sedd_uniform",
            lambda c: c["model"].update(scale_by_sigma=True),
            "scale_by_sigma must be false where the graph is uniform, got true",
        ),
        ("radd", lambda c: c["model"].update(n_heads=5), "hidden_dim .* got 64 with 5 heads"),
        ("radd", lambda c: c.update(model=3), "the key model.hidden_size is missing"),
        ("radd", lambda c: c["model"].update(length=0), "model.length must be a positive integer"),
        ("radd", lambda c: c.update(tokens=True), "tokens must be a positive integer, got True"),
        (
            "sedd_absorb",
            lambda c: (c.pop("tokens"), c["model"].update(n_heads="4", dropout=[])),
            "model.n_heads must be .*'4'; model.dropout must be a number.*; the key tokens is miss",
        ),
        ("mdlm", lambda c: c.update(time_conditioning=0), "must be true or false, got 0"),
        (
            "mdlm",
            lambda c: c.update(model_type="gpt2"),
            "an unknown layout, with .* 'gpt2' .*: expected .* RADD, SDAR or SEDD",
        ),
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
    (path / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"has no file of tensors: expected one of model.safetensors, "
    ):
        load_published(path)


# ------------------------------------------------------- full sizes


@pytest.mark.parametrize(
    ("kind", "sizes", "parameters"),
    [
        ("sedd", {"hidden_size": 768, "n_blocks": 12, "n_heads": 12}, 169_627_218),
        ("sedd", {"hidden_size": 1024, "n_blocks": 24, "n_heads": 16}, 424_477_010),
        ("radd", {"hidden_size": 768, "n_blocks": 12, "n_heads": 12}, 162_265_682),
        ("radd", {"hidden_size": 1024, "n_blocks": 24, "n_heads": 16}, 405_191_762),
    ],
)
def test_published_sizes_have_the_published_numbers_of_parameters(
    tmp_path, kind, sizes, parameters
):
    config = {
        "tokens": 50257,
        "noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20},
        "model": {"cond_dim": 128, "length": 1024, "dropout": 0.1, **sizes},
    }
    if kind == "sedd":
        config["graph"] = {"type": "absorb", "file": "data", "report_all": False}
        config["model"] |= {"type": "ddit", "scale_by_sigma": True}
    else:
        config["model"] |= {"type": "ddit_wot", "use_checkpoint": False, "dtype": "float16"}
    _write_json(config, tmp_path / "config.json")
    network = read_layout(tmp_path / "config.json").network
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


# ------------------------------------------------------- PyTorch's own files


ORDER = ("vocab_embed", "sigma_map", "rotary_emb", "blocks", "output_layer")  # as PyTorch registers
INSIDE = ("norm", "attn_qkv", "attn_out", "mlp", "linear", "adaLN")


def registered(name):
    """The tensors of a golden checkpoint in the order of the published module's state dict."""

    def place(full):
        top, *rest = full.removeprefix("backbone.").split(".")
        block = int(rest.pop(0)) if top == "blocks" else 0
        second = next((i for i, part in enumerate(INSIDE) if rest[0].startswith(part)), 0)
        if rest[0] == "norm2":
            second = 2.5
        return ORDER.index(top), block, second, rest[1:-1], rest[-1] != "weight"

    tensors = load_file(GOLDEN / name / "model.safetensors")
    return collections.OrderedDict(
        (full, View.of(tensors[full], parameter=not full.endswith("inv_freq")))
        for full in sorted(tensors, key=place)
    )


def saved(path, name, content, *, config="config.json"):
    """A directory with a golden checkpoint's configuration and a file of torch.save."""
    directory, file = path
    text = (GOLDEN / name / "config.json").read_text()  # JSON is YAML
    (directory / config).parent.mkdir(parents=True, exist_ok=True)
    (directory / config).write_text(text)
    write(directory / file, content)
    return directory


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", ["sedd_absorb", "radd", "mdlm"])
def test_a_torch_file_holds_the_same_tensors(tmp_path, name):
    directory = saved((tmp_path, "pytorch_model.bin"), name, registered(name))
    equal(load_published(directory).params, load_published(GOLDEN / name).params)


def training(name, **changes):
    """What SEDD's and RADD's code saves: raw weights of -1, and the golden ones as the average."""
    state = registered(name)
    shadow = [view for full, view in state.items() if not full.endswith("inv_freq")]
    raw = {k: View.of(np.full(v.arguments[1], -1, np.float32)) for k, v in state.items()}
    content = {
        "optimizer": {"state": {0: {"step": View.of(np.float32(2)), "exp_avg": shadow[0]}}},
        "model": collections.OrderedDict(raw),
        "ema": {"decay": 0.9999, "num_updates": 2, "shadow_params": shadow},
        "step": 2,
    }
    return content | changes


@pytest.mark.parametrize("name", ["sedd_absorb", "radd"])
@pytest.mark.parametrize("file", ["checkpoints-meta/checkpoint.pth", "checkpoint.pth"])
def test_a_training_run_gives_its_average(tmp_path, name, file):
    directory = saved((tmp_path, file), name, training(name), config=".hydra/config.yaml")
    equal(load_published(directory).params, load_published(GOLDEN / name).params)


def test_a_lightning_checkpoint_gives_its_average(tmp_path):
    content = training("mdlm")
    content["state_dict"] = content.pop("model")
    directory = saved((tmp_path, "checkpoints/last.ckpt"), "mdlm", content)
    equal(load_published(directory).params, load_published(GOLDEN / "mdlm").params)


def test_a_run_without_an_average_gives_its_weights(tmp_path):
    content = {"state_dict": registered("mdlm"), "ema": None}
    directory = saved((tmp_path, "last.ckpt"), "mdlm", content)
    equal(load_published(directory).params, load_published(GOLDEN / "mdlm").params)


def shadowed(change):
    content = training("radd")
    change(content["ema"]["shadow_params"])
    return content


def swap(shadow):
    shadow[0], shadow[1] = shadow[1], shadow[0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: shadowed(list.pop), "are 24 tensors, but the model has 25 parameters"),
        (
            lambda: shadowed(swap),
            r"embedding is \[98, 64\], its average is \[64\], blocks.0.norm1.weight is",
        ),
        (
            lambda: training("radd", ema={"decay": 0.9}),
            "ema.shadow_params must be a list of",
        ),
        (lambda: training("radd", ema=[1]), "ema.shadow_params must be a list of"),
        (lambda: training("radd", model=3), "neither a state dict .* nor a checkpoint"),
        (lambda: [1], "neither a state dict .* nor a checkpoint"),
        (lambda: {"a": 1}, "neither a state dict .* nor a checkpoint"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(tmp_path, content, words):
    directory = saved((tmp_path, "checkpoint.pth"), "radd", content())
    with pytest.raises(UserError, match=f"checkpoint.pth.*{words}"):
        load_published(directory)
