"""Each protocol against a straightforward computation from the documents, and the command."""

import dataclasses
import itertools
import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from tiers import daily, nightly
from tiny_run import TOKENIZER, call

import sedd
from sedd.commands.evaluate import checked_estimate, evaluate_all, open_data
from sedd.commands.evaluate_flags import read_command
from sedd.data import corpora
from sedd.data.detokenizers import lm1b, wikitext
from sedd.errors import UserError
from sedd.evaluation import datasets, scoring
from sedd.evaluation.protocols import (
    PROTOCOLS,
    ZEROSHOT,
    Protocol,
    check_fit,
    describe,
    protocol,
)
from sedd.evaluation.tables import detail_table, summary_table

LENGTH = 12
EOS = TOKENIZER.eos_id
EPS = 1e-3  # of the log-linear schedule
T_MIN = 1e-3
WORDS = ["the cat . ", "sat : on", "a mat", "and saw my dog", "", "far away : run , a : b"]


def documents(count=1100):
    """Short ones, some empty, some longer than a row; separated words for the detokenizer."""
    rng = np.random.default_rng(0)
    texts = ("".join(rng.choice(WORDS, rng.integers(0, 5))) for _ in range(count))
    return [text.replace(",", "{").replace("'", "") for text in texts]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models whose tokens have the same probabilities everywhere, and documents."""
    place = tmp_path_factory.mktemp("protocols")
    for kind in ("radd", "sedd"):
        (place / kind).mkdir()
        tiny_run.make_run(place / kind, tiny_run.config(kind))
    lines = (json.dumps({"text": text}) for text in documents())
    (place / "rows.jsonl").write_text("\n".join(lines))
    (place / "text.txt").write_text(tiny_run.text(300))
    return place


def log_probs():
    """[N], the probabilities of the constant models."""
    logits = np.random.default_rng(1).standard_normal(TOKENIZER.num_tokens)
    return logits - np.log(np.exp(logits).sum())


def constant_model(place, kind):
    """A network of the usual shape whose output is its bias; a score of SEDD's size and form."""
    model = sedd.load(place / kind)
    bias = np.append(log_probs(), 0.0)
    if kind == "sedd":
        bias[:-1] += math.log(TOKENIZER.num_tokens)

    def leaf(path, value):
        name = jax.tree_util.keystr(path)
        if "head" not in name:
            return value
        return jnp.zeros_like(value) if value.ndim > 1 else jnp.asarray(bias, value.dtype)

    params = jax.tree_util.tree_map_with_path(leaf, model.denoiser.params)
    return dataclasses.replace(model, denoiser=dataclasses.replace(model.denoiser, params=params))


def encode(text):
    return TOKENIZER.encode_batch([text])[0].tolist()


def wrapped(texts, size):
    stream = list(itertools.chain(*([*encode(t), EOS] for t in texts)))
    return [stream[i : i + size] for i in range(0, len(stream) - size + 1, size)]


def rows_of(name, texts):
    """The scored tokens of every row, straight from what each protocol says."""
    by_thousand = [texts[i : i + 1000] for i in range(0, len(texts), 1000)]
    if name == "sedd":
        return [row for part in by_thousand for row in wrapped(map(wikitext, part), LENGTH)]
    if name == "mdlm":
        inner = [row for part in by_thousand for row in wrapped(map(wikitext, part), LENGTH - 2)]
        return [[EOS, *row, EOS] for row in inner]
    if name == "lm1b":
        return [encode(wikitext(t))[:LENGTH] for t in texts if encode(wikitext(t))]
    return wrapped(texts, LENGTH)  # text8, default


def expected(name, kind, tokens):
    """Nats per token of the constant model, by hand.

    A mask is there with probability λ = (1 - ε)t and costs -log c, weighted by 1/t: the mean over t
    is (1 - ε)·H. The prior is ε·log N and the reconstruction (1 - ε)·t_min·H.
    """
    entropy = -log_probs()[tokens].mean()
    if kind == "radd" and name not in ("sedd", "mdlm"):
        return entropy  # the mean over orders
    if name in ("sedd", "mdlm"):
        return (1 - EPS) * entropy
    prior = EPS * math.log(TOKENIZER.num_tokens)
    return prior + (1 - T_MIN) * (1 - EPS) * entropy + (1 - EPS) * T_MIN * entropy


def evaluation(place, kind, *arguments):
    """The command's flags, a model, and what opens and evaluates the data."""
    command = read_command(
        [
            *("--checkpoint", str(place / kind), "--cache-dir", str(place / "cache")),
            *("--draws", "16", "--batch-size", "64"),
            *arguments,
        ]
    )
    model = constant_model(place, kind)
    return command, model, checked_estimate(command, model)


def opened(case):
    command, model, _ = case
    return open_data(command, model)


def figures_of(case, data):
    command, model, estimate = case
    [result] = evaluate_all(command, model, estimate, [data])
    return result


@pytest.mark.parametrize(
    ("kind", "name"),
    daily(
        itertools.product(["radd", "sedd"], PROTOCOLS),
        [("radd", name) for name in PROTOCOLS if name not in ("default", "sedd", "mdlm")]
        + [("sedd", "sedd")],
    ),
)
def test_a_protocol_is_what_it_says(place, kind, name):
    """Rows exactly; the figure within 4 of its errors, which are small."""
    case = evaluation(
        *(place, kind, "--data", f"wikitext2={place}/rows.jsonl", "--protocol", name),
        *("--tokenizer", "characters", "--length", str(LENGTH), "--max-sequences", "400"),
    )
    [data], failed = opened(case)
    assert not failed
    rows = rows_of(name, documents())
    x0, scored = data.source.rows(np.arange(data.source.num_rows))
    assert [x[s].tolist() for x, s in zip(x0, scored, strict=True)] == rows
    tokens = np.concatenate(rows)
    assert data.source.num_tokens_total == len(tokens)
    np.testing.assert_array_equal(data.source.counts, np.bincount(tokens, minlength=EOS + 1))
    result = figures_of(case, data)
    tokens = np.concatenate([rows[i] for i in data.chosen])
    exact = expected(name, kind, tokens)
    assert result.num_tokens == len(tokens)
    assert abs(result.nats_per_token - exact) < 4 * result.standard_error_draws
    assert result.standard_error_draws < 0.02
    assert result.is_bound == (name not in ("sedd", "mdlm"))


def test_protocols_differ_on_the_same_model(place):
    figures = {n: expected(n, "sedd", np.concatenate(rows_of(n, documents()))) for n in PROTOCOLS}
    assert figures.pop("text8") == figures["default"]  # they differ in length, tokenizer and split
    assert np.diff(sorted(figures.values())).min() > 0.002


def test_what_published_protocols_expect():
    sedd_, mdlm, text8, lm1b_ = (PROTOCOLS[n] for n in ("sedd", "mdlm", "text8", "lm1b"))
    assert (sedd_.tokenizer, sedd_.length, sedd_.drop_every) == ("gpt2", 1024, 1000)
    assert (sedd_.draws, sedd_.t_min, sedd_.outer_terms) == (1000, 1e-3, False)
    assert (mdlm.tokenizer, mdlm.length, mdlm.specials) == ("gpt2", 1024, True)
    assert (text8.tokenizer, text8.length) == ("text8", 256)
    assert (lm1b_.tokenizer, lm1b_.length, lm1b_.cut) == ("bert-base-uncased", 128, "truncated")
    check_fit("sedd", sedd_, tokenizer="gpt2", length=1024)
    assert describe("sedd", sedd_) == "sedd"
    assert describe("sedd", dataclasses.replace(sedd_, draws=64)) == "sedd (draws 64)"


def test_splits(place, monkeypatch):
    """WikiText-2 on its train split under sedd, and on validation otherwise."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class StandIn(corpora.Corpus):
        name: str = "wikitext2"
        splits: tuple[str, ...] = ("train", "validation", "test")

        def _documents(self, split):
            return iter([split * 10])

        def fingerprint(self):
            return "stand-in"

    monkeypatch.setattr(datasets, "open_corpus", lambda spec, cache_dir: StandIn())
    for name, split in (("sedd", "train"), ("mdlm", "validation"), ("default", "validation")):
        fit = ("--tokenizer", "characters", "--length", str(LENGTH))
        case = evaluation(place, "sedd", "--data", "wikitext2", "--protocol", name, *fit)
        assert opened(case)[0][0].split == split


# ---------------------------------------------------------------- the command


def evaluate(place, *arguments, kind="radd"):
    return call(
        *("evaluate", "--checkpoint", place / kind, "--cache-dir", place / "cache", "--draws", 4),
        *arguments,
    )


def test_several_data_sets_make_one_table(place, tmp_path):
    """One that cannot be had is named, and the others are evaluated."""
    standing = [f"{name}={place}/text.txt" for name in ZEROSHOT if name != "pubmed"]
    json_file, table = tmp_path / "a.json", tmp_path / "a.md"
    result = evaluate(
        *(place, "--data", *standing, f"pubmed={place}/none.txt", "--max-sequences", 8),
        *("--protocol", "sedd", "--draws", 4, "--tokenizer", "characters", "--length", LENGTH),
        *("--json", json_file, "--table", table),
    )
    assert result.code == 2
    assert len(result.errors) == 1
    assert f"pubmed={place}/none.txt: no such file" in result.errors[0]
    assert "NOT a bound" in result.out
    assert "sedd (draws 4, length 12, tokenizer characters)" in result.out
    title, empty, *lines = table.read_text().splitlines()
    assert title.startswith("NOT a bound: the prior and the reconstruction are left out")
    assert empty == ""
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        name for name in ZEROSHOT if name != "pubmed"
    ]
    assert lines[0].count("|") == 10
    figures = json.loads(json_file.read_text())
    assert [row["data"] for row in figures["results"]] == [n for n in ZEROSHOT if n != "pubmed"]
    assert all(row["is_bound"] is row["exact"] is False for row in figures["results"])
    assert figures["protocol"]["name"] == "sedd"
    assert figures["protocol"]["outer_terms"] is False
    assert figures["protocol"]["drop_every"] == 1000
    assert len(figures["failed"]) == 1


def test_one_data_set_shows_its_terms(place, tmp_path):
    table = tmp_path / "a.tex"
    result = evaluate(
        *(place, "--data", place / "text.txt", "--max-sequences", 4, "--table", table), kind="sedd"
    )
    assert result.code == 0
    for words in (
        "nats per token ≤",
        "prior",
        "reconstruction",
        "error of the draws",
        "perplexity ≤",
    ):
        assert words in result.out
    assert "left out" not in result.out
    assert r"\begin{tabular}" in table.read_text()
    assert r"\caption{Upper bound on the negative log likelihood}" in table.read_text()
    fit = ("--protocol", "mdlm", "--tokenizer", "characters", "--length", LENGTH)
    result = evaluate(
        *(place, "--data", place / "text.txt", "--max-sequences", 4, *fit), kind="sedd"
    )
    assert "NOT a bound" in result.out
    assert "prior, left out" in result.out
    assert "≤" not in result.out


@pytest.mark.parametrize("order", [nightly("forward"), nightly("backward"), "random"])
def test_the_likelihood_of_one_order(place, order):
    """The constant model costs the same in every order."""
    case = evaluation(
        *(place, "radd", "--data", f"{place}/text.txt", "--order", order, "--max-sequences", "9")
    )
    [data], _ = opened(case)
    result = figures_of(case, data)
    x0, scored = data.source.rows(data.chosen)
    assert result.nats_per_token == pytest.approx(-log_probs()[x0[scored]].mean(), rel=1e-5)
    assert result.estimator == f"{order} order"
    assert result.standard_error_draws == 0
    figures = result.to_json()
    assert (figures["is_bound"], figures["exact"], figures["draws"]) == (False, True, 0)
    for shown in (summary_table([result]), detail_table(result)):
        assert shown.title.startswith("Exact negative log likelihood")
        absent = ("bound", "≤", "left out, ", "prior", "diffusion", "reconstruction", "draws (")
        assert not [word for word in absent if word in shown.markdown()]
    with pytest.raises(
        UserError, match=f"--order {order} needs a time-independent absorbing model"
    ):
        evaluation(place, "sedd", "--data", "x", "--order", order)


# ---------------------------------------------------------------- which tokens are scored


@pytest.mark.parametrize(
    ("cut", "texts"),
    [
        ("whole", documents(40)),
        ("whole", ["ab"]),  # shorter than a row
        ("whole", ["a" * (2 * LENGTH - 1)]),  # fills two rows to the last place, with its end
        ("wrapped", documents(40)),
        ("truncated", documents(40)),
        ("as_trained", documents(40)),
    ],
)
def test_every_token_is_scored_or_counted_as_dropped(place, tmp_path, cut, texts):
    """``whole`` drops none: the scored tokens are all tokens, in their order."""
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    [data], failed = opened(evaluation(place, "radd", "--data", str(file), "--cut", cut))
    assert not failed
    x0, scored = data.source.rows(np.arange(data.source.num_rows))
    assert len(x0) == data.source.num_rows
    stream = [token for text in texts for token in (*encode(text), EOS)]
    if cut == "whole":
        assert x0[scored].tolist() == stream
        assert data.num_dropped == 0
    elif cut == "truncated":
        assert scored.sum() + data.num_dropped == sum(len(encode(text)) for text in texts)
        assert data.num_dropped > 0
    else:  # wrapped, as these models are trained
        assert scored.sum() + data.num_dropped == len(stream)
        assert data.num_dropped == len(stream) % LENGTH > 0


def test_padding_of_the_last_row_changes_no_figure_of_the_others(place, tmp_path):
    """From Python: a text of one row and a remainder, whole; the constant model is exact."""
    file = tmp_path / "a.txt"
    file.write_text("the cat sat on a mat")
    model = constant_model(place, "radd")
    result = sedd.evaluate(model, str(file), protocol=Protocol(draws=16, cut="whole"))
    tokens = [*encode("the cat sat on a mat"), EOS]
    assert result.num_tokens == len(tokens)
    assert result.nats_per_token == pytest.approx(-log_probs()[tokens].mean(), rel=0.02)
    figures = result.to_json()
    assert (figures["num_tokens_dropped"], figures["num_sequences"]) == (0, 2)
    cut = sedd.evaluate(model, str(file), protocol=Protocol(draws=4)).to_json()
    assert (cut["num_tokens"], cut["num_tokens_dropped"]) == (LENGTH, len(tokens) - LENGTH)


def test_python_and_the_command_give_the_same_figures(place, tmp_path):
    """A protocol by name with fields changed; JSON says of what the figures are."""
    path, text = tmp_path / "a.json", place / "text.txt"
    flags = ("--protocol", "sedd", "--tokenizer", "characters", "--length", LENGTH, "--draws", 4)
    ran = evaluate(place, "--data", text, "--max-sequences", 6, "--json", path, *flags)
    assert ran.code == 0
    printed = json.loads(path.read_text())
    model = sedd.load(place / "radd")
    chosen = dataclasses.replace(PROTOCOLS["sedd"], tokenizer="characters", length=LENGTH, draws=4)
    result = sedd.evaluate(model, str(text), protocol=chosen, max_sequences=6)
    for name, value in result.to_json().items():
        assert printed[name] == (pytest.approx(value) if isinstance(value, float) else value), name
    assert printed["step"] == 4
    assert printed["num_sequences_not_evaluated"] == result.data.source.num_rows - 6 > 0
    assert printed["versions"] == {
        "sedd": sedd.__version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
    }
    x0, scored = result.data.rows(0, 6)
    tokens = sedd.evaluate(model, x0, protocol=chosen, scored_BL=scored)
    assert tokens.to_json()["fingerprint"] == printed["fingerprint"]
    assert tokens.nats_per_token == pytest.approx(printed["nats_per_token"])
    other = sedd.evaluate(model, x0[::-1].copy(), protocol=Protocol(draws=4))
    assert other.to_json()["fingerprint"] != printed["fingerprint"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((2, 3, 4), int), r"shape \[sequences, length\], got int64 of shape \(2, 3, 4\)"),
        (np.zeros((0, 12), int), r"got int64 of shape \(0, 12\)"),
        (np.zeros((2, 12)), "got float64 of shape"),
        (np.full((2, 12), 99), r"token ids must be in \[0, .*, got 99..99"),
        (np.full((2, 12), -1), "got -1..-1"),
        ("nosuch.txt", "no such file"),
        (Path("nosuch.txt"), "no such file"),
    ],
)
def test_python_refuses_what_is_no_data(place, data, message):
    with pytest.raises(UserError, match=message):
        sedd.evaluate(sedd.load(place / "radd"), data)


@pytest.mark.parametrize("name", ["batch_size", "max_sequences"])
@pytest.mark.parametrize("value", [0, -3])
def test_python_refuses_numbers_below_one(place, name, value):
    with pytest.raises(UserError, match=f"^{name} must be at least 1, got {value}"):
        sedd.evaluate(sedd.load(place / "radd"), np.zeros((1, LENGTH), int), **{name: value})


# ---------------------------------------------------------------- going on


def interrupted(monkeypatch, after):
    """Evaluations that stop after some batches."""
    score = scoring.score_sequences

    def stops(*args, **kwargs):
        for number, part in enumerate(score(*args, **kwargs)):
            if number == after:
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(scoring, "score_sequences", stops)


def test_an_interrupted_evaluation_goes_on(place, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    arguments = (place, "--data", place / "text.txt", place / "rows.jsonl", "--max-sequences", 30)
    arguments += ("--batch-size", 8, "--json", path)
    assert evaluate(*arguments).code == 0
    whole = path.read_text()
    path.unlink()
    kept = tmp_path / "a.json.partial"
    assert not kept.exists()
    with monkeypatch.context() as patch:
        interrupted(patch, after=2)
        assert evaluate(*arguments).code == 130
    assert not path.exists()
    assert len(kept.read_text().splitlines()) == 1 + 16
    kept.write_bytes(kept.read_bytes()[:-5])  # killed in the middle of a line
    assert evaluate(*arguments).code == 0
    assert path.read_text() == whole
    assert not kept.exists()


def test_a_stream_of_json_has_no_journal_beside_it(place, tmp_path, monkeypatch):
    """``--json -`` prints JSON alone, and none of its names leaves a file behind."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    os.symlink("/dev/null", "link")
    files = sorted(os.listdir())
    for name in ("fifo", "link", "/dev/null", "-"):
        assert evaluation(place, "radd", "--data", "x", "--json", name)[0].journal is None
    assert evaluation(place, "radd", "--data", "x", "--json", "a")[0].journal == Path("a.partial")
    kept = ("--json", "-", "--resume", "kept")
    assert evaluation(place, "radd", "--data", "x", *kept)[0].journal == Path("kept")
    result = evaluate(place, "--data", place / "text.txt", "--max-sequences", 4, "--json", "-")
    assert json.loads(result.out)["num_sequences"] == 4
    assert sorted(os.listdir()) == files


def test_a_path_that_is_no_utf_8_reaches_every_file(place, tmp_path):
    text = tmp_path / "x\udcff.txt"
    text.write_text(tiny_run.text(300))
    files = [tmp_path / name for name in ("a.json", "a.md", "a.html")]
    flags = ("--json", files[0], "--table", files[1], "--report", files[2])
    result = evaluate(place, "--data", text, "--max-sequences", 4, *flags)
    assert (result.code, result.err) == (0, "")
    for file in files:
        assert r"x\udcff.txt" in file.read_text("utf-8")
    assert json.loads(files[0].read_text("utf-8"))["data"] == str(text)


def test_what_is_done_is_not_done_again(place, tmp_path, monkeypatch):
    kept = tmp_path / "kept.jsonl"
    arguments = (place, "--data", place / "text.txt", "--max-sequences", 8, "--resume", kept)
    first = evaluate(*arguments)
    interrupted(monkeypatch, after=0)
    assert evaluate(*arguments).out == first.out


@pytest.mark.parametrize(
    ("what", "arguments"),
    [
        ("seed", ["--seed", 1]),
        ("protocol", ["--draws", 8]),
        ("data", ["--max-sequences", 7]),
        ("model", ["--checkpoint", "{place}/other"]),
    ],
)
def test_the_file_of_another_evaluation_is_refused(place, tmp_path, what, arguments):
    if not (place / "other").exists():
        (place / "other").mkdir()
        tiny_run.make_run(place / "other", tiny_run.config("radd"), seed=1)
    kept = tmp_path / "kept.jsonl"
    before = (place, "--data", place / "text.txt", "--max-sequences", 8, "--resume", kept)
    assert evaluate(*before).code == 0
    text = kept.read_text()
    given = [str(a).format(place=place) for a in arguments]
    result = evaluate(*before, *given)
    assert result.code == 2
    assert result.errors == [
        f"error: {kept} holds the results of another evaluation ({what} differs): remove it, or "
        "name another file"
    ]
    assert kept.read_text() == text


def test_a_file_that_is_not_an_evaluations_is_left_alone(place, tmp_path):
    kept = tmp_path / "notes.txt"
    kept.write_text("my notes\n")
    result = evaluate(place, "--data", place / "text.txt", "--resume", kept)
    assert result.errors == [f"error: {kept} is not the file of an evaluation"]
    assert kept.read_text() == "my notes\n"


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("radd", "--protocol sed", "unknown protocol 'sed'; did you mean 'sedd'?"),
        (
            "radd",
            "--protocol sedd",
            "protocol sedd expects tokenizer gpt2 and length 1024, and the model has characters "
            "and 12; to evaluate all the same, give --tokenizer characters --length 12: the table",
        ),
        ("radd", "--protocol sedd --length 12", "expects tokenizer gpt2, and the model has"),
        ("radd", "--protocol text8 --length 64 --tokenizer gpt2", "expects tokenizer gpt2"),
        ("sedd", "--estimator k_dce", "--estimator k_dce needs a time-independent absorbing"),
        ("radd", "--draws 0", "draws must be a positive multiple of 4, got 0"),
        ("radd", "--max-sequences 0", "max_sequences must be at least 1, got 0"),
        ("radd", "--t-min 0", "t_min must be in (0, 1), got 0.0"),
        ("radd", "--drop-every 10", "drop_every needs cut wrapped, got cut as_trained"),
        ("radd", "--specials --length 2", "leaves no room for text: two tokens of every row"),
        (
            "radd",
            "--length 100000",
            "length 100000 is longer than the data: "
            "{place}/text.txt (all) has 1,158 tokens, 1 ends of documents included; "
            "--cut whole evaluates it in one padded row",
        ),
        ("radd", "--report r.pdf", "--report r.pdf: the name must end in .html or .htm"),
        ("radd", "--report r", "--report r: the name must end in .html or .htm"),
        ("radd", "--table x.html", "--table x.html: the name must end in .md or .tex"),
    ],
)
def test_a_mistake_is_one_line(place, kind, arguments, message):
    result = call(
        *("evaluate", "--checkpoint", place / kind, "--cache-dir", place / "cache"),
        *("--data", place / "text.txt", *arguments.split()),
    )
    assert (result.code, len(result.errors)) == (2, 1)
    assert message.replace("{place}", str(place)) in result.errors[0]
    assert result.out == ""


def test_an_unknown_data_set_gets_a_suggestion(place):
    result = evaluate(place, "--data", "agnews")
    assert result.code == 2
    assert "unknown corpus 'agnews', did you mean 'ag_news'?" in result.errors[0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mine={place}/text.txt", "'mine' is no data set that can stand before '='"),
        ("mine={place}/text.txt", "to evaluate the file under its own name, give {place}/text.txt"),
        ("agnews={place}/text.txt", "before '='; did you mean 'ag_news'?"),
        ("hf://fancyzhx/ag_news", "hf://OWNER/NAME is a checkpoint"),
    ],
)
def test_a_source_that_is_no_data_set_gets_a_hint(place, spec, message):
    result = evaluate(place, "--data", spec.format(place=place))
    assert (result.code, len(result.errors)) == (2, 1)
    assert message.format(place=place) in result.errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--samples nosuch.jsonl", "--samples nosuch.jsonl: No such file"),
        ("--samples {place}/text.txt", 'line 1: no JSON with a "text"'),
        (
            "--samples {place}/rows.jsonl --judge gpt2",
            "--judge gpt2: no such directory; did you mean hf:gpt2?",
        ),
        ("--samples {place}/rows.jsonl --judge smolm2", "did you mean 'smollm2'?"),
        ("--samples {place}/rows.jsonl --judge {place}", "no config.json"),
        ("--consistency 100000", "--consistency 100000: pairs must be in"),
        ("--table {place}", "must end in .md or .tex"),
    ],
)
def test_mistakes_are_found_before_anything_is_computed(place, monkeypatch, arguments, message):
    def compute(*args, **kwargs):
        raise AssertionError("computed")

    monkeypatch.setattr(scoring, "score_sequences", compute)
    given = arguments.format(place=place).split()
    result = evaluate(place, "--data", place / "text.txt", *given)
    assert (result.code, len(result.errors)) == (2, 1)
    assert message in result.errors[0]


def test_a_data_set_that_is_named_twice(place):
    twice = [f"ptb={place}/text.txt", f"ptb={place}/rows.jsonl"]
    found, failed = opened(evaluation(place, "radd", "--data", *twice))
    assert [data.label for data in found] == ["ptb"]
    (message,) = failed
    assert message == (
        f"{twice[1]}: another data set has the label 'ptb' already, and figures are stored by label"
    )


def test_unknown_protocol():
    with pytest.raises(UserError, match="did you mean 'text8'"):
        protocol("tex8")


def test_detokenizers_change_what_is_read():
    assert any(wikitext(t) != t for t in documents())
    assert lm1b("a , b") == "a, b"
