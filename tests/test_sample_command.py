"""``sample.py`` with every sampler: what it writes, which flag reaches what, and what it says."""

import dataclasses
import html
import inspect
import json
import math
import re
from collections import Counter

import pytest
import tiny_run
from tiers import daily, nightly
from tiny_run import TOKENIZER, call

import sedd
from sedd.commands import sample
from sedd.commands.answers import Answering
from sedd.commands.asking import Asking
from sedd.commands.cli import run
from sedd.commands.sample_flags import read_schema, sampler_for
from sedd.commands.user_code import load_processor
from sedd.configuration.components import makers, options_type
from sedd.configuration.user_function import load_function
from sedd.errors import UserError

LENGTH = 12
SEARCHES = ("best_of_n", "particle", "search_paths", "zero_order")
FLAGS = {  # of every sampler, so that each does some of its own
    "tweedie": "--steps 3",
    "euler": "--steps 3",
    "event_jump": "--steps 5",
    "ordered": "--order 11,3 --steps 4",
    "confidence": "--by margin --steps 3",
    "entropy_bounded": "--gamma 4",
    "token_confidence": "--threshold 0.3",
    "planned": "--calls 3 --profile {place}/price.json",
    "remdm": "--steps 6 --eta 0.5",
    "semi_autoregressive": "--block 4 --inner confidence --inner.by max_probability",
    "speculative": "--draft batch --lookahead 3 --bonus --order random",
    "best_of_n": "--n 2 --inner ordered --inner.steps 2 --verifier {code}:vowels",
    "particle": "--particles 2 --tilt 2 --resample-every 2 --verifier {code}:vowels",
    "search_paths": "--paths 1 --branches 2 --inner.steps 2 --verifier {code}:vowels",
    "zero_order": "--neighbours 2 --rounds 2 --rho 0.3 --inner.steps 3 --verifier {code}:vowels",
}
CODE = '''
import json
from pathlib import Path
import jax.numpy as jnp

def vowels(texts):
    with open(Path(__file__).with_name("seen.jsonl"), "a") as seen:
        print(json.dumps(texts), file=seen)
    return [sum(c in "aeiou" for c in text) + len(text) / 10 for text in texts]

def only_once(texts):
    mark = Path(__file__).with_name("mark")
    if mark.exists():
        raise RuntimeError("a second time")
    mark.touch()
    return [0.1] * len(texts)

def failing(texts):
    return eval(Path(__file__).with_name("does.txt").read_text())

def ban(log_probs, tokens, positions):
    return log_probs.at[..., 5:].set(-jnp.inf)

def strict(log_probs, tokens, positions):
    """Nan where nothing is drawn, which nobody reads."""
    masked = jnp.take_along_axis(tokens, positions, 1) == 33
    return jnp.where(masked[..., None], log_probs, jnp.nan)
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run, one of each other kind, and a file of functions."""
    top = tmp_path_factory.mktemp("place")
    for kind in ("radd", "sedd", "uniform", "ar"):
        (top / kind).mkdir()
        tiny_run.make_run(top / kind, tiny_run.config(kind, length=LENGTH))
    (top / "code.py").write_text(CODE)
    tiny_run.profile_of(sedd.load(top / "radd"), LENGTH).save(top / "price.json")
    return top


def draw(place, flags, *more, kind="radd", code=0):
    """The command's outcome; its exit code must be this one."""
    flags = flags.format(code=place / "code.py", place=place).split()
    result = call("sample", "--checkpoint", place / kind, *flags, *more)
    assert result.code == code, result.err
    return result


def answers(place, tmp_path, flags, *more, **options):
    """The lines of the file that ``--output`` names."""
    draw(place, flags, *more, "--output", tmp_path / "out.jsonl", **options)
    return read(tmp_path / "out.jsonl")


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def vowels(text):
    return sum(character in "aeiou" for character in text) + len(text) / 10


# ------------------------------------------------------- autoregressive models


@pytest.mark.nightly
def test_an_autoregressive_run_brings_its_sampler(place, tmp_path):
    lines = [{"prompt": "the "}, {"suffix": "."}, {"infill": "a {mask:3}"}]
    lines = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "requests.jsonl").write_text(lines)
    flags = ("--requests", tmp_path / "requests.jsonl", "--output", tmp_path / "out.jsonl")
    result = draw(place, "--top-p 0.9", *flags, kind="ar", code=2)
    assert result.errors == [
        f"error: {tmp_path}/requests.jsonl, line 2: this model is autoregressive and sees what is "
        "before a position only: it takes a prompt, and no text after free tokens (a suffix, or "
        "text behind a gap)"
    ]
    assert [(a["id"], a["calls"]) for a in read(tmp_path / "out.jsonl")] == [(1, 8), (3, 3)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--suffix end", "sees what is before"),
        ("--infill {{mask:3}}end", "sees what is before"),
        ("--sampler tweedie", "--sampler ordered --order forward"),
        ("--steps 3", "without steps (--sampler ordered --order forward)"),
        ("--prompt a --guidance 1", "guidance and constraints"),
        ("--regex [a-z]*", "guidance and constraints"),
    ],
)
def test_what_an_autoregressive_run_refuses(place, flags, message):
    (error,) = draw(place, flags, kind="ar", code=2).errors
    assert message in error


# ------------------------------------------------------- constraints


@pytest.mark.nightly
def test_a_regex_of_the_command_line(place, tmp_path):
    page = tmp_path / "trace.html"
    lines = answers(
        *(place, tmp_path, "--sampler event_jump --num 3"),
        *("--regex", "(cat|dog)s?", "--prompt", "a ", "--trace", page),
    )
    for line in lines:
        assert re.fullmatch("a (cat|dog)s?", line["text"])
    assert "(cat|dog)s?" in page.read_text()


INLINE = ['{"enum":[true]}', '  {"const": true}', '{"const":\ntrue}']


@pytest.mark.parametrize("schema", INLINE)
def test_a_schema_may_be_inline(schema):
    assert read_schema(schema) == json.loads(schema)


@pytest.mark.nightly
@pytest.mark.parametrize("schema", INLINE)
def test_an_inline_schema_of_the_command_line(place, tmp_path, schema):
    (line,) = answers(place, tmp_path, "--sampler ordered --length 4", "--json-schema", schema)
    assert line["text"] == "true"


@pytest.mark.nightly
def test_a_regex_for_each_gap(place, tmp_path):
    flags = "--sampler ordered --rule dingo --steps 2 --num 3"
    infill = "x {mask:3}: {mask:4}"
    lines = answers(place, tmp_path, flags, "--infill", infill, "--regex", "[abc]{3}", "(no|yes)+")
    for line in lines:
        assert re.fullmatch("x [abc]{3}: (no|yes)+", line["text"])


@pytest.mark.nightly
def test_a_schema_of_the_command_line(place, tmp_path):
    (tmp_path / "schema.json").write_text('{"enum": [null, true, false]}')
    flags = "--sampler confidence --num 4"
    for line in answers(place, tmp_path, flags, "--json-schema", tmp_path / "schema.json"):
        assert line["text"] in ("null", "true", "false")


def test_each_line_has_its_own_constraint(place, tmp_path):
    requests = [
        {"id": "a", "regex": "[ab]+c"},
        {"id": "b", "infill": "{mask:2}.{mask:5}", "regex": [None, "d*e"]},
        {"id": "c", "json_schema": {"type": "boolean"}, "length": 8},
        {"id": "d", "regex": "a{40}"},
        {"id": "e"},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, requests)))
    flags = "--sampler event_jump --output"
    result = draw(
        *(place, flags, tmp_path / "out.jsonl", "--requests", tmp_path / "in.jsonl"), code=2
    )
    assert len(result.errors) == 1
    assert "line 4: regex: 'a{40}' needs at least 40 tokens" in result.errors[0]
    text = {line["id"]: line["text"] for line in read(tmp_path / "out.jsonl")}
    assert re.fullmatch("[ab]+c", text["a"])
    assert re.search(r"\.d*e$", text["b"])
    assert text["c"] in ("true", "false")
    assert "e" in text


# ------------------------------------------------------- every sampler


def test_every_sampler_is_tried():
    assert {*FLAGS, "self_correct"} == set(makers("samplers"))  # which needs another model
    search = [
        n
        for n, make in makers("samplers").items()
        if "verifier" in inspect.signature(make).parameters
    ]
    assert sorted(search) == sorted(SEARCHES)


@pytest.mark.parametrize(
    "sampler",
    daily(FLAGS, ["best_of_n"]),
)
def test_what_is_written(place, tmp_path, sampler):
    flags = f"--sampler {sampler} {FLAGS[sampler]} --num 2"
    page = tmp_path / "new" / "trace.html"
    result = draw(
        *(place, flags, "--prompt", "the {", "--seed", 5),
        *("--output", tmp_path / "out.jsonl", "--trace", page),
    )
    lines = read(tmp_path / "out.jsonl")
    fields = {"id": int, "text": str, "tokens": list, "calls": int, "rows": int}
    fields |= {"entropy": float, "seed": int}
    if sampler == "speculative":
        fields["log_prob"] = float
    if sampler in SEARCHES:
        fields |= {"score": float, "verifier_calls": int}
    if sampler == "particle":
        fields["log_partition"] = float
    trace = page.read_text()
    assert [(line["id"], line["seed"]) for line in lines] == [(0, 5), (1, 6)]
    for line in lines:
        assert {name: type(value) for name, value in line.items()} == fields
        assert len(line["tokens"]) == LENGTH
        assert all(
            type(token) is int and 0 <= token < TOKENIZER.num_tokens for token in line["tokens"]
        )
        assert line["text"] == TOKENIZER.decode(line["tokens"])
        assert line["text"].startswith("the {")
        counts = Counter(line["tokens"][5:])  # of what was drawn
        entropy = sum(n / 7 * math.log(7 / n) for n in counts.values())
        assert line["entropy"] == pytest.approx(entropy, abs=1e-6)
        assert 1 <= line["calls"] <= 2 * 2 * 7  # candidates, and completions of each round
        if sampler in SEARCHES:
            assert line["score"] == pytest.approx(vowels(line["text"]), abs=1e-6)
        said = f"{line['id']} · seed {line['seed']} · {line['calls']} network calls"
        if sampler == "speculative":
            said += f" of {line['rows']} rows · {7 / line['calls']:.2f} tokens a call"
        else:
            assert line["rows"] == line["calls"]
        if sampler in SEARCHES:
            said += f" · {line['verifier_calls']} verifier calls"
        said += " · "
        assert said + f"entropy {line['entropy']:.2f} nats" in result.out
        assert line["text"] in result.out
        pieces = (TOKENIZER.decode([token], keep_eos=True) for token in line["tokens"])
        eos = TOKENIZER.eos_id
        final = "".join(
            "[eos]" if t == eos else p for t, p in zip(line["tokens"], pieces, strict=True)
        )
        assert html.escape(final) in trace
    assert f"wrote 2 samples to {tmp_path / 'out.jsonl'}\nwrote {page}\n" in result.out
    for option in (word for word in FLAGS[sampler].split() if word.startswith("--")):
        if option not in ("--inner", "--verifier", "--profile"):
            assert f"<dt>{option[2:].replace('-', '_')}</dt>" in trace
    # A sequence is that of its seed: the second one is the first one of the seed after.
    (again, _) = answers(place, tmp_path, flags, "--prompt", "the {", "--seed", 6)
    assert again == lines[1] | {"id": 0}
    assert again["text"] != lines[0]["text"]


KINDS = [
    {"id": "prompt", "prompt": "the "},
    {"id": "gaps", "infill": "a{mask:3}b{mask}"},
    {"id": "broken", "prompt": "the ", "lenght": 4},
    {"id": "suffix", "suffix": "end", "length": 8, "seed": 3},
    {},
]


@pytest.mark.parametrize(
    "sampler", daily(["event_jump", "tweedie", "entropy_bounded", "best_of_n"], ["event_jump"])
)
def test_requests_of_every_kind(place, tmp_path, sampler):
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(map(json.dumps, KINDS)))
    result = draw(
        *(place, f"--sampler {sampler} {FLAGS[sampler]}", "--requests", path),
        *("--output", tmp_path / "out.jsonl", "--trace", tmp_path / "page.html"),
        code=2,
    )
    assert len(result.errors) == 1
    assert result.errors[0].startswith(f"error: {path}, line 3: unknown field 'lenght'")
    prompt, gaps, suffix, nothing = lines = read(tmp_path / "out.jsonl")
    assert [line["id"] for line in lines] == ["prompt", "gaps", "suffix", 5]
    assert [len(line["tokens"]) for line in lines] == [12, 6, 8, 12]
    assert [line["seed"] for line in lines] == [0, 1, 3, 4]
    assert prompt["text"].startswith("the ")
    kept = [TOKENIZER.decode([gaps["tokens"][i]]) for i in (0, 4)]
    assert kept == ["a", "b"]
    assert suffix["text"].endswith("end")
    assert nothing["calls"] >= 1


# ------------------------------------------------ flags that reach their place


def test_a_tilde_within_a_value_is_the_home_directory(place, monkeypatch):
    """Flags whose value is more than a path."""
    monkeypatch.setenv("HOME", str(place))
    (place / "schema.json").write_text('{"const": true}')
    assert load_function("~/code.py:vowels", "--verifier").__name__ == "vowels"
    assert load_processor("~/code.py:ban", "--logit-processor", 33).path == str(place / "code.py")
    assert sampler_for(["--checkpoint=~/ar"]) == "ordered"
    assert read_schema("~/schema.json") == {"const": True}
    with pytest.raises(UserError, match=rf"^--verifier ~/c.py:f: {place}/c.py: no such file$"):
        load_function("~/c.py:f", "--verifier")


@pytest.mark.parametrize(
    ("flags", "calls"),
    [
        nightly(
            "--sampler best_of_n --n 3 --inner ordered --inner.steps 2 --verifier {code}:vowels",
            3 * 2,
        ),
        nightly("--sampler semi_autoregressive --block 4 --inner ordered --inner.steps 2", 3 * 2),
        nightly("--sampler semi_autoregressive --block 6 --inner.steps 1", 2),
        (
            "--sampler best_of_n --n 2 --inner semi_autoregressive --inner.block 6 "
            "--inner.inner.steps 1 --verifier {code}:vowels",
            2 * 2,
        ),
        nightly(
            "--sampler particle --particles 3 --resample-every 99 --inner ordered --inner.steps 4 "
            "--verifier {code}:vowels",
            3 * 4,
        ),
        nightly("--sampler=ordered --steps=3", 3),
        nightly("--sampler ordered --guidance 1 --prompt the", 2 * 9),
    ],
)
def test_flags_reach_the_sampler_that_they_are_of(place, tmp_path, flags, calls):
    (line,) = answers(place, tmp_path, flags)
    assert line["calls"] == calls


@pytest.mark.nightly
@pytest.mark.parametrize("inner", ["--inner tweedie --inner.steps 2", "--inner ordered"])
def test_the_best_is_picked(place, tmp_path, inner):
    seen = place / "seen.jsonl"
    seen.unlink(missing_ok=True)
    flags = f"--sampler best_of_n --n 5 --num 2 --devices 1 {inner} --verifier {{code}}:vowels"
    lines = answers(place, tmp_path, flags)
    (texts,) = read(seen)
    assert len(set(texts)) == 10
    for line, candidates in zip(lines, (texts[:5], texts[5:]), strict=True):
        assert line["text"] == max(candidates, key=vowels)
        assert min(map(vowels, candidates)) < line["score"]


@pytest.mark.parametrize(
    "sampler", [nightly("tweedie --steps 3"), nightly("confidence"), "event_jump --steps 2"]
)
def test_a_logit_processor(place, tmp_path, sampler):
    """It bans all tokens from 5 on, by -inf, and any sampler ends."""
    flags = f"--sampler {sampler} --prompt the"
    (line,) = answers(place, tmp_path, flags)
    assert max(line["tokens"][3:]) >= 5
    (line,) = answers(place, tmp_path, flags + " --logit-processor {code}:ban")
    assert max(line["tokens"][3:]) < 5


@pytest.mark.nightly
def test_what_a_processor_says_of_given_tokens_does_not_count(place, tmp_path):
    flags = "--sampler confidence --prompt the"
    (line,) = answers(place, tmp_path, flags)
    (same,) = answers(place, tmp_path, flags + " --logit-processor {code}:strict")
    assert line == same


@pytest.mark.nightly
def test_temperature_0_is_the_same_for_any_seed(place, tmp_path):
    def texts(flags):
        lines = answers(place, tmp_path, f"--sampler ordered --num 2 {flags}")
        return [line["text"] for line in lines]

    assert len(set(texts(""))) == 2
    (likeliest,) = set(texts("--temperature 0"))
    assert set(texts("--top-k 1")) == {likeliest}


# ------------------------------------------------------- what is said


@pytest.fixture
def nothing_drawn(monkeypatch):
    """What is said beforehand needs no samples."""
    monkeypatch.setattr(Answering, "answers", lambda self, asked: iter([]))


@pytest.mark.usefixtures("nothing_drawn")
@pytest.mark.parametrize(
    ("kind", "flags", "said"),
    [
        ("radd", "--sampler token_confidence", "token_confidence is approximate: it prefers"),
        (
            "radd",
            "--sampler best_of_n --inner token_confidence --verifier {code}:vowels",
            "token_confidence is approximate: it prefers",
        ),
        ("uniform", "--prompt the", "given text is approximate on a uniform process"),
        (
            "sedd",
            "--sampler semi_autoregressive --inner remdm",
            "semi_autoregressive is approximate here: this model depends on the noise level",
        ),
        (
            "radd",
            "--sampler particle --particles 9 --batch-size 8 --verifier {code}:vowels",
            "--batch-size 8 is exceeded: particle draws 9 sequences at the same time for each one",
        ),
    ],
)
def test_what_a_user_should_know_is_said(place, kind, flags, said):
    note = draw(place, flags, kind=kind).err
    assert note.startswith(f"note: {said}")
    assert note.count("\n") == 1


@pytest.mark.usefixtures("nothing_drawn")
@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("radd", "--sampler confidence --prompt the"),
        ("uniform", "--sampler tweedie"),
        ("radd", "--sampler semi_autoregressive --inner remdm"),
        ("radd", "--sampler particle --particles 9 --batch-size 9 --verifier {code}:vowels"),
    ],
)
def test_nothing_is_said_of_the_others(place, kind, flags):
    assert draw(place, flags, kind=kind).err == ""


def test_a_long_name_is_printed_whole(place, tmp_path):
    path, name = tmp_path / "requests.jsonl", "n" * 200
    path.write_text(json.dumps({"id": name}))
    assert f"{name} · seed 0 · " in draw(place, "--steps 2", "--requests", path).out


# ------------------------------------------------------ functions that fail

FAILING = {  # what a verifier does, and what is said of it
    "1 / 0": "raised ZeroDivisionError: division by zero",
    "[0.0, float('nan')]": "a score must be finite, got nan for '",
    "[float('inf'), 0.0]": "a score must be finite, got inf for '",
    "[1.0]": "must return one score a text, 2 in all, got an array of shape (1,)",
    "[[1.0], [2.0]]": "must return one score a text, 2 in all, got an array of shape (2, 1)",
    "1.0": "must return one score a text, 2 in all, got an array of shape ()",
    "None": "must return one score a text, 2 in all, got an array of shape ()",
    "[None, None]": "a score must be finite, got nan for '",
    "['good', 'bad']": "raised ValueError: could not convert string to float: 'good'",
    "(len(text) for text in texts)": "raised TypeError: float() argument must be",
    "exec('raise ValueError(\\'two\\\\nlines\\')')": "raised ValueError: two lines",
}


@pytest.fixture(scope="module")
def loaded(place):
    """The run's model, once: another one compiles another program."""
    return sedd.load(place / "radd")


@pytest.mark.parametrize(
    "search",
    [
        *("best_of_n --n 2", nightly("particle --particles 2")),
        nightly("zero_order --neighbours 2 --rounds 3"),
        nightly("search_paths --paths 1 --branches 2"),
    ],
)
@pytest.mark.parametrize("does", FAILING)
def test_a_verifier_that_fails(place, loaded, monkeypatch, search, does):
    monkeypatch.setattr(sedd, "load", lambda path, **options: loaded)
    (place / "does.txt").write_text(does)
    result = draw(place, f"--sampler {search} --verifier {{code}}:failing", code=2)
    assert result.out == ""
    (error,) = result.errors
    assert error.startswith(f"error: verifier {place}/code.py:failing")
    assert FAILING[does] in error


@pytest.mark.nightly
@pytest.mark.parametrize("does", ["-jnp.inf", "jnp.nan"])
def test_a_processor_that_leaves_nothing(place, tmp_path, does):
    """Some samplers would go on for ever with nan."""
    (tmp_path / "code.py").write_text(
        "import jax.numpy as jnp\n"
        f"def f(log_probs, tokens, positions):\n    return jnp.full_like(log_probs, {does})\n"
    )
    result = draw(
        *(place, "--sampler confidence", "--logit-processor", f"{tmp_path}/code.py:f"), code=2
    )
    assert result.out == ""
    (error,) = result.errors
    assert error.startswith(
        f"error: --logit-processor {tmp_path}/code.py:f: it returned nan, inf, or -inf for every "
        "token of a masked position"
    )


# ------------------------------------------------- what was drawn is not lost


def test_a_verifier_that_fails_late(place, tmp_path):
    result = draw(
        *(
            place,
            "--sampler best_of_n --n 2 --inner ordered --inner.steps 2 --num 3 --batch-size 2 "
            "--devices 1",
        ),
        *("--verifier", f"{place}/code.py:only_once"),
        *("--output", tmp_path / "out.jsonl", "--trace", tmp_path / "page.html"),
        code=2,
    )
    assert len(result.errors) == 1
    assert result.errors[0].endswith("only_once raised RuntimeError: a second time")
    (line,) = read(tmp_path / "out.jsonl")
    assert (line["seed"], line["score"]) == (0, 0.1)
    assert (tmp_path / "page.html").exists()


def test_an_interruption(place, tmp_path, monkeypatch):
    def interrupted(self, asked):
        yield next(before(self, asked))
        raise KeyboardInterrupt

    before = Answering.answers
    monkeypatch.setattr(Answering, "answers", interrupted)
    flags = "--steps 2 --num 3 --batch-size 1"
    (line,) = answers(place, tmp_path, flags, code=130)
    assert line["id"] == 0  # the code of one that Ctrl-C ended


def test_nothing_replaces_a_file_when_nothing_was_drawn(place, tmp_path):
    output, requests = tmp_path / "out.jsonl", tmp_path / "requests.jsonl"
    output.write_text("before")
    requests.write_text("no request")
    draw(place, "", "--requests", requests, "--output", output, code=2)
    assert output.read_text() == "before"


def test_each_batch_is_in_the_file_before_the_next(place, tmp_path, monkeypatch):
    """A signal, a crash or a full disk then takes nothing of them."""
    path, before, seen = tmp_path / "out.jsonl", Answering.answers, []

    def watched(self, asked):
        for batch in before(self, asked):
            yield batch
            seen.append([line["id"] for line in read(path)])

    monkeypatch.setattr(Answering, "answers", watched)
    draw(place, "--steps 2 --num 3 --batch-size 1", "--output", path)
    assert seen == [[0], [0, 1], [0, 1, 2]]


def test_a_reader_that_goes_away_does_not_end_the_file(place, tmp_path, monkeypatch):
    def closed(*_):
        raise BrokenPipeError

    monkeypatch.setattr(sample, "show", closed)
    flags = "--steps 2 --num 2 --batch-size 1"
    result = draw(place, flags, "--output", tmp_path / "out.jsonl")
    assert (result.out, [line["id"] for line in read(tmp_path / "out.jsonl")]) == ("", [0, 1])
    assert draw(place, flags).out == ""  # the control: without a file it ends at once


def test_standard_output_holds_json_alone(place):
    result = draw(place, "--steps 2 --num 2 --output -")
    assert [json.loads(line)["id"] for line in result.out.splitlines()] == [0, 1]


def test_requests_are_answered_while_they_are_read(place, monkeypatch):
    """The second pass never holds more than a window of batches."""
    held, most = [], []
    before = Answering._draw

    def watched(self, batch, trace):
        most.append(len(held))
        held.clear()
        return before(self, batch, trace)

    asking = Asking.__call__
    monkeypatch.setattr(Asking, "__call__", lambda self, r: held.append(r) or asking(self, r))
    monkeypatch.setattr(Answering, "_draw", watched)
    path = place / "many.jsonl"
    path.write_text('{"seed": 1, "length": 2}\n' * 100)
    draw(place, "--steps 1 --batch-size 2", "--requests", path)
    assert len(most) == 50
    assert max(most[1:]) <= 2 * 8


# ------------------------------------------------------- what a line may carry


def test_lines_carry_numbers_and_sampler_options(place, tmp_path):
    lines = [
        {"seed": 1, "temperature": 0},
        {"seed": 2, "sampler": {"steps": 3}},
        {"seed": 3, "temperature": 0},
        {"sampler": {"stesp": 3}},
        {"sampler": {"steps": "3"}},
        {"sampler": {"steps": 0}},
        {"sampler": {"inner": {}}},
        {"top_p": 1.5},
        {"seed": 2, "prompt": None},
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    flags = ("--sampler", "confidence", "--steps", 2, "--length", 6, "--requests", path)
    result = draw(place, "", *flags, "--output", tmp_path / "out.jsonl", code=2)
    for said, message in zip(
        result.errors,
        [
            "line 4: sampler.stesp: confidence has no such option; did you mean 'steps'",
            "line 5: sampler.steps must be int | None, got '3'",
            "line 6: samplers 'confidence': steps must be at least 1, got 0",
            "line 7: sampler.inner: confidence has no such option",
            "line 8: top_p must be in (0, 1], got 1.5",
        ],
        strict=True,
    ):
        assert message in said
    found = read(tmp_path / "out.jsonl")
    assert [line["id"] for line in found] == [1, 2, 3, 9]
    assert [line["calls"] for line in found] == [2, 3, 2, 2]


@pytest.mark.usefixtures("nothing_drawn")
@pytest.mark.parametrize("ids", [["a", "b", "a"], [7, 7], [2, None]], ids=str)
def test_an_id_of_two_lines_is_noted(place, tmp_path, ids):
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(json.dumps({"id": one}) for one in ids))
    note = draw(place, "", "--requests", path).err
    assert note == f"note: --requests {path}: the id {ids[0]!r} stands in several lines\n"


def test_control_characters_never_reach_a_terminal(place, tmp_path):
    path = tmp_path / "in.jsonl"
    lines = [{"id": "a\x1b[2Jb\u202ec\r"}, {"id": "\x07", "regex": "\x1b("}]
    path.write_text("\n".join(map(json.dumps, lines)))
    result = draw(place, "--steps 2", "--requests", path, code=2)
    assert "a\\x1b[2Jb\\u202ec\\r · seed" in result.out
    assert not set("\x1b\x07\u202e\r") & set(result.out + result.err)


# ------------------------------------------------------------------ help


def help_of(monkeypatch, capsys, *arguments):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", ["sample.py", *arguments, "--help"])
    with pytest.raises(SystemExit) as stop:
        run(sample.main)
    out, err = capsys.readouterr()
    assert (stop.value.code, err) == (0, "")
    return out


@pytest.mark.parametrize(
    ("arguments", "has", "lacks"),
    [
        ("", "--steps INT", "--gamma"),
        ("--sampler entropy_bounded", "--gamma FLOAT", "--steps"),
        ("--sampler token_confidence", "--threshold FLOAT", "--gamma"),
        ("--sampler particle --inner confidence", "--tilt FLOAT", "--eta"),
        ("--sampler particle --inner confidence", "--inner.by {entropy,margin,ma", "--eta"),
        (
            "--sampler best_of_n --inner semi_autoregressive",
            "--inner.block INT",
            "--inner.by",
        ),
        (
            "--sampler best_of_n --inner semi_autoregressive",
            "--inner.inner.steps INT",
            "--inner.by",
        ),
    ],
)
def test_help(monkeypatch, capsys, arguments, has, lacks):
    out = help_of(monkeypatch, capsys, *arguments.split())
    for name in makers("samplers"):
        assert sum(line.startswith(f"  {name} ") for line in out.splitlines()) == 1
    assert has in out
    assert lacks not in out
    assert "{None}" not in out
    assert "``" not in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("name", makers("samplers"))
def test_help_says_what_each_option_of_a_sampler_is(monkeypatch, capsys, name):
    out = help_of(monkeypatch, capsys, "--sampler", name)
    words = " ".join(re.findall(r"[^\s│─╭╮╰╯]+", out))
    for field in dataclasses.fields(options_type("samplers", name)):
        flag = field.name.replace("_", "-")
        value = rf"(?: [A-Z]+| {{\S+}}|, --no-{flag})"
        (said,) = re.findall(rf" --{flag}{value}(.*?)(?=--|$|\(default)", words)
        assert said.strip().endswith("."), f"--{flag}: {said!r}"


def test_help_of_an_unknown_sampler(place):
    result = call("sample", "--sampler", "twedie", "--help")
    assert result.code == 2
    assert "did you mean 'tweedie'?" in result.errors[0]
