"""The vocabulary of a published model: its tokenizer, its mask, and the rows that no token uses.

Published models have the mask anywhere among the rows of their embedding, and unused rows, which
make the number of rows a round one. Here the tokens are 0..N-1, the mask is N, and the unused rows
follow. ``settle`` finds N and the mask, and the two rows that have to change places.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from sedd.data.tokenizer_directory import read_tokenizer_directory
from sedd.data.tokenizers import Pretrained, Tokenizer, tokenizer_from_json
from sedd.errors import UserError, first_line
from sedd.interop.layouts.base import Layout
from sedd.networks.ddit import DDiT


def published_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer in the directory of a checkpoint, with the ids of its files; None without one.

    Raises:
        UserError: if its files are damaged.
    """
    file = directory / "tokenizer.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        # The file of a run has the key "kind"; other files are of Hugging Face's tokenizers.
        if isinstance(data, dict) and "kind" in data:
            return tokenizer_from_json(data)
    except (ValueError, RecursionError) as error:  # a ``UserError`` is a ``ValueError``
        raise UserError(f"{file}: {first_line(error)}") from None
    return read_tokenizer_directory(directory)


def settle(
    layout: Layout, tokenizer: Tokenizer | None, mask_id: int | None, config: Path
) -> tuple[Layout, Tokenizer | None]:
    """Decide where the mask and the unused rows of the vocabulary are, from all that is known.

    The networks of SEDD, RADD, MDLM and GIDD have the mask last and no unused rows: their layouts
    are returned unchanged. The tokenizer of GIDD has the mask among its tokens.

    Args:
        layout: the layout as the configuration states it; its network has ``num_states`` rows.
        tokenizer: the tokenizer with the ids of its files, or None.
        mask_id: the user's id of the mask in the model's own vocabulary, or None.
        config: the configuration, for messages.

    Returns:
        The layout, and the tokenizer with the ids that its tokens have here.

    Raises:
        UserError: if no file states the mask and the user gave none, if it is given for a model
            without a mask, or if an id is beyond the rows of the vocabulary.
    """
    if isinstance(layout.network, DDiT):
        if mask_id is not None:
            raise UserError(f"--mask-id {mask_id}: {config} has the mask as its last id")
        mask_id = layout.description.mask_id
        if mask_id is None or not isinstance(tokenizer, Pretrained):
            return layout, tokenizer
        if tokenizer.named_mask not in (None, mask_id):
            raise UserError(
                f"{config.parent / 'tokenizer_config.json'}: mask_token is {tokenizer.named_mask}, "
                f"and {layout.name} has the mask as its last id, {mask_id}"
            )
        return layout, tokenizer.with_mask(mask_id)
    network: Any = layout.network
    rows = network.num_states
    size = rows if tokenizer is None else tokenizer.num_tokens
    causal = layout.description.parameterization == "autoregressive"
    if size > rows:
        raise UserError(
            f"{config}: the tokenizer has {size} tokens, and the model {rows} rows for them: it is "
            "not the tokenizer that the model was trained with"
        )
    if causal:
        if mask_id is not None:
            raise UserError(f"--mask-id {mask_id}: {layout.name} is autoregressive, without a mask")
        return _with_rows(layout, rows, num_tokens=size, mask_id=None), tokenizer
    mask_id, where = _find_mask(layout, tokenizer, mask_id, config)
    if mask_id >= rows:
        raise UserError(f"{where} {mask_id}: the model has the rows 0 to {rows - 1}")
    if isinstance(tokenizer, Pretrained):
        token = tokenizer.backend.id_to_token(mask_id)
        if token is not None and token not in tokenizer.specials:
            note = f"the mask {mask_id} is {token!r}, a word of the vocabulary"
            layout = dataclasses.replace(layout, notes=(*layout.notes, note))
        tokenizer = tokenizer.with_mask(mask_id)
    # A mask that is one of the tokenizer's ids is not a token.
    num_tokens = size - 1 if mask_id < size else size
    return _with_rows(layout, rows, num_tokens=num_tokens, mask_id=mask_id), tokenizer


def _find_mask(
    layout: Layout, tokenizer: Tokenizer | None, given: int | None, config: Path
) -> tuple[int, str]:
    """Id of the mask in the model's own vocabulary, and where it is stated; or UserError."""
    if given is not None:
        return given, "--mask-id"
    if layout.description.mask_id is not None:
        return layout.description.mask_id, f"{config}: mask_token_id"
    hint = ""
    if isinstance(tokenizer, Pretrained):
        if tokenizer.named_mask is not None:
            return tokenizer.named_mask, f"{config.parent / 'tokenizer_config.json'}: mask_token"
        named = [f"{t} ({i})" for t, i in tokenizer.specials.items() if "mask" in t.lower()]
        hint = f"; tokens with such a name: {', '.join(named)}" if named else ""
    raise UserError(
        f"{config}: neither the configuration nor the tokenizer names the mask: give its published "
        f"id by --mask-id (in Python mask_id=…){hint}"
    )


def _with_rows(layout: Layout, rows: int, *, num_tokens: int, mask_id: int | None) -> Layout:
    """The layout with N tokens, the mask after them, and the other rows after the mask."""
    ours = max(rows, num_tokens + 1)
    network: Any = layout.network
    return dataclasses.replace(
        layout,
        network=dataclasses.replace(
            network, num_states=num_tokens + 1, spare_rows=ours - num_tokens - 1
        ),
        description=dataclasses.replace(layout.description, num_tokens=num_tokens, mask_id=mask_id),
        swap=None if mask_id in (None, num_tokens) else (mask_id, num_tokens),
        added_rows=ours - rows,
    )
