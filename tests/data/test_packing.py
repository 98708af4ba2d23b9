"""Packed rows against the stream of tokens that they come from, and what becomes of broken ones."""

import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sedd.data import base, packing, token_files
from sedd.data.base import Corpus, digest
from sedd.data.loader import Batches
from sedd.data.packing import pack, validation_rows
from sedd.data.row_ranges import Cut
from sedd.data.tokenizer_sources import LETTERS, build_tokenizer
from sedd.data.tokenizers import Bytes, Characters, Tokenizer
from sedd.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Given(Corpus):
    """Documents given in memory."""

    name: str = "given"
    splits: tuple[str, ...] = ("train",)
    texts: tuple[str, ...]

    def _documents(self, split):
        return iter(self.texts)

    def fingerprint(self):
        return digest(self.texts)


TEXTS = ("the cat", "", "sat on the mat é", "x" * 23, "end")
WITHOUT_END = Characters.of("letters", LETTERS + "é", eos=False)


def stream(texts, tokenizer):
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    ids = [[*ids.tolist(), *end] for ids in tokenizer.encode_batch(texts)]
    return [i for document in ids for i in document]


def packed(cache, texts=TEXTS, tokenizer=None, **options):
    how = ("workers", "progress", "max_documents")
    how = {name: options.pop(name) for name in how if name in options}
    cut = Cut(**{"length": 5, "wrap": True, **options})
    corpus = Given(texts=tuple(texts))
    return pack(corpus, tokenizer or Bytes(), "train", cut, cache_dir=cache, **how)


documents = st.lists(st.text(sorted(LETTERS + "é"), max_size=30), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(documents, st.integers(1, 12), st.sampled_from([Bytes(), WITHOUT_END]))
def test_joined_documents_are_the_stream_cut_into_rows(tmp_path_factory, texts, length, tokenizer):
    cache = tmp_path_factory.mktemp("cache")
    ids = stream(texts, tokenizer)
    if len(ids) < length:
        with pytest.raises(UserError):
            packed(cache, texts, tokenizer, length=length)
        return
    rows = packed(cache, texts, tokenizer, length=length)
    x0, scored = rows.rows(np.arange(rows.num_rows))
    assert x0.shape == (len(ids) // length, length)
    assert x0.dtype == np.int32
    assert x0.ravel().tolist() == ids[: x0.size]
    assert scored.all()
    assert rows.num_tokens_total == x0.size
    check_counts(rows, x0, scored, tokenizer)


@settings(max_examples=60, deadline=None)
@given(documents, st.integers(1, 12), st.sampled_from([Bytes(), WITHOUT_END]))
def test_separate_documents_come_back_one_by_one(tmp_path_factory, texts, length, tokenizer):
    cache = tmp_path_factory.mktemp("cache")
    if not any(texts):
        with pytest.raises(UserError, match="no text"):
            packed(cache, texts, tokenizer, length=length, wrap=False)
        return
    rows = packed(cache, texts, tokenizer, length=length, wrap=False)
    x0, scored = rows.rows(np.arange(rows.num_rows))
    assert (x0[~scored] == tokenizer.pad_id).all()
    assert (np.diff(scored.astype(int), axis=1) <= 0).all()  # padding is at the end
    position = 0
    for ids in tokenizer.encode_batch(texts):
        num = -(-len(ids) // length)
        block = x0[position : position + num][scored[position : position + num]]
        assert block.tolist() == ids.tolist()
        position += num
    assert position == rows.num_rows
    assert rows.num_tokens_total == scored.sum() == sum(map(len, tokenizer.encode_batch(texts)))
    assert rows.text_characters == len("".join(texts))
    assert rows.text_bytes == len("".join(texts).encode())
    check_counts(rows, x0, scored, tokenizer)


def check_counts(rows, x0, scored, tokenizer):
    """The counts, the entropy and the size of the text, against the rows themselves."""
    counted = Counter(x0[scored].tolist())
    assert {i: n for i, n in enumerate(rows.counts.tolist()) if n} == counted
    total = counted.total()
    entropy = -sum(n / total * math.log(n / total) for n in counted.values())
    assert rows.unigram_entropy() == pytest.approx(entropy, abs=1e-12)
    table = tokenizer.token_bytes()
    spelled = b"".join(table[i] or b"" for i in x0[scored].tolist())
    assert rows.text_bytes == len(spelled)
    if tokenizer.unit == "character":
        assert rows.text_characters == len(spelled.decode())


def test_rows_may_be_asked_for_in_any_order_and_twice(tmp_path):
    for wrap in (True, False):
        rows = packed(tmp_path, wrap=wrap)
        whole, scored = rows.rows(np.arange(rows.num_rows))
        order = np.array([3, 0, 3, rows.num_rows - 1])
        x0, mask = rows.rows(order)
        assert (x0 == whole[order]).all()
        assert (mask == scored[order]).all()
        assert rows.rows(np.array([], int))[0].shape == (0, 5)
        for bad in (-1, rows.num_rows):
            with pytest.raises(IndexError, match="rows are 0"):
                rows.rows(np.array([bad]))


def test_uniform_text_has_the_entropy_of_its_alphabet(tmp_path):
    rows = packed(tmp_path, [LETTERS * 10], WITHOUT_END, length=27)
    assert rows.unigram_entropy() == pytest.approx(math.log(27))


def test_large_vocabularies_are_stored_in_32_bits(tmp_path):
    alphabet = "".join(chr(code) for code in range(0x4E00, 0x9FFF)) + "".join(
        chr(code) for code in range(0x20000, 0x2C000)
    )
    tokenizer = Characters.of("many", alphabet, eos=True)
    rows = packed(tmp_path, [alphabet[::-997]], tokenizer, length=3)
    assert tokenizer.num_tokens > 1 << 16
    assert rows.tokens.dtype == np.uint32
    assert packed(tmp_path).tokens.dtype == np.uint16
    x0, _ = rows.rows(np.arange(rows.num_rows))
    assert x0.max() > 1 << 16
    assert tokenizer.decode(x0.ravel()) == alphabet[::-997][: x0.size]


def test_long_documents_in_many_threads_are_the_same(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("the cat sat\n" * 500)
    texts = ["the cat sat\n" * 400, "on the mat " * 300, "z" * 1000, *["short"] * 50]
    corpus = Given(texts=tuple(texts))
    tokenizer = build_tokenizer("bpe:263", corpus, cache_dir=tmp_path)
    whole = packed(tmp_path / "1", texts, tokenizer, workers=1)
    monkeypatch.setattr(token_files, "TASK_CHARACTERS", 100)
    parts = packed(tmp_path / "2", texts, tokenizer, workers=4)
    assert whole.tokens.tolist() == parts.tokens.tolist() == stream(texts, tokenizer)


def test_a_tokenizer_without_bytes_counts_the_text_in_proportion(tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Lossy(Tokenizer):
        """A word an id: its length modulo 8."""

        name: str = "lossy"
        num_tokens: int = 9
        eos_id: int | None = 8
        unit: str = "token"

        def encode_batch(self, texts):
            return [np.array([len(w) % 8 for w in t.split()], np.int32) for t in texts]

        def _decode(self, ids):
            return " ".join(map(str, ids))

        def token_bytes(self):
            raise UserError("lossy")

        def to_json(self):
            return {"kind": "lossy"}

    text = "one two three four"
    rows = packed(tmp_path, [text], Lossy(), length=4, wrap=False)
    assert (rows.num_tokens_total, rows.text_characters) == (4, len(text))
    rows = packed(tmp_path, [text], Lossy(), length=2)
    assert rows.text_characters == len(text)


def test_no_more_documents_than_asked_for(tmp_path):
    rows = packed(tmp_path, max_documents=2, wrap=False)
    assert rows.num_tokens_total == len(TEXTS[0])
    assert packed(tmp_path, wrap=False).num_tokens_total > len(TEXTS[0])


def test_progress_ends_at_everything(tmp_path):
    seen = []
    packed(tmp_path, progress=lambda documents, tokens: seen.append((documents, tokens)))
    assert seen[-1] == (len(TEXTS), len(stream(TEXTS, Bytes())))


def refuse(*args):
    raise AssertionError("tokenised again")


def test_tokens_are_made_once_for_every_length(tmp_path, monkeypatch):
    packed(tmp_path)
    monkeypatch.setattr(token_files, "_build", refuse)
    assert packed(tmp_path, length=7, wrap=False).length == 7


@pytest.mark.parametrize(
    "change",
    [{"texts": ("other",) * 9}, {"tokenizer": WITHOUT_END}, {"max_documents": 3}],
)
def test_what_tokens_are_made_from_is_in_their_name(tmp_path, monkeypatch, change):
    packed(tmp_path)
    monkeypatch.setattr(token_files, "_build", refuse)
    with pytest.raises(AssertionError, match="again"):
        packed(tmp_path, **change)


def folders(cache):
    return [path for path in (cache / "packed").iterdir() if path.is_dir()]


def test_a_build_that_fails_leaves_nothing_and_the_next_succeeds(tmp_path):
    def fail(documents, tokens):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        packed(tmp_path, progress=fail)
    with pytest.raises(UserError, match="character 'ß'"):
        packed(tmp_path, ("a" * 99, "ß"), WITHOUT_END)
    assert folders(tmp_path) == []
    assert packed(tmp_path).num_rows


KILLED = """
import os, sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
from sedd.data import token_files
from test_packing import Given, packed
token_files.TASK_CHARACTERS = 50
packed(Path({cache!r}), ("many words " * 20,) * 50, progress=lambda d, t: d > 5 and os._exit(9))
"""


def test_a_build_that_is_killed_is_not_used_and_its_remains_are_removed(tmp_path, request):
    script = KILLED.format(tests=str(request.path.parent), cache=str(tmp_path))
    environment = {"PYTHONPATH": str(request.config.rootpath), "PATH": "/usr/bin:/bin"}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == 9
    [remains] = folders(tmp_path)
    assert remains.name.startswith(".")
    assert not (remains / "meta.json").exists()
    texts = ("many words " * 20,) * 50
    rows = packed(tmp_path, texts)
    assert rows.tokens.tolist() == stream(texts, Bytes())
    assert [folder.name.startswith(".") for folder in folders(tmp_path)] == [False]


def cut(folder):
    data = (folder / "tokens.bin").read_bytes()
    (folder / "tokens.bin").write_bytes(data[:-1])


def garble(folder):
    (folder / "meta.json").write_text("{")


def lose(folder):
    (folder / "ends.npy").unlink()


@pytest.mark.parametrize("damage", [cut, garble, lose])
def test_damaged_tokens_are_built_again_and_said_so(tmp_path, capsys, damage):
    packed(tmp_path)
    damage(*folders(tmp_path))
    assert capsys.readouterr().err == ""
    rows = packed(tmp_path)
    assert "damaged: made again" in capsys.readouterr().err
    assert rows.tokens.tolist() == stream(TEXTS, Bytes())
    assert len(folders(tmp_path)) == 1


def test_tokens_that_another_program_cuts_are_an_error_and_not_the_end_of_the_process(tmp_path):
    rows = packed(tmp_path)
    (folder,) = folders(tmp_path)
    os.truncate(folder / "tokens.bin", 10)
    batches = Batches([(rows, 1.0)], batch_size=2, seed=0)
    with pytest.raises(UserError, match=f"{folder}/tokens.bin were cut .*: start again, and"):
        next(batches)


def test_tokens_that_another_program_removes_are_read_on(tmp_path):
    rows = packed(tmp_path)
    (folder,) = folders(tmp_path)
    shutil.rmtree(folder)
    x0_BL, _ = rows.rows(np.arange(rows.num_rows))
    assert x0_BL.ravel().tolist() == stream(TEXTS, Bytes())[: x0_BL.size]


def build_at_once(cache, barrier, results):
    barrier.wait()
    results.put(packed(cache).tokens.tolist())


@pytest.mark.nightly
def test_processes_that_build_at_once_agree(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (tmp_path, barrier, results)
    processes = [context.Process(target=build_at_once, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert found == [stream(TEXTS, Bytes())] * 2
    assert len(folders(tmp_path)) == 1


def test_without_locks_the_first_to_finish_is_kept(tmp_path, monkeypatch):
    """A file system without locks: another process's tokens appear while these are made."""

    def no_locks(file, operation):
        raise OSError("not supported")

    monkeypatch.setattr(base.fcntl, "flock", no_locks)
    nested = []

    def other(documents, tokens):
        if not nested:
            nested.append(True)
            packed(tmp_path)

    rows = packed(tmp_path, progress=other)
    assert rows.tokens.tolist() == stream(TEXTS, Bytes())
    assert len(folders(tmp_path)) == 1


def test_a_length_beyond_the_data_names_both(tmp_path):
    with pytest.raises(
        UserError, match=r"length 1000 is longer than the data: given \(train\) has 5"
    ):
        packed(tmp_path, length=1000)
    assert packed(tmp_path, length=1000, wrap=False).num_rows == 4


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("texts", [(), ("",)])
def test_no_text_is_refused(tmp_path, texts, wrap):
    with pytest.raises(UserError, match=r"given \(train\)"):
        packed(tmp_path, texts, wrap=wrap, length=2)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "packed").write_text("a file in the way")
    with pytest.raises(UserError, match=r"cannot write the packed tokens .*/packed/"):
        packed(tmp_path)


@pytest.mark.parametrize(
    "options", [{"length": 0}, {"max_documents": 0}, {"drop_every": 0}, {"workers": 0}]
)
def test_numbers_below_one_are_refused(tmp_path, options):
    with pytest.raises(UserError, match="must be at least 1, got 0"):
        packed(tmp_path, **options)


def test_an_undeclared_split_is_refused(tmp_path):
    with pytest.raises(UserError, match="no split 'test'"):
        pack(Given(texts=TEXTS), Bytes(), "test", Cut(length=2, wrap=True), cache_dir=tmp_path)


def test_meta_says_what_was_made(tmp_path):
    packed(tmp_path)
    [folder] = folders(tmp_path)
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["num_documents"] == len(TEXTS)
    assert meta["text_characters"] == len("".join(TEXTS))
    assert meta["text_bytes"] == len("".join(TEXTS).encode())
    assert meta["tokenizer"] == Bytes().fingerprint()
    assert sum(meta["counts"]) == meta["num_tokens"] == len(stream(TEXTS, Bytes()))


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 250))
def test_validation_rows_are_spread_evenly(num_rows, max_rows):
    rows = packing.Packed(
        name="",
        num_rows=num_rows,
        length=1,
        num_tokens_total=num_rows,
        text_characters=0,
        text_bytes=0,
        counts=np.ones(1, int),
        pad_id=0,
        tokens=np.zeros(num_rows, np.uint16),
        spans=None,
    )
    chosen = validation_rows(rows, max_rows)
    assert len(chosen) == min(num_rows, max_rows)
    assert chosen[0] == 0
    gaps = np.diff([*chosen, num_rows])
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1
    assert validation_rows(rows, None).tolist() == list(range(num_rows))


@pytest.mark.parametrize(
    "texts", [("the cbt", *TEXTS[1:]), ("the cat", "", "sat on the mat é", "x" * 22, "endx")]
)
def test_the_digest_tells_texts_of_equal_size_apart(tmp_path, texts):
    """Another letter; the same letters with a document's end elsewhere."""
    here = packed(tmp_path)
    assert packed(tmp_path, length=3, wrap=False).digest == here.digest != ""
    assert packed(tmp_path, texts).digest != here.digest
    [meta] = [p for p in tmp_path.glob("packed/*/meta.json") if here.digest in p.read_text()]
    older = json.loads(meta.read_text())
    del older["digest"]  # as versions wrote it that did not record one
    meta.write_text(json.dumps(older))
    assert packed(tmp_path).digest == here.digest
