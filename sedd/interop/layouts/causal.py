"""The layouts of Llama, Qwen2 and Qwen3 of transformers: autoregressive models.

They are baselines, judges, and starting points of diffusion models.
"""

from sedd.interop.layouts.decoder import DecoderLayout

CODE = "transformers"
LAYOUTS = (
    DecoderLayout(
        name="Llama",
        code=CODE,
        architectures=("LlamaForCausalLM",),
        autoregressive=True,
        exports=True,
    ),
    DecoderLayout(
        name="Qwen2",
        code=CODE,
        architectures=("Qwen2ForCausalLM",),
        autoregressive=True,
        biases="qkv",
        exports=True,
    ),
    DecoderLayout(
        name="Qwen3",
        code=CODE,
        architectures=("Qwen3ForCausalLM",),
        autoregressive=True,
        qk_norm=True,
        exports=True,
    ),
)
