"""Small models of the library ``transformers``: their configurations, and weights from a seed.

``tests/golden/decoder.py`` computes the logits of these models with ``transformers`` and stores
them in ``tests/golden/decoder.npz``. The tests make the same weights again, so that none are
stored. Tensors have the names and shapes of published checkpoints.
"""

import zlib
from typing import Any

import numpy as np

LENGTH, BLOCK = 24, 4
ROWS = (0, 5, 14, 23)  # whose logits are stored
LARGE = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4} | {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 300,
    "tie_word_embeddings": False,
}
SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6} | {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 80,
    "vocab_size": 133,
    "tie_word_embeddings": True,
}


def _case(architecture, size, theta, eps, rope=None, **fields) -> dict[str, Any]:
    rope = {"rope_type": "default"} | (rope or {}) | {"rope_theta": theta}
    return {
        "architectures": [architecture],
        **size,
        "rms_norm_eps": eps,
        "rope_parameters": rope,
        **fields,
    }


def _llama3(length):
    return {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": length} | {
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }


def _yarn(length, **fields):
    return {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": length} | {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "llama_4_scaling_beta": 0.1,
        **fields,
    }


LLAMA, QWEN2, QWEN3 = "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"
MINISTRAL3 = "Ministral3ForCausalLM"
# θ and ε are those of LLaDA, Dream, SDAR and Nemotron. The small models differ from the large ones
# in every size, are tied, and have the options that the large ones leave out.
CONFIGS = {
    "llama": _case(LLAMA, LARGE, 5e5, 1e-5),
    "llama-small": _case(LLAMA, SMALL, 1e4, 1e-5, attention_bias=True),
    "llama3": _case(LLAMA, LARGE, 5e5, 1e-5, _llama3(64)),
    "llama3-small": _case(LLAMA, SMALL, 1e4, 1e-6, _llama3(128)),
    "qwen2": _case(QWEN2, LARGE, 1e6, 1e-6),
    "qwen2-small": _case(QWEN2, SMALL, 1e6, 1e-6),
    "qwen3": _case(QWEN3, LARGE | {"head_dim": 24}, 1e6, 1e-6),
    "qwen3-small": _case(QWEN3, SMALL, 1e6, 1e-6, attention_bias=True),
    "ministral3": _case(MINISTRAL3, LARGE, 1e6, 1e-5, _yarn(1024, mscale=1.0, mscale_all_dim=1.0)),
    "ministral3-small": _case(MINISTRAL3, SMALL, 1e4, 1e-5, _yarn(16)),
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a checkpoint by its name."""
    kind, width = config["architectures"][0], config["hidden_size"]
    channels, inner = config["head_dim"], config["intermediate_size"]
    queries = config["num_attention_heads"] * channels
    keys = config["num_key_value_heads"] * channels
    found = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, out, into in (
            ("self_attn.q_proj", queries, width),
            ("self_attn.k_proj", keys, width),
            ("self_attn.v_proj", keys, width),
            ("self_attn.o_proj", width, queries),
            ("mlp.gate_proj", inner, width),
            ("mlp.up_proj", inner, width),
            ("mlp.down_proj", width, inner),
        ):
            found[f"{layer}{name}.weight"] = (out, into)
            biased = config.get("attention_bias", False) and "self_attn" in name
            if biased or (kind == QWEN2 and name[-6:-5] in "qkv" and "self_attn" in name):
                found[f"{layer}{name}.bias"] = (out,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}{name}.weight"] = (width,)
        if kind == QWEN3:
            for name in ("q_norm", "k_norm"):
                found[f"{layer}self_attn.{name}.weight"] = (channels,)
    found["model.norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], width)
    return found


def tensors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Float32 weights of a checkpoint by name: nothing is at its initial value.

    The stream of ``RandomState`` is the same in every version of numpy.
    """

    def draw(name, shape):
        noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        if name.endswith("bias"):
            noise *= 0.3
        elif "norm" in name:
            noise = 1 + 0.2 * noise
        elif "embed" in name and not config["tie_word_embeddings"]:
            noise *= 0.5
        else:
            noise *= shape[-1] ** -0.5
        return noise.astype(np.float32)

    return {name: draw(name, shape) for name, shape in shapes(config).items()}


def tokens(config: dict[str, Any]) -> np.ndarray:
    """The tokens of the only sequence, [L]."""
    return np.random.RandomState(1).randint(0, config["vocab_size"], LENGTH).astype(np.int32)


def ranks() -> np.ndarray:
    """The rank of each position under full, causal and block attention, [3, L].

    Position i sees position j if the rank of j is not above that of i.
    """
    positions = np.arange(LENGTH, dtype=np.int32)
    return np.stack([0 * positions, positions, positions // BLOCK])
