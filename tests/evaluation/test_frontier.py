"""The frontier of judged quality against entropy: interpolation, errors, and the command."""

import json

import numpy as np
import pytest
import tiny_run

import sedd
from sedd.data.packing import unigram_entropy
from sedd.errors import FieldError
from sedd.evaluating.frontier import named_models
from sedd.evaluation.frontier import Frontier, JudgedPoint, at_entropy
from sedd.evaluation.ngram_judge import NgramJudge


def point(rng, temperature, *, nats, entropy, count=400, shared=None, model="a", steps=2):
    """Texts whose nats and entropies scatter around these means, partly in common."""
    noise_S = rng.standard_normal((2, count)) if shared is None else shared
    tokens_S = 20 + rng.integers(0, 5, count)
    return JudgedPoint(
        nats_S=(nats + 0.3 * noise_S[0]) * tokens_S,
        tokens_S=tokens_S,
        entropy_S=entropy + 0.2 * noise_S[1],
        model=model,
        steps=steps,
        temperature=temperature,
        calls=2.0,
    )


def test_a_line_is_interpolated_exactly():
    rng = np.random.default_rng(0)
    quiet = np.zeros((2, 5))
    line = [
        point(rng, t, nats=1 + 2 * t, entropy=3 + t, count=5, shared=quiet) for t in (1.0, 0.5, 0.7)
    ]
    found = at_entropy(line, 3.6)
    assert found is not None
    assert found.measured.value == pytest.approx(1 + 2 * 0.6)
    assert found.measured.error == pytest.approx(0, abs=1e-12)
    assert at_entropy(line, 3.4) is None  # no extrapolation
    assert at_entropy(line, 4.1) is None


@pytest.mark.parametrize("paired", [False, True])
def test_errors_are_the_spread_over_repetitions(paired):
    """Of the interpolated figure and of a difference, also if texts share their noise."""
    rng = np.random.default_rng(1)
    figures, errors, differences, difference_errors = [], [], [], []
    for _ in range(400):
        noise = rng.standard_normal((2, 100)) if paired else None

        def curve(offset, noise=noise):
            return [
                point(rng, t, nats=offset + 2 * t, entropy=3 + t, count=100, shared=noise)
                for t in (0.5, 1.0)
            ]

        one, other = (at_entropy(curve(offset), 3.7) for offset in (1.0, 1.2))
        assert one is not None
        assert other is not None
        figures.append(one.nats)
        errors.append(one.measured.error)
        value, error = one.above(other)
        differences.append(value)
        difference_errors.append(error)
    for values, stated in ((figures, errors), (differences, difference_errors)):
        # The standard deviation of 400 repetitions is known to 3.5 %.
        assert np.std(values) == pytest.approx(np.mean(stated), rel=0.15, abs=1e-3)
    assert np.mean(figures) == pytest.approx(1 + 2 * 0.7, abs=0.02)
    assert np.mean(differences) == pytest.approx(-0.2, abs=0.02)
    if paired:
        assert np.mean(difference_errors) < 0.5 * np.mean(errors)


def test_a_point_is_what_the_judge_and_the_counts_say():
    judge = NgramJudge.of(
        np.array([0, 1, 0, 1, 2]),
        *(3, 2),
        encode=lambda texts: [np.array([*map(int, text)], int) for text in texts],
    )
    texts = ["0101", "22", ""]
    found = JudgedPoint.of(texts, judge)
    total = judge.nats(np.array([0, 1, 0, 1])).sum() + judge.nats(np.array([2, 2])).sum()
    assert found.nats.value == pytest.approx(total / 6)
    np.testing.assert_allclose(found.entropy_S, [np.log(2), 0, 0])
    assert unigram_entropy(np.array([2, 2])) == pytest.approx(np.log(2))
    with pytest.raises(ValueError, match="scores no token of these 1 texts"):
        JudgedPoint.of([""], judge)
    with pytest.raises(FieldError, match=r"with 50257\*\*order below 2\*\*63, got 5"):
        NgramJudge.of(np.array([0]), 50257, 5, encode=judge.encode)


def test_the_comparison_is_at_the_entropy_of_real_text():
    rng = np.random.default_rng(0)
    quiet = np.zeros((2, 3))
    points = [
        point(rng, t, nats=n + t, entropy=3 + t, count=3, shared=quiet, model=model, steps=steps)
        for model, steps, n in (("a", 2, 1.0), ("a", 8, 0.5), ("b", 2, 1.5), ("b", 8, 0.25))
        for t in (0.5, 1.0)
    ]
    real = point(rng, 1.0, nats=0.1, entropy=3.75, count=3, shared=quiet)
    found = Frontier(judge="j", points=points, real=real, model="a", against="b")
    two, eight = found.comparison()
    assert two["nats"].value == pytest.approx(1.75)
    assert two["above"].value == pytest.approx(-0.5)
    assert two["above_most"].value == pytest.approx(1.75 - 1.0)
    assert eight["above"].value == pytest.approx(0.25)
    section = found.section()
    assert len(section.tables[0].rows) == 2
    assert len(section.tables[1].rows) == 8
    json.dumps(found.to_json())
    far = Frontier(judge="j", points=points, real=point(rng, 1.0, nats=0, entropy=9), model="a")
    assert far.comparison()[0]["nats"] is None


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("frontier")
    (place / "text.txt").write_text(tiny_run.text(4000))
    for seed, name in enumerate(("student", "teacher", "uniform", "short")):
        kind = "uniform" if name == "uniform" else "radd"
        length = 10 if name == "short" else 12
        config = tiny_run.config(kind, corpus=str(place / "text.txt"), length=length)
        tiny_run.make_run(place / name, config, seed=seed)
    return place


def evaluate(place, *flags, model="student"):
    data = ("--data", place / "text.txt", "--draws", 4, "--max-sequences", 16)
    return tiny_run.call("evaluate", "--checkpoint", place / model, *data, *flags)


FRONTIER = ("--frontier", "--steps", "1,4", "--texts", 12)


@pytest.mark.nightly
def test_the_command_draws_two_models(place):
    ran = evaluate(
        *(place, *FRONTIER, "--temperatures", "0.3,1,3", "--judge", "ngram"),
        *("--against", place / "teacher", "--json", place / "f.json", "--report", place / "f.html"),
    )
    assert ran.code == 0, ran.err
    for printed in ("entropy of real text", "student", "teacher", "temperature", "difference"):
        assert printed in ran.out
    assert "Quality against entropy" in (place / "f.html").read_text()
    found = json.loads((place / "f.json").read_text())["frontier"]
    assert len(found["points"]) == 2 * 2 * 3
    assert {p["calls"] for p in found["points"] if p["steps"] == 1} == {1.0}
    assert all(1 < p["calls"] <= 4 for p in found["points"] if p["steps"] == 4)
    assert [row["steps"] for row in found["at_real_entropy"]] == [1, 4]
    assert found["texts"] == 12
    # A random model: the hotter the more entropy, and the judge knows the training text.
    for model in ("student", "teacher"):
        cold, _, hot = (p for p in found["points"] if (p["model"], p["steps"]) == (model, 4))
        assert cold["entropy"][0] < hot["entropy"][0]
    assert found["real"]["nats_per_token"][0] < min(p["nats_per_token"][0] for p in found["points"])


@pytest.mark.nightly
def test_a_process_without_temperature_has_one_point(place):
    ran = evaluate(
        *(place, *FRONTIER, "--judge", "ngram", "--json", place / "u.json"), model="uniform"
    )
    assert ran.code == 0, ran.err
    found = json.loads((place / "u.json").read_text())["frontier"]
    assert [p["temperature"] for p in found["points"]] == [1.0, 1.0]
    assert found["at_real_entropy"][0]["nats"] is None


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("student", ("--steps", "4"), "--steps 4: it is a flag of --frontier"),
        ("student", ("--against", "RUN"), "it is a flag of --frontier"),
        ("student", ("--texts", 9), "--texts 9: it is a flag of --frontier"),
        ("student", ("--frontier", "--steps", "1,x"), "--steps 1,x: 'x' is no number of steps"),
        ("student", ("--frontier", "--steps", "0"), "--steps 0: '0' is no number of steps"),
        (
            "student",
            ("--frontier", "--temperatures", "1,0"),
            "--temperatures 1,0: '0' is no number above 0",
        ),
        ("student", ("--frontier", "--texts", 1), "--texts must be at least 2, got 1"),
        ("student", (*FRONTIER, "--against", "nowhere"), "--against nowhere: "),
        (
            "student",
            (*FRONTIER, "--judge", "ngram", "--against", "PLACE/short"),
            "its length is 10, and here it is 12",
        ),
        (
            "uniform",
            (*FRONTIER, "--judge", "ngram", "--temperatures", "0.5,1"),
            "has no temperature: off the absorbing process it needs",
        ),
        ("student", ("--judge", "ngram"), "takes --samples FILE.jsonl or --frontier"),
        (
            "student",
            ("--judge", "ngram", "--samples", "PLACE/text.txt"),
            "--judge ngram is for --frontier",
        ),
    ],
)
def test_mistakes_are_one_line(place, model, flags, message):
    flags = [str(flag).replace("PLACE", str(place)) for flag in flags]
    if "nowhere" in flags:
        flags += ["--judge", "ngram"]
    ran = evaluate(place, *flags, model=model)
    assert ran.code == 2
    [line] = ran.errors
    assert message in line


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": []}, r"^steps must be whole numbers of at least 1, such as \[8, 64\], got \[\]"),
        ({"steps": [2.5]}, r"^steps must be whole numbers .* got \[2.5\]"),
        ({"steps": 8}, "^steps must be whole numbers .* got 8"),
        ({"temperatures": "0.9,1"}, "^temperatures must be numbers above 0, .* got '0.9,1'"),
        ({"temperatures": [0.0, 1.0]}, r"^temperatures must be numbers above 0, .* \[0.0, 1.0\]"),
        ({"texts": 1}, "^texts must be at least 2, got 1"),
        ({"judge": "gpt2"}, r"^judge must be \"ngram\" or a judge, such as .* got 'gpt2'"),
    ],
)
def test_mistakes_in_python(place, given, message):
    model = sedd.load(place / "student")
    with pytest.raises(FieldError, match=message):
        sedd.frontier(model, place / "text.txt", **given)


def test_two_models_of_one_name_are_told_apart(place, monkeypatch):
    monkeypatch.chdir(place)
    model = sedd.load("student")
    assert [*named_models(model, model)] == ["student", f"student, step {model.step}"]
    other = sedd.load(place / "student")
    assert [*named_models(model, other)] == ["student", str(place / "student")]


def test_without_a_judge_the_line_says_what_to_install(place, monkeypatch):
    from importlib import metadata

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("sedd.evaluation.smollm2.metadata.distribution", missing)
    ran = evaluate(place, *FRONTIER)
    assert ran.code == 2
    [line] = ran.errors
    assert "--frontier needs a judge" in line
    assert "pip install" in line
    assert "such as ngram" in line
