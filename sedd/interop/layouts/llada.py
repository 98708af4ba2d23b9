"""The layout of LLaDA and LLaDA 1.5: a Llama block with full attention. arXiv:2502.09992.

The configuration has keys of its own, from the code of OLMo.
"""

from sedd.interop.layouts.decoder import DecoderLayout

BLOCK = "model.transformer.blocks.{}."
LAYOUT = DecoderLayout(
    name="LLaDA",
    code="the code of LLaDA (arXiv:2502.09992)",
    architectures=("LLaDAModelLM",),
    biases="none",
    keys={
        "num_states": ("embedding_size", "size"),
        "hidden_dim": ("d_model", "size"),
        "num_layers": ("n_layers", "size"),
        "num_heads": ("n_heads", "size"),
        "num_kv_heads": ("n_kv_heads", "size", 0),
        "mlp_dim": ("mlp_hidden_size", "size"),
        "norm_eps": ("rms_norm_eps", float, 1e-5),
        "tied": ("weight_tying", bool, False),
    },
    required={
        "activation_type": ["silu"],
        "alibi": [False],
        "attention_layer_norm": [False],
        "block_group_size": [1],
        "block_type": ["llama"],
        "include_bias": [False],
        "include_qkv_bias": [False],
        "input_emb_norm": [False],
        "layer_norm_type": ["rms"],
        "layer_norm_with_affine": [True],
        "quantization_config": [],
        "rope": [True],
        "scale_logits": [False],
    },
    length_key="max_sequence_length",
    without_effect=frozenset(
        """alibi_bias_max attention_layer_norm_with_affine bias_for_layer_norm embedding_dropout
        flash_attention init_cutoff_factor init_device init_fn init_std mlp_ratio
        multi_query_attention precision residual_dropout rope_full_precision vocab_size""".split()  # noqa: SIM905
    ),
    names={
        "trunk/embed/embedding": "model.transformer.wte.weight",
        "trunk/blocks/norm_attention/scale": BLOCK + "attn_norm.weight",
        "trunk/blocks/query/kernel": BLOCK + "q_proj.weight",
        "trunk/blocks/key/kernel": BLOCK + "k_proj.weight",
        "trunk/blocks/value/kernel": BLOCK + "v_proj.weight",
        "trunk/blocks/attention_out/kernel": BLOCK + "attn_out.weight",
        "trunk/blocks/norm_mlp/scale": BLOCK + "ff_norm.weight",
        "trunk/blocks/mlp_gate/kernel": BLOCK + "ff_proj.weight",
        "trunk/blocks/mlp_up/kernel": BLOCK + "up_proj.weight",
        "trunk/blocks/mlp_down/kernel": BLOCK + "ff_out.weight",
        "trunk/norm/scale": "model.transformer.ln_f.weight",
        "head/kernel": "model.transformer.ff_out.weight",
    },
)
