"""``evaluate.py`` beyond perplexity: samples, a judge, conditionals, and one page of it all."""

import html
import json
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

import sedd
from sedd.commands.evaluate_judges import judge_of
from sedd.commands.evaluate_report import read_samples
from sedd.denoiser import Denoiser
from sedd.errors import UserError
from sedd.evaluation.price import Price


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
        *("--price", 1, 6, 48, "--diagnose", 0.5, 0.9),
    )
    assert ran.code == 0, ran.err
    figures = json.loads((place / "r.json").read_text())
    assert figures["nats_per_token"] > 0
    found = figures["diagnosis"]
    assert (found["rates"], found["masks_for_each_rate"]) == ([0.5, 0.9], 1)
    assert found["commonest"]["text"] == " "
    whole, *cells = found["cells"]
    each = [cell["positions"] for cell in cells if None not in (cell["rate"], cell["distance"])]
    assert whole["positions"] == sum(each)
    assert 0 < whole["entropy_error"] < whole["entropy"] <= np.log(tiny_run.TOKENIZER.num_tokens)
    assert {"samples", "generative_perplexity", "consistency"} <= figures.keys()
    assert 0 < figures["mauve"]["score"] <= 1
    assert str(place / "ar") in figures["mauve"]["features"]
    page = (place / "r.html").read_text()
    titles = ("Upper bound", "Samples", "consistent", "What parallelism costs")
    for title in (*titles, "by distance to the nearest revealed"):
        assert title in page
    assert "<script" not in page
    assert "prefers-color-scheme: dark" in page
    assert "the figures are exact" not in page
    for told in ("step 4", f"sedd {sedd.__version__}", f"jax {jax.__version__}", " UTC"):
        assert told in page
    for printed in ("stop words", "Arnold–Gokhale", "best plan", "Bits per token", "pair TV"):
        assert printed in ran.out


@pytest.mark.nightly
def test_the_price_in_json_is_the_profile_of_planned(place, tmp_path):
    """The file of the test above."""
    if not (place / "r.json").exists():
        test_everything_on_one_page_and_in_json(place)
    figures, price = json.loads((place / "r.json").read_text()), Price.load(place / "r.json")
    assert price.model == sedd.load(place / "radd").digest == figures["model"]
    assert (price.length, price.num_sequences, price.draws) == (48, 60, 4)
    one, six, whole = rows = figures["price"]["figures"]
    assert [row["calls"] for row in rows] == [1, 6, 48]
    assert (six["groups"], whole["groups"]) == (price.plan(6), [1] * 48)
    assert (six["plan_nats"], six["plan_error"]) == price.plan_nats(6)
    assert (six["equal_nats"], six["equal_error"]) == price.nats_per_token([8] * 6)
    # One call: the tokens of all sequences given masks alone, in any order.
    assert one["plan_nats"] == pytest.approx(price.nats_by_known[0])
    for row in rows:
        assert row["event_jump_calls"] <= row["calls"] + 1e-6
    # Interpolated between four levels, for conditionals that hardly depend on what is known.
    assert abs(whole["plan_nats"] - figures["nats_per_token"]) < 4 * whole["plan_error"]
    ran = tiny_run.call(
        *("sample", "--checkpoint", place / "radd", "--sampler", "planned", "--calls", 5),
        *("--profile", place / "r.json", "--output", tmp_path / "out.jsonl"),
    )
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "out.jsonl").read_text())["calls"] == 5


@pytest.mark.nightly
def test_a_diagnosis_has_the_price_too_or_says_why_not(place, tmp_path):
    """By the programs of the test above."""
    flags = ("--diagnose", 0.5, 0.9, "--json", tmp_path / "d.json")
    ran = evaluate(place, "radd", *flags)
    assert (ran.code, ran.err) == (0, "")
    figures = json.loads((tmp_path / "d.json").read_text())
    calls = [row["calls"] for row in figures["price"]["figures"]]
    assert calls == [1, 2, 4, 8, 16, 32, 48]
    ran = evaluate(place, "radd", *flags, *PADDED[2:])
    assert ran.code == 0
    assert ran.err.startswith("note: --diagnose: without a price: some rows have padding")
    assert "price" not in json.loads((tmp_path / "d.json").read_text())


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
    assert (figures["is_bound"], figures["exact"]) == (False, True)
    assert figures["standard_error_draws"] == 0
    assert "left out" not in ran.out
    page = (place / "ar.html").read_text()
    assert "bound" not in page.lower()
    ran = evaluate(place, "radd", "--json", place / "radd.json")
    figures = json.loads((place / "radd.json").read_text())
    assert (figures["is_bound"], figures["exact"]) == (True, False)


def test_the_command_of_a_report_gives_its_figures(place, tmp_path):
    """Flags that change a figure, in both spellings, and a name that a shell would split."""
    text = tmp_path / "my text.txt"
    text.write_text(tiny_run.text(4000))
    flags = ("--checkpoint", place / "radd", "--data", text, "--protocol=mdlm", "--max-sequences=7")
    flags += ("--tokenizer", "characters", "--length", 24, "--estimator", "k_dce", "--draws", 8)
    flags += ("--seed", 3, "--split", "all", "--step", 4, "--no-specials")
    page, figures = tmp_path / "r.html", tmp_path / "r.json"
    ran = tiny_run.call("evaluate", *flags, "--report", page, "--json", figures)
    assert ran.code == 0, ran.err
    first = figures.read_text()
    [line] = re.findall("Command: (.*?)</p>", page.read_text())
    name, *arguments = shlex.split(html.unescape(line))
    assert name == "evaluate.py"
    figures.unlink()
    assert tiny_run.call("evaluate", *arguments).code == 0
    assert figures.read_text() == first


# ---------------------------------------------------------------- an autoregressive run as a judge


def test_features_have_seen_the_last_token(place):
    """The state after it, by a call for each text alone; the shift of the inputs would hide it."""
    judge, model = judge_of(str(place / "ar")), sedd.load(place / "ar")
    texts = ["the cat sat", "the cat sad", "the", "x" * model.length]  # the last without padding
    found = judge.features(texts)
    hidden = jax.jit(Denoiser.hidden)
    assert np.abs(found[0] - found[1]).max() > 0.01
    for text, feature in zip(texts, found, strict=True):
        [ids] = model.text_reader.tokenizer.encode_batch([text])
        x_1L = jnp.asarray([[*ids, 1]])  # whatever follows
        seen_D = hidden(model.denoiser, x_1L)[0][0, len(ids)]
        np.testing.assert_allclose(seen_D, feature, atol=1e-5)


PADDED = ("--price", 4, "--cut", "whole", "--max-sequences", 9999)  # the last row is padded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--judge", "smollm2"),
            "--judge smollm2 takes --samples FILE.jsonl or --frontier, which is missing",
        ),
        (("--consistency", 0), "consistency must be at least 1, got 0"),
        (("--samples", "none.jsonl"), "--samples none.jsonl: No such file"),
        (("--price",), "--price needs"),
        (("--price", "few"), "--price: "),
        (("--price", 4, 0), "--price 0: calls must be from 1 to 48, the tokens of a row"),
        (("--price", 49), "--price 49: calls must be from 1 to 48, the tokens of a row"),
        (("--diagnose", 0.5, 1.5), "--diagnose must be between 0 and 1, exclusive, got 1.5"),
        (("--diagnose", 0.5, 0.5), "--diagnose must be one or more distinct numbers"),
        (("--diagnose",), "--draws must be at least 8, two network calls for each of 4 mask rates"),
        (PADDED, "--price: some rows have padding or given tokens, and the price is that of texts"),
    ],
)
def test_flags_that_do_not_fit(place, arguments, message):
    ran = evaluate(place, "radd", *arguments)
    assert ran.code == 2
    assert message in ran.errors[0]


def test_an_autoregressive_model_has_no_price(place):
    ran = evaluate(place, "ar", "--price", 4)
    assert ran.code == 2
    assert ran.errors == [
        "error: --price: an autoregressive model has no price of parallelism: it draws one token a "
        "call"
    ]


def test_an_autoregressive_model_has_no_diagnosis(place):
    ran = evaluate(place, "ar", "--diagnose", 0.5)
    assert ran.code == 2
    assert ran.errors == ["error: --diagnose: an autoregressive model predicts no masked tokens"]


def test_samples_end_where_json_lines_do(tmp_path):
    """U+2028, U+0085 and the like end lines for str.splitlines, and stand in drawn text."""
    texts = ["a\u2028b", "c\x85d", "e\u2029", "é\n\r", "\x1c"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path = tmp_path / "samples.jsonl"
    path.write_bytes(("\ufeff" + "\r\n\n".join(lines)).encode())
    assert read_samples(path) == texts
    for bad in ("[" * 100_000, "[]", "{", '{"text": null}'):
        path.write_text(f"{lines[0]}\n{bad}\n")
        with pytest.raises(UserError, match=f"^--samples {path}, line 2: "):
            read_samples(path)


def test_a_judge_may_be_in_the_home_directory(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    assert judge_of("~/ar").name == "~/ar"


def test_bad_lines_and_judges_are_named(place, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"tokens": [1]}\n')
    ran = evaluate(place, "radd", "--samples", bad)
    assert ran.code == 2
    assert f'--samples {bad}, line 2: no JSON with a "text"' in ran.errors[0]
    ran = evaluate(place, "radd", "--samples", place / "samples.jsonl", "--judge", place / "radd")
    assert ran.code == 2
    assert "a judge is an autoregressive model" in ran.errors[0]
