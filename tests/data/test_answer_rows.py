"""Records for fine-tuning: which tokens are given, and how rows are filled."""

import itertools
import json

import numpy as np
import pytest
from chat_toy import CHATML, LLADA, answer, tokenizer, user

from sedd.data import token_files as token_files_module
from sedd.data.answer_rows import pack_records
from sedd.data.base import hold_out, hold_out_from
from sedd.data.chat import conversation
from sedd.data.corpora import open_corpus
from sedd.data.loader import Batches
from sedd.data.packing import pack
from sedd.data.row_ranges import Cut
from sedd.data.tokenizer_sources import build_tokenizer
from sedd.data.tokenizers import Bytes
from sedd.errors import UserError

L = 48
BYTES = Bytes()
EOS = 256
PAIRS = [("ab", "cd"), ("", "x"), ("question " * 3, "answer"), ("p", "q" * 60), ("p" * 50, "q")]


def write(path, records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return open_corpus(str(path), cache_dir=path.parent)


@pytest.fixture
def pairs(tmp_path):
    """Prompts with completions: short ones, a longer and a long one, and one that is all prompt."""
    return write(tmp_path / "pairs.jsonl", [{"prompt": p, "completion": c} for p, c in PAIRS])


def packed(corpus, model, padding, tmp_path, *, length=L, split="all", answers="all"):
    return pack_records(
        corpus,
        model,
        split,
        length=length,
        padding=padding,
        answers=answers,
        cache_dir=tmp_path / "cache",
        workers=1,
    )


def expected(prompt, completion, padding, fill):
    """A record in plain Python: ids and which are scored, as a row of its own."""
    ids = [*prompt.encode(), *completion.encode(), EOS][:L]
    scored = [padding == "unified" or i >= len(prompt) for i in range(len(ids))]
    free = L - len(ids)
    return ids + list(itertools.islice(itertools.cycle(fill), free)), scored + [True] * free


def test_ends_fill_a_row_and_are_learned(pairs, tmp_path, capsys):
    rows = packed(pairs, BYTES, "eos", tmp_path)
    assert rows.num_rows == 4
    assert "1 of 5 records are longer than 48 tokens and cut, and 1 left out" in (
        capsys.readouterr().err
    )
    x0_BL, scored_BL = rows.rows(np.arange(4))
    for row, (prompt, completion) in enumerate(PAIRS[:4]):
        ids, scored = expected(prompt, completion, "eos", [EOS])
        assert x0_BL[row].tolist() == ids
        assert scored_BL[row].tolist() == scored
    check_counts(rows, x0_BL, scored_BL)


def check_counts(rows, x0_BL, scored_BL):
    """The counts are those of the rows."""
    counts = np.bincount(x0_BL[scored_BL], minlength=len(rows.counts))
    np.testing.assert_array_equal(rows.counts, counts)
    assert rows.num_tokens_total == scored_BL.sum()


def test_records_are_packed_as_segments(pairs, tmp_path):
    rows = packed(pairs, BYTES, "none", tmp_path)
    x0_BL, scored_BL, segment_BL = rows.rows(np.arange(rows.num_rows))
    texts = []
    for x0_L, scored_L, segment_L in zip(x0_BL, scored_BL, segment_BL, strict=True):
        for number in range(1, segment_L.max() + 1):
            here_L = segment_L == number
            texts.append((x0_L[here_L].tolist(), scored_L[here_L].tolist()))
        assert not scored_L[segment_L == 0].any()
    assert texts == [
        (ids[: len(p) + len(c) + 1], scored[: len(p) + len(c) + 1])
        for p, c in PAIRS[:4]
        for ids, scored in [expected(p, c, "none", [EOS])]
    ]
    assert segment_BL.max(1).tolist() == [3, 1]
    check_counts(rows, x0_BL, scored_BL)


def test_a_rainbow_follows_the_end(tmp_path):
    corpus = write(tmp_path / "c.jsonl", [{"messages": [user("a"), answer("b")]}] * 2)
    model = tokenizer(LLADA, spare=9)
    rows = packed(corpus, model, "rainbow", tmp_path, length=160)
    spare = [model.specials[f"<|reserved_token_{i}|>"] for i in range(7)]
    (x0_L, scored_L), end = (each[0] for each in rows.rows(np.array([0]))), model.eos_id
    ids, given_L = model.encode_spans(*conversation(model, [user("a"), answer("b")]))
    size = len(ids) + 1
    assert x0_L[:size].tolist() == [*ids, end]
    assert x0_L[size:].tolist() == [spare[i % 7] for i in range(160 - size)]
    assert scored_L.tolist() == [*~given_L, *[True] * (160 - len(ids))]
    check_counts(rows, *rows.rows(np.arange(2)))
    with pytest.raises(UserError, match=r"rainbow needs 7 special tokens .* 'toy' has 0"):
        packed(corpus, tokenizer(LLADA), "rainbow", tmp_path, length=160)


def test_all_tokens_are_learned_if_unified(pairs, tmp_path):
    rows = packed(pairs, BYTES, "unified", tmp_path)
    joined = [i for p, c in PAIRS for i in (*p.encode(), *c.encode(), EOS)]
    x0_BL, scored_BL = rows.rows(np.arange(rows.num_rows))
    assert x0_BL.ravel().tolist() == joined[: len(joined) // L * L]
    assert scored_BL.all()
    check_counts(rows, x0_BL, scored_BL)


def test_the_end_of_a_turn_may_be_the_end_of_a_document(tmp_path):
    """Then an answer has one of them, not two."""
    corpus = write(tmp_path / "c.jsonl", [{"messages": [user("a"), answer("b")]}])
    model = tokenizer(CHATML, eos="<|im_end|>")
    x0_BL, _, segment_BL = packed(corpus, model, "none", tmp_path, length=160).rows(np.array([0]))
    text = x0_BL[segment_BL > 0]
    assert text[-2:].tolist() == [*model.encode_batch(["b"])[0], model.eos_id]


def test_which_answers_are_learned(tmp_path):
    turns = [user("a"), answer("b"), user("c"), answer("d")]
    corpus = write(tmp_path / "c.jsonl", [{"messages": turns, "id": 3}])
    model = tokenizer(LLADA)
    for answers, learned in (("all", "b<|eot_id|>d<|eot_id|>"), ("last", "d<|eot_id|>")):
        rows = packed(corpus, model, "none", tmp_path, length=240, answers=answers)
        x0_BL, scored_BL, _ = rows.rows(np.array([0]))
        ids, _ = model.encode_spans(learned + "<|endoftext|>")
        assert x0_BL[scored_BL].tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ({"text": "a"}, "line 2: expected an object with messages, or with prompt and completion"),
        ([1], "line 2: expected an object with messages, .* got list"),
        ({"prompt": "a"}, "line 2: expected an object .* got 'prompt'"),
        ({"prompt": "a", "completion": 3}, "line 2: 'completion' is int, not text"),
        ({"messages": []}, r"line 2: messages must be a list of messages, got \[\]"),
        ({"messages": [{"role": "bot", "content": ""}]}, "line 2: messages, number 1: unknown"),
        ({"messages": [user("a")]}, "line 2: the last message must be of the role assistant"),
        ({"prompt": "\ud800", "completion": ""}, "line 2: a text holds half of a surrogate pair"),
        ({"messages": [user("a"), answer("b")]}, "line 2: tokenizer 'bytes' has no chat template"),
    ],
)
def test_a_record_that_is_none_is_named(tmp_path, second, says):
    corpus = write(tmp_path / "c.jsonl", [{"prompt": "a", "completion": "b"}, second])
    with pytest.raises(UserError, match=rf"c\.jsonl, {says}"):
        packed(corpus, BYTES, "none", tmp_path)


def test_what_reads_text_refuses_records(pairs, tmp_path):
    with pytest.raises(UserError, match="it holds records of messages or prompts, which are not"):
        pack(pairs, BYTES, "all", Cut(length=8, wrap=True), cache_dir=tmp_path)
    with pytest.raises(UserError, match=r"is made from text, and .* holds messages or prompts"):
        build_tokenizer("characters", pairs, cache_dir=tmp_path)
    named = open_corpus(f"{tmp_path / 'pairs.jsonl'}:prompt", cache_dir=tmp_path)
    assert not named.records
    assert next(named.documents("all")) == "ab"
    (tmp_path / "z.txt").write_text("text")
    mixed = open_corpus(f"{tmp_path}/*.[jt]*", cache_dir=tmp_path)
    with pytest.raises(UserError, match=r"z\.txt: other files of this corpus are JSON lines"):
        list(mixed.documents("all"))


@pytest.mark.parametrize("count", [1, 2, 8, 45])
def test_records_are_held_out_whole(count):
    records = [str(i) for i in range(count)]
    train, held = (list(hold_out(iter(records), s, whole=True)) for s in ("train", "validation"))
    if count < 20:
        assert held == records[-1:]
        assert train == (records[:-1] or records)
    else:
        assert sorted(train + held, key=int) == records
    for split, whole in (("train", train), ("validation", held)):
        for start in range(len(whole)):
            read = iter(hold_out_from(lambda n: iter(records[n:]), split, start, whole=True))
            assert list(read) == whole[start:]


def test_an_interrupted_build_goes_on(tmp_path, monkeypatch):
    """Records are tokenised once: an interruption, other workers and processes change no byte."""
    monkeypatch.setattr(token_files_module, "TASK_CHARACTERS", 200)
    records = [{"messages": [user(f"q {i}" * (i % 5)), answer(f"a {i}")]} for i in range(30)]
    corpus, model = write(tmp_path / "c.jsonl", records), tokenizer(LLADA)

    def build(place, workers, stop=None):
        made = []

        def progress(documents, tokens):
            made.append(documents)
            if stop is not None and len(made) > stop:
                raise KeyboardInterrupt

        return pack_records(
            corpus,
            model,
            "all",
            length=160,
            padding="eos",
            answers="all",
            cache_dir=tmp_path / place,
            workers=workers,
            progress=progress,
        ), made

    whole, _ = build("whole", 1)
    with pytest.raises(KeyboardInterrupt):
        build("parts", 2, stop=3)
    parts, made = build("parts", 2)
    assert made[0] > 3
    monkeypatch.setattr("sedd.data.token_workers.THREADS_CHARACTERS", 0)
    processes, _ = build("processes", 2)
    for other in (parts, processes):
        assert other.tokens.tobytes() == whole.tokens.tobytes()
        assert other.digest == whole.digest


def test_batches_have_segments(pairs, tmp_path):
    rows = packed(pairs, BYTES, "none", tmp_path)
    batch = next(Batches([(rows, 1.0)], batch_size=4, seed=0, prefetch=0))
    assert batch["segment"].shape == (4, L)
    filled = packed(pairs, BYTES, "eos", tmp_path)
    assert "segment" not in next(Batches([(filled, 1.0)], batch_size=4, seed=0, prefetch=0))
