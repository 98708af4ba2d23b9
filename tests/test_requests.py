"""Requests: what a line may say, which line is refused and how, and what is answered."""

import json
import os
import threading
from collections import Counter
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import tiny_run
import tokenizers
from tiers import nightly

import sedd
from sedd.commands.answers import Answer, Answering, Asked
from sedd.commands.survey import Survey
from sedd.constraints.clamp import Clamp, from_infill, from_prompt
from sedd.constraints.spans import spans_of
from sedd.data.tokenizers import Bytes, Pretrained
from sedd.errors import UserError
from sedd.requests import FIELD_TYPES, Request, RequestFile
from sedd.samplers.ordered import Ordered
from sedd.samplers.tweedie import Tweedie
from sedd.sampling.arguments import NUMBERS

LENGTH = 10


def read(tmp_path, text) -> list[Any]:
    """What the file yields: a ``Read`` for each good line, a UserError for each bad one."""
    path = tmp_path / "requests.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with RequestFile(path) as file:
        return list(file.read(0, ask))


class Read(NamedTuple):
    """A request, its tokens and its spans."""

    request: Request
    clamp: Clamp
    spans: list


def ask(request):
    clamp = request.clamp(tiny_run.TOKENIZER, LENGTH)
    return Read(request, clamp, request.spans(clamp, tiny_run.TOKENIZER, None))


def test_every_field(tmp_path):
    lines = [
        {"id": "a", "prompt": "ab", "suffix": "c", "length": 5, "seed": 7},
        {"id": 12, "infill": "a{mask:2}b"},
        {"infill": "a{mask:2}b", "length": 6},
        {"prompt": "xy"},
        {},
        dict.fromkeys(FIELD_TYPES),
        {"temperature": 0, "top_k": 3, "top_p": 0.5, "guidance": 1.5, "sampler": {"steps": 2}},
    ]
    found = read(tmp_path, "\n".join(map(json.dumps, lines)))
    assert FIELD_TYPES.keys() == vars(found[0].request).keys()
    assert [one.request for one in found] == [
        Request(id="a", prompt="ab", suffix="c", length=5, seed=7),
        Request(id=12, infill="a{mask:2}b", seed=1),
        Request(id=3, infill="a{mask:2}b", length=6, seed=2),
        Request(id=4, prompt="xy", seed=3),
        Request(id=5, seed=4),
        Request(id=6, seed=5),  # null is the default of every field
        Request(
            id=7, seed=6, temperature=0, top_k=3, top_p=0.5, guidance=1.5, sampler={"steps": 2}
        ),
    ]
    assert [one.clamp.length for one in found] == [5, 4, 6, *[LENGTH] * 4]
    assert found[0][1].fixed_L.tolist() == [True, True, False, False, True]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_a_file_of_wide_characters_is_one_error(tmp_path, encoding):
    with pytest.raises(UserError, match="not a file of JSON lines: it holds NUL bytes"):
        read(tmp_path, '{"prompt": "a"}'.encode(encoding))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ["é"]}', 'prompt must be a string, got ["é"]'),
        ('{"temperature": "1"}', 'temperature must be a number, got "1"'),
        ('{"top_k": 2.5}', "top_k must be a whole number, got 2.5"),
        ('{"top_p": true}', "top_p must be a number, got true"),
        ('{"sampler": "tweedie"}', "sampler must be an object of the sampler's options, got"),
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
        ('{"prompt": "\\ud800"}', "prompt contains a lone surrogate"),
        ('{"prompt": "A"}', "prompt: character 'A'"),
        ('{"prompt": "abcdefghijk"}', "prompt (11 tokens) do not fit into the length of 10"),
        ('{"infill": "{mask:x}"}', "infill gap '{mask:x}'"),
        ('{"regex": 3}', "regex must be a string, or a list with one or null for each gap, got 3"),
        ('{"regex": ["a", 3]}', "regex must be a string, or a list"),
        ('{"regex": "a", "json_schema": {}}', "regex and json_schema: give one of them"),
        ('{"regex": "a(b"}', "line 4: regex, position 1: "),
        ('{"regex": "(?=a)b"}', "position 0"),
        ('{"regex": "a{40}"}', "line 4: regex: 'a{40}' needs at least 40 tokens, but has room"),
        ('{"regex": "A+"}', "line 4: regex: the vocabulary cannot spell anything that regex 'A+'"),
        ('{"infill": "a{mask:2}b{mask:2}", "regex": ["a"]}', "regex: 1 constraints for 2 gaps"),
        ('{"json_schema": 3}', "json_schema must be an object"),
        ('{"json_schema": {"type": "integer", "multipleOf": 0.5}}', "json_schema: #/multipleOf"),
        ('{"json_schema": {"type": "strin"}}', "json_schema: #/type"),
        ('{"json_schema": {"const": "aaaaaaaaaaa"}}', "json_schema: the vocabulary cannot spell"),
        ('{"json_schema": {"const": 12345678901}}', "json_schema: the vocabulary cannot spell"),
        ('{"json_schema": {"const": [null, true]}}', "json_schema: the vocabulary cannot spell"),
        (json.dumps({"regex": "(" * 500 + "a" + ")" * 500}), "regex, position 100: "),
        (json.dumps({"json_schema": {"pattern": "(" * 500 + "a" + ")" * 500}}), "#/pattern: "),
        (
            '{"json_schema": ' + '{"not": ' * 450 + "{}" + "}" * 451,
            "json_schema: #: its schemas nest",
        ),
        ('{"json_schema": {}, "json_schema_depth": "3"}', "json_schema_depth must be a whole"),
        ('{"json_schema": {}, "json_schema_depth": -1}', "json_schema_depth must be in 0..64"),
        ('{"json_schema_depth": 3}', "json_schema_depth is 3, but there is no json_schema"),
        ('{"regex": "a", "json_schema_depth": 0}', "json_schema_depth is 0, but there is no json"),
        ('{"prompt": "a"', "not JSON"),
        ("prompt", "not JSON"),
        ("[" * 100_000, "not JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8 text, at byte 13"),
        (b"\xe9", "not UTF-8 text, at byte 1"),
        ('["a"]', 'a request must be an object, got ["a"]'),
        ("null", "a request must be an object, got null"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    before, bad, after = read(tmp_path, b'{"id": 1}\n\n  \n' + line + b'\n{"id": 2}\n')
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
    [("", "the file is empty"), ("\n \n", "the file is empty"), ("\ufeff", "the file is empty")],
)
def test_a_file_without_requests(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, content)


def test_a_file_that_cannot_be_read(tmp_path):
    for path, message in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=f"--requests {path}: {message}"):
            RequestFile(path)


def test_a_pipe_is_read_twice(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    text = '{"id": "a"}\nnothing\n{"id": "b"}\n'
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(text,))
    writer.start()
    with RequestFile(tmp_path / "pipe") as file:
        for _ in range(2):
            lines: list[Any] = list(file.read(0, lambda request: request))
            first, bad, last = lines
            assert (first.id, last.id) == ("a", "b")
            assert "line 2: not JSON" in str(bad)
    writer.join()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    return sedd.load(tiny_run.make_run(directory, tiny_run.config()))


def asked_of(model, request, steps=4, kind: Any = Tweedie, **numbers):
    sampler = kind(schedule=model.schedule, steps=steps)
    clamp = request.clamp(model.tokenizer, model.length)
    return Asked(request, clamp, [], sampler, {**NUMBERS, **numbers})


def answering(model, asked, batch_size, **options):
    counts = Counter(one.program for one in asked)
    return Answering(model=model, counts=counts, batch_size=batch_size, **options)


@pytest.mark.nightly
def test_requests_of_other_programs_are_answered_in_their_order(model):
    """Steps and guidance are compiled in; seeds and temperatures are not."""
    kinds = [(2, {}), (3, {}), (2, {"guidance": 1.0}), (2, {"temperature": 0.5}), (3, {})]
    asked = [
        asked_of(model, Request(id=i, prompt="ab", length=9, seed=i), steps, **numbers)
        for i, (steps, numbers) in enumerate(kinds)
    ]
    assert len({one.program for one in asked}) == 3
    batches = list(answering(model, asked, 2, reshaped=True).answers(asked))
    assert [[one.request.id for one in batch] for batch in batches] == [[0], [1], [2, 3, 4]]
    assert [one.calls for batch in batches for one in batch] == [3, 4, 6, 3, 4]
    for one in [each for batch in batches for each in batch]:
        (alone,) = answering(model, asked, 2, reshaped=True).answers([asked[int(one.request.id)]])
        np.testing.assert_array_equal(alone[0].tokens, one.tokens)


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt, SystemExit])
def test_what_was_drawn_comes_before_the_error(model, monkeypatch, error):
    """Also what waits for an earlier request of another program."""
    asked = [
        asked_of(model, Request(id=i, length=9, seed=i), steps) for i, steps in enumerate((2, 2, 3))
    ]
    drawing = answering(model, asked, 1)
    draw = Answering._draw
    calls = []

    def fails_at_last(self, batch, trace):
        calls.append(batch)
        if len(calls) == 3:
            raise error
        return draw(self, batch, trace)

    monkeypatch.setattr(Answering, "_draw", fails_at_last)
    batches = drawing.answers([asked[0], asked[2], asked[1]])  # the one in the middle fails
    assert [one.request.id for one in next(batches)] == [0]
    assert [one.request.id for one in next(batches)] == [1]
    with pytest.raises(error):
        next(batches)


def test_batches_of_a_file_share_the_program_of_their_constraints(model, monkeypatch):
    """Automata of other sizes, spans of other lengths, one gap and two: one shape for all."""
    requests = [
        Request(id=0, infill="{mask:2}", regex="ab?"),
        Request(id=1, infill="{mask:9}", regex="(ab|cd|ef|gh|ba|dc){1,4}a?"),
        Request(id=2, infill="{mask:3} {mask:2}", regex=["[a-z]+", "a*"]),
        Request(id=3, infill="{mask:3} {mask:2}", regex="[a-z ]+"),
    ]
    asked = []
    for request in requests:
        one = asked_of(model, request)
        given = request.constraint(model.tokenizer, None)
        asked.append(one._replace(spans=spans_of(one.clamp, given)))
    survey = Survey.of(asked, None)
    assert survey.spanned
    assert not Survey.of(asked[:3], None).spanned
    programs = set()

    class StopError(Exception):
        pass

    def run(sampler, params, rows, **options):
        spans = rows[0].constraint
        leaves = [leaf.shape for leaf in jax.tree.leaves(spans)]
        programs.add((jax.tree.structure(spans), tuple(leaves)))
        raise StopError

    monkeypatch.setattr("sedd.sampling.batch.run_sampler", run)

    def compiled(shape):
        programs.clear()
        for one in asked:
            with pytest.raises(StopError):
                list(answering(model, asked, 1, shape=shape).answers([one]))
        return len(programs)

    assert compiled(survey.shape) == 1
    assert compiled(None) > 1


@pytest.mark.parametrize("kind", [Ordered, nightly(Tweedie)])
def test_answers_do_not_depend_on_the_batch(model, kind):
    """Together, and in another order in a batch and a rest of one."""
    requests = [  # each size of batch and length is a program
        Request(id=0, prompt="ab", suffix="xy", length=9, seed=3),
        Request(id=1, length=12, seed=3),
        Request(id=2, infill="a{mask:4}b{mask:2}y", seed=2**32 - 1),
        Request(id=3, length=12, seed=4),
    ]
    asked = [asked_of(model, request, kind=kind) for request in requests]

    def tokens(asked, batch_size):
        batches = answering(model, asked, batch_size).answers(asked)
        return {one.request.id: one.tokens.tolist() for batch in batches for one in batch}

    together = tokens(asked, 4)
    assert [len(row) for row in together.values()] == [9, 12, 9, 12]
    assert together == tokens(asked[::-1], 3)
    assert together[1] != together[3]  # the seeds tell them apart


def test_what_an_answer_holds(model):
    request = Request(id="x", prompt="ab", length=6, seed=9)
    asked = [asked_of(model, request)]
    ((one,),) = answering(model, asked, 32, traced=1).answers(asked)
    assert one.frames is not None
    line = json.loads(json.dumps(one.to_json()))
    assert line.keys() == {"id", "text", "tokens", "calls", "rows", "entropy", "seed"}
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
        rows=1,
        score=None,
        verifier_calls=None,
        log_partition=None,
        log_prob=None,
        frames=None,
        times=None,
        watermark=None,
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
    spans = [one.spans for one in found]
    assert [[(s.start, s.length) for s in row] for row in spans] == [
        [(0, LENGTH)],
        [(1, 2)],
        [(1, 6)],
        [(1, LENGTH - 1)],
        [],
    ]
    assert spans[0][0].automaton.pattern == "[ab]{3}"


@pytest.mark.parametrize(
    ("schema", "around"),
    [
        ({"anyOf": [{"const": 1}, {"type": "array", "items": {"$ref": "#"}}]}, "[{}]"),
        ({"anyOf": [{"const": 1}, {"additionalProperties": {"$ref": "#"}}]}, '{{"a": {}}}'),
        ({}, "[{}]"),
    ],
)
def test_the_depth_of_a_schema(tmp_path, schema, around):
    """A line's depth, one of a Python request, and the default, on one schema of each kind."""
    path = tmp_path / "requests.jsonl"
    lines = [{"json_schema": schema, "json_schema_depth": depth} for depth in (0, 1, None, 3)]
    path.write_text("\n".join(map(json.dumps, lines)))
    with RequestFile(path) as file:
        requests: list[Any] = list(file.read(0, lambda one: one))
    given = [request.constraint(Bytes(), None) for request in requests]
    for automaton, depth in zip(given, (0, 1, 2, 3), strict=True):
        text = "1"
        for _ in range(depth):
            text = around.format(text)
        assert automaton.accepts(text.encode())
        assert not automaton.accepts(around.format(text).encode())


def test_requests_with_the_same_regex_share_an_automaton(tmp_path):
    """In a batch it is then held once."""
    first, second = read(tmp_path, '{"regex": "ab*"}\n{"regex": "ab*"}')
    assert first.spans[0].automaton is second.spans[0].automaton


# ------------------------------------------------- stretches of text around a gap


def spaced(**options):
    """A small tokenizer like Llama's: it puts a space before every text, and decodes without."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(**options)
    backend.decoder = tokenizers.decoders.Metaspace(**options)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=120,
        special_tokens=["<unk>"],
        initial_alphabet=list("\n.,1"),
        show_progress=False,
    )
    text = "the state of the union is strong, 1 people of the state are free.\n"
    backend.train_from_iterator([text] * 9, trainer)
    return Pretrained.of("spaced", backend.to_str())


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
@pytest.mark.parametrize(
    ("stretches", "sizes"),
    [
        (["the state ", " union is ", "ong"], [1, 2]),
        (["", "tate of", ", free."], [1, 3]),
        (["the", " state", "s\n of"], [2, 2]),
    ],
)
def test_stretches_join_as_in_the_whole_text(scheme, stretches, sizes):
    tokenizer = spaced(prepend_scheme=scheme)
    gaps = [f"{{mask:{size}}}" for size in sizes] + [""]
    clamp = from_infill(tokenizer, "".join(map("".join, zip(stretches, gaps, strict=True))))
    tokens_L = np.where(clamp.fixed_L, clamp.tokens_L, tokenizer.backend.token_to_id("1"))
    filled = zip(stretches, [*sizes, 0], strict=True)
    assert tokenizer.decode(tokens_L.tolist()) == "".join(
        text + "1" * size for text, size in filled
    )


def test_a_suffix_is_no_beginning():
    tokenizer = spaced(prepend_scheme="first")
    clamp = from_prompt(tokenizer, 9, prompt="the", suffix="state")
    (alone,) = tokenizer.encode_batch(["state"])
    ids = clamp.tokens_L[clamp.fixed_L]
    assert tokenizer.decode(ids.tolist()) == "thestate"
    assert tokenizer.decode([*tokenizer.encode_batch(["the"])[0], *alone]) == "the state"
