"""``sedd.evaluate``: perplexity bounds and exact likelihoods of a model."""

from pathlib import Path
from typing import Any

import numpy as np

from sedd.data.tokenizers import Tokenizer
from sedd.errors import UserError
from sedd.evaluating.inputs import check_sizes, data_set_of, key_of
from sedd.evaluation.protocols import PROTOCOLS, Protocol
from sedd.evaluation.protocols import protocol as protocol_named
from sedd.evaluation.scoring import EvaluationResult, Order, choose_estimate, score_data_set
from sedd.model import Model
from sedd.types import Array, Key


def evaluate(
    model: Model,
    data: str | Path | Any,
    key: Key[Array, ""] | int = 0,
    *,
    protocol: str | Protocol = "default",
    scored_BL: Any = None,
    order: Order | None = None,
    orders: int = 1,
    split: str | None = None,
    max_sequences: int | None = None,
    batch_size: int = 32,
) -> EvaluationResult:
    """Bound the perplexity of a model on token ids or on a corpus; see ``docs/evaluation.md``.

    Args:
        model: from ``load``.
        data: token ids [S, L], or a corpus as ``evaluate.py --data`` takes it: the name of one, a
            file, a folder, or ``NAME=FILE``, which reads the known data set NAME from FILE.
        key: a key, or an integer seed. The draws of a sequence depend on this key and on the
            sequence's number in the data, not on ``batch_size`` or the number of devices.
        protocol: a ``Protocol``, or the name of one of ``sedd.evaluation.PROTOCOLS``: "default"
            cuts text as in training, "sedd" and "mdlm" are the zero-shot tables of these papers,
            "text8" and "lm1b" the settings of these data sets. ``dataclasses.replace`` changes
            fields of a named one. If ``data`` is token ids, all fields but ``estimator``,
            ``outer_terms``, ``t_min`` and ``draws`` are ignored.
        scored_BL: which token ids are scored, [S, L]; the others are conditioned on. Default: all.
        order: "forward", "backward" or "random": compute the exact likelihood of the tokens
            revealed in this order instead of a bound. Needs a time-independent absorbing model that
            is not autoregressive; a block model takes "forward" only. It takes a network call for
            each token, or one in all for an any-subset model.
        orders: K, only with the order "random": compute -log of the mean likelihood over K random
            orders. In expectation this is an upper bound on -log of the mean over all orders; it
            falls as K grows.
        split: split of the corpus. The default depends on ``data``. For a data set with published
            figures under the protocol it is the split of these figures; for the corpus that the
            model was trained on, the validation split. Of other text all is evaluated if it has no
            splits. If it has splits, the default is the first of these that there is: "validation",
            "test", or text that is held out of the training split.
        max_sequences: evaluate at most so many sequences, evenly spread.
        batch_size: sequences in a batch, over all devices.

    Returns:
        Nats per token, perplexity and standard errors; see ``EvaluationResult``.

    Raises:
        UserError: if the data cannot be read, or does not fit the protocol or the model.
        ValueError: if there is no sequence, or no token is scored.

    Example:
        >>> import sedd
        >>> from sedd.evaluation import Protocol
        >>> model = sedd.load("runs/tiny")  # sequences of 12 tokens
        >>> result = sedd.evaluate(model, "my.txt", protocol=Protocol(draws=16), max_sequences=8)
        >>> result.is_bound, result.num_sequences, result.num_tokens
        (True, 8, 96)
        >>> result.standard_error < result.nats_per_token
        True
    """
    check_sizes(batch_size, max_sequences)
    if isinstance(protocol, str):
        name, protocol = protocol, protocol_named(protocol)
    else:
        name = next((n for n, known in PROTOCOLS.items() if known == protocol), "default")
    return score_data_set(
        model.denoiser,
        model.schedule,
        key_of(key),
        data_set_of(model, data, protocol, name, scored_BL, split, max_sequences),
        choose_estimate(protocol, model.denoiser, order, orders, schedule=model.schedule),
        protocol=protocol,
        protocol_name=name,
        batch_size=batch_size,
        count_text=text_counter(model.tokenizer),
        train_counts_N=model.train_counts,
    )


def text_counter(tokenizer: Tokenizer | None):
    """Return a function from token ids to (characters, bytes) of their text.

    None without a tokenizer, or if the tokenizer does not tell the bytes of its tokens. Characters
    are counted by their first byte, so that a character whose bytes are divided between two
    sequences counts once.
    """
    if tokenizer is None:
        return None
    try:
        pieces = tokenizer.token_bytes()
    except UserError:
        return None
    num_bytes = np.array([len(piece or b"") for piece in pieces])
    characters = np.array([sum(byte & 0xC0 != 0x80 for byte in piece or b"") for piece in pieces])
    return lambda ids: (int(characters[ids].sum()), int(num_bytes[ids].sum()))
