"""Training from published models: what they determine, adapters in PEFT's files, conversion."""

import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny_run
from safetensors.numpy import load_file, save_file
from test_layouts import MASK, ROWS, TOKENS, checkpoint, rewrite, tiny_config, tokenizer_files

import sedd
from sedd.commands.train_from import started_from
from sedd.configuration.components import options
from sedd.configuration.config import Config
from sedd.errors import UserError
from sedd.interop.peft import CONFIG, WEIGHTS, load_adapters, save_adapters
from sedd.model import read_config
from sedd.networks.base import Attend
from sedd.networks.lora import Lora

L = 8
FAST = ("--optimizer.warmup-steps", 0, "--optimizer.learning-rate", 0.01)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    rng = np.random.default_rng(0)
    words = [" ".join(f"w{i}" for i in row) for row in rng.integers(8, 18, (40, 7))]
    path.write_text("\n\n".join(words))
    return path


def published(path, name, *, dtype=np.float32, **changes):
    """A small published model whose tokenizer has words between spaces."""
    files = tokenizer_files()
    files["tokenizer.json"] |= {"pre_tokenizer": {"type": "Whitespace"}}
    files["tokenizer_config.json"] = {"eos_token": "w2"}
    changes = {"torch_dtype": np.dtype(dtype).name, **changes}
    return checkpoint(path, tiny_config(name, **changes), dtype=dtype, files=files)


@pytest.fixture(scope="module")
def llada(tmp_path_factory):
    return published(tmp_path_factory.mktemp("llada") / "base", "LLaDA", dtype=ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return published(tmp_path_factory.mktemp("qwen") / "base", "Qwen3")


def train(workdir, text, *flags):
    few = ("--data.corpus", text, "--data.length", L, "--training.batch-size", 4)
    short = (
        "--training.steps",
        1,
        "--evaluation.max-sequences",
        4,
        "--training.sample-every",
        None,
    )
    return tiny_run.call("train", "--workdir", workdir, *few, *short, *FAST, *flags)


def same(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, text, llada):
    """LLaDA with adapters, without a recipe."""
    workdir = tmp_path_factory.mktemp("runs") / "adapted"
    outcome = train(workdir, text, "--init-from", llada, "--lora", 4)
    assert outcome.code == 0, outcome.err
    return workdir


@pytest.mark.nightly
def test_a_published_model_needs_no_recipe_and_its_weights_stay(adapted, llada):
    config, base, model = read_config(adapted), sedd.load(llada), sedd.load(adapted)
    assert config.network.lora == Lora(rank=4)
    assert (config.network.hidden_dim, config.network.param_dtype) == (16, "bfloat16")
    assert (config.parameterization, config.process) == (
        base.config.parameterization,
        base.config.process,
    )
    assert (config.objective.name, config.init_from) == ("lambda_dce", str(llada))
    assert model.tokenizer.mask == MASK
    params = dict(model.denoiser.params)
    adapters = params.pop("adapters")
    assert same(params, base.denoiser.params)
    assert all(leaf.any() for leaf in jax.tree.leaves(adapters))


@pytest.mark.nightly
def test_a_run_is_exported_in_the_layout_that_it_started_from(adapted, llada, tmp_path):
    outcome = tiny_run.call("export", "--checkpoint", adapted, "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "in the layout of LLaDA" in outcome.out
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads(
            (llada / name).read_text()
        )
    before, after = (load_file(p / "model.safetensors") for p in (llada, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert {before[name].dtype for name in before} == {after[name].dtype for name in after}
    assert changed == {name for name in before if re.search("_proj|attn_out|blocks.*ff_out", name)}


@pytest.mark.nightly
def test_adapters_go_out_and_in_by_the_names_of_peft(adapted, llada, tmp_path, text):
    out = tmp_path / "out"
    outcome = tiny_run.call("export", "--checkpoint", adapted, "--output", out, "--adapters")
    assert outcome.code == 0, outcome.err
    assert sorted(path.name for path in out.iterdir()) == [CONFIG, WEIGHTS]
    config, tensors = json.loads((out / CONFIG).read_text()), load_file(out / WEIGHTS)
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
    assert config["base_model_name_or_path"] == str(llada)
    name = "base_model.model.model.transformer.blocks.1.ff_out.lora_"
    assert tensors[name + "A.weight"].shape == (4, 20)
    assert tensors[name + "B.weight"].shape == (16, 4)
    assert len(tensors) == 2 * 2 * 7
    # PEFT matches the whole name of a module: the output layer ff_out has no adapter.
    assert re.fullmatch(config["target_modules"], "model.transformer.blocks.1.ff_out")
    assert not re.fullmatch(config["target_modules"], "model.transformer.ff_out")

    model, run = sedd.load(out), sedd.load(adapted)
    assert same(model.denoiser.params, run.denoiser.params)
    assert model.config.network.lora.scale == 2
    mesh = sedd.device_mesh(jax.devices()[:2], fsdp=2)
    assert same(sedd.load(out, mesh=mesh).denoiser.params, run.denoiser.params)

    # A run starts from them: other adapters are new, and these are merged.
    outcome = train(tmp_path / "run", text, "--init-from", out, "--lora", 2)
    assert outcome.code == 0, outcome.err
    kernels = (
        m.denoiser.params["trunk"]["blocks"]["query"]["kernel"]
        for m in (sedd.load(tmp_path / "run"), model)
    )
    assert not np.array_equal(*kernels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, r"use_dora must be False, got True"),
        ({"peft_type": "IA3"}, "peft_type must be 'LORA', got 'IA3'"),
        ({"r": None}, "r must be given, got None"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save must be \[\], got \['lm_head'\]"),
    ],
)
def test_adapters_of_another_kind_are_refused(llada, tmp_path, change, message):
    out = tmp_path / "out"
    names = {"trunk/blocks/query/kernel": "layers.{}.q_proj.weight"}
    adapters = {"query": {"a": np.ones((2, 16, 3)), "b": np.ones((2, 3, 16))}}
    save_adapters(out, names, Lora(rank=3), {"blocks": adapters}, base=str(llada))
    rewrite(out / CONFIG, lambda config: config.update(change))
    with pytest.raises(UserError, match=message):
        sedd.load(out)


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    names = {"trunk/blocks/query/kernel": "layers.{}.q_proj.weight", "head/kernel": "head.weight"}
    adapters = {"query": {"a": np.ones((2, 6, 3)), "b": np.ones((2, 3, 5))}}
    lora = Lora(rank=3, alpha=6.0)
    save_adapters(tmp_path / "out", names, lora, {"blocks": adapters}, base="owner/name")
    kernels = {"query": (2, 6, 5)}
    found, read = load_adapters(tmp_path / "out", names, kernels)
    assert (found.rank, found.scale, found.layers) == (3, 2.0, "query")
    assert same(read["blocks"], adapters)
    rewrite(tmp_path / "out" / CONFIG, lambda config: config.update(use_rslora=True))
    assert load_adapters(tmp_path / "out", names, kernels)[0].scale == pytest.approx(6 / 3**0.5)
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    first = "base_model.model.layers.0.q_proj.lora_A.weight"
    tensors["base_model.model.head.lora_A.weight"] = tensors.pop(first)
    save_file(tensors, tmp_path / "out" / WEIGHTS)
    with pytest.raises(UserError, match=f"missing {first}; unexpected base_model.model.head.lora"):
        load_adapters(tmp_path / "out", names, kernels)
    with pytest.raises(UserError, match=r"q_proj.lora_B.weight is \[5, 3\], not \[7, 3\]"):
        load_adapters(tmp_path / "out", names, {"query": (2, 6, 7)})


@pytest.mark.nightly
@pytest.mark.parametrize("convert", ["full", "block:1"])
def test_an_autoregressive_model_is_converted(qwen, tmp_path, text, convert):
    """Without training, causal attention gives its own conditionals, one row earlier.

    The attention of blocks of one token is causal.
    """
    run = tmp_path / "run"
    outcome = train(
        *(run, text, "--init-from", qwen, "--convert", convert),
        *("--optimizer.learning-rate", 1e-12),
    )
    assert outcome.code == 0, outcome.err
    before, after = sedd.load(qwen), sedd.load(run)
    reading = after.config.parameterization
    assert reading.shift
    assert (reading.name, getattr(reading, "block", None)) == (
        ("conditional", None) if convert == "full" else ("block", 1)
    )
    assert after.process.num_tokens == before.process.num_tokens == TOKENS
    rows = after.denoiser.params["trunk"]["embed"]["embedding"]
    assert rows.shape == (ROWS, 16)
    np.testing.assert_allclose(rows[TOKENS], rows[:TOKENS].mean(0), atol=1e-5)
    # The autoregressive model opens its texts with the token 3.
    x_BL = np.array([[3, 5, 9, 4, after.process.mask_id]])
    network = after.denoiser.network
    logits = network.raw(after.denoiser.params, x_BL, attend=Attend(kind="causal"))[0, 3, :TOKENS]
    masked = np.array([[5, 9, 4, before.process.mask_id]])
    expected = before.log_conditional(masked)[0, 3]
    np.testing.assert_allclose(jax.nn.log_softmax(logits), expected, atol=1e-4)
    seen = after.log_conditional(x_BL)[0, 4]
    assert np.allclose(seen, expected, atol=1e-4) == (convert == "block:1")


@pytest.mark.nightly
def test_a_recipe_takes_the_network_of_a_published_model(llada, tmp_path, text):
    flags = ("--config", "quickstart", "--init-from", llada, "--lora", 2)
    outcome = train(tmp_path / "run", text, *flags)
    assert outcome.code == 0, outcome.err
    config = read_config(tmp_path / "run")
    assert (config.network.name, config.network.hidden_dim) == ("decoder", 16)
    assert (config.optimizer.name, config.data.tokenizer) == ("muon", "tokenizer.json")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--network.hidden-dim 32", "--init-from LLADA is of another configuration: its network."),
        ("--parameterization.shift", "its parameterization.shift is False, and --parameterization"),
        (
            "--data.tokenizer bytes",
            "its tokenizer is tokenizer.json, and --data.tokenizer is bytes",
        ),
        ("--convert full", "--convert full: LLADA is not autoregressive, its parameterization is"),
        ("--convert half", "--convert must be full or block:SIZE, such as block:32, got half"),
    ],
)
def test_contradictions_are_one_line(llada, tmp_path, text, flags, message):
    [error] = train(tmp_path / "run", text, "--init-from", llada, *flags.split()).errors
    assert message.replace("LLADA", str(llada)) in error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_model_that_names_no_mask_needs_its_id(tmp_path, text):
    path = published(tmp_path / "base", "SDAR")
    [error] = train(tmp_path / "run", text, "--init-from", path).errors
    assert "names the mask: give its published id by --mask-id" in error
    arguments = ("--init-from", str(path), "--mask-id", str(MASK))
    config = started_from(arguments, Config(), named=False)
    assert config.parameterization == options("parameterizations", "block", block=4)
    assert (config.objective.name, config.sampler.name) == ("block", "semi_autoregressive")


def test_an_autoregressive_model_needs_convert(qwen, tmp_path, text):
    flags = ("--config", "quickstart", "--init-from", qwen)
    [error] = train(tmp_path / "run", text, *flags).errors
    assert "it is autoregressive, and --parameterization is conditional: --convert full" in error
    [error] = train(tmp_path / "run", text, "--config", "quickstart", "--convert", "full").errors
    assert error == "error: --convert full needs a model to convert: --init-from"
