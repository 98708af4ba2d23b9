"""Infilling: tokens that are given, at any position, and gaps between them."""

import re
from dataclasses import dataclass

import numpy as np

from sedd.data.tokenizers import Tokenizer
from sedd.errors import UserError

_GAP = re.compile(r"\{mask(?::([^{}]*))?\}")


@dataclass(frozen=True, kw_only=True)
class Clamp:
    """Where ``fixed_L`` holds, the token is that of ``tokens_L``; the rest (0 there) is free."""

    tokens_L: np.ndarray
    fixed_L: np.ndarray

    @property
    def length(self) -> int:
        """Positions, free ones included."""
        return len(self.tokens_L)


def free(length: int) -> Clamp:
    """Nothing given."""
    return Clamp(tokens_L=np.zeros(length, np.int32), fixed_L=np.zeros(length, bool))


def from_prompt(tokenizer: Tokenizer, length: int, *, prompt: str = "", suffix: str = "") -> Clamp:
    """A prompt at the start and a suffix at the end of ``length`` tokens.

    UserError when they do not fit.
    """
    clamp = free(length)
    before, after = tokenizer.encode_batch([prompt, suffix])
    if len(before) + len(after) > length:
        given = " and ".join(
            f"{what} ({len(ids)} tokens)"
            for what, ids in (("prompt", before), ("suffix", after))
            if len(ids)
        )
        raise UserError(f"{given}: longer than the length of {length}, which includes them")
    clamp.tokens_L[: len(before)], clamp.fixed_L[: len(before)] = before, True
    if len(after):
        clamp.tokens_L[-len(after) :], clamp.fixed_L[-len(after) :] = after, True
    return clamp


def from_infill(tokenizer: Tokenizer, text: str, length: int | None = None) -> Clamp:
    """Text with gaps, ``{mask:12}`` for twelve tokens; what follows it up to ``length`` is free.

    ``length`` defaults to the text's own. UserError on a gap that cannot be read and on a text that
    is longer than ``length``.
    """
    tokens, fixed = [], []
    end = 0
    for gap in _GAP.finditer(text):
        _append_text(tokenizer, text[end : gap.start()], tokens, fixed)
        size = gap.group(1)
        if size is not None and not re.fullmatch(r"[1-9][0-9]*", size.strip()):
            raise UserError(
                f"infill gap {gap.group()!r}: the size must be a whole number of tokens, at least 1"
            )
        size = 1 if size is None else int(size)
        tokens += [0] * size
        fixed += [False] * size
        end = gap.end()
    _append_text(tokenizer, text[end:], tokens, fixed)
    if all(fixed) and length is None:
        raise UserError("the infill text has no gap; write {mask:12} for one of twelve tokens")
    if length is not None and len(tokens) > length:
        raise UserError(
            f"infill text with its gaps ({len(tokens)} tokens): longer than the length of {length}"
        )
    clamp = free(len(tokens) if length is None else length)
    clamp.tokens_L[: len(tokens)], clamp.fixed_L[: len(tokens)] = tokens, fixed
    return clamp


def _append_text(tokenizer: Tokenizer, text: str, tokens: list[int], fixed: list[bool]) -> None:
    broken = re.search(r"\{mask[^{}]*\}?", text)
    if broken:
        raise UserError(
            f"infill gap {broken.group()!r} cannot be read; write {{mask:12}} for twelve tokens"
        )
    ids = tokenizer.encode_batch([text])[0] if text else []
    tokens += [int(i) for i in ids]
    fixed += [True] * len(ids)
