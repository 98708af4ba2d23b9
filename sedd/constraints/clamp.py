"""Infilling: given tokens at any position, and the gaps between them, which are drawn."""

import re
from dataclasses import dataclass, replace

import numpy as np

from sedd.data.tokenizers import Tokenizer
from sedd.errors import UserError

_GAP = re.compile(r"\{mask(?::([^{}]*))?\}")
_BROKEN_GAP = re.compile(r"\{\s*mask(?![a-z])[^{}]*\}?", re.IGNORECASE)
MAX_LENGTH = 2**20  # far above any model's; more than that is a mistake that would fill the memory


@dataclass(frozen=True, kw_only=True)
class Clamp:
    """Given tokens ``tokens_L`` where ``fixed_L``; the other positions (0 there) are drawn.

    A gap is a maximal run of free positions; ``gap_starts`` are the positions at which another gap
    begins although the position before is free as well.
    """

    tokens_L: np.ndarray
    fixed_L: np.ndarray
    gap_starts: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Positions, free ones included."""
        return len(self.tokens_L)

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """Start and length of every gap."""
        free_L1 = np.append(~self.fixed_L, False)
        starts_L1 = np.isin(np.arange(len(free_L1)), self.gap_starts)
        first_L1 = free_L1 & (starts_L1 | ~np.append(False, free_L1[:-1]))
        end_L1 = ~free_L1 | first_L1
        starts, ends = np.flatnonzero(first_L1), np.flatnonzero(end_L1)
        lengths = ends[np.searchsorted(ends, starts, side="right")] - starts
        return list(zip(starts.tolist(), lengths.tolist(), strict=True))


def free(length: int) -> Clamp:
    """A clamp with no given tokens. Raises UserError on a length out of range."""
    if not 1 <= length <= MAX_LENGTH:
        raise UserError(f"length must be in 1..{MAX_LENGTH}, got {length}")
    return Clamp(tokens_L=np.zeros(length, np.int32), fixed_L=np.zeros(length, bool))


def check_prefix(clamp: Clamp) -> None:
    """Raise UserError if a given token follows a free one: a causal model would not see it."""
    if not clamp.fixed_L[: clamp.fixed_L.sum()].all():
        raise UserError(
            "this model is autoregressive and sees what is before a position only: it takes a "
            "prompt, and no text after free tokens (a suffix, or text behind a gap)"
        )


def from_prompt(tokenizer: Tokenizer, length: int, *, prompt: str = "", suffix: str = "") -> Clamp:
    """A prompt at the start and a suffix at the end of ``length`` tokens, free between them.

    Raises UserError if they do not fit, or hold what the tokenizer cannot encode.
    """
    clamp = free(length)
    before = _encode(tokenizer, prompt, "prompt")
    after = _encode(tokenizer, suffix, "suffix", first=False)
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
    """Text with gaps: ``{mask:12}`` is a gap of twelve tokens, ``{mask}`` of one.

    Gaps that touch stay apart. ``length`` defaults to the text's own; positions behind the text are
    free, and belong to the last gap where the text ends with one. Raises UserError on a gap that
    cannot be read and on a text that is longer than ``length``.
    """
    tokens, fixed, gap_starts = [], [], []
    end = 0
    for gap in _GAP.finditer(text):
        _append_text(tokenizer, text[end : gap.start()], tokens, fixed)
        size = gap.group(1)
        if size is not None and not re.fullmatch("[1-9][0-9]{0,5}", size.strip()):
            raise UserError(
                f"infill gap {gap.group()!r}: the size must be a whole number of tokens, "
                "from 1 to 999999"
            )
        size = 1 if size is None else int(size)
        if fixed and not fixed[-1]:
            gap_starts.append(len(tokens))
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
    return replace(clamp, gap_starts=tuple(gap_starts))


def _append_text(tokenizer: Tokenizer, text: str, tokens: list[int], fixed: list[bool]) -> None:
    broken = _BROKEN_GAP.search(text)
    if broken:
        raise UserError(
            f"infill gap {broken.group()!r} cannot be read; write {{mask:12}} for twelve tokens"
        )
    ids = _encode(tokenizer, text, "infill text", first=not tokens)
    tokens += [int(i) for i in ids]
    fixed += [True] * len(ids)


def _encode(tokenizer: Tokenizer, text: str, what: str, *, first: bool = True) -> np.ndarray:
    """The ids of a stretch of text, as in the middle of a text where it is not the first one."""
    if not text:
        return np.zeros(0, np.int32)
    try:
        ids = tokenizer.encode_batch([text])[0]
        return ids if first else _continued(tokenizer, text, ids)
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


def _continued(tokenizer: Tokenizer, text: str, ids: np.ndarray) -> np.ndarray:
    """The ids of a text behind other text; ``ids`` are those of the text alone.

    Tokenizers such as Llama's put a space before every text that they encode. It shows when the
    ids are decoded behind those of an anchor; the text is then encoded together with the anchor,
    and the anchor's ids are taken off.
    """
    for anchor in ("\n", ".", "a", "1"):
        try:
            head, whole = tokenizer.encode_batch([anchor, anchor + text])
        except UserError:  # a character that the tokenizer does not have
            continue
        before = tokenizer.decode(head.tolist())
        if tokenizer.decode([*head.tolist(), *ids.tolist()]) == before + text:
            return ids
        tail = whole[len(head) :]
        joined = np.array_equal(whole[: len(head)], head)
        if joined and tokenizer.decode([*head.tolist(), *tail.tolist()]) == before + text:
            return tail
    return ids
