"""Judges: autoregressive models that compute the likelihood of texts, and features for MAUVE.

``Scorer`` and ``Judge`` are the interfaces. ``WindowJudge`` makes a judge of two functions on rows
of token ids, and ``hugging_face_judge`` one of a model of the Hugging Face hub.
"""

import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from safetensors import SafetensorError

from sedd.arrays import bucket
from sedd.data.network import why_hub_unreachable
from sedd.errors import UserError

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")  # of a model: NAME or OWNER/NAME
# Exceptions of transformers: no such model, a pickle that PyTorch refuses, damaged weights.
LOADING = (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """For each of S texts: -log p of its scored tokens in nats, and the number of these tokens."""

    nats_S: np.ndarray
    tokens_S: np.ndarray


@runtime_checkable
class Scorer(Protocol):
    """A model that computes the likelihood of texts."""

    @property
    def name(self) -> str:
        """The name of the judge, for reports."""
        ...

    @property
    def first_token(self) -> str:
        """How the first token of a text is treated, for reports: "given, not scored"."""
        ...

    def encode(self, texts: Sequence[str], /) -> list[np.ndarray]:
        """Return the ids of each text in the judge's tokens, without special tokens."""
        ...

    def judge(self, texts: Sequence[str]) -> Judgement:
        """Compute the nats of each text; an empty text has 0 nats and 0 tokens."""
        ...


@runtime_checkable
class Judge(Scorer, Protocol):
    """A scorer that also gives features of texts, for MAUVE."""

    def features(self, texts: Sequence[str]) -> np.ndarray:
        """Return a feature vector for each text, [S, D].

        It is the hidden state of the judge's last layer at the last token of the text.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class WindowJudge:
    """A judge made of two functions on rows of token ids.

    A text of more than ``context`` tokens is cut into windows, which are scored independently.

    Args:
        name: the name of the judge, for reports.
        encode: returns the ids of each text, without special tokens.
        nats: ``nats(ids_BL, scored_BL) -> nats_B``, -log p of the scored tokens of each row, each
            given the tokens before it in the row.
        hidden: ``hidden(ids_BL) -> h_BLD``, the last hidden states; state i depends on the tokens
            up to i.
        context: the most tokens of a row, at least 2.
        scores_first: whether the model scores the first token of a row. If not, that token is
            conditioned on and not counted.
        pad_id: the id that fills short rows.
        batch_size: rows of a call.

    Raises:
        ValueError: if ``context`` or ``batch_size`` is too small.
    """

    name: str
    encode: Callable[[Sequence[str]], list[np.ndarray]]
    nats: Callable[[np.ndarray, np.ndarray], Any]
    hidden: Callable[[np.ndarray], Any]
    context: int
    scores_first: bool
    pad_id: int = 0
    batch_size: int = 8

    def __post_init__(self):
        if self.context < 2 or self.batch_size < 1:
            raise ValueError(
                f"context must be at least 2 and batch_size 1, got {self.context} and "
                f"{self.batch_size}"
            )

    @property
    def first_token(self) -> str:
        """How the first token is treated, for reports."""
        return "scored" if self.scores_first else "given, not scored"

    def judge(self, texts: Sequence[str]) -> Judgement:
        """Compute the nats of each text, summed over its windows."""
        windows, owner = [], []
        for text, ids in enumerate(self.encode(texts)):
            for start in range(0, len(ids), self.context):
                windows.append(ids[start : start + self.context])
                owner.append(text)
        nats_S, tokens_S = np.zeros(len(texts)), np.zeros(len(texts), int)
        if not windows:
            return Judgement(nats_S=nats_S, tokens_S=tokens_S)
        length = min(bucket(max(map(len, windows))), self.context)
        size = self.batch_size
        for first in range(0, len(windows), size):
            batch = windows[first : first + size]
            ids_BL = self._padded(batch, length)
            scored_BL = np.zeros((size, length), bool)
            for row, ids in enumerate(batch):
                scored_BL[row, 0 if self.scores_first else 1 : len(ids)] = True
            nats_B = np.asarray(self.nats(ids_BL, scored_BL), np.float64)
            here = owner[first : first + size]
            np.add.at(nats_S, here, nats_B[: len(batch)])
            np.add.at(tokens_S, here, scored_BL.sum(1)[: len(batch)])
        return Judgement(nats_S=nats_S, tokens_S=tokens_S)

    def features(self, texts: Sequence[str]) -> np.ndarray:
        """Return the last layer's hidden state at the last token of each text, [S, D].

        Texts are cut to their first ``context`` tokens. An empty text has the state of a padding
        token.
        """
        rows = [ids[: self.context] for ids in self.encode(texts)]
        length = min(bucket(max([1, *map(len, rows)])), self.context)
        found = []
        for first in range(0, len(rows), self.batch_size):
            batch = rows[first : first + self.batch_size]
            ids_BL = self._padded(batch, length)
            last = [max(len(ids), 1) - 1 for ids in batch]  # padding, for an empty text
            found.append(np.asarray(self.hidden(ids_BL)[np.arange(len(batch)), np.array(last)]))
        return np.concatenate(found)

    def _padded(self, batch: Sequence[np.ndarray], length: int) -> np.ndarray:
        """Pad a batch to the full size and length, so that one compiled program serves all."""
        ids_BL = np.full((self.batch_size, length), self.pad_id, np.int32)
        for row, ids in enumerate(batch):
            ids_BL[row, : len(ids)] = ids
        return ids_BL


def hugging_face_judge(
    name: str = "gpt2-large",
    *,
    context: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
) -> WindowJudge:
    """Load a causal language model of the Hugging Face hub, or of a folder in its format.

    The first token of a text is given and not scored, as in published evaluations: no token for the
    beginning of a text is put before it.

    Args:
        name: the model's name on the hub, or the folder.
        context: the most tokens of a row; by default the model's own limit.
        batch_size: rows of a call.
        device: PyTorch's name of a device; by default a GPU if there is one.

    Raises:
        UserError: if PyTorch is not installed, if there is no such model, or if its files are
            damaged or refused.
    """
    torch, tokenizer, model = _load_pretrained(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        return [np.array(ids, np.int32) for ids in encoded]

    @torch.no_grad()
    def nats(ids_BL, scored_BL):
        ids = torch.from_numpy(ids_BL).long().to(device)
        logits = model(ids).logits[:, :-1].float()  # no token attends to the padding at the end
        log_probs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return -(log_probs * torch.from_numpy(scored_BL[:, 1:]).to(device)).sum(-1).cpu().numpy()

    @torch.no_grad()
    def hidden(ids_BL):
        ids = torch.from_numpy(ids_BL).long().to(device)
        return model(ids, output_hidden_states=True).hidden_states[-1].float().cpu().numpy()

    return WindowJudge(
        name=name,
        encode=encode,
        nats=nats,
        hidden=hidden,
        context=context or model.config.max_position_embeddings,
        scores_first=False,
        batch_size=batch_size,
    )


def _load_pretrained(name: str) -> tuple[Any, Any, Any]:
    """PyTorch, and the tokenizer and the model called ``name``; raises UserError."""
    try:
        import torch  # pyright: ignore[reportMissingImports]

        # Before the import of transformers, which reads the variable that this may set.
        on_hub = HUB_NAME.fullmatch(name) and not Path(name).is_dir()
        unreachable = why_hub_unreachable() if on_hub else None
        from transformers import (  # pyright: ignore[reportMissingImports]
            AutoModelForCausalLM,
            AutoTokenizer,
        )
    except ImportError as error:
        raise UserError(f"judge {name!r} needs PyTorch: pip install -e '.[judge]'") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except LOADING as error:
        if unreachable:
            raise UserError(
                f"judge {name!r} cannot be loaded: the hub cannot be reached ({unreachable}), and "
                "its cache does not hold this model; give the folder of a copy instead"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"judge {name!r} cannot be loaded: {reason}") from error
    return torch, tokenizer, model
