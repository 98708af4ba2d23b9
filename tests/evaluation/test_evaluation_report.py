"""``evaluate.py`` beyond perplexity: samples, a judge, conditionals, and one page of it all."""

import json

import pytest
import tiny_run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An any-order and an autoregressive model, text, and samples of other text."""
    place = tmp_path_factory.mktemp("report")
    for kind in ("radd", "ar"):
        tiny_run.make_run(place / kind, tiny_run.config(kind, length=48))
    (place / "text.txt").write_text(tiny_run.text(4000))
    lines = tiny_run.text(700, seed=1).split("\n")
    samples = [json.dumps({"text": line}) + "\n" for line in lines if line]
    (place / "samples.jsonl").write_text("".join(samples))
    (place / "few.jsonl").write_text("".join(samples[:5]))
    return place


def evaluate(place, kind, *arguments):
    data = ("--data", place / "text.txt", "--draws", 4, "--max-sequences", 60)
    return tiny_run.call("evaluate", "--checkpoint", place / kind, *data, *arguments)


def test_everything_on_one_page_and_in_json(place):
    ran = evaluate(
        *(place, "radd", "--samples", place / "samples.jsonl", "--judge", place / "ar"),
        *("--consistency", 2, "--report", place / "r.html", "--json", place / "r.json"),
    )
    assert ran.code == 0, ran.err
    figures = json.loads((place / "r.json").read_text())
    assert figures["nats_per_token"] > 0
    assert {"samples", "generative_perplexity", "consistency"} <= figures.keys()
    assert 0 < figures["mauve"]["score"] <= 1
    assert str(place / "ar") in figures["mauve"]["features"]
    page = (place / "r.html").read_text()
    for title in ("Upper bound", "Samples", "consistent"):
        assert title in page
    assert "<script" not in page
    for printed in ("stop words", "Arnold–Gokhale"):
        assert printed in ran.out


def test_few_samples_have_no_mauve_and_it_says_so(place):
    flags = ("--samples", place / "few.jsonl", "--judge", place / "ar")
    ran = evaluate(
        place, "radd", *flags, "--json", place / "few.json", "--report", place / "f.html"
    )
    assert ran.code == 0, ran.err
    assert "mauve" not in json.loads((place / "few.json").read_text())
    assert (
        "Needs 50 samples and as many real texts: there are 5 and 5."
        in (place / "f.html").read_text()
    )


def test_an_exact_likelihood_is_called_no_bound(place):
    ran = evaluate(place, "ar", "--json", place / "ar.json", "--report", place / "ar.html")
    assert ran.code == 0, ran.err
    assert "≤" not in ran.out
    assert "bound" not in ran.out.lower()
    figures = json.loads((place / "ar.json").read_text())
    assert (figures["estimator"], figures["draws"]) == ("exact", 0)
    assert figures["standard_error_draws"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--judge", "smollm2"), "--judge smollm2 takes --samples FILE.jsonl, which is missing"),
        (("--consistency", 0), "consistency must be at least 1, got 0"),
        (("--samples", "none.jsonl"), "--samples none.jsonl: No such file"),
    ],
)
def test_flags_that_do_not_fit(place, arguments, message):
    ran = evaluate(place, "radd", *arguments)
    assert ran.code == 2
    assert message in ran.errors[0]


def test_bad_lines_and_judges_are_named(place, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"tokens": [1]}\n')
    ran = evaluate(place, "radd", "--samples", bad)
    assert ran.code == 2
    assert f'--samples {bad}, line 2: no JSON with a "text"' in ran.errors[0]
    ran = evaluate(place, "radd", "--samples", place / "samples.jsonl", "--judge", place / "radd")
    assert ran.code == 2
    assert "a judge is an autoregressive model" in ran.errors[0]
