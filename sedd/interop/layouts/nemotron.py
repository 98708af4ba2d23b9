"""The layout of Nemotron-Labs-Diffusion: Ministral 3 (YaRN) with attention by blocks."""

from sedd.interop.layouts.decoder import DecoderLayout, renamed

LAYOUT = DecoderLayout(
    name="Nemotron",
    code="the code of Nemotron-Labs-Diffusion",
    architectures=("NemotronLabsDiffusionModel",),
    block=("block_size", 32),
    without_effect=frozenset(
        {"ar_loss_weight", "dlm_loss_weight", "dlm_paradigm", "dp_varying_mask_ratio"}
    ),
    names=renamed(("model.", "encoder."), ("lm_head.", "diffusion_head.")),
)
