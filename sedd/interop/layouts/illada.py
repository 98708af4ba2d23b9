"""The layout of iLLaDA: a Llama with full attention and grouped queries.

Neither its configuration nor its tokenizer names the mask; its model card says 5.
"""

from sedd.interop.layouts.decoder import DecoderLayout

LAYOUT = DecoderLayout(
    name="iLLaDA",
    code="the code of iLLaDA",
    architectures=("ILLaDAForCausalLM",),
)
