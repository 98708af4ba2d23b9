"""``sedd.marginals``: approximate log marginals of texts with gaps."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sedd.constraints.clamp import from_infill
from sedd.errors import FieldError, UserError
from sedd.evaluating.inputs import key_of
from sedd.evaluation.marginals import Marginals, log_marginals
from sedd.model import Model
from sedd.types import Array, Key


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
        key_of(key),
        (
            (x_SL[start : start + batch_size], visible_SL[start : start + batch_size])
            for start in range(0, len(x_SL), batch_size)
        ),
        orders=orders,
    )


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
