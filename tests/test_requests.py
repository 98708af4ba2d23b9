"""Requests: what a line may say, which line is refused and how, and what is answered."""

import json

import numpy as np
import pytest
import tiny_run

import sedd
from sedd.constraints.clamp import from_prompt
from sedd.constraints.spans import spans_of
from sedd.errors import UserError
from sedd.requests import Answer, Asked, Request, answer, ask, read_requests
from sedd.samplers.tweedie import Tweedie

LENGTH = 10


def read(tmp_path, text):
    path = tmp_path / "requests.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(read_requests(path, tiny_run.TOKENIZER, LENGTH))


def test_every_field(tmp_path):
    lines = [
        {"id": "a", "prompt": "ab", "suffix": "c", "length": 5, "seed": 7},
        {"id": 12, "infill": "a{mask:2}b"},
        {"infill": "a{mask:2}b", "length": 6},
        {"prompt": "xy"},
        {},
    ]
    found = read(tmp_path, "\n".join(map(json.dumps, lines)))
    assert [one.request for one in found] == [
        Request(id="a", prompt="ab", suffix="c", length=5, seed=7),
        Request(id=12, infill="a{mask:2}b", seed=1),
        Request(id=3, infill="a{mask:2}b", length=6, seed=2),
        Request(id=4, prompt="xy", seed=3),
        Request(id=5, seed=4),
    ]
    assert [one.clamp.length for one in found] == [5, 4, 6, LENGTH, LENGTH]
    assert found[0][1].fixed_L.tolist() == [True, True, False, False, True]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": null}', "id must be a string or a whole number, got null"),
        ('{"id": 1.5}', "id must be a string or a whole number, got 1.5"),
        ('{"id": true}', "id must be a string or a whole number, got true"),
        ('{"prompt": 3}', "prompt must be a string, got 3"),
        ('{"suffix": ["a"]}', 'suffix must be a string, got ["a"]'),
        ('{"infill": 3}', "infill must be a string, got 3"),
        ('{"length": "8"}', 'length must be a whole number, got "8"'),
        ('{"length": 8.0}', "length must be a whole number, got 8.0"),
        ('{"length": true}', "length must be a whole number, got true"),
        ('{"length": 0}', "length must be in 1.."),
        ('{"length": 100000000000}', "length must be in 1.."),
        ('{"seed": "1"}', 'seed must be a whole number, got "1"'),
        ('{"seed": -1}', "seed must be in [0, 2**32), got -1"),
        ('{"seed": 4294967296}', "seed must be in [0, 2**32)"),
        ('{"lenght": 8}', "unknown field 'lenght'; did you mean 'length'?; it has id, prompt,"),
        ('{"prompt": "a", "infill": "{mask}"}', "infill already holds its context"),
        ('{"prompt": "\\ud800"}', "prompt is not text"),
        ('{"prompt": "A"}', "prompt: character 'A'"),
        ('{"prompt": "abcdefghijk"}', "prompt (11 tokens): longer than the length of 10"),
        ('{"infill": "{mask:x}"}', "infill gap '{mask:x}'"),
        ('{"regex": 3}', "regex must be a string, or a list with one or null for each gap, got 3"),
        ('{"regex": ["a", 3]}', "regex must be a string, or a list"),
        ('{"regex": "a", "json_schema": {}}', "regex and json_schema: give one of them"),
        ('{"regex": "a(b"}', "position 1"),
        ('{"regex": "(?=a)b"}', "position 0"),
        ('{"regex": "a{40}"}', "needs at least 40 tokens: 10 tokens are left"),
        ('{"regex": "A+"}', "no token holds the character 'A'"),
        ('{"infill": "a{mask:2}b{mask:2}", "regex": ["a"]}', "1 constraints for 2 gaps"),
        ('{"json_schema": 3}', "json_schema must be an object"),
        ('{"json_schema": {"type": "integer", "multipleOf": 7}}', "#/multipleOf"),
        ('{"json_schema": {"type": "strin"}}', "#/type"),
        ('{"prompt": "a"', "not JSON"),
        ("prompt", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('["a"]', 'a request must be an object, got ["a"]'),
        ("null", "a request must be an object, got null"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path, line, message):
    before, bad, after = read(tmp_path, f'{{"id": 1}}\n\n  \n{line}\n{{"id": 2}}\n')
    assert isinstance(bad, UserError)
    assert str(bad).startswith(f"{tmp_path}/requests.jsonl, line 4: ")
    assert message in str(bad)
    assert (before[0].id, after[0].id) == (1, 2)


def test_lines_end_where_json_lines_do(tmp_path):
    # U+2028 and U+0085 end lines for str.splitlines, and may stand in a JSON string.
    (one,) = read(tmp_path, '\ufeff{"id": "a\u2028b\u0085c"}\r\n')
    assert one[0].id == "a\u2028b\u0085c"


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "the file is empty"), ("\n \n", "the file is empty"), (b"\xff\xfe{}", "not UTF-8 text")],
)
def test_a_file_without_requests(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, content)


def test_a_file_that_cannot_be_read(tmp_path):
    for path, message in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=f"--requests {path}: {message}"):
            list(read_requests(path, tiny_run.TOKENIZER, LENGTH))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    return sedd.load(tiny_run.make_run(directory, tiny_run.config()))


def test_answers_do_not_depend_on_the_batch(model):
    """Alone, together, in batches that leave a rest, and in another order."""
    requests = [  # each size of batch and length is a program
        Request(id=0, prompt="ab", suffix="xy", length=9, seed=3),
        Request(id=1, length=12, seed=3),
        Request(id=2, infill="a{mask:4}b{mask:2}y", seed=2**32 - 1),
        Request(id=3, length=12, seed=4),
    ]
    asked = [ask(request, model.tokenizer, model.length) for request in requests]
    sampler = Tweedie(schedule=model.schedule, steps=4)

    def tokens(asked, batch_size):
        batches = answer(model, asked, sampler, batch_size=batch_size)
        return {one.request.id: one.tokens.tolist() for batch in batches for one in batch}

    together = tokens(asked, 4)
    assert [len(row) for row in together.values()] == [9, 12, 9, 12]
    assert together == tokens(asked, 1)
    assert together == tokens(asked, 3)
    assert together == tokens(asked[::-1], 4)
    assert together[1] != together[3]  # the seeds tell them apart


def test_what_an_answer_holds(model):
    request = Request(id="x", prompt="ab", length=6, seed=9)
    clamp = from_prompt(model.tokenizer, 6, prompt="ab")
    sampler = Tweedie(schedule=model.schedule, steps=4)
    ((one,),) = answer(model, [Asked(request, clamp)], sampler, batch_size=32, trace=True)
    line = json.loads(json.dumps(one.to_json()))
    assert line.keys() == {"id", "text", "tokens", "calls", "entropy", "seed"}
    assert (line["id"], line["calls"], line["seed"]) == ("x", 5, 9)
    assert line["text"] == model.tokenizer.decode(line["tokens"])
    assert line["text"].startswith("ab")
    assert one.frames.shape == (6, 6)  # the start, four steps and the last call
    np.testing.assert_array_equal(one.frames[-1], one.tokens)
    assert (one.frames[0, 2:] == model.process.mask_id).all()


@pytest.mark.parametrize(("tokens", "entropy"), [([3, 3, 3], "0.0"), ([3, 3, 4, 4], "0.693147")])
def test_the_entropy_is_of_what_was_drawn(tokens, entropy):
    """Never minus zero: it is printed."""
    clamp = from_prompt(tiny_run.TOKENIZER, 2 + len(tokens), prompt="ab")
    one = Answer(
        request=Request(id=0),
        clamp=clamp,
        spans=(),
        tokens=np.array([*clamp.tokens_L[:2], *tokens]),
        text="",
        calls=1,
        score=None,
        frames=None,
        times=None,
    )
    assert str(one.to_json()["entropy"]) == entropy


def test_constraints_of_requests(tmp_path):
    lines = [
        {"regex": "[ab]{3}"},
        {"infill": "a{mask:2}b{mask:3}", "regex": ["[cd]+", None]},
        {"infill": "a{mask:2}b{mask:3}", "regex": "[bcd]+"},
        {"json_schema": {"enum": [None, True]}, "prompt": "x"},
        {},
    ]
    found = read(tmp_path, "\n".join(map(json.dumps, lines)))
    spans = [spans_of(one.clamp, one.constraint) for one in found]
    assert [[(s.start, s.length) for s in row] for row in spans] == [
        [(0, LENGTH)],
        [(1, 2)],
        [(1, 6)],
        [(1, LENGTH - 1)],
        [],
    ]
    assert spans[0][0].automaton.pattern == "[ab]{3}"


def test_requests_with_the_same_regex_share_an_automaton(tmp_path):
    """In a batch it is then held once."""
    first, second = read(tmp_path, '{"regex": "ab*"}\n{"regex": "ab*"}')
    assert first.constraint is second.constraint
