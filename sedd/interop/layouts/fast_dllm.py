"""The layout of Fast-dLLM v2: Qwen2 with attention by blocks, shifted. arXiv:2509.26328."""

from sedd.interop.layouts.decoder import DecoderLayout

LAYOUT = DecoderLayout(
    name="Fast-dLLM v2",
    code="the code of Fast-dLLM v2 (arXiv:2509.26328)",
    architectures=("Fast_dLLM_QwenForCausalLM",),
    biases="qkv",
    shift=True,
    block=("bd_size", 32),
)
