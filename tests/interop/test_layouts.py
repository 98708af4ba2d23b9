"""Layouts of large models: every configuration parses, and small models go in and out unchanged."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import hf_models
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from published_configs import CONFIGS, MEANING, PARAMETERS
from safetensors.numpy import load_file, save_file
from tiers import nightly
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from sedd.errors import UserError
from sedd.interop import published
from sedd.interop.layouts import read_layout
from sedd.interop.layouts.base import names_of
from sedd.interop.published import describe_published, load_published, save_published
from sedd.interop.tensor_files import INDEX, open_tensors
from sedd.networks.base import Attend

GOLDEN = Path(__file__).parents[1] / "golden" / "decoder.npz"
ROWS, TOKENS, MASK = 24, 20, 7  # rows of the vocabulary, ids of the tokenizer, the mask among them
TINY = {  # the sizes of a small model, by the keys of both kinds of configuration
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 6},
    **{"num_key_value_heads": 2, "intermediate_size": 20, "vocab_size": ROWS},
    **{"d_model": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 20},
    **{"embedding_size": ROWS},
}
LARGE = [name for name in CONFIGS if name != "BD3-LM"]
WHOLE = [name for name in LARGE if MEANING[name][1] is None]  # without blocks


def tiny_config(name, **changes):
    config = {key: TINY.get(key, value) for key, value in CONFIGS[name].items()}
    config |= {"bos_token_id": 3}
    if "mask_token_id" in config:
        config["mask_token_id"] = MASK
    return config | changes


def tokenizer_files(size=TOKENS, mask=None, special=None):
    """The files of a tokenizer with ``size`` words.

    ``mask`` is the word that it names as its mask, and ``special`` a special token in the place of
    the word w5.
    """
    words = [f"w{i}" for i in range(size)]
    added = []
    if special is not None:
        words[5] = special
        plain = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
        added = [{"id": 5, "content": special, "special": True, **plain}]
    backend: Any = Backend(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    files = {"tokenizer.json": json.loads(backend.to_str()) | {"added_tokens": added}}
    if mask is not None:
        files["tokenizer_config.json"] = {"mask_token": mask}
    return files


def checkpoint(path, config, *, dtype=np.float32, files=None, seed=0):
    """Write a small published model with random tensors under its published names."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    for name, content in (tokenizer_files() if files is None else files).items():
        (path / name).write_text(json.dumps(content))
    layout = read_layout(path / "config.json")
    shapes = jax.eval_shape(layout.network.init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    tensors = {}
    for leaf_path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        key = jax.tree_util.keystr(leaf_path, simple=True, separator="/")
        names, shape = names_of(layout, key, leaf.shape)
        tensors |= {n: rng.standard_normal(shape, np.float32).astype(dtype) for n in names}
    save_file(tensors, path / "model.safetensors")
    return path


def masked(name):
    """The arguments that a masked model needs, whose configuration may name no mask."""
    return {} if MEANING[name][0] is None else {"mask_id": MASK}


def rewrite(path, change):
    """Apply a function to a JSON file, or to the tensors of a safetensors file."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    else:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_parses(name, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS[name]))
    layout = read_layout(path)
    mask, block, shift = MEANING[name]
    what = layout.description
    assert layout.name == name
    assert (what.block, what.shift) == (block, shift)
    assert what.parameterization == ("autoregressive" if mask is None else "conditional")
    stated = CONFIGS[name].get("mask_token_id")
    assert what.mask_id == stated
    assert stated in (None, mask)
    if name in LARGE:
        assert layout.notes == (
            ("the repository has code of its own (auto_map), which is not run",)
            if "auto_map" in CONFIGS[name]
            else ()
        )
        assert what.dtype == CONFIGS[name].get("torch_dtype")
        assert layout.network.param_dtype == (what.dtype or "float32")
    if name in PARAMETERS:
        shapes = jax.eval_shape(layout.network.init, jax.random.key(0))
        assert sum(x.size for x in jax.tree.leaves(shapes)) == PARAMETERS[name]


def test_what_differs_between_families(tmp_path):
    """The options of the network that no size decides."""
    networks = {}
    for name in LARGE:
        (tmp_path / f"{name}.json").write_text(json.dumps(CONFIGS[name]))
        networks[name] = read_layout(tmp_path / f"{name}.json").network
    biased = {"Dream", "Fast-dLLM v2", "A2D-Qwen2", "Qwen2"}
    normed = {"DreamReasoner", "SDAR", "A2D-Qwen3", "Qwen3"}
    tied = {"iLLaDA", "A2D-Llama", "A2D-Qwen2", "A2D-Qwen3"}
    assert {name for name, net in networks.items() if net.qkv_bias} == biased
    assert {name for name, net in networks.items() if net.qk_norm} == normed
    assert {name for name, net in networks.items() if net.tied} == tied
    assert not any(net.output_bias for net in networks.values())
    assert networks["LLaDA"].rope_theta == networks["Llama"].rope_theta == 5e5
    assert networks["Nemotron"].rope_theta == networks["Dream"].rope_theta == 1e6
    assert (networks["LLaDA"].norm_eps, networks["Dream"].norm_eps) == (1e-5, 1e-6)
    yarn = networks["Nemotron"].rope_scaling
    assert (yarn.kind, yarn.factor, yarn.original_length) == ("yarn", 16, 16384)
    assert (yarn.attention_factor, yarn.query_growth) == (1, 0.1)
    llama = networks["A2D-Llama"].rope_scaling
    assert (llama.kind, llama.factor, llama.low_turns, llama.high_turns) == ("llama3", 32, 1, 4)


def test_keys_of_one_form_or_the_other(tmp_path):
    """``rope_parameters`` of transformers 5, ``attention_bias``, YaRN with few keys."""

    def network(**changes):
        (tmp_path / "config.json").write_text(json.dumps(CONFIGS["iLLaDA"] | changes))
        return read_layout(tmp_path / "config.json").network

    nested = network(rope_theta=None, rope_parameters={"rope_theta": 123.0, "rope_type": "default"})
    assert nested.rope_theta == 123
    biased = network(attention_bias=True)
    assert biased.qkv_bias
    assert biased.output_bias
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    plain = network(rope_scaling=yarn).rope_scaling
    assert math.isclose(plain.amplitude, 0.1 * math.log(4) + 1)
    assert (plain.low_turns, plain.high_turns, plain.truncate) == (1, 32, True)
    scaled = network(rope_scaling=yarn | {"mscale": 2.0, "mscale_all_dim": 1.0}).rope_scaling
    assert math.isclose(scaled.amplitude, (1 + 0.2 * math.log(4)) / (1 + 0.1 * math.log(4)))


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("LLaDA", {"block_type": "x", "alibi": True}, "alibi must be False, got True; .*'llama'"),
        ("LLaDA", {"d_model": "4096"}, "d_model must be a positive integer, got '4096'"),
        ("LLaDA", {"architectures": ["LLaDAMoEModelLM"]}, "LLaDAMoEModelLM is a mixture of e"),
        ("SDAR", {"architectures": ["LLaDA2MoeModelLM"]}, "LLaDA2MoeModelLM is a mixture of"),
        ("Qwen3", {"num_experts": 128}, r"a mixture of experts \(num_experts is 128\)"),
        ("Llama", {"architectures": ["DiffusionGemmaForBlockDiffusion"]}, "uniform diffusion"),
        ("Llama", {"architectures": ["GPT9"]}, "unknown layout, .* architectures GPT9: expected"),
        ("Llama", {"rope_scaling": {"rope_type": "longrope"}}, "must be default, llama3 or yarn"),
        ("Llama", {"rope_scaling": {"type": "yarn", "factor": 0.25}}, "original_max.* is missing"),
        ("Llama", {"quantization_config": {"bits": 4}}, "quantization_config must be null"),
        ("Qwen2", {"use_sliding_window": True}, "use_sliding_window must be False, got True"),
        ("Nemotron", {"sliding_window": 4096}, "sliding_window must be null, got 4096"),
        ("Qwen3", {"layer_types": ["sliding_attention"]}, "layer_types must be full_attention"),
        ("iLLaDA", {"layer_norm_eps": 1e-5}, "layer_norm_eps must be null"),
        ("Qwen3", {"num_key_value_heads": 7}, "num_kv_heads must divide num_heads, got 7"),
        ("BD3-LM", {"adaln": False}, "adaln must be true, got False"),
    ],
)  # fmt: skip
def test_a_configuration_with_another_network_is_refused(name, changes, words, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS[name] | changes))
    with pytest.raises(UserError, match=words) as error:
        read_layout(path)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("name", LARGE)
def test_what_is_read_is_written_back_bit_for_bit(name, tmp_path):
    """The same names, types, numbers and configuration; and read again, the same parameters."""
    dtype = ml_dtypes.bfloat16 if name in ("LLaDA", "Qwen3") else np.float32
    path = checkpoint(tmp_path / "in", tiny_config(name), dtype=dtype)
    published = load_published(path, **masked(name))
    save_published(tmp_path / "out", published.layout, published.params, beside={})
    before, after = (load_file(tmp_path / p / "model.safetensors") for p in ("in", "out"))
    assert before.keys() == after.keys()
    for tensor, value in before.items():
        assert after[tensor].dtype == value.dtype
        np.testing.assert_array_equal(after[tensor], value)
    read, written = (json.loads((tmp_path / p / "config.json").read_text()) for p in ("in", "out"))
    assert read == written
    assert {leaf.dtype for leaf in jax.tree.leaves(published.params)} == {np.dtype(dtype)}


def test_shards_hold_what_one_file_holds(tmp_path):
    """Several files of limited size with an index: the same model, each within the limit."""
    path = checkpoint(tmp_path / "in", tiny_config("LLaDA"), dtype=ml_dtypes.bfloat16)
    one = load_published(path)
    limit = 4000
    beside = {name: json.dumps(content) for name, content in tokenizer_files().items()}
    save_published(tmp_path / "out", one.layout, one.params, beside=beside, shard_bytes=limit)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    whole = load_file(path / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        tensors = load_file(tmp_path / "out" / file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= limit
        assert tensors.keys() == {name for name, f in index["weight_map"].items() if f == file}
    again = load_published(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again.params, one.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(again.params)} == {np.dtype(ml_dtypes.bfloat16)}


def test_a_parameter_moves_to_its_device_before_the_next_one_is_read(tmp_path, monkeypatch):
    """The host holds the tensors of one stacked parameter at a time."""
    path = checkpoint(tmp_path / "in", tiny_config("Qwen2"))
    events = []

    def opened(directory):
        files = open_tensors(directory)
        assert files is not None

        def read(name):
            events.append(name)
            return files.read(name)

        return dataclasses.replace(files, read=read)

    def placing(network, mesh):
        def place(index, leaf):
            events.append(index)
            return leaf

        return place

    monkeypatch.setattr(published, "open_tensors", opened)
    monkeypatch.setattr(published, "_placing", placing)
    loaded = load_published(path)
    groups = "".join("." if isinstance(e, str) else "|" for e in events).split("|")[:-1]
    leaves = jax.tree.leaves(loaded.params)
    assert [e for e in events if not isinstance(e, str)] == list(range(len(leaves)))
    stacked = [path[1].key == "blocks" for path, _ in jax.tree.leaves_with_path(loaded.params)]
    assert [len(group) for group in groups] == [2 if one else 1 for one in stacked]


@pytest.fixture
def sharded(tmp_path):
    """A small model in several files."""
    path = checkpoint(tmp_path / "in", tiny_config("LLaDA"))
    one = load_published(path)
    save_published(tmp_path / "many", one.layout, one.params, beside={}, shard_bytes=8000)
    return tmp_path / "many"


def test_everything_that_is_wrong_with_shards_is_listed(sharded):
    index = sharded / INDEX
    first, second, *_ = sorted(sharded.glob("model-0*.safetensors"))
    norm, other = "model.transformer.ln_f.weight", "model.transformer.blocks.0.attn_norm.weight"
    files = json.loads(index.read_text())["weight_map"]
    rewrite(sharded / files[norm], lambda tensors: tensors.pop(norm))
    rewrite(
        sharded / files[other], lambda tensors: tensors.update({"extra.weight": tensors[other]})
    )
    with pytest.raises(UserError) as error:
        load_published(sharded)
    message = str(error.value)
    assert "\n" not in message
    assert f"{files[other]} holds extra.weight, which the index does not map" in message
    assert f"{files[norm]} lacks {norm}" in message
    assert f"missing {norm}" in message
    for file in (first, second):
        file.unlink()
    with pytest.raises(UserError, match=f"the file {second.name} is missing") as error:
        load_published(sharded)
    assert f"the file {first.name} is missing" in str(error.value)


def test_a_wrong_total_and_an_unknown_tensor_are_listed(sharded):
    index = sharded / INDEX
    total = json.loads(index.read_text())["metadata"]["total_size"]
    rewrite(index, lambda data: data["metadata"].update(total_size=total + 2))
    with pytest.raises(UserError, match=f"states {total + 2:,} bytes in total, .* {total:,}"):
        load_published(sharded)
    rewrite(index, lambda data: data["metadata"].update(total_size=total))
    last = sorted(sharded.glob("model-0*.safetensors"))[-1]
    rewrite(last, lambda tensors: tensors.update(more=np.ones(3, np.float32)))
    rewrite(
        index,
        lambda data: (data["weight_map"].update(more=last.name), data["metadata"].clear()),
    )
    with pytest.raises(UserError, match=r"does not fit its configuration: unexpected more$"):
        load_published(sharded)


@pytest.mark.parametrize("file", ["/etc/passwd", "../x.safetensors", "a/../../x", "..\\x", "C:x"])
def test_an_index_names_files_of_its_directory_only(sharded, file):
    name = "model.transformer.ln_f.weight"
    rewrite(sharded / INDEX, lambda data: data["weight_map"].update({name: file}))
    with pytest.raises(UserError, match="the files must be in the directory of the index"):
        load_published(sharded)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}']
)
def test_an_unreadable_index_is_refused(sharded, content):
    (sharded / INDEX).write_text(content)
    with pytest.raises(UserError, match="is not an index of safetensors files"):
        load_published(sharded)


def test_a_mask_anywhere_gives_the_same_model(tmp_path):
    """The rows of the mask and of the last token change places, here and in the tokens."""
    path = checkpoint(tmp_path / "in", tiny_config("LLaDA", mask_token_id=MASK))
    published = load_published(path)
    N = TOKENS - 1  # the mask is one of the tokenizer's ids
    assert published.description.num_tokens == N
    assert published.layout.swap == (MASK, N)
    assert published.network.num_states == N + 1
    assert published.network.spare_rows == ROWS - TOKENS
    # As if nothing were exchanged: the rows as they are in the file, and the tokens of the file.
    unchanged = dataclasses.replace(published.layout, swap=None)
    save_published(tmp_path / "swapped", unchanged, published.params, beside={})
    before, after = (load_file(tmp_path / p / "model.safetensors") for p in ("in", "swapped"))
    order_V = np.arange(ROWS)
    order_V[[MASK, N]] = N, MASK
    for name in ("model.transformer.wte.weight", "model.transformer.ff_out.weight"):
        np.testing.assert_array_equal(after[name], before[name][order_V])
    theirs_BL = np.array([[0, MASK, N, 2, 5], [MASK, MASK, 1, 6, N]])
    plain = load_published(path, mask_id=N)  # the mask is last already: nothing is exchanged
    assert plain.layout.swap is None
    unswapped = raw(plain, theirs_BL)
    np.testing.assert_allclose(
        raw(published, order_V[theirs_BL]), unswapped[..., order_V], atol=1e-5, rtol=1e-5
    )


def raw(published, tokens_BL):
    tokens_BL = jnp.asarray(tokens_BL, jnp.int32)
    return np.asarray(_raw(published.network, published.params, tokens_BL, None))


@jax.jit(static_argnums=0, compiler_options=oracle.QUICKLY)
def _raw(network, params, tokens_BL, attend):
    return network.raw(params, tokens_BL, attend=attend)


@pytest.mark.parametrize(
    ("given", "files", "config", "mask", "num_tokens"),
    [
        (None, tokenizer_files(mask="w4"), {}, 4, TOKENS - 1),
        (9, tokenizer_files(mask="w4"), {"mask_token_id": 5}, 9, TOKENS - 1),
        (None, tokenizer_files(mask="w4"), {"mask_token_id": 5}, 5, TOKENS - 1),
        (TOKENS, tokenizer_files(), {}, TOKENS, TOKENS),  # the first unused row
        (ROWS - 1, tokenizer_files(), {}, ROWS - 1, TOKENS),
        (MASK, {}, {}, MASK, ROWS - 1),  # without a tokenizer all rows but the mask are tokens
    ],
)
def test_where_the_mask_is_stated(given, files, config, mask, num_tokens, tmp_path):
    path = checkpoint(tmp_path / "in", tiny_config("iLLaDA", **config), files=files)
    layout, *_ = describe_published(path, mask_id=given)
    assert (layout.description.mask_id, layout.description.num_tokens) == (mask, num_tokens)
    network = layout.network
    assert network.num_states + network.spare_rows == ROWS
    assert any("a word of the vocabulary" in note for note in layout.notes) == (
        bool(files) and mask < TOKENS
    )


def test_a_mask_that_nothing_states_must_be_given(tmp_path):
    files = tokenizer_files(special="<[MASK]>")
    path = checkpoint(tmp_path / "in", tiny_config("iLLaDA"), files=files)
    with pytest.raises(UserError, match=r"names the mask: give .* --mask-id .*: <\[MASK\]> \(5\)$"):
        load_published(path)
    layout, *_ = describe_published(path, mask_id=5)
    assert layout.notes[-1].startswith("the repository has code")  # a special token is no word
    with pytest.raises(UserError, match=r"--mask-id 24: the model has the rows 0 to 23"):
        load_published(path, mask_id=ROWS)
    causal = checkpoint(tmp_path / "causal", tiny_config("Llama"))
    with pytest.raises(UserError, match="--mask-id 3: Llama is autoregressive, without a mask"):
        load_published(causal, mask_id=3)
    (path / "tokenizer.json").write_text(json.dumps(tokenizer_files(ROWS + 1)["tokenizer.json"]))
    with pytest.raises(UserError, match="the tokenizer has 25 tokens, and the model 24 rows"):
        load_published(path, mask_id=5)


def test_a_full_vocabulary_of_an_autoregressive_model_gets_a_row(tmp_path):
    """The mask of the process has a row of zeros, which is not written back."""
    path = checkpoint(tmp_path / "in", tiny_config("Llama"), files=tokenizer_files(ROWS))
    published = load_published(path)
    assert published.layout.added_rows == 1
    assert published.network.num_states == ROWS + 1
    assert not np.asarray(published.params["trunk"]["embed"]["embedding"])[ROWS].any()
    save_published(tmp_path / "out", published.layout, published.params, beside={})
    before, after = (load_file(tmp_path / p / "model.safetensors") for p in ("in", "out"))
    np.testing.assert_array_equal(after["lm_head.weight"], before["lm_head.weight"])


def test_a_saved_head_of_a_tied_configuration_is_read(tmp_path):
    """Converted checkpoints have one of their own, whatever the configuration says."""
    untied = tiny_config("A2D-Qwen3", tie_word_embeddings=False)
    path = checkpoint(tmp_path / "in", untied)
    rewrite(path / "config.json", lambda config: config.update(tie_word_embeddings=True))
    published = load_published(path, mask_id=MASK)
    assert not published.network.tied
    assert any("is saved too" in note for note in published.layout.notes)


@pytest.mark.parametrize("name", ["A2D-Llama", "Dream", "Qwen3", "Llama"])
def test_a_model_that_was_trained_here_has_a_layout(name, tmp_path):
    """The written configuration reads as the same network and description."""
    from sedd.interop.layouts.base import layout_for

    path = checkpoint(tmp_path / "in", tiny_config(name))
    read = load_published(path, **masked(name))
    ours = dataclasses.replace(read.description, mask_id=None, first=read.description.first)
    layout = layout_for(read.network, ours)
    assert layout.name == name
    save_published(tmp_path / "out", layout, read.params, beside={})
    for file, content in tokenizer_files(ours.num_tokens).items():
        (tmp_path / "out" / file).write_text(json.dumps(content))
    again = load_published(tmp_path / "out")
    assert again.network == read.network
    jax.tree.map(np.testing.assert_array_equal, again.params, read.params)


LLADA_NAMES = {  # beginnings and endings of Llama's names, and LLaDA's
    "model.embed_tokens.": "model.transformer.wte.",
    "model.norm.": "model.transformer.ln_f.",
    "lm_head.": "model.transformer.ff_out.",
    "model.layers.": "model.transformer.blocks.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.o_proj": "attn_out",
    "self_attn.": "",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
NEMOTRON_NAMES = {"model.": "encoder.", "lm_head.": "diffusion_head."}


def as_llada(config):
    """A configuration of Llama with LLaDA's keys."""
    names = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "vocab_size": "embedding_size",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "rms_norm_eps": "rms_norm_eps",
    }
    values = {theirs: config[ours] for ours, theirs in names.items()}
    return values | {"rope_theta": config["rope_parameters"]["rope_theta"]}


@pytest.mark.parametrize(
    ("reference", "family", "attention"),
    [
        ("llama", "LLaDA", "full"),
        nightly("llama", "Llama", "causal"),
        nightly("llama-small", "iLLaDA", "full"),
        ("llama3", "A2D-Llama", "full"),
        nightly("llama3-small", "Llama", "causal"),
        ("qwen2", "Dream", "full"),
        nightly("qwen2-small", "A2D-Qwen2", "full"),
        nightly("qwen2", "Fast-dLLM v2", "block"),
        nightly("qwen2-small", "Qwen2", "causal"),
        ("qwen3", "SDAR", "block"),
        nightly("qwen3-small", "DreamReasoner", "block"),
        nightly("qwen3", "A2D-Qwen3", "full"),
        nightly("qwen3-small", "Qwen3", "causal"),
        ("ministral3", "Nemotron", "block"),
        nightly("ministral3-small", "Nemotron", "causal"),
    ],
)
def test_the_logits_are_those_of_transformers(reference, family, attention, tmp_path):
    """The tensors of the reference under the family's names, through files, in float32."""
    config, names = dict(hf_models.CONFIGS[reference]), {}
    if family == "LLaDA":
        config, names = as_llada(config), LLADA_NAMES
    elif family == "Nemotron":
        names = NEMOTRON_NAMES
    config |= {"architectures": CONFIGS[family]["architectures"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, tensor in hf_models.tensors(hf_models.CONFIGS[reference]).items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        tensors[name] = tensor
    save_file(tensors, tmp_path / "model.safetensors")
    rows = hf_models.CONFIGS[reference]["vocab_size"]
    masked_kind = MEANING[family][0] is not None
    published = load_published(tmp_path, mask_id=rows - 1 if masked_kind else None)
    index = ("full", "causal", "block").index(attention)
    rank_1L = jnp.asarray(hf_models.ranks()[index][None])
    attend = Attend(kind="ranks", rank_q_BL=rank_1L, rank_k_BL=rank_1L)
    tokens_1L = jnp.asarray(hf_models.tokens(hf_models.CONFIGS[reference])[None])
    logits = np.asarray(_raw(published.network, published.params, tokens_1L, attend))
    golden = np.load(GOLDEN)[reference][index]
    np.testing.assert_allclose(logits[0, list(hf_models.ROWS), :rows], golden, atol=1e-5, rtol=0)
