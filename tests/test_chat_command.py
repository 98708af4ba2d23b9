"""Answers to conversations: ``sample.py --chat``, request lines with messages, ``sedd.sample``."""

import json

import jax
import numpy as np
import pytest
import tiny_run
from chat_toy import CHATML, answer, tokenizer, user
from tiny_run import call

import sedd
from sedd.data.chat import end_ids, render
from sedd.errors import UserError

LENGTH = 160
TOKENIZER = tokenizer(CHATML)
ASKED = [user("Hi"), answer("Hello"), user("And?")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run whose tokenizer has a chat template, and one without."""
    top = tmp_path_factory.mktemp("place")
    for name, chosen in (("chat", TOKENIZER), ("plain", tiny_run.TOKENIZER)):
        (top / name).mkdir()
        tiny_run.make_run(
            top / name, tiny_run.config("radd", length=LENGTH), tokenizer=chosen, seed=3
        )
    return top


@pytest.fixture(scope="module")
def model(place):
    return sedd.load(place / "chat")


def check(line, messages):
    """The sequence begins with the conversation, and the text is the answer up to its end."""
    before = TOKENIZER.encode_spans(render(TOKENIZER, messages, answer=True))[0].tolist()
    tokens = line["tokens"]
    assert tokens[: len(before)] == before
    drawn = tokens[len(before) :]
    ends = np.flatnonzero(np.isin(drawn, end_ids(TOKENIZER)))
    stop = int(ends[0]) if len(ends) else len(drawn)
    assert line["text"] == TOKENIZER.decode(drawn[:stop])
    return bool(len(ends))


def test_a_message_is_answered(place, tmp_path):
    flags = ("--checkpoint", place / "chat", "--sampler", "event_jump", "--steps", "4")
    # A temperature above 1 makes the special tokens of a random model likely enough to occur.
    flags += ("--num", "8", "--output", tmp_path / "out.jsonl", "--temperature", "3")
    shown = call("sample", *flags, "--chat", "What? <|im_end|>")
    assert shown.code == 0, shown.err
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    asked = [user("What? <|im_end|>")]
    assert any([check(line, asked) for line in lines])
    assert "What?" not in shown.out


def test_lines_of_requests(place, tmp_path):
    lines = [
        {"messages": ASKED},
        {"messages": [*ASKED, answer("x")]},
        {"messages": ASKED, "prompt": "a"},
        {"messages": [{"role": "usr", "content": "a"}]},
        {"messages": "a"},
        {"messages": ASKED, "length": 30},
        {"messages": [user("Hi")], "length": 100},
    ]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    flags = ("--checkpoint", place / "chat", "--sampler", "event_jump", "--steps", "4")
    told = call(
        *("sample", *flags),
        *("--requests", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"),
    )
    assert told.code == 2
    problems = [line.partition("in.jsonl, ")[2] for line in told.errors]
    for problem, says in zip(
        problems,
        [
            "line 2: messages: the last one is of the role assistant, so that no answer is left",
            "line 3: messages are all of the given text: give no prompt, suffix or infill",
            "line 4: messages, number 1: unknown role 'usr'",
            'line 5: messages must be a list of messages, got "a"',
            "line 6: the conversation (89 tokens) does not fit into the length of 30 tokens",
        ],
        strict=True,
    ):
        assert problem.startswith(says)
    first, last = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    check(first, ASKED)
    check(last, [user("Hi")])
    assert len(last["tokens"]) == 100


@pytest.mark.parametrize(
    ("name", "flags", "says"),
    [
        ("plain", ("--chat", "Hi"), "tokenizer 'characters' has no chat template"),
        ("chat", ("--chat", "Hi", "--prompt", "a"), "--chat is all of the given text: give no"),
        ("chat", ("--chat", "Hi", "--requests", "x"), "--requests holds the prompts: give no"),
    ],
)
def test_what_chat_refuses(place, name, flags, says):
    told = call("sample", "--checkpoint", place / name, *flags)
    assert told.code == 2
    assert says in told.errors[0]


def test_from_python(model):
    """One conversation for all sequences, or one each; a seed gives the same answer in both."""
    keys = jax.vmap(jax.random.key)(np.arange(2))
    settings = {"sampler": "event_jump", "steps": 4}
    one = sedd.sample(model, keys, messages=ASKED, **settings)
    each = sedd.sample(model, keys, messages=[ASKED, [user("Hi")]], **settings)
    assert len(one.text) == len(each.text) == 2
    assert one.text[0] == each.text[0]
    check({"tokens": one.tokens[1].tolist(), "text": one.text[1]}, ASKED)
    check({"tokens": each.tokens[1].tolist(), "text": each.text[1]}, [user("Hi")])
    with pytest.raises(UserError, match="unknown role 'me'"):
        sedd.sample(model, 0, messages=[{"role": "me", "content": ""}], **settings)


@pytest.mark.nightly
def test_an_answer_may_be_constrained(model):
    result = sedd.sample(model, 0, messages=[user("Hi")], regex="(yes|no)+", length=120, steps=4)
    assert result.text[0].replace("yes", "").replace("no", "") == ""
