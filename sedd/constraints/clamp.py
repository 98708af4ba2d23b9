"""Given tokens of a sequence, from a prompt and suffix or from a text with gaps.

Positions without a given token are free: samplers draw them, and leave given tokens unchanged.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sedd.data.chat import ANSWERING, Message, end_ids, render
from sedd.data.tokenizers import Tokenizer
from sedd.errors import FieldError, UserError

_GAP = re.compile(r"\{mask(?::([^{}]*))?\}")
_BROKEN_GAP = re.compile(r"\{\s*mask(?![a-z])[^{}]*\}?", re.IGNORECASE)
MAX_LENGTH = 2**20  # far above any model's: a larger length is a mistake and would fill the memory


@dataclass(frozen=True, kw_only=True)
class Clamp:
    """The given tokens of one sequence. The other positions are free: they are drawn.

    Attributes:
        tokens_L: the given tokens, 0 at free positions.
        fixed_L: whether each position is given.
        gap_starts: positions at which a gap begins directly behind another one. Without any, a gap
            is a maximal run of free positions.
        end_ids: ids of which the first one that is drawn ends an answer. Without any, the text of
            the sequence is all of it; see ``text``.
    """

    tokens_L: np.ndarray
    fixed_L: np.ndarray
    gap_starts: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """The number of positions, free ones included."""
        return len(self.tokens_L)

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """The start and the length of each gap, from left to right."""
        free_L1 = np.append(~self.fixed_L, False)
        starts_L1 = np.isin(np.arange(len(free_L1)), self.gap_starts)
        first_L1 = free_L1 & (starts_L1 | ~np.append(False, free_L1[:-1]))
        end_L1 = ~free_L1 | first_L1
        starts, ends = np.flatnonzero(first_L1), np.flatnonzero(end_L1)
        lengths = ends[np.searchsorted(ends, starts, side="right")] - starts
        return list(zip(starts.tolist(), lengths.tolist(), strict=True))

    def text(self, tokens_L: np.ndarray, tokenizer: Tokenizer) -> str:
        """The text of a drawn sequence: all of it, or for a conversation the answer alone."""
        if not self.end_ids:
            return tokenizer.decode(tokens_L.tolist())
        answer = tokens_L[~self.fixed_L]
        ends = np.flatnonzero(np.isin(answer, self.end_ids))
        return tokenizer.decode(answer[: ends[0] if len(ends) else None].tolist())


def free(length: int) -> Clamp:
    """A clamp of ``length`` free positions. Raises UserError if the length is out of range."""
    if not 1 <= length <= MAX_LENGTH:
        raise UserError(f"length must be in 1..{MAX_LENGTH}, got {length}")
    return Clamp(tokens_L=np.zeros(length, np.int32), fixed_L=np.zeros(length, bool))


def check_prefix(clamp: Clamp) -> None:
    """Raise UserError if a given token follows a free one, which a causal model cannot see."""
    if not clamp.fixed_L[: clamp.fixed_L.sum()].all():
        raise UserError(
            "this model is autoregressive and sees what is before a position only: it takes a "
            "prompt, and no text after free tokens (a suffix, or text behind a gap)"
        )


def from_prompt(tokenizer: Tokenizer, length: int, *, prompt: str = "", suffix: str = "") -> Clamp:
    """A prompt at the start and a suffix at the end of a sequence; the rest is free.

    Args:
        tokenizer: encodes the texts.
        length: the number of tokens, those of prompt and suffix included.
        prompt: text at the start.
        suffix: text at the end.

    Raises:
        UserError: the texts are longer than ``length``, or the tokenizer cannot encode one.
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
        raise UserError(
            f"{given} do not fit into the length of {length} tokens, which includes the given "
            "text; give a larger length or a shorter text"
        )
    clamp.tokens_L[: len(before)], clamp.fixed_L[: len(before)] = before, True
    if len(after):
        clamp.tokens_L[-len(after) :], clamp.fixed_L[-len(after) :] = after, True
    return clamp


def from_messages(tokenizer: Tokenizer, length: int, messages: Sequence[Message]) -> Clamp:
    """A conversation at the start of a sequence, written by the tokenizer's chat template.

    The rest is free, for an answer.

    Args:
        tokenizer: has the template and encodes the text.
        length: the number of tokens, those of the conversation included.
        messages: checked messages; the last one is no answer.

    Raises:
        UserError: the tokenizer has no template, or the template refuses the messages; the last
            message is an answer; the conversation is longer than ``length``.
    """
    if messages[-1]["role"] == ANSWERING:
        raise UserError(
            f"messages: the last one is of the role {ANSWERING}, so that no answer is left to draw"
        )
    ids, _ = tokenizer.encode_spans(render(tokenizer, messages, answer=True))
    if len(ids) > length:
        raise UserError(
            f"the conversation ({len(ids)} tokens) does not fit into the length of {length} "
            "tokens, which includes it; give a larger length"
        )
    clamp = replace(free(length), end_ids=end_ids(tokenizer))
    clamp.tokens_L[: len(ids)], clamp.fixed_L[: len(ids)] = ids, True
    return clamp


def from_infill(tokenizer: Tokenizer, text: str, length: int | None = None) -> Clamp:
    """A text with gaps: ``{mask:12}`` is a gap of twelve tokens, ``{mask}`` a gap of one.

    Adjacent gaps stay separate gaps. Positions behind the text are free. They are a gap of their
    own, or part of the last gap if the text ends with it.

    Args:
        tokenizer: encodes the text.
        text: the text with its gaps.
        length: the number of tokens, gaps included; by default that of the text.

    Raises:
        UserError: a gap is malformed, the text is longer than ``length``, or there is no gap.
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
            f"infill text with its gaps ({len(tokens)} tokens) does not fit into the length of "
            f"{length} tokens; give a larger length, a shorter text or smaller gaps"
        )
    clamp = free(len(tokens) if length is None else length)
    clamp.tokens_L[: len(tokens)], clamp.fixed_L[: len(tokens)] = tokens, fixed
    return replace(clamp, gap_starts=tuple(gap_starts))


def from_hidden(tokenizer: Tokenizer, before: str, hidden: str, after: str) -> Clamp:
    """A text with one stretch hidden: a gap of as many tokens as the stretch has.

    Each of the three parts is encoded by itself, so that no token crosses an edge of the gap.

    Args:
        tokenizer: encodes the texts.
        before: the text before the gap; may be empty.
        hidden: the text in place of which the gap is.
        after: the text behind the gap; may be empty.

    Raises:
        FieldError: the tokenizer cannot encode one of the texts, which ``field`` names.
    """
    parts = [
        _encode(tokenizer, before, "before"),
        _encode(tokenizer, hidden, "hidden", first=not before),
        _encode(tokenizer, after, "after", first=False),
    ]
    gap = np.zeros(len(parts[1]), np.int32)
    return Clamp(
        tokens_L=np.concatenate([parts[0], gap, parts[2]]).astype(np.int32),
        fixed_L=np.repeat([True, False, True], [len(part) for part in parts]),
    )


def _append_text(tokenizer: Tokenizer, text: str, tokens: list[int], fixed: list[bool]) -> None:
    """Append the tokens of a stretch of text as given; refuses a malformed gap in it."""
    broken = _BROKEN_GAP.search(text)
    if broken:
        raise UserError(
            f"infill gap {broken.group()!r} cannot be read; write {{mask:12}} for twelve tokens"
        )
    ids = _encode(tokenizer, text, "infill", first=not tokens)
    tokens += [int(i) for i in ids]
    fixed += [True] * len(ids)


def _encode(tokenizer: Tokenizer, text: str, what: str, *, first: bool = True) -> np.ndarray:
    """The token ids of a stretch of text; ``what`` is its field, for messages.

    ``first`` states that the sequence begins with it. Otherwise it is encoded as the continuation
    of other text.
    """
    if not text:
        return np.zeros(0, np.int32)
    try:
        ids = tokenizer.encode_batch([text])[0]
        return ids if first else _continued(tokenizer, text, ids)
    except UserError as error:
        raise FieldError(what, f": {error}") from error


def _continued(tokenizer: Tokenizer, text: str, ids: np.ndarray) -> np.ndarray:
    """The token ids of a text behind other text; ``ids`` are those of the text alone.

    Tokenizers such as Llama's put a space before every text that they encode. To detect it, the ids
    are decoded behind those of an anchor, a character that stands for the text before. If a space
    appears, the text is encoded together with the anchor and the anchor's ids are removed.
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
