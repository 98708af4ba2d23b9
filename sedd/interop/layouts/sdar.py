"""The layouts of SDAR and DreamReasoner: Qwen3 with attention by blocks. arXiv:2510.06303 (SDAR).

A block sees itself and the blocks before it. Blocks are counted from the first position.
"""

from sedd.interop.layouts.decoder import DecoderLayout

LAYOUTS = (
    DecoderLayout(
        name="SDAR",
        code="the code of SDAR (arXiv:2510.06303)",
        architectures=("SDARForCausalLM",),
        qk_norm=True,
        block=("block_size", 4),
        without_effect=frozenset({"fuse_cross_entropy", "noise"}),
    ),
    DecoderLayout(
        name="DreamReasoner",
        code="the code of DreamReasoner",
        architectures=("DreamForCausalLM",),
        qk_norm=True,
        block=("block_size", 32),
    ),
)
