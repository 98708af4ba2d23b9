"""Block models from Python and the command line: pieces of a stream, and the commands."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_run
from chat_toy import CHATML, tokenizer, user
from tiers import nightly

import sedd
from sedd.constraints.clamp import free
from sedd.data.chat import end_ids, render
from sedd.errors import FieldError, UserError
from sedd.networks.mesh import device_mesh
from sedd.sampling.by_block import _next_block, _Reader

PROMPTS = ["the cat", "", "a"]  # 7 tokens: the second block begins with given ones


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text and a block model of it."""
    place = tmp_path_factory.mktemp("block")
    (place / "my.txt").write_text(tiny_run.text())
    config = tiny_run.config("block", corpus=str(place / "my.txt"))
    tiny_run.make_run(place / "runs" / "block", config)
    return place


@pytest.fixture(scope="module")
def model(place):
    return sedd.load(place / "runs" / "block")


@pytest.mark.parametrize("stop", [None, nightly(4)])
def test_pieces_join_to_the_sample(model, stop):
    """By two programs, whatever the prompts, the seed and the lengths of one padded size."""
    before = _next_block._cache_size()
    for seed, prompts, length in ((0, PROMPTS, 22), (1, ["the cat sat on", "", "my dog "], 21)):
        whole = sedd.sample(model, seed, prompt=prompts, length=length, stop=stop)
        pieces = list(sedd.stream(model, seed, prompt=prompts, length=length, stop=stop))
        for b in range(3):
            tokens = np.concatenate([piece.tokens[b] for piece in pieces])
            np.testing.assert_array_equal(tokens, whole.tokens[b])
            assert "".join(piece.text[b] for piece in pieces) == whole.text[b]
        np.testing.assert_array_equal(pieces[-1].calls, whole.calls)
        assert pieces[-1].done.all()
        assert not pieces[0].done.any()
        if stop is None:
            assert [len(piece.tokens[1]) for piece in pieces] == [4] * 5 + [length - 20]
            final = np.cumsum([len(piece.tokens[0]) for piece in pieces])
            assert (final % 4 == 0)[final < length].all()
    assert _next_block._cache_size() == before + 1


@pytest.mark.nightly
def test_several_devices_draw_the_same(place, model):
    spread = sedd.load(place / "runs" / "block", mesh=device_mesh(jax.devices()[:2]))
    ours, theirs = (
        list(sedd.stream(each, 3, num=3, length=8, inner="confidence")) for each in (model, spread)
    )
    assert [piece.text for piece in ours] == [piece.text for piece in theirs]


@pytest.mark.nightly
def test_a_model_without_blocks_streams_if_it_is_asked_to(tmp_path):
    tiny_run.make_run(tmp_path / "radd", tiny_run.config("radd"))
    radd = sedd.load(tmp_path / "radd")
    with pytest.raises(FieldError, match=r"must be semi_autoregressive, .* got event_jump"):
        sedd.stream(radd, 0)
    options = {"sampler": "semi_autoregressive", "block": 5, "prompt": "the"}
    for guided in ({}, {"guidance": 1.0}):
        whole = sedd.sample(radd, 0, **options, **guided)
        pieces = list(sedd.stream(radd, 0, **options, **guided))
        assert "".join(piece.text[0] for piece in pieces) == whole.text[0]
        assert [len(piece.tokens[0]) for piece in pieces] == [8, 4]
        np.testing.assert_array_equal(pieces[-1].calls, whole.calls)


@dataclasses.dataclass
class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def test_a_character_of_several_tokens_comes_when_it_is_whole():
    x_L = np.frombuffer("aé€b€".encode()[:-1], np.uint8).astype(np.int32)
    reader = _Reader(free(len(x_L)), Bytes())
    found = [reader.read(x_L, n, done=n == len(x_L)) for n in range(1, len(x_L) + 1)]
    assert [text for _, text in found] == ["a", "", "é", "", "", "€", "b", "", "\ufffd"]
    np.testing.assert_array_equal(np.concatenate([tokens for tokens, _ in found]), x_L)


def test_mistakes_are_named_before_anything_is_drawn(model):
    with pytest.raises(FieldError, match="block must be that of the model, 4, got 3"):
        sedd.stream(model, 0, block=3)
    with pytest.raises(UserError, match="'event_jump' cannot draw from a block model by itself"):
        sedd.sample(model, 0, sampler="event_jump")
    with pytest.raises(UserError, match="a block model draws its blocks from left to right"):
        sedd.price(model, np.zeros((2, 12), np.int32))


@pytest.mark.nightly
def test_an_answer_ends_with_the_block_in_which_its_end_is_drawn(tmp_path):
    """Its pieces join to the answer, without what follows the end."""
    chat = tokenizer(CHATML)
    config = tiny_run.config("block", length=160)
    tiny_run.make_run(tmp_path / "chat", config, tokenizer=chat, seed=4)
    model, asked = sedd.load(tmp_path / "chat"), {"messages": [user("Hi")], "temperature": 50.0}
    whole = sedd.sample(model, 1, num=8, **asked)
    pieces = list(sedd.stream(model, 1, num=8, **asked))
    given = len(chat.encode_spans(render(chat, [user("Hi")], answer=True))[0])
    ended = 0
    for b in range(8):
        assert "".join(piece.text[b] for piece in pieces) == whole.text[b]
        ends = np.flatnonzero(np.isin(whole.tokens[b][given:], end_ids(chat)))
        last = 160 if not len(ends) else (given + ends[0]) // 4 * 4 + 4
        assert whole.calls[b] == last - given
        ended += last < 160
    assert ended


# ---------------------------------------------------------------- commands


def call(place, name, *flags):
    return tiny_run.call(name, "--checkpoint", place / "runs" / "block", *flags)


@pytest.mark.nightly
def test_a_block_model_is_trained_evaluated_and_sampled(place):
    outcome = tiny_run.call(
        *("train", "--workdir", place / "trained", *tiny_run.TINY, "--training.steps", 2),
        *("--data.corpus", place / "my.txt", "--evaluation.max-sequences", 8),
        *("--parameterization", "block", "--parameterization.block", 4, "--objective", "block"),
    )
    assert outcome.code == 0, outcome.err
    assert "validation bound at step 2" in outcome.out
    assert "least variance at levels " in outcome.out
    again = ("--training.steps", 3, "--objective.min-level", 0.4, "--objective.max-level", 0.9)
    outcome = tiny_run.call(
        *("train", "--workdir", place / "trained", "--config", place / "trained" / "config.json"),
        *again,
    )
    assert outcome.code == 0, outcome.err
    output = place / "figures.json"
    outcome = call(
        *(place, "evaluate", "--data", place / "my.txt", "--max-sequences", 4, "--draws", 8),
        *("--json", output),
    )
    assert outcome.code == 0, outcome.err
    figures = json.loads(output.read_text())
    assert (figures["estimator"], figures["is_bound"]) == ("k_dce", True)
    assert figures["standard_error_draws"] > 0


@pytest.mark.nightly
def test_long_texts_from_the_command_line(place):
    output = place / "samples.jsonl"
    outcome = call(
        *(place, "sample", "--num", 2, "--length", 40, "--block", 4, "--prompt", "the cat"),
        *("--output", output),
    )
    assert outcome.code == 0, outcome.err
    for line in map(json.loads, output.read_text().splitlines()):
        assert (len(line["tokens"]), line["calls"]) == (40, 33)
        assert line["text"].startswith("the cat")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--block", 3], "--block must be that of the model, 4, got 3"),
        (["--stop", 99], "--stop must be below 33, got 99"),
        (["--sampler", "confidence"], "sampler 'confidence' cannot draw from a block model by its"),
        (["--prompt", "a", "--guidance", 1], "guidance masks the given tokens, and a block model"),
        (["--inner", "planned"], "--inner planned: semi_autoregressive wraps confidence, "),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(place, flags, message):
    outcome = call(place, "sample", *flags)
    assert outcome.code == 2
    (error,) = outcome.errors
    assert error.startswith(f"error: {message}")


def test_a_block_that_does_not_divide_the_length_is_one_line(place):
    outcome = tiny_run.call(
        *("train", "--workdir", place / "never", *tiny_run.TINY),
        *("--data.corpus", place / "my.txt"),
        *("--parameterization", "block", "--parameterization.block", 5, "--objective", "block"),
    )
    assert outcome.code == 2
    assert outcome.errors == [
        "error: --parameterization.block must divide the length of a row, 12, got 5"
    ]
