"""Evaluate a model from Python: ``sedd.evaluate``, ``price``, ``diagnose`` and ``marginals``."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sedd.constraints.clamp import from_infill
from sedd.data.tokenizers import Tokenizer
from sedd.errors import FieldError, UserError
from sedd.evaluation.datasets import DataSet, TokenRows, token_data_set
from sedd.evaluation.diagnosis import RATES, Diagnosis, measure_predictions
from sedd.evaluation.marginals import Marginals, log_marginals
from sedd.evaluation.price import Price
from sedd.evaluation.price_draws import measure_price
from sedd.evaluation.protocols import PROTOCOLS, Protocol, check_fit
from sedd.evaluation.protocols import protocol as protocol_named
from sedd.evaluation.scoring import (
    EvaluationResult,
    Order,
    Track,
    choose_estimate,
    score_data_set,
)
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
        split: split of the corpus. By default the protocol's split of a known data set, and the
            validation split of the training corpus. For other text: all of it if it has no splits,
            else the validation or, without one, the test split that it comes with; if it comes with
            neither, the validation text that is held out of its training split.
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
        >>> model = sedd.load("runs/quickstart")
        >>> result = sedd.evaluate(model, "my.txt", protocol=Protocol(draws=16), max_sequences=8)
        >>> result.is_bound, result.num_sequences, result.num_tokens
        (True, 8, 96)
        >>> result.standard_error < result.nats_per_token
        True
    """
    _check_sizes(batch_size, max_sequences)
    if isinstance(protocol, str):
        name, protocol = protocol, protocol_named(protocol)
    else:
        name = next((n for n, known in PROTOCOLS.items() if known == protocol), "default")
    return score_data_set(
        model.denoiser,
        model.schedule,
        _key_of(key),
        _data_set(model, data, protocol, name, scored_BL, split, max_sequences),
        choose_estimate(protocol, model.denoiser, order, orders, schedule=model.schedule),
        protocol=protocol,
        protocol_name=name,
        batch_size=batch_size,
        count_text=text_counter(model.tokenizer),
        train_counts_N=model.train_counts,
    )


def price(
    model: Model,
    x0_BL: str | Path | Any,
    key: Key[Array, ""] | int = 0,
    *,
    draws: int = 64,
    max_sequences: int | None = None,
    batch_size: int = 32,
) -> Price:
    """Measure what revealing several tokens in one network call costs a model, in nats.

    See ``docs/parallel_decoding.md``. The result is also the profile of the sampler ``planned``.

    Args:
        model: a time-independent absorbing model, from ``load``.
        x0_BL: token ids [S, L], or a corpus as ``evaluate`` takes it. All tokens are priced; rows
            with padding are refused.
        key: a key, or an integer seed.
        draws: the most network calls for each sequence; the value must be at least 2. With at least
            L draws (and L at most 128) every number of known tokens is measured. Otherwise at most
            ``draws`` numbers, and at most 128, are measured, and those between them are
            interpolated. Each measured number gets equally many calls, so that fewer calls may be
            made; ``Price.draws`` has their number.
        max_sequences: measure at most so many sequences, evenly spread.
        batch_size: sequences in a batch, over all devices.

    Raises:
        UserError: if the model is autoregressive, a block model, depends on the noise level, is of
            another process or was trained with weights of positions (``by_position``), or the data
            cannot be read or have padding.
        FieldError: if a number is out of its range.

    Example:
        >>> import sedd
        >>> model = sedd.load("runs/quickstart")
        >>> price = sedd.price(model, "my.txt", draws=12, max_sequences=32)
        >>> price.nats_by_known.shape, sum(price.plan(4))
        ((12,), 12)
        >>> nats, error = price.nats_per_token([2, 2, 4, 4])
        >>> 0 < error < nats
        True
    """
    _check_sizes(batch_size, max_sequences)
    data = _data_set(model, x0_BL, protocol_named("default"), "default", None, None, max_sequences)
    return price_of(
        model,
        data,
        _key_of(key),
        draws=draws,
        batch_size=batch_size,
    )


def diagnose(
    model: Model,
    x0_BL: str | Path | Any,
    key: Key[Array, ""] | int = 0,
    *,
    rates: Sequence[float] = RATES,
    draws: int = 64,
    scored_BL: Any = None,
    max_sequences: int | None = None,
    batch_size: int = 32,
) -> Diagnosis:
    """Measure what a model predicts at masked positions, by distance to the nearest revealed token.

    See ``docs/diagnostics.md``.

    Args:
        model: an absorbing model, from ``load``.
        x0_BL: token ids [S, L], or a corpus as ``evaluate`` takes it.
        key: a key, or an integer seed.
        rates: distinct probabilities in (0, 1) with which a position is masked.
        draws: the most network calls for each sequence: two for each masking of the text, with
            equally many maskings for each rate; at least 2·``len(rates)``.
        scored_BL: which token ids are masked, [S, L]; the others are given. Default: all.
        max_sequences: measure at most so many sequences, evenly spread.
        batch_size: sequences in a batch, over all devices.

    Raises:
        UserError: the model is autoregressive, a block model or of another process, or the data
            cannot be read.
        FieldError: a number is out of its range.

    Example:
        >>> import sedd
        >>> model = sedd.load("runs/quickstart")
        >>> found = sedd.diagnose(model, "my.txt", rates=[0.5, 0.9], draws=8, max_sequences=32)
        >>> value, error = found.mean("entropy", rate=0.9, distance=2)
        >>> 0 < error < value
        True
    """
    _check_sizes(batch_size, max_sequences)
    data = _data_set(
        model, x0_BL, protocol_named("default"), "default", scored_BL, None, max_sequences
    )
    return diagnosis_of(
        model,
        data,
        _key_of(key),
        rates=rates,
        draws=draws,
        batch_size=batch_size,
    )


def marginals(
    model: Model,
    texts: Sequence[str] | Any,
    key: Key[Array, ""] | int = 0,
    *,
    orders: int = 0,
    batch_size: int = 32,
) -> Marginals:
    """Rank texts with gaps by approximate log marginals, from one network call each.

    See ``docs/marginals.md``. The values are those of a marginal head. They are no normalised log
    likelihoods.

    Args:
        model: a model with a marginal head, from ``load``.
        texts: texts of at most ``model.length`` tokens. ``{mask:12}`` is a gap of twelve tokens,
            which are summed out, as are the positions behind a text. Or token ids [S, L], with the
            id of the mask where a token is summed out; L is ``model.length``.
        key: a key, or an integer seed, for the orders.
        orders: compare with the log of the mean likelihood over so many random orders; 0 for no
            comparison.
        batch_size: texts in a batch, over all devices.

    Raises:
        UserError: the model has no marginal head, or a text is too long or cannot be encoded; the
            message says which one.
        FieldError: a number is out of its range.

    Example:
        >>> import sedd
        >>> model = sedd.load("runs/marginal")
        >>> found = sedd.marginals(model, ["the cat{mask:5}", "zzz cat{mask:5}"], orders=2)
        >>> found.log_marginal_S.shape, found.known_S.tolist(), found.log_mean.shape
        ((2,), [7, 7], (2,))
    """
    for field, value, least in (("batch_size", batch_size, 1), ("orders", orders, 0)):
        if value < least:
            raise FieldError(field, f"must be at least {least}, got {value}")
    x_SL, visible_SL = _texts_with_gaps(model, texts)
    return log_marginals(
        model.denoiser,
        _key_of(key),
        (
            (x_SL[start : start + batch_size], visible_SL[start : start + batch_size])
            for start in range(0, len(x_SL), batch_size)
        ),
        orders=orders,
    )


def _key_of(key: Key[Array, ""] | int) -> Key[Array, ""]:
    """A key, or that of an integer seed."""
    return jax.random.key(key) if isinstance(key, int) else key


def _check_sizes(batch_size: int, max_sequences: int | None) -> None:
    """Raise FieldError unless both are at least 1; None is no limit."""
    for field, value in (("batch_size", batch_size), ("max_sequences", max_sequences)):
        if value is not None and value < 1:
            raise FieldError(field, f"must be at least 1, got {value}")


def _texts_with_gaps(model: Model, texts: Sequence[str] | Any) -> tuple[np.ndarray, np.ndarray]:
    """The tokens [S, L] of the ``texts`` of ``marginals``, and which of them are visible."""
    if len(texts) and isinstance(texts[0], str):
        rows = []
        for number, text in enumerate(texts):
            try:
                rows.append(visible_tokens(model, text))
            except UserError as error:
                raise UserError(f"texts[{number}]: {error}") from error
        x_SL, visible_SL = (np.array(each) for each in zip(*rows, strict=True))
        return x_SL, visible_SL
    x_SL = np.asarray(texts)
    if x_SL.ndim != 2 or x_SL.shape[1] != model.length or not len(x_SL):
        raise UserError(
            f"texts must be strings or token ids [S, {model.length}], got an array of shape "
            f"{x_SL.shape}"
        )
    model.check_ids(x_SL, mask=True)
    return x_SL.astype(np.int32), x_SL != model.process.mask_id


def visible_tokens(model: Model, text: str) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a text with gaps and which of them are visible, both [L] of the model's length.

    Raises:
        UserError: the model has no tokenizer, or the text is too long or cannot be encoded.
    """
    clamp = from_infill(model.text_reader.tokenizer, text, model.length)
    return clamp.tokens_L, clamp.fixed_L


def price_of(
    model: Model,
    data: DataSet,
    key: Key[Array, ""],
    *,
    draws: int,
    batch_size: int,
    track: Track | None = None,
) -> Price:
    """Measure the price of parallelism on the rows of a data set; see ``price``.

    ``track`` wraps the batches to show progress.
    """
    starts = range(0, len(data.chosen), batch_size)
    batches = (data.rows(start, batch_size) for start in starts)
    return measure_price(
        model.denoiser,
        model.schedule,
        key,
        batches if track is None else track(batches, f"price of {data.label}", len(starts)),
        model=model.digest,
        length=data.length,
        draws=draws,
    )


def diagnosis_of(
    model: Model,
    data: DataSet,
    key: Key[Array, ""],
    *,
    rates: Sequence[float],
    draws: int,
    batch_size: int,
    track: Track | None = None,
) -> Diagnosis:
    """Measure predictions on the rows of a data set; see ``diagnose``.

    ``track`` wraps the batches to show progress.
    """
    starts = range(0, len(data.chosen), batch_size)
    batches = (data.rows(start, batch_size) for start in starts)
    return measure_predictions(
        model.denoiser,
        key,
        batches if track is None else track(batches, f"diagnosis of {data.label}", len(starts)),
        length=data.length,
        counts_N=np.pad(data.counts, (0, model.process.num_tokens - len(data.counts))),
        train_counts_N=model.train_counts,
        rates=rates,
        draws=draws,
        padded=not isinstance(data.source, TokenRows),
    )


def _data_set(
    model: Model,
    data: Any,
    protocol: Protocol,
    name: str,
    scored_BL: Any,
    split: str | None,
    max_sequences: int | None,
) -> DataSet:
    """The rows to evaluate: a corpus cut as the protocol says, or the given token ids."""
    data = os.fspath(data) if isinstance(data, Path) else data
    if not isinstance(data, str):
        num_tokens = model.process.num_tokens
        return token_data_set(data, scored_BL, num_tokens=num_tokens, max_sequences=max_sequences)
    if scored_BL is not None:
        raise UserError(
            "scored_BL is only for token ids; for a corpus the protocol decides which tokens are "
            "scored"
        )
    reader = model.text_reader
    check_fit(name, protocol, tokenizer=reader.tokenizer.name, length=model.length)
    return reader.open(data, protocol, name=name, split=split, max_sequences=max_sequences)


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
