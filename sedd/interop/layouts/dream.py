"""The layout of Dream, Dream-Coder and DiffuCoder: Qwen2 with full attention and shifted output.

The code of Dream (arXiv:2508.15487) reads position i at row i - 1, because the model was made from
an autoregressive one. DreamReasoner has the same ``model_type``, but another network:
``sedd.interop.layouts.sdar``.
"""

from sedd.interop.layouts.decoder import DecoderLayout

LAYOUT = DecoderLayout(
    name="Dream",
    code="the code of Dream (arXiv:2508.15487)",
    architectures=("DreamModel",),
    biases="qkv",
    shift=True,
    exports=True,
)
