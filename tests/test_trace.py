"""The trace page: its data replays to the frames, and no text gets out of its place."""

import html
import html.parser
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from sedd.commands.trace import TraceRow, write_trace
from sedd.data.tokenizers import Bytes
from sedd.errors import UserError

HOSTILE = [
    "</script><script>alert(1)</script>",
    "</script x",  # ends a script element as well
    "<!--<script ",
    "<img src=https://example.invalid/x onerror=alert(1)>",
    "\" ' ` \\",
    "\u2028\u2029",
    "\x00\x07\x1b\x7f\x85",
    "\n",
    "\t ",
    "\ufffd",
    "\ud83d",  # half of a surrogate pair: has no UTF-8
    "🙂",
    "\u202eabc",
    "&amp;",
    "[[data]]",
    "[[title]]",
    r"\1\g<0>\u003c",
    "",
]


class _Page(html.parser.HTMLParser):
    """The page as a browser would cut it up: elements with their attributes, scripts, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text: dict[str, str] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if self._open and self._open[-1] == "script":
            self.scripts[-1] += data
        elif self._open:
            tag = self._open[-1]
            self.text[tag] = self.text.get(tag, "") + data


def _random_row(seed: int, steps: int, length: int, vocabulary: int, title: str = "") -> TraceRow:
    rng = np.random.default_rng(seed)
    frames_TL = rng.integers(0, vocabulary, (steps + 1, length))
    keep_TL = rng.random((steps, length)) < 0.7  # so that most positions stay, some frames all
    keep_TL[rng.random(steps) < 0.3] = True
    for t in range(steps):
        frames_TL[t + 1] = np.where(keep_TL[t], frames_TL[t], frames_TL[t + 1])
    fixed_L = rng.random(length) < 0.3
    frames_TL[:, fixed_L] = frames_TL[0, fixed_L]
    return TraceRow(title=title or f"row {seed}", frames_TL=frames_TL, fixed_L=fixed_L)


def _write(path: Path, rows, **changes) -> str:
    options = {
        "decode": lambda ids: "".join(f" t{token}" for token in ids),
        "mask_id": None,
        "eos_id": None,
        "description": {},
        "times_T1": None,
    }
    write_trace(path, rows, **(options | changes))
    return path.read_text(encoding="utf-8")


def _data(page: str) -> dict:
    (found,) = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    return json.loads(found)


def _replay(data: dict, row: dict) -> np.ndarray:
    """Token ids [T+1, L] from the page's data, as the page's script reads it."""
    frames = [list(row["start"])]
    for flat in row["changes"]:
        frame, position = list(frames[-1]), 0
        for gap, token in zip(flat[::2], flat[1::2], strict=True):
            position += gap
            frame[position] = token
        frames.append(frame)
    return np.asarray(data["ids"])[np.asarray(frames)]


@pytest.mark.parametrize("steps", [0, 1, 40])
@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_data_replays_to_the_frames(tmp_path, steps, dtype):
    rows = [_random_row(seed, steps, length, 50) for seed, length in ((0, 1), (1, 33), (2, 7))]
    rows = [
        TraceRow(title=row.title, frames_TL=row.frames_TL.astype(dtype), fixed_L=row.fixed_L)
        for row in rows
    ]
    times = np.linspace(1, 0, steps + 1)
    data = _data(_write(tmp_path / "trace.html", rows, mask_id=49, eos_id=3, times_T1=times))
    for row, encoded in zip(rows, data["rows"], strict=True):
        np.testing.assert_array_equal(_replay(data, encoded), row.frames_TL)
        np.testing.assert_array_equal(encoded["fixed"], np.flatnonzero(row.fixed_L))
        assert encoded["title"] == row.title
    np.testing.assert_allclose(data["times"], times, atol=1e-6)
    used = np.unique(np.concatenate([row.frames_TL.ravel() for row in rows]))
    assert sorted(data["ids"]) == used.tolist()
    for special, token in (("mask", 49), ("eos", 3)):
        assert data[special] == (data["ids"].index(token) if token in used else None)


def test_only_changes_are_stored(tmp_path):
    frames_TL = np.full((4, 6), 9)
    frames_TL[1:, 4] = 5
    frames_TL[3:, [1, 2]] = 6
    row = TraceRow(title="r", frames_TL=frames_TL, fixed_L=np.zeros(6, bool))
    data = _data(_write(tmp_path / "trace.html", [row]))
    five, six = data["ids"].index(5), data["ids"].index(6)
    assert data["rows"][0]["changes"] == [[4, five], [], [1, six, 1, six]]


def test_a_long_uniform_trace_stays_small(tmp_path):
    rng = np.random.default_rng(0)
    frames_TL = np.empty((1025, 1024), np.int64)
    frames_TL[0] = rng.integers(0, 50257, 1024)
    for t in range(1024):  # about twenty changes at each position
        moved_L = rng.random(1024) < 20 / 1024
        frames_TL[t + 1] = np.where(moved_L, rng.integers(0, 50257, 1024), frames_TL[t])
    row = TraceRow(title="long", frames_TL=frames_TL, fixed_L=np.zeros(1024, bool))
    _write(tmp_path / "trace.html", [row], times_T1=np.linspace(1, 0, 1025))
    assert (tmp_path / "trace.html").stat().st_size < 2e6


def test_the_page_fetches_nothing(tmp_path):
    page = _Page(_write(tmp_path / "trace.html", [_random_row(0, 5, 9, 4)]))
    for tag, attributes in page.elements:
        assert tag not in {"iframe", "object", "embed", "img", "base", "audio", "video"}
        for name in ("src", "href", "xlink:href", "srcset", "action", "poster"):
            assert attributes.get(name) in {None, "data:,"}, (tag, attributes)
    policies = [a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a]
    assert len(policies) == 1
    assert "default-src 'none'" in (policies[0] or "")
    source = (tmp_path / "trace.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", source)


def test_hostile_text_stays_text(tmp_path):
    frames_TL = np.stack([np.roll(np.arange(len(HOSTILE)), 1), np.arange(len(HOSTILE))])
    plain = _Page(_write(tmp_path / "plain.html", [_random_row(0, 3, 4, 3)], description={"k": ""}))
    for text in HOSTILE:
        row = TraceRow(title=text, frames_TL=frames_TL, fixed_L=np.zeros(len(HOSTILE), bool))
        source = _write(
            tmp_path / "trace.html",
            [row],
            decode=lambda ids: "".join(HOSTILE[token] for token in ids),
            description={text: text},
        )
        page = _Page(source)
        assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
        assert len(page.scripts) == len(plain.scripts)
        data = _data(source)
        assert data["rows"][0]["title"] == text
        assert [data["texts"][data["ids"].index(i)] for i in range(len(HOSTILE))] == HOSTILE
        np.testing.assert_array_equal(_replay(data, data["rows"][0]), frames_TL)
        shown = re.sub("[\x00\x07\x1b\x7f\x85\u2028\u2029\ud83d]", "\ufffd", text)
        assert page.text.get("dt", "") == page.text.get("dd", "") == shown
        # Browsers end a script at "</script x" too, which Python's parser reads over.
        assert not re.search("[<>&]", source.split(' id="trace-data">')[1].split("</script>\n")[0])
        # Nothing that a browser, an editor or a terminal would act on is left in the file.
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]", source)


def test_the_last_frame_is_readable_without_scripts(tmp_path):
    words = [" never", "The", " sea", "\n", " <sleeps>", " eos's", " mask's"]
    frames_TL = np.array([[6] * 6, [1, 2, 0, 3, 6, 6], [1, 2, 0, 4, 3, 5]])
    row = TraceRow(title="a & b", frames_TL=frames_TL, fixed_L=np.zeros(6, bool))
    source = _write(
        tmp_path / "trace.html",
        [row],
        decode=lambda ids: "".join(words[token] for token in ids),
        mask_id=6,
        eos_id=5,
    )
    (found,) = re.findall(r'<div class="plain">(.*?)</div>', source, re.DOTALL)
    assert html.unescape(found) == "The sea never <sleeps>\n[eos]"
    assert "<h2>a &amp; b</h2>" in source


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a “b” c", "a “b” c"),
        ("“”é国👩", "“”é国👩"),
        ("🇩🇪x\n क", "🇩🇪x\n क"),
        (b"a\xe2\x80\xc3\xa9", "a\ufffd\ufffdé"),  # bytes that are no character keep a sign each
        (b"\x80\x80\x80", "\ufffd" * 3),
    ],
)
def test_characters_of_several_tokens_are_whole(tmp_path, text, shown):
    ids = list(text if isinstance(text, bytes) else text.encode())
    frames_TL = np.array([[256] * len(ids), ids])
    row = TraceRow(title="r", frames_TL=frames_TL, fixed_L=np.zeros(len(ids), bool))
    options = {"mask_id": 256, "decode": Bytes().decode}
    source = _write(tmp_path / "trace.html", [row], **options)
    (found,) = re.findall(r'<div class="plain">(.*?)</div>', source, re.DOTALL)
    assert html.unescape(found) == shown
    data = _data(source)
    own = dict(map(tuple, data["rows"][0]["joined"]))
    texts = [own.get(p, data["texts"][data["ids"].index(i)]) for p, i in enumerate(ids)]
    assert "".join(texts) == shown


def test_special_tokens_need_no_text(tmp_path):
    def text(ids: list[int]) -> str:
        if {7, 8} & set(ids):
            raise IndexError(ids)
        return "x"

    row = TraceRow(
        title="r", frames_TL=np.array([[7, 7], [1, 7], [1, 8]]), fixed_L=np.zeros(2, bool)
    )
    data = _data(_write(tmp_path / "trace.html", [row], decode=text, mask_id=7, eos_id=8))
    assert data["texts"][data["mask"]] == "[mask]"
    assert data["texts"][data["eos"]] == "[eos]"


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "trace.html"
    row = _random_row(0, 3, 4, 3)
    old = _write(path, [row])

    def broken(*_):
        raise OSError("no space left")

    def no_text(ids: list[int]) -> str:
        raise KeyError(ids)

    with pytest.raises(KeyError):
        _write(path, [row], decode=no_text)
    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(UserError, match=r"cannot write .*trace\.html: no space left"):
        _write(path, [row], description={"new": "yes"})
    assert path.read_text(encoding="utf-8") == old
    assert [p.name for p in tmp_path.iterdir()] == ["trace.html"]
    monkeypatch.undo()
    assert _write(path, [row], description={"new": "yes"}) != old


@pytest.mark.parametrize(
    ("frames", "fixed", "message"),
    [
        (np.zeros(3, int), np.zeros(3, bool), r"frames_TL must be \[T\+1, L\].*\(3,\)"),
        (np.zeros((0, 3), int), np.zeros(3, bool), r"at least one frame.*\(0, 3\)"),
        (np.zeros((2, 0), int), np.zeros(0, bool), r"one position.*\(2, 0\)"),
        (np.zeros((2, 3)), np.zeros(3, bool), "must hold integers, got float64"),
        (np.full((2, 3), -1), np.zeros(3, bool), "ids must be >= 0, got -1"),
        (np.zeros((2, 3), int), np.zeros(2, bool), r"shape \(3,\), got bool of shape \(2,\)"),
        (np.zeros((2, 3), int), np.zeros(3, int), "must be bool"),
        (np.array([[0, 1], [0, 2]]), np.array([True, True]), "fixed position 1 changes at frame 1"),
    ],
)
def test_a_row_checks_itself(frames, fixed, message):
    with pytest.raises(ValueError, match=rf"trace row 'seven'.*{message}"):
        TraceRow(title="seven", frames_TL=frames, fixed_L=fixed)


@pytest.mark.parametrize(
    ("rows", "times", "message"),
    [
        ([], None, "at least one row"),
        ([_random_row(0, 3, 4, 3, "six")], [1, 0.5, 0], "'six' has 4 frames, got 3 times"),
        ([_random_row(0, 1, 4, 3)], [1.5, 0], "got 1.5 at frame 0"),
        ([_random_row(0, 1, 4, 3)], [1, float("nan")], "got nan at frame 1"),
    ],
)
def test_write_trace_checks_its_arguments(tmp_path, rows, times, message):
    with pytest.raises(ValueError, match=message):
        _write(tmp_path / "trace.html", rows, times_T1=times)
    assert not list(tmp_path.iterdir())


def test_rows_may_differ_in_frames_without_times(tmp_path):
    rows = [_random_row(0, 3, 4, 3), _random_row(1, 8, 5, 3)]
    data = _data(_write(tmp_path / "trace.html", rows))
    assert [len(row["changes"]) for row in data["rows"]] == [3, 8]
    assert data["times"] is None
