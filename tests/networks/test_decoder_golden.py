"""The decoder against models of ``transformers``: logits that tests/golden/decoder.py stored."""

import dataclasses
import functools
from pathlib import Path

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import CONFIGS, QWEN2, QWEN3, ROWS
from tiers import daily

from sedd.networks.base import Attend
from sedd.networks.decoder import Decoder
from sedd.networks.rotary import RopeScaling

GOLDEN = Path(__file__).parents[1] / "golden" / "decoder.npz"
LAYERS = {
    "input_layernorm": "norm_attention",
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.q_norm": "norm_query",
    "self_attn.k_norm": "norm_key",
    "self_attn.o_proj": "attention_out",
    "post_attention_layernorm": "norm_mlp",
    "mlp.gate_proj": "mlp_gate",
    "mlp.up_proj": "mlp_up",
    "mlp.down_proj": "mlp_down",
}
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def scaling_of(rope):
    if rope["rope_type"] == "default":
        return RopeScaling()
    low, high = (
        ("low_freq_factor", "high_freq_factor")
        if rope["rope_type"] == "llama3"
        else ("beta_slow", "beta_fast")
    )
    return RopeScaling(
        kind=rope["rope_type"],
        factor=rope["factor"],
        original_length=rope["original_max_position_embeddings"],
        low_turns=rope[low],
        high_turns=rope[high],
        # Two equal scales cancel; without them it is YaRN's own.
        attention_factor=1.0 if "mscale" in rope else None,
        query_growth=rope.get("llama_4_scaling_beta", 0.0),
    )


def decoder_of(config, **fields):
    architecture, bias = config["architectures"][0], config.get("attention_bias", False)
    return Decoder(
        num_states=config["vocab_size"],
        time_conditioned=False,
        hidden_dim=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        mlp_dim=config["intermediate_size"],
        norm_eps=config["rms_norm_eps"],
        rope_theta=config["rope_parameters"]["rope_theta"],
        rope_scaling=scaling_of(config["rope_parameters"]),
        qkv_bias=bias or architecture == QWEN2,
        output_bias=bias,
        qk_norm=architecture == QWEN3,
        tied=config["tie_word_embeddings"],
        **fields,
    )


def params_of(tensors, num_layers, dtype):
    def stacked(name):
        return jnp.stack(
            [jnp.asarray(tensors[f"model.layers.{i}.{name}"].T, dtype) for i in range(num_layers)]
        )

    blocks = {}
    for theirs, ours in LAYERS.items():
        for kind in ("weight", "bias"):
            if f"model.layers.0.{theirs}.{kind}" in tensors:
                leaf = "bias" if kind == "bias" else "scale" if "norm" in ours else "kernel"
                blocks.setdefault(ours, {})[leaf] = stacked(f"{theirs}.{kind}")
    trunk = {
        "embed": {"embedding": jnp.asarray(tensors["model.embed_tokens.weight"], dtype)},
        "blocks": blocks,
        "norm": {"scale": jnp.asarray(tensors["model.norm.weight"], dtype)},
    }
    if "lm_head.weight" not in tensors:
        return {"trunk": trunk}
    return {"trunk": trunk, "head": {"kernel": jnp.asarray(tensors["lm_head.weight"].T, dtype)}}


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def raw(net, params, tokens_BL, rank_BL):
    attend = Attend(kind="ranks", rank_q_BL=rank_BL, rank_k_BL=rank_BL)
    return net.raw(params, tokens_BL, attend=attend)


def logits(name, dtype="float32", **scaling):
    """[3, R, V]: under full, causal and block attention; ``scaling`` changes the rotary scaling."""
    config = CONFIGS[name]
    net = decoder_of(config, dtype=dtype, param_dtype=dtype)
    changed = dataclasses.replace(net.rope_scaling, **scaling)
    net = dataclasses.replace(net, rope_scaling=changed)
    params = params_of(hf_models.tensors(config), net.num_layers, dtype)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    tokens_BL = np.tile(hf_models.tokens(config), (3, 1))
    return np.asarray(raw(net, params, tokens_BL, hf_models.ranks()))[:, list(ROWS)]


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


def test_every_model_is_stored(golden):
    assert golden.keys() == CONFIGS.keys() | {f"{name}/bfloat16" for name in CONFIGS}
    assert GOLDEN.stat().st_size < 300_000


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name, golden):
    """Of standard deviation 1."""
    np.testing.assert_allclose(logits(name), golden[name], atol=1e-5)


@pytest.mark.parametrize("name", daily(["llama", "qwen2", "qwen3", "ministral3"], ["qwen3"]))
def test_bfloat16_is_as_near_as_that_of_transformers(name, golden):
    """In the root mean square. Single logits are up to .1 off, those of transformers too."""
    error = np.sqrt(np.square(logits(name, "bfloat16") - golden[name]).mean())
    assert error < 2e-2
    assert error <= golden[f"{name}/bfloat16"]


@pytest.mark.parametrize(
    ("name", "scaling"),
    [
        ("llama3", {"kind": "none"}),
        ("ministral3", {"kind": "none"}),
        ("ministral3-small", {"query_growth": 0.0}),
        ("ministral3-small", {"attention_factor": 1.0}),
    ],
)
def test_control_each_number_of_the_scaling_shows_in_the_logits(name, scaling, golden):
    assert np.abs(logits(name, **scaling) - golden[name]).max() > 1e-2
