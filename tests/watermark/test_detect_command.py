"""``sample.py --watermark`` and ``sedd detect``: what is written, found, noted and refused."""

import json

import numpy as np
import pytest
import tiny_run
from tiers import nightly
from tiny_run import TOKENIZER, call

import sedd
from sedd.constraints.clamp import from_prompt
from sedd.watermark import Scheme, detect
from sedd.watermark.scheme import scored_positions

LENGTH = 24
SECRET = "5e1f0c9d2b7a4e6f8091a2b3c4d5e6f7"
CODE = "def most_vowels(texts):\n    return [sum(c in 'aeiou' for c in text) for text in texts]\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run, a file of a secret, and a verifier."""
    top = tmp_path_factory.mktemp("place")
    (top / "run").mkdir()
    tiny_run.make_run(top / "run", tiny_run.config("radd", length=LENGTH))
    (top / "code.py").write_text(CODE)
    (top / "key").write_text(SECRET + "\n")
    (top / "key").chmod(0o600)
    (top / "other").write_text("f" * 32)
    (top / "other").chmod(0o600)
    return top


def sample(place, flags, *more, code=0, kind="gumbel"):
    """The outcome of ``sample.py``, and the lines of its output."""
    output = place / "out.jsonl"
    output.unlink(missing_ok=True)
    outcome = call(
        *("sample", "--checkpoint", place / "run", "--output", output, *flags.split(), *more),
        *("--watermark", kind, "--watermark-key", place / "key"),
    )
    assert outcome.code == code, outcome.err
    lines = output.read_text().splitlines() if output.exists() else []
    return outcome, [json.loads(line) for line in lines]


def found(place, *flags, key="key", texts="out.jsonl", code=0):
    """The JSON objects that ``sedd detect`` prints."""
    flags = ("--watermark-key", place / key, "--json", *flags)
    outcome = call("detect", place / texts, *flags)
    assert outcome.code == code, outcome.err
    return [json.loads(line) for line in outcome.out.splitlines()]


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# ------------------------------------------------------- what is written, and found


@pytest.mark.parametrize(
    "flags",
    [
        "--sampler event_jump",
        nightly("--sampler semi_autoregressive --block 8"),
        nightly("--sampler best_of_n --n 3 --verifier {place}/code.py:most_vowels"),
    ],
)
def test_drawn_texts_are_found_by_their_secret_alone(place, flags):
    outcome, lines = sample(
        place, f"--num 4 --seed 4 {flags}".format(place=place), "--prompt", "the "
    )
    assert SECRET not in outcome.out + outcome.err + (place / "out.jsonl").read_text()
    n = 3 if "best_of_n" in flags else 1
    for line in lines:
        mark = {"kind": "gumbel", "nonce": line["seed"], "candidates": n, "scored": [[4, LENGTH]]}
        assert line["watermark"] == mark
    own, others = found(place), found(place, key="other")
    assert [(one["scored"], one["tests"]) for one in own] == [(20, n)] * 4
    assert max(one["p_value"] for one in own) < 1e-6
    assert min(one["p_value"] for one in others) > 1e-3
    assert len({line["text"] for line in lines}) == 4


def test_texts_without_marks_are_found_by_a_search(place, tmp_path):
    _, lines = sample(place, "--num 4 --seed 2 --sampler event_jump")
    whole = [line for line in lines if len(line["text"]) == LENGTH]  # without ends of text
    lines = [whole[0], whole[-1]]
    texts = write(tmp_path / "texts.jsonl", *({"text": line["text"][2:]} for line in lines))
    run = ("--checkpoint", place / "run", "--nonces", 8, "--offsets", 3)
    first, second = found(place, *run, texts=texts)
    assert [one["nonce"] for one in (first, second)] == [line["seed"] for line in lines]
    assert [one["offset"] for one in (first, second)] == [2, 2]
    assert first["tests"] == 8 * 7
    assert max(first["p_value"], second["p_value"]) < 1e-6
    unsearched = found(place, "--checkpoint", place / "run", texts=texts)
    assert min(one["p_value"] for one in unsearched) > 1e-3


@pytest.mark.nightly
def test_constrained_tokens_carry_nothing(place, tmp_path):
    requests = write(
        tmp_path / "in.jsonl", {"infill": "a{mask:8}b{mask:6}", "regex": [None, "c{6}"]}
    )
    _, (line,) = sample(place, "--sampler event_jump", "--requests", requests)
    assert line["watermark"]["scored"] == [[1, 9]]
    assert line["text"].endswith("cccccc")
    (one,) = found(place)
    assert one["scored"] == 8


@pytest.mark.nightly
def test_green_texts_are_found(place):
    outcome, lines = sample(place, "--num 4 --sampler event_jump --length 96", kind="green")
    assert "green changes the distribution of the samples: by at most 2 nats" in outcome.err
    assert lines[0]["watermark"] == {"kind": "green", "gamma": 0.5, "scored": [[0, 96]]}
    own = found(place)
    assert max(one["p_value"] for one in own) < 1e-4
    assert {one["watermark"] for one in own} == {"green"}
    assert min(one["p_value"] for one in found(place, key="other")) > 1e-4


def test_a_seed_is_a_nonce(place):
    """One seed, one text; other seeds, other texts."""
    _, first = sample(place, "--num 4 --seed 8 --sampler event_jump")
    _, later = sample(place, "--num 4 --seed 9 --sampler event_jump")
    assert [line["tokens"] for line in later[:3]] == [line["tokens"] for line in first[1:]]
    assert len({tuple(line["tokens"]) for line in first}) == 4


def test_the_table(place):
    sample(place, "--num 4 --sampler event_jump")
    outcome = call("detect", place / "out.jsonl", "--watermark-key", place / "key", "--nonces", 2)
    assert outcome.code == 0
    for word in ("p-value", "statistic", "gumbel", "nonce", "offset"):
        assert word in outcome.out


def test_behind_the_end_of_a_text_nothing_is_scored():
    clamp = from_prompt(TOKENIZER, 8, prompt="e")
    end = TOKENIZER.encode_batch(["e"])[0][0]
    tokens_L = np.array([end, 1, 2, end, end, end, end, end])
    scored_L = scored_positions(tokens_L, clamp, [], (end,))
    assert scored_L.tolist() == [False, True, True, True, False, False, False, False]


# ------------------------------------------------------- in Python


def test_in_python(place):
    model = sedd.load(place / "run")
    scheme = Scheme(secret=SECRET.encode())
    asked = {"num": 4, "prompt": "the ", "sampler": "event_jump", "watermark": scheme}
    result = sedd.sample(model, 0, **asked)
    assert result.scored.tolist() == [[False] * 4 + [True] * (LENGTH - 4)] * 4
    assert len(set(result.nonces.tolist())) == 4
    for tokens, nonce, scored in zip(result.tokens, result.nonces, result.scored, strict=True):
        p_value = detect(tokens, scheme.secret, nonces=[nonce], scored=scored).p_value
        assert p_value < 1e-6
    other = sedd.sample(model, 1, **asked)
    assert not set(other.nonces.tolist()) & set(result.nonces.tolist())
    given = sedd.sample(model, 1, nonces=[5, 5, 6, 7], **asked)
    assert given.nonces.tolist() == [5, 5, 6, 7]
    assert (given.tokens[0] == given.tokens[1]).mean() > 0.5  # equal noise, another order
    assert (given.tokens[0] == given.tokens[2]).mean() < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"watermark": None, "nonces": [1]}, "nonces are for a watermark"),
        ({"nonces": [1, 2]}, "nonces must be 1 numbers"),
        ({"nonces": [-1]}, "nonces must be 1 numbers"),
        ({"temperature": 0.0}, "temperature must be above 0 with a watermark"),
        ({"sampler": "remdm"}, "'remdm' takes no gumbel watermark"),
    ],
)
def test_what_python_refuses(place, options, message):
    model = sedd.load(place / "run")
    options = {"watermark": Scheme(secret=b"s"), "sampler": "event_jump", **options}
    with pytest.raises(sedd.UserError, match=message):
        sedd.sample(model, 0, **options)


# ------------------------------------------------------- mistakes, one line each


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--watermark gumbel", "--watermark gumbel needs --watermark-key FILE"),
        ("--watermark-key {place}/key", "say which watermark"),
        ("--watermark green --watermark-key {place}/no", "{place}/no: No such file"),
        ("--watermark gumbel --watermark-key {place}/empty", "{place}/empty: the file is empty"),
        (
            "--watermark green --watermark-key {place}/key --watermark-delta 0",
            "--watermark-delta must be finite and above 0",
        ),
        (
            "--watermark green --watermark-key {place}/key --watermark-gamma 0.3",
            "--watermark-gamma must be a multiple of 1/256",
        ),
        (
            "--watermark gumbel --watermark-key {place}/key --temperature 0",
            "--temperature must be above 0 with a watermark",
        ),
        (
            "--watermark gumbel --watermark-key {place}/key --sampler remdm",
            "sampler 'remdm' takes no gumbel watermark: it may draw a position more than once",
        ),
        (
            "--watermark gumbel --watermark-key {place}/key --sampler semi_autoregressive --inner "
            "token_confidence",
            "--inner token_confidence: sampler 'token_confidence' takes no gumbel watermark",
        ),
    ],
)
def test_what_sample_refuses(place, flags, message):
    (place / "empty").write_text(" \n")
    flags = flags.format(place=place).split()
    outcome = call("sample", "--checkpoint", place / "run", *flags)
    assert outcome.code == 2
    (error,) = outcome.errors
    assert message.format(place=place) in error
    assert SECRET not in outcome.err


def test_an_exposed_or_short_secret_is_noted(place):
    (place / "exposed").write_text("abc")
    (place / "exposed").chmod(0o644)
    flags = ("--num", 4, "--sampler", "event_jump", "--watermark", "gumbel")
    key = ("--watermark-key", place / "exposed")
    for outcome in (
        call("sample", "--checkpoint", place / "run", *flags, *key),
        call("detect", write(place / "t.jsonl", {"tokens": [1, 2]}), *key),
    ):
        assert outcome.code == 0
        assert "every user of this machine can read the secret" in outcome.err
        assert "fewer than 16 bytes" in outcome.err
        assert "abc" not in outcome.err


def test_a_nonce_that_is_used_again_for_a_prompt_is_noted(place, tmp_path):
    lines = [
        {"id": name, "prompt": prompt, "seed": 3}
        for name, prompt in zip("abcd", "xyzx", strict=True)
    ]
    requests = write(tmp_path / "in.jsonl", *lines)
    outcome, _ = sample(place, "--sampler event_jump", "--requests", requests)
    (note,) = [line for line in outcome.err.splitlines() if "nonce" in line]
    assert "of 'd' stand in several lines" in note
    requests = write(tmp_path / "in.jsonl", *lines[:3], {**lines[3], "seed": 4})
    outcome, _ = sample(place, "--sampler event_jump", "--requests", requests)
    assert "nonce" not in outcome.err


def test_bad_lines_are_named_and_the_others_tested(place, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        '{"tokens": [1, 2, 3]}\n'
        "no json\n"
        "[1, 2]\n"
        '{"tokens": "x"}\n'
        '{"tokens": [-4]}\n'
        '{"text": "the CAT"}\n'
        '{"text": 5}\n'
        '{"tokens": [1], "watermark": {"nonce": -1}}\n'
        '{"tokens": [1], "watermark": {"scored": [[1]]}}\n'
        '\n{"id": "last", "text": "the cat"}\n'
    )
    flags = ("--watermark-key", place / "key", "--checkpoint", place / "run", "--json")
    outcome = call("detect", texts, *flags)
    assert outcome.code == 2
    tested = [json.loads(line)["id"] for line in outcome.out.splitlines()]
    assert tested == [1, "last"]
    said = [error.removeprefix(f"error: {texts}, line ") for error in outcome.errors]
    beginnings = [
        "2: not JSON",
        "3: a text must be an object",
        "4: tokens must be a list",
        "5: tokens must be at least 0",
        "6: ",
        "7: text must be a string",
        "8: watermark.nonce: got -1",
        "9: watermark.scored: got [[1]]",
    ]
    for line, beginning in zip(said, beginnings, strict=True):
        assert line.startswith(beginning)
    (error,) = call("detect", write(texts, {"text": "a"}), *flags[:2]).errors
    assert "line 1: it has text and no tokens: give --checkpoint" in error


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("\n", "", "the file holds no texts"),
        (None, "", "No such file"),
        ('{"tokens": [1]}', "--nonces 0", "--nonces must be at least 1"),
        ('{"tokens": [1]}', "--offsets -1", "--offsets must be at least 0"),
        ('{"tokens": [1]}', "--watermark-gamma 2", "--watermark-gamma must be a multiple"),
        ('{"text": "a"}', "--checkpoint {place}/nowhere", "nowhere"),
    ],
)
def test_what_detect_refuses(place, tmp_path, content, flags, message):
    texts = tmp_path / "texts.jsonl"
    if content is not None:
        texts.write_text(content)
    flags = flags.format(place=place).split()
    outcome = call("detect", texts, "--watermark-key", place / "key", *flags)
    assert outcome.code == 2
    (error,) = outcome.errors
    assert message in error
