"""The denoising trace: one self-contained HTML page that plays how sequences were sampled.

``trace.html`` is the template: a script that replays the frames, with places for the data. The data
hold each row's first frame and then only the tokens that change from one frame to the next, so that
a sequence of 1024 tokens over 1024 steps stays small. The page needs no network and no server. A
model's texts may contain anything: they enter the page escaped.
"""

import html
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from sedd.files import write_text

PIECES = 8  # tokens of one character at most: four bytes, which may begin and end in other tokens
_PLACEHOLDER = re.compile(r"\[\[(title|description|final|data)\]\]")
# Tab and newline are the only control characters that HTML text may hold; a lone surrogate (a token
# text may hold one) has no UTF-8.
_NOT_HTML_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True, kw_only=True)
class TraceRow:
    """The frames of one sequence, from the start to the result.

    Attributes:
        title: names the sequence on the page, e.g. "request 3 · seed 17".
        frames_TL: token ids [T+1, L]; frame 0 is the start (all mask, or noise on a uniform
            process), the last is the result.
        fixed_L: bool [L]: the clamped positions (prompt, suffix, infill context); they must hold
            one token throughout.
        spans: (start, length, regex) of the constrained positions.

    Raises:
        ValueError: a shape or dtype is wrong, an id is negative, or a clamped position changes.
    """

    title: str
    frames_TL: np.ndarray
    fixed_L: np.ndarray
    spans: Sequence[tuple[int, int, str]] = ()

    def __post_init__(self) -> None:
        where = f"trace row {self.title!r}"
        if self.frames_TL.ndim != 2 or 0 in self.frames_TL.shape:
            raise ValueError(
                f"{where}: frames_TL must be [T+1, L] with at least one frame and one position, "
                f"got shape {self.frames_TL.shape}"
            )
        if not np.issubdtype(self.frames_TL.dtype, np.integer):
            raise ValueError(f"{where}: frames_TL must hold integers, got {self.frames_TL.dtype}")
        if self.frames_TL.min() < 0:
            raise ValueError(f"{where}: token ids must be >= 0, got {self.frames_TL.min()}")
        length = self.frames_TL.shape[1]
        if self.fixed_L.shape != (length,) or self.fixed_L.dtype != np.bool_:
            raise ValueError(
                f"{where}: fixed_L must be bool of shape ({length},), "
                f"got {self.fixed_L.dtype} of shape {self.fixed_L.shape}"
            )
        moved = np.argwhere((self.frames_TL != self.frames_TL[0]) & self.fixed_L)
        if len(moved):
            frame, position = moved[0]
            raise ValueError(f"{where}: fixed position {position} changes at frame {frame}")


def write_trace(
    path: Path,
    rows: Sequence[TraceRow],
    *,
    decode: Callable[[Sequence[int]], str],
    mask_id: int | None,
    eos_id: int | None,
    description: Mapping[str, str],
    times_T1: Sequence[float] | None,
) -> None:
    """Write the page that plays the rows; see ``write_whole`` for how the file is written.

    Args:
        path: the HTML file; missing folders are made.
        rows: at least one; without ``times_T1`` they may differ in their numbers of frames.
        decode: returns the text of consecutive tokens, in which an incomplete character is the
            replacement character. It is never called with ``mask_id`` or ``eos_id``.
        mask_id: the mask token, drawn as a block; None on a uniform process.
        eos_id: the end-of-sequence token, drawn as a mark; None where there is none.
        description: names and values shown above the text, e.g. ``{"sampler": "tweedie"}``.
        times_T1: the diffusion time of each frame, in [0, 1]; None hides it.

    Raises:
        ValueError: there is no row, or the number of times is not that of the frames.
        UserError: the file cannot be written.
    """
    path = Path(path)
    _check(rows, times_T1)
    data = _encode(rows, decode, mask_id, eos_id, times_T1)
    values = {
        "title": _text(rows[0].title if len(rows) == 1 else "Denoising trace"),
        "description": "".join(
            f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>"
            for name, value in description.items()
        ),
        "final": "".join(_final_text(row, data) for row in data["rows"]),
        "data": _script_json(data),
    }
    template = resources.files("sedd.commands").joinpath("trace.html").read_text(encoding="utf-8")
    # One pass: a placeholder inside a value is not looked at again.
    page = _PLACEHOLDER.sub(lambda match: values[match[1]], template)

    write_text(path, page)


def _check(rows: Sequence[TraceRow], times_T1: Sequence[float] | None) -> None:
    """Raise ValueError if there is no row, or the times do not go with the frames."""
    if not rows:
        raise ValueError("a trace needs at least one row, got none")
    if times_T1 is None:
        return
    for row in rows:
        if len(row.frames_TL) != len(times_T1):
            raise ValueError(
                f"times_T1 must give a time for each frame: trace row {row.title!r} has "
                f"{len(row.frames_TL)} frames, got {len(times_T1)} times"
            )
    for frame, time in enumerate(times_T1):
        if not 0 <= time <= 1:  # also refuses nan
            raise ValueError(f"times_T1 must lie in [0, 1], got {time} at frame {frame}")


def _encode(
    rows: Sequence[TraceRow],
    decode: Callable[[Sequence[int]], str],
    mask_id: int | None,
    eos_id: int | None,
    times_T1: Sequence[float] | None,
) -> dict[str, Any]:
    """Make the page's data, short as JSON.

    Tokens are numbered anew by frequency, the most frequent first, so that most numbers have one or
    two digits. The changes of a frame are one flat list [gap, token, gap, token, …] in the order of
    positions: a gap is the distance to the position of the previous change, at first to position 0.
    """
    written = [_changes(row.frames_TL) for row in rows]
    starts = [row.frames_TL[0] for row in rows]
    ids, counts = np.unique(
        np.concatenate([*starts, *(token_K for _, _, token_K in written)]), return_counts=True
    )
    by_count = np.argsort(-counts, kind="stable")
    number = np.empty(len(ids), np.int64)
    number[by_count] = np.arange(len(ids))

    def numbered(tokens: np.ndarray) -> np.ndarray:
        return number[np.searchsorted(ids, tokens)]

    vocabulary = [int(i) for i in ids[by_count]]
    special = {mask_id: "[mask]", eos_id: "[eos]"}
    texts = {i: special[i] if i in special else decode([i]) for i in vocabulary}
    encoded = []
    for row, (frame_K, position_K, token_K) in zip(rows, written, strict=True):
        steps = len(row.frames_TL) - 1
        first_T = np.searchsorted(frame_K, np.arange(steps + 1))
        gap_K = np.diff(position_K, prepend=0)
        leading = first_T[:-1][first_T[:-1] < first_T[1:]]
        gap_K[leading] = position_K[leading]
        pairs_K2 = np.stack([gap_K, numbered(token_K)], axis=1)
        encoded.append(
            {
                "title": row.title,
                "fixed": np.flatnonzero(row.fixed_L).tolist(),
                "spans": [[start, start + size, regex] for start, size, regex in row.spans],
                "joined": _joined(row.frames_TL[-1].tolist(), texts, special.keys(), decode),
                "start": numbered(row.frames_TL[0]).tolist(),
                "changes": [
                    pairs_K2[first_T[t] : first_T[t + 1]].ravel().tolist() for t in range(steps)
                ],
            }
        )
    return {
        "ids": vocabulary,
        "texts": [texts[i] for i in vocabulary],
        "mask": vocabulary.index(mask_id) if mask_id in vocabulary else None,
        "eos": vocabulary.index(eos_id) if eos_id in vocabulary else None,
        "times": None if times_T1 is None else [round(float(t), 6) for t in times_T1],
        "rows": encoded,
    }


def _joined(
    ids: Sequence[int],
    texts: Mapping[int, str],
    special: Collection[int | None],
    decode: Callable[[Sequence[int]], str],
) -> list[tuple[int, str]]:
    """Find the characters of the final text whose bytes are spread over several tokens.

    Each token of such a character has a replacement character as its own text. Of consecutive
    tokens of this kind the fewest that decode without one are shown as one character.

    Returns:
        Positions and the text to show there: the character at its first token, nothing at the
        others.
    """
    broken = [i not in special and "\ufffd" in texts[i] for i in ids]
    found, start = [], 0
    while start < len(ids):
        end = start + 1
        while end < len(ids) and all(broken[start : end + 1]) and end - start < PIECES:
            end += 1
            if "\ufffd" not in (text := decode(ids[start:end])):
                found += [(start, text), *((p, "") for p in range(start + 1, end))]
                break
        else:
            end = start + 1
        start = end
    return found


def _changes(frames_TL: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find every change of a token between frames, ordered by step and then position.

    Returns:
        The step, the position and the new token of each of the K changes.
    """
    frame_K, position_K = np.nonzero(frames_TL[1:] != frames_TL[:-1])
    return frame_K, position_K, frames_TL[frame_K + 1, position_K]


def _final_text(row: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """Make the HTML that a browser without scripts shows of a row: its last frame as text."""
    tokens = list(row["start"])
    for flat in row["changes"]:
        for position, token in zip(np.cumsum(flat[::2]), flat[1::2], strict=True):
            tokens[position] = token
    own = dict(row["joined"])
    final = "".join(own.get(p, data["texts"][token]) for p, token in enumerate(tokens))
    return f'<h2>{_text(row["title"])}</h2><div class="plain">{_text(final)}</div>'


def _text(value: str) -> str:
    """Escape a text for HTML, and replace the characters that HTML cannot hold."""
    return html.escape(_NOT_HTML_TEXT.sub("\ufffd", value))


def _script_json(value: Any) -> str:
    """Write JSON for a script element: ASCII, without the characters that could end the element."""
    encoded = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return encoded.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
