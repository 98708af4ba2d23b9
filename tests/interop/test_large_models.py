"""Large published models through ``sedd.load`` and the commands: inspect, sample, export."""

import dataclasses
import json
import types

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny_run
from published_configs import CONFIGS
from safetensors.numpy import load_file
from test_layouts import MASK, ROWS, TOKENS, checkpoint, tiny_config, tokenizer_files
from tiers import nightly

import sedd
from sedd.commands.export import publishable
from sedd.configuration.components import options
from sedd.constraints.clamp import Clamp
from sedd.errors import UserError
from sedd.interop.published import load_published, save_published
from sedd.interop.tensor_files import INDEX


def load(path, name="LLaDA", **changes):
    return sedd.load(checkpoint(path, tiny_config(name, **changes)))


def test_a_masked_model_loads_samples_and_keeps_its_tokens(tmp_path):
    model = load(tmp_path / "in")
    assert (model.process.num_tokens, model.process.mask_id) == (TOKENS - 1, TOKENS - 1)
    assert model.tokenizer is not None
    assert model.tokenizer.num_tokens == model.process.num_tokens
    assert model.time_independent
    assert model.config.network.name == "decoder"
    # Words keep their names: that of the mask's row is the last word of the file.
    assert model.tokenizer.decode([0, MASK, 3]) == f"w0 w{TOKENS - 1} w3"
    result = sedd.sample(model, jax.random.key(0), num=3, length=6)
    tokens = np.asarray(result.tokens)
    assert tokens.shape == (3, 6)
    assert tokens.max() < model.process.num_tokens  # neither the mask nor an unused row
    x = np.full((1, 6), model.process.mask_id)
    log_probs = model.log_conditional(x)
    assert log_probs.shape == (1, 6, TOKENS - 1)
    np.testing.assert_allclose(np.exp(np.asarray(log_probs)).sum(-1), 1, rtol=1e-5)


def given(length, tokens):
    """A clamp of so many positions with these tokens given, by position."""
    tokens_L, fixed_L = np.zeros(length, np.int32), np.zeros(length, bool)
    for position, token in tokens.items():
        tokens_L[position], fixed_L[position] = token, True
    return Clamp(tokens_L=tokens_L, fixed_L=fixed_L)


def test_the_conditional_of_a_shifted_model_is_the_row_before(tmp_path):
    model = load(tmp_path / "in", "Dream")
    assert model.config.parameterization.shift  # pyright: ignore
    x = np.array([[1, model.process.mask_id, 2, model.process.mask_id, model.process.mask_id]])
    network = model.denoiser.network
    raw = np.asarray(network.raw(model.denoiser.params, x))[..., : model.process.num_tokens]
    rows = np.asarray(jax.nn.log_softmax(raw, -1))
    ours = np.asarray(model.log_conditional(x))
    for i in (1, 3, 4):
        np.testing.assert_allclose(ours[0, i], rows[0, i - 1], atol=1e-5)
        assert np.abs(ours[0, i] - rows[0, i]).max() > 1e-2
    with pytest.raises(UserError, match="nothing predicts the first one: begin with given text"):
        sedd.sample(model, jax.random.key(0), num=1, length=4)
    drawn = sedd.sample(model, jax.random.key(0), clamp=given(4, {0: 2}))
    assert np.asarray(drawn.tokens)[0, 0] == 2


def test_an_autoregressive_model_begins_with_its_own_token(tmp_path):
    model = load(tmp_path / "in", "Llama")
    assert model.denoiser.causal
    assert model.config.parameterization.first == 3  # pyright: ignore
    assert model.process.num_tokens == TOKENS
    tokens = np.array([[5, 2, 9, 4]])
    network = model.denoiser.network
    hidden = network.raw(
        model.denoiser.params,
        np.array([[3, 5, 2, 9]]),
        attend=sedd.networks.Attend(kind="causal"),
    )
    theirs = np.asarray(jax.nn.log_softmax(hidden[..., :TOKENS], -1))
    masked = np.where(np.arange(4) >= 2, model.process.mask_id, tokens)
    ours = np.asarray(model.log_conditional(masked))
    np.testing.assert_allclose(ours[0, 2], theirs[0, 2], atol=1e-5)
    result = sedd.sample(model, jax.random.key(0), num=2, length=5)
    assert np.asarray(result.tokens).max() < TOKENS


def test_the_compute_type_may_differ_from_that_of_the_parameters(tmp_path):
    """The tensors decide the default, not the configuration: LLaDA's states no type."""
    path = checkpoint(tmp_path / "in", tiny_config("LLaDA"), dtype=ml_dtypes.bfloat16)
    model = sedd.load(path)
    assert model.denoiser.network.dtype == "bfloat16"  # pyright: ignore
    other = checkpoint(tmp_path / "float", tiny_config("Dream"))
    assert sedd.load(other).denoiser.network.dtype == "float32"  # pyright: ignore
    half = checkpoint(tmp_path / "half", tiny_config("Dream"), dtype=np.float16)
    leaves = jax.tree.leaves(sedd.load(half).denoiser.params)
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}
    exact = sedd.load(path, dtype="float32")
    assert exact.denoiser.network.dtype == "float32"  # pyright: ignore
    for one in (model, exact):
        leaves = jax.tree.leaves(one.denoiser.params)
        assert {leaf.dtype for leaf in leaves} == {np.dtype(ml_dtypes.bfloat16)}
    x = np.full((1, 4), model.process.mask_id)
    a, b = (np.asarray(one.log_conditional(x)) for one in (model, exact))
    assert 0 < np.abs(a - b).max() < 0.3


def test_a_mesh_gets_the_same_parameters(tmp_path):
    path = checkpoint(tmp_path / "in", tiny_config("Qwen3"))
    mesh = sedd.device_mesh(jax.devices()[:2], fsdp=2)
    one, many = sedd.load(path), sedd.load(path, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, one.denoiser.params, many.denoiser.params)
    leaf = jax.tree.leaves(many.denoiser.params)[0]
    assert len(leaf.sharding.device_set) == 2


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "size"), [("SDAR", 4), ("Fast-dLLM v2", 2)])
def test_a_block_model_is_drawn_by_blocks(name, size, tmp_path):
    """Blocks of the published size, which see no later block."""
    config = tiny_config(name, **({"bd_size": size} if name != "SDAR" else {}))
    model = sedd.load(checkpoint(tmp_path / "in", config), mask_id=MASK)
    assert model.config.parameterization.name == "block"
    assert model.denoiser.block == size
    mask = model.process.mask_id
    x = np.full((1, 8), mask)
    later = np.array([[mask] * 4 + [5, 6, 7, 8]])
    here, there = (np.asarray(model.log_conditional(tokens)) for tokens in (x, later))
    np.testing.assert_array_equal(here[:, :4], there[:, :4])
    shifted = model.config.parameterization.shift  # pyright: ignore
    assert shifted == (name != "SDAR")
    if name == "SDAR":
        result = sedd.sample(model, jax.random.key(0), num=2, length=8)
        assert np.asarray(result.tokens).max() < model.process.num_tokens


def test_blocks_that_a_configuration_does_not_state(tmp_path):
    path = checkpoint(tmp_path / "in", tiny_config("A2D-Qwen3"))
    model = sedd.load(path, mask_id=MASK, block=4)
    assert model.denoiser.block == 4
    assert sedd.load(path, mask_id=MASK).denoiser.block is None
    sdar = checkpoint(tmp_path / "sdar", tiny_config("SDAR"))
    with pytest.raises(UserError, match=r"--trained-block 8: checkpoint .* has blocks of 4"):
        sedd.load(sdar, mask_id=MASK, block=8)
    causal = checkpoint(tmp_path / "causal", tiny_config("Llama"))
    with pytest.raises(UserError, match=r"--trained-block 8: checkpoint .* is autoregressive"):
        sedd.load(causal, block=8)


def test_bd3lm_is_our_network_by_blocks(tmp_path):
    config = CONFIGS["BD3-LM"] | {"hidden_dim": 16, "n_heads": 2, "n_blocks": 2, "vocab_size": 20}
    config |= {"cond_dim": 8, "model_length": 8}
    path = checkpoint(tmp_path / "in", config, files={})
    model = sedd.load(path)
    assert (model.denoiser.block, model.process.mask_id, model.length) == (4, 19, 8)
    assert not model.denoiser.network.time_conditioned
    tokens = np.array([[2, 3, 4, 5, 19, 19, 6, 19]])
    assert np.isfinite(np.asarray(model.log_conditional(tokens))).all()
    with pytest.raises(UserError, match=r"takes a noise level \(time_conditioning\)"):
        sedd.load(checkpoint(tmp_path / "timed", config | {"time_conditioning": True}, files={}))


def test_confidences_over_all_rows(tmp_path):
    """``normalise`` all is the softmax over every row of the file, as in published samplers."""
    path = checkpoint(tmp_path / "in", tiny_config("LLaDA"))
    model = sedd.load(path, normalise="all")
    x = np.full((1, 3), model.process.mask_id)
    network = model.denoiser.network
    raw = network.raw(model.denoiser.params, x)
    assert raw.shape[-1] == ROWS
    theirs = np.asarray(jax.nn.log_softmax(raw, -1))[..., : model.process.num_tokens]
    np.testing.assert_allclose(np.asarray(model.log_conditional(x)), theirs, atol=1e-5)
    with pytest.raises(UserError, match="--normalise all: the parameterization autoregressive has"):
        sedd.load(checkpoint(tmp_path / "causal", tiny_config("Llama")), normalise="all")


def test_a_mask_for_a_run_or_for_radd_is_refused(tmp_path):
    run = tiny_run.make_run(tmp_path / "run", tiny_run.config("radd"), steps=(2,))
    with pytest.raises(UserError, match=f"--mask-id 5: checkpoint {run} is a run"):
        sedd.load(run, mask_id=5)
    with pytest.raises(UserError, match=f"--trained-block 4: checkpoint {run} is a run"):
        sedd.load(run, block=4)


def exported(checkpoint, output, *more):
    result = tiny_run.call("export", "--checkpoint", checkpoint, "--output", output, *more)
    assert result.code == 0, result.err
    return result


def test_an_export_is_the_published_checkpoint_again(tmp_path):
    files = tokenizer_files(mask=f"w{MASK}")
    files["generation_config.json"] = {"eos_token_id": [2, 3]}
    config = tiny_config("SDAR", architectures=["A2DQwen3LMHeadModel"], torch_dtype="bfloat16")
    path = checkpoint(tmp_path / "in", config, files=files, dtype=ml_dtypes.bfloat16)
    result = exported(path, tmp_path / "out")
    assert "in the layout of A2D-Qwen3" in result.out
    assert "names code of the repository (auto_map), which is not copied" in result.err
    for name in ("config.json", *files):
        here, there = (json.loads((tmp_path / p / name).read_text()) for p in ("in", "out"))
        assert here == there, name
    before, after = (load_file(tmp_path / p / "model.safetensors") for p in ("in", "out"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        np.testing.assert_array_equal(after[name], value)


@pytest.mark.parametrize(
    ("kind", "reading", "network", "name"),
    [
        ("radd", {"shift": True}, {"qkv_bias": True}, "Dream"),
        ("radd", {}, {"qk_norm": True, "embed_norm": True, "tied": True}, "A2D-Qwen3"),
        nightly("radd", {}, {"embed_norm": True}, "A2D-Llama"),
        nightly("ar", {}, {"qk_norm": True}, "Qwen3"),
    ],
)
def test_a_run_with_the_decoder_is_exported(kind, reading, network, name, tmp_path):
    config = tiny_run.config(kind)
    sizes = {"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 24}
    config = dataclasses.replace(
        config,
        network=options("networks", "decoder", **sizes, **network),
        parameterization=dataclasses.replace(config.parameterization, **reading),
    )
    run = tiny_run.make_run(tmp_path / "run", config, steps=(2,))
    assert f"in the layout of {name}" in exported(run, tmp_path / "out").out
    before, after = sedd.load(run), sedd.load(tmp_path / "out")
    x = np.full((1, 6), before.process.mask_id)
    x[0, :2] = 1, 2
    tolerance = 2e-6 if network.get("embed_norm") else 0  # another place for the norm
    expected = before.log_conditional(x)
    np.testing.assert_allclose(after.log_conditional(x), expected, rtol=tolerance)
    assert after.config.parameterization == before.config.parameterization
    assert after.tokenizer == before.tokenizer


def test_what_was_trained_from_a_published_model_has_its_ids_again(tmp_path):
    """The rows of the mask change places when a model of no layout is exported, too."""
    path = checkpoint(tmp_path / "in", tiny_config("LLaDA"))
    model = dataclasses.replace(sedd.load(path), layout=None)
    layout, params, _ = publishable(model)
    save_published(tmp_path / "out", layout, params, beside={})
    theirs = load_file(path / "model.safetensors")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    for here, there in (
        ("model.embed_tokens.weight", "model.transformer.wte.weight"),
        ("lm_head.weight", "model.transformer.ff_out.weight"),
    ):
        np.testing.assert_array_equal(ours[here], theirs[there])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["mask_token_id"], config["vocab_size"]) == (MASK, ROWS)


def inspected(path, *more):
    result = tiny_run.call("inspect", path, "--json", *more)
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_inspect_describes_a_checkpoint(tmp_path):
    config = tiny_config("Fast-dLLM v2", mask_token_id=MASK, new_key=3, torch_dtype="bfloat16")
    path = checkpoint(tmp_path / "in", config, dtype=ml_dtypes.bfloat16)
    facts = inspected(path)
    assert (facts["layout"], facts["shift"], facts["block"]) == ("Fast-dLLM v2", True, 32)
    assert facts["mask"] == {"published_id": MASK, "token": f"w{MASK}", "id_here": TOKENS - 1}
    assert facts["vocabulary"] == {"rows": ROWS, "tokens": TOKENS - 1, "unused": ROWS - TOKENS}
    tensors = load_file(path / "model.safetensors").values()
    assert facts["parameters"] == sum(tensor.size for tensor in tensors)
    assert facts["bytes"] == sum(tensor.nbytes for tensor in tensors)
    assert facts["dtypes"] == ["bfloat16"]
    assert facts["tokenizer"]["tokens"] == TOKENS - 1
    assert facts["keys_not_understood"] == ["new_key"]
    assert facts["problems"] == []
    assert any("auto_map" in note for note in facts["notes"])
    assert any("a word of the vocabulary" in note for note in facts["notes"])
    table = tiny_run.call("inspect", path)
    assert table.code == 0
    assert "Fast-dLLM v2" in table.out


def test_inspect_lists_problems_instead_of_failing(tmp_path):
    """A mask that is not stated, tensors that do not fit, and no weights at all."""
    path = checkpoint(tmp_path / "in", tiny_config("iLLaDA"))
    facts = inspected(path)
    assert facts["mask"] == "not stated"
    assert "names the mask" in facts["problems"][0]
    assert inspected(path, "--mask-id", MASK)["problems"] == []
    (path / "config.json").write_text(json.dumps(tiny_config("iLLaDA", num_hidden_layers=3)))
    assert "missing model.layers.2." in inspected(path, "--mask-id", MASK)["problems"][0]
    (path / "model.safetensors").unlink()
    (path / "config.json").write_text(json.dumps(CONFIGS["LLaDA"]))
    (path / "tokenizer.json").unlink()
    facts = inspected(path)
    assert (facts["parameters"], facts["bytes"]) == (8_015_581_184, None)
    assert facts["mask"]["published_id"] == 126336
    (path / "config.json").write_text(json.dumps(CONFIGS["Dream"]))
    assert inspected(path)["bytes"] == 2 * 7_615_616_512


def test_inspect_knows_runs_and_refuses_the_rest(tmp_path):
    run = tiny_run.make_run(tmp_path / "run", tiny_run.config("radd"), steps=(2,))
    facts = inspected(run)
    assert (facts["layout"], facts["process"]) == ("a run of sedd train", "absorbing")
    assert facts["block"] is None
    config = json.loads((run / "config.json").read_text())
    config["parameterization"] = {"name": "block", "block": 4}
    config["objective"] = {"name": "block"}
    config["sampler"] = {"name": "semi_autoregressive"}
    (run / "config.json").write_text(json.dumps(config))
    assert inspected(run)["block"] == 4
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LLaDA2MoeModelLM"]}))
    result = tiny_run.call("inspect", tmp_path)
    assert result.code == 2
    assert "LLaDA2MoeModelLM is a mixture of experts" in result.err


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for ``huggingface_hub`` with a sharded checkpoint; the files that it gave."""
    path = checkpoint(tmp_path / "one", tiny_config("LLaDA"))
    one = load_published(path)
    beside = {name: json.dumps(content) for name, content in tokenizer_files().items()}
    remote = tmp_path / "remote"
    save_published(remote, one.layout, one.params, beside=beside, shard_bytes=8000)
    (remote / "modeling_llada.py").write_text("raise SystemExit('published code was run')")
    copied = set()

    def snapshot_download(repo_id, *, revision=None, allow_patterns, local_files_only):
        local = tmp_path / "cache"
        local.mkdir(exist_ok=True)
        for file in remote.iterdir():
            if file.name in allow_patterns:
                copied.add(file.name)
                (local / file.name).write_bytes(file.read_bytes())
        return str(local)

    def get_safetensors_metadata(repo_id, *, revision=None):
        files = {}
        for file in remote.glob("*.safetensors"):
            tensors = {
                name: types.SimpleNamespace(shape=list(value.shape), dtype="F32")
                for name, value in load_file(file).items()
            }
            files[file.name] = types.SimpleNamespace(tensors=tensors)
        return types.SimpleNamespace(files_metadata=files)

    import sys

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download  # pyright: ignore
    module.get_safetensors_metadata = get_safetensors_metadata  # pyright: ignore
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setattr("sedd.interop.hub.why_hub_unreachable", lambda: None)
    return copied


def test_the_hub_gives_shards_to_load_and_headers_to_inspect(hub):
    facts = inspected("hf://some/llada")
    assert hub == {"config.json", "tokenizer.json", INDEX}
    assert (facts["layout"], facts["dtypes"], facts["problems"]) == ("LLaDA", ["float32"], [])
    model = sedd.load("hf://some/llada")
    count = sum(leaf.size for leaf in jax.tree.leaves(model.denoiser.params))
    assert count == facts["parameters"]
    assert any(name.startswith("model-0") for name in hub)
    assert "modeling_llada.py" not in hub


@pytest.mark.nightly
def test_sample_takes_the_mask_and_the_type(tmp_path):
    path = checkpoint(tmp_path / "in", tiny_config("iLLaDA"))
    flags = ("--checkpoint", path, "--length", 5, "--output", "-")
    result = tiny_run.call("sample", *flags)
    assert result.code == 2
    assert "give its published id by --mask-id" in result.err
    result = tiny_run.call("sample", *flags, "--mask-id", MASK, "--dtype", "bfloat16")
    assert result.code == 0, result.err
    assert len(json.loads(result.out)["tokens"]) == 5
    assert (
        f"note: {path}: the repository has code of its own (auto_map), which is not" in result.err
    )
    assert f"note: {path}: the mask {MASK} is 'w{MASK}', a word of the vocabulary" in result.err
