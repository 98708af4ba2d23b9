"""PyTorch's form of the training step, of ``benchmarks/``: it is RADD's, and it is ours."""

import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from sedd.configuration.build import build_parts
from sedd.configuration.config import load_config
from sedd.errors import UserError
from sedd.interop.layouts.base import layout_for, to_published
from sedd.interop.published import load_published
from sedd.objectives.base import Corrupted
from sedd.training.optimizer import OptimizerOptions, make_optimizer
from sedd.training.state import update_ema

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="the optional dependency `judge` is not installed")


def test_without_pytorch_it_says_what_to_install(monkeypatch):
    torch_step = importlib.import_module("torch_step")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"PyTorch: pip install -e '\.\[judge\]'"):
        torch_step.main(torch_step.Settings())


def ours():
    """A small checkpoint of the published code, and a batch with the published loss."""
    golden = np.load(GOLDEN / "radd.npz")
    names = {"xt": "lambda_DCE/x", "lambda": "lambda_DCE/u", "loss": "lambda_DCE/loss"}
    batch = {name: golden[key] for name, key in names.items()} | {"x0": golden["x0"]}
    return load_published(GOLDEN / "radd"), batch, golden["lambda_DCE/log_cond"]


def theirs(torch, network, length):
    """PyTorch's form of the same checkpoint; strict: no tensor is missing or left over."""
    form = importlib.import_module("torch_loop").RADD(network, length)
    tensors = load_file(GOLDEN / "radd" / "model.safetensors")
    del tensors["rotary_emb.inv_freq"]
    form.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})
    return form


def by_published_name(published, params):
    layout = layout_for(published.network, published.description)
    tensors = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        tensors |= to_published(layout, key, np.asarray(leaf))
    return tensors


def test_its_network_and_loss_give_the_published_numbers(torch):
    published, batch, log_cond = ours()
    network = theirs(torch, published.network, batch["x0"].shape[1])
    xt, x0, lambda_ = (torch.tensor(batch[name]) for name in ("xt", "x0", "lambda"))
    with torch.no_grad():
        logits = network(xt)[..., :-1]
        loss = importlib.import_module("torch_loop").lambda_dce(network, x0, xt, lambda_)
    np.testing.assert_allclose(logits.log_softmax(-1), log_cond[..., :-1], atol=2e-5, rtol=0)
    np.testing.assert_allclose(loss, batch["loss"], rtol=1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_its_step_is_ours(torch, name):
    """Loss, gradients, two updates and the average, from equal parameters and an equal batch."""
    published, batch, _ = ours()
    params = jax.tree.map(jnp.asarray, published.params)
    x0, xt = (jnp.asarray(batch[key], jnp.int32) for key in ("x0", "xt"))
    weight = jnp.where(xt == 97, 1 / batch["lambda"][:, None], 0.0)
    objective = build_parts(load_config("sotu_radd_small"), 97).objective
    corrupted = Corrupted(xt_BL=xt, weight_BL=weight)

    @jax.jit
    @jax.value_and_grad
    def loss_and_grads(params):
        return objective.summed_nats(published.network, params, corrupted, x0) / len(x0)

    loss, grads = loss_and_grads(params)
    options = OptimizerOptions(name=name, learning_rate=0.01, warmup_steps=4, clip_norm=0.5)
    optimizer = make_optimizer(options, 100)

    torch_loop = importlib.import_module("torch_loop")
    network = theirs(torch, published.network, x0.shape[1])
    loop = torch_loop.Loop(network, options)
    batch = {key: torch.tensor(value) for key, value in batch.items()}
    their_loss = torch_loop.lambda_dce(network, batch["x0"], batch["xt"], batch["lambda"]).mean()
    their_loss.backward()
    np.testing.assert_allclose(their_loss.item(), loss, rtol=1e-5)
    expected = by_published_name(published, grads)
    assert len(expected) == len(loop.parameters)
    for key, parameter in network.named_parameters():
        np.testing.assert_allclose(
            parameter.grad, expected[key], atol=1e-5 * np.abs(expected[key]).max(), rtol=1e-3
        )

    @jax.jit
    def update(params, ema_params, opt_state, grads, n):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, update_ema(ema_params, params, n, options.ema_decay), opt_state

    ema_params, opt_state = params, optimizer.init(params)
    for n, scale in ((1, 1.0), (2, -0.3)):  # equal gradients: Adam divides by those near 0
        scaled = jax.tree.map(lambda g: scale * g, grads)  # noqa: B023
        params, ema_params, opt_state = update(params, ema_params, opt_state, scaled, n)
        for key, value in by_published_name(published, scaled).items():
            network.get_parameter(key).grad = torch.tensor(value)
        loop.update()
    average = dict(zip(dict(network.named_parameters()), loop.ema_parameters, strict=True))
    before = load_file(GOLDEN / "radd" / "model.safetensors")
    moved, moved_average = (by_published_name(published, tree) for tree in (params, ema_params))
    close = {"atol": 1e-3 * options.learning_rate, "rtol": 0}
    for key, parameter in network.named_parameters():
        if name == "muon" and not (key.startswith("blocks") and parameter.ndim == 2):
            continue  # optax gives the parameters beside Muon's Adam with Nesterov's momentum
        np.testing.assert_allclose(parameter.detach(), moved[key], **close)
        np.testing.assert_allclose(average[key], moved_average[key], **close)
        assert np.abs(moved[key] - before[key]).max() > 50 * close["atol"]


@pytest.mark.nightly
def test_the_forms_run_in_turn_with_as_many_parameters(torch, capsys):
    torch_step = importlib.import_module("torch_step")
    torch_step.main(torch_step.Settings(shapes=("sotu_radd_small",), steps=1))
    rows = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["rows"]
    assert [row["form"] for row in rows] == list(torch_step.FORMS)
    assert {row["parameters"] for row in rows} == {1_844_225}
    assert rows[1]["speed"] == 1
    assert all(row["tokens/s"] == pytest.approx(32 * 64 / row["s/step"]) for row in rows)
