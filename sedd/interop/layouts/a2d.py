"""The layouts of A2D, of the project dllm: Llama, Qwen2 and Qwen3 with full attention.

Configurations of models that were trained by blocks do not say so: ``sedd.load`` is told by
``block``.
"""

from sedd.interop.layouts.decoder import DecoderLayout

CODE = "the code of dllm (A2D)"
LAYOUTS = (
    DecoderLayout(
        name="A2D-Llama", code=CODE, architectures=("A2DLlamaLMHeadModel",), exports=True
    ),
    DecoderLayout(
        name="A2D-Qwen2",
        code=CODE,
        architectures=("A2DQwen2LMHeadModel",),
        biases="qkv",
        exports=True,
    ),
    DecoderLayout(
        name="A2D-Qwen3",
        code=CODE,
        architectures=("A2DQwen3LMHeadModel",),
        qk_norm=True,
        exports=True,
    ),
)
