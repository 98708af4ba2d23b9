"""Compute decoder.npz: logits of small models of ``transformers`` on the CPU in float32.

    pip install -e '.[judge]' 'transformers>=5'; PYTHONPATH=tests python tests/golden/decoder.py

For each configuration of ``tests/hf_models.py`` the file has the logits [3, R, V] under full,
causal and block attention, at the rows ``ROWS``. ``NAME/bfloat16`` is the root mean square by which
the logits of the same model in bfloat16 differ. The code of the project is not used.
"""

from pathlib import Path

import hf_models
import numpy as np
import torch
import transformers


def load(config):
    """The model of a configuration."""
    architecture = config["architectures"][0]
    kind = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
    fields = {k: v for k, v in config.items() if k != "architectures"}
    settings = kind(**fields, max_position_embeddings=2048, attn_implementation="eager")
    model = getattr(transformers, architecture)(settings).eval()
    weights = {name: torch.tensor(w) for name, w in hf_models.tensors(config).items()}
    wrong = model.load_state_dict(weights, strict=False)
    assert not wrong.unexpected_keys
    assert wrong.missing_keys == (["lm_head.weight"] if config["tie_word_embeddings"] else [])
    model.tie_weights()
    return model


@torch.no_grad()
def logits(model, tokens):
    """[3, L, V]: the logits under full, causal and block attention."""
    ids = torch.tensor(tokens)[None].long()
    found = []
    for rank in hf_models.ranks():
        hidden = torch.tensor(rank[None] > rank[:, None])
        least = torch.finfo(model.dtype).min
        mask = torch.zeros(hidden.shape, dtype=model.dtype).masked_fill(hidden, least)
        found.append(model(ids, attention_mask=mask[None, None]).logits[0].float().numpy())
    usual = model(ids).logits[0].float().numpy()
    full, causal, block = found
    np.testing.assert_allclose(causal, usual, atol=1e-6)  # without a mask it is causal
    assert min(np.abs(full - causal).max(), np.abs(block - causal).max()) > 0.1
    return np.stack(found)


def main():
    """Write the file."""
    arrays = {}
    for name, config in hf_models.CONFIGS.items():
        model, tokens = load(config), hf_models.tokens(config)
        exact = logits(model, tokens)
        error = np.sqrt(np.square(logits(model.bfloat16(), tokens) - exact).mean())
        arrays[name], arrays[f"{name}/bfloat16"] = exact[:, list(hf_models.ROWS)], error
        print(f"{name}: standard deviation {exact.std():.3f}, in bfloat16 {error:.4f} off")
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **arrays)


if __name__ == "__main__":
    main()
