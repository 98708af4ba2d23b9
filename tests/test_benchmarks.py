"""The benchmark scripts run, and their judge is the n-gram that it says it is."""

import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from tiny_run import make_run

from sedd.configuration.components import options, values
from sedd.errors import UserError
from sedd.evaluation.ngram_judge import NgramJudge

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.nightly
def test_sampling_prints_a_table_and_a_line(capsys):
    sampling = importlib.import_module("sampling")
    shape = {"length": 6, "batch": 2, "steps": 3, "hidden_dim": 8, "num_layers": 1, "num_heads": 1}
    chosen = ("tweedie", "event_jump, 3", "best_of_n")
    sampling.main(sampling.Settings(**shape, vocabulary=5, samplers=chosen))
    out = capsys.readouterr().out
    line = json.loads(out.strip().splitlines()[-1])
    assert [row["sampler"].split(",")[0] for row in line["rows"]] == [
        "tweedie",
        "event_jump",
        "best_of_n",
    ]
    for row in line["rows"]:
        assert row["s/sample"] == pytest.approx(row["network"] + row["rest"])
    assert line["rows"][0]["calls"] == 4
    assert {"jax", "device", "steps"} <= line.keys()


@pytest.mark.nightly
def test_search_compares_at_equal_calls(tmp_path, capsys):
    """The row of random search has no gain on itself, and every row its calls and scores."""
    search = importlib.import_module("search")
    (tmp_path / "text.txt").write_text(tiny_run.text(600))
    make_run(tmp_path / "run", tiny_run.config(corpus=str(tmp_path / "text.txt")))
    search.main(
        search.Settings(
            checkpoint=tmp_path / "run",
            plot=tmp_path / "plot.png",
            budgets=(4,),
            **{"num": 4, "batch_size": 4, "steps": 4, "draws": 4},
        )
    )
    rows = json.loads(capsys.readouterr().out.strip().splitlines()[-2])["rows"]
    assert [row["search"] for row in rows] == list(dict.fromkeys(row["search"] for row in rows))
    random, greedy, chain, paths, particle = rows
    assert (random["gain"], random["± gain"]) == (0, 0)
    assert [row["verifier"] for row in rows[:3]] == [4, 4, 4]
    assert 4 < particle["verifier"] <= 16
    assert greedy["calls"] == pytest.approx(random["calls"], rel=0.5)
    for row in (greedy, chain, paths, particle):
        assert row["gain"] == pytest.approx(row["score"] - random["score"])
        assert row["held-out"] < 0
    assert (tmp_path / "plot.png").exists()


@pytest.mark.nightly
def test_block_draws_the_same_texts_with_and_without_the_cache(capsys):
    block = importlib.import_module("block")
    shape = {"hidden_dim": 8, "num_layers": 1, "num_heads": 1, "vocabulary": 5}
    block.main(block.Settings(length=10, block=4, batch=2, **shape))
    every, cached = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["rows"]
    assert (every["calls"], every["rows"]) == (10, 100)
    assert (cached["calls"], cached["rows"]) == (10, 10 * 4 + 2 * 4)


def test_loading_measures_the_model_that_it_wrote(tmp_path):
    loading = importlib.import_module("loading")
    shape = {"hidden_dim": 64, "num_layers": 2, "num_heads": 2, "mlp_dim": 96, "vocabulary": 50}
    layout = loading.write(loading.Settings(**shape, shard_mib=1), tmp_path / "model")
    found = loading.measure(tmp_path / "model")
    assert found["numbers"] == 2 * 50 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64
    assert found["parameters"] == 2 * found["numbers"]
    assert found["largest"] == 2 * 2 * 64 * 96
    assert layout.name == "LLaDA"


@pytest.mark.nightly
def test_watermark_detects_its_own_texts_alone(tmp_path, capsys):
    watermark = importlib.import_module("watermark")
    (tmp_path / "run").mkdir()
    make_run(tmp_path / "run", tiny_run.config("radd", length=12))
    settings = watermark.Settings(
        checkpoint=str(tmp_path / "run"),
        plot=tmp_path / "plot.png",
        prefixes=(8, 40),
        **{"num": 8, "batch_size": 8, "length": 40, "steps": 4},
    )
    watermark.main(settings)
    lines = capsys.readouterr().out.strip().splitlines()
    found = json.loads(lines[-2])
    assert [row["tokens"] for row in found["rows"]] == [8, 40]
    assert found["rows"][1]["gumbel"] == 1
    assert found["rows"][1]["gumbel, other secret"] < 0.5
    assert 0 < float(found["KL of green"].split()[0]) < 2
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.nightly
def test_compare_trains_evaluates_and_writes_how(tmp_path, capsys, monkeypatch):
    """Its commands in this process: they are what compiles."""
    compare = importlib.import_module("compare")

    said = []

    def command(name, flags, *, quiet=False):
        outcome = tiny_run.call(name, *flags)
        assert outcome.code == 0, outcome.err
        said.append(outcome.out)

    monkeypatch.setattr(compare, "command", command)
    (tmp_path / "text.txt").write_text(tiny_run.text())
    shape = {"length": 8, "batch_size": 8, "hidden_dim": 8, "num_layers": 1, "num_heads": 1}
    settings = compare.Settings(
        workdir=tmp_path / "runs",
        corpus=str(tmp_path / "text.txt"),
        models=("ar", "sedd"),
        seeds=2,
        markdown=tmp_path / "results.md",
        **{"steps": 10, "draws": 4, "max_sequences": 16},
        **shape,
    )
    compare.main(settings)
    ar, sedd = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["rows"]
    assert (ar["figure"], sedd["figure"]) == ("exact NLL", "bound")
    assert "validation NLL " in said[0]
    assert "validation bound " in said[1]
    assert "bound" not in said[0] + said[4]
    assert ar["± draws"] == 0 < sedd["± draws"]
    assert ar["training tokens"] == sedd["training tokens"] == 10 * 8 * 8
    assert ar["parameters"] < sedd["parameters"]
    two = [
        json.loads((settings.folder("sedd", seed) / "evaluation.json").read_text())
        for seed in range(2)
    ]
    nats = [each["nats_per_token"] for each in two]
    assert sedd["nats/token"] == pytest.approx(sum(nats) / 2)
    assert sedd["± seeds"] == pytest.approx(abs(nats[0] - nats[1]) / 2) != 0
    page = (tmp_path / "results.md").read_text()
    assert f"| autoregressive | exact NLL | {ar['nats/token']:.4g} |" in page
    assert "--models ar sedd" in page
    assert "16 sequences" in page
    with pytest.raises(ValueError, match="'rad'"):
        compare.Settings(workdir=tmp_path, models=("rad",))


def witten_bell(text, train, order, num_tokens):
    """Nats per token by the recursion itself, one token at a time."""

    def prob(context, token):
        if context is None:
            return 1 / num_tokens
        after = [
            train[i + len(context)]
            for i in range(len(train) - len(context))
            if train[i : i + len(context)] == context
        ]
        lower = prob(context[1:] if context else None, token)
        if not after:
            return lower
        distinct = len(set(after))
        return (after.count(token) + distinct * lower) / (len(after) + distinct)

    rows = [prob(text[max(0, i - order + 1) : i], text[i]) for i in range(len(text))]
    return -np.log(rows).mean()


def test_the_judge_is_witten_and_bells():
    rng = np.random.default_rng(0)
    train, text = rng.integers(0, 3, 40).tolist(), rng.integers(0, 4, 12).tolist()
    judge = NgramJudge.of(np.array(train), 4, 3, encode=lambda texts: [np.array(text)] * len(texts))
    expected = witten_bell(text, train, 3, 4)
    np.testing.assert_allclose(judge.nats(np.array(text)).mean(), expected, rtol=1e-12)
    judged = judge.judge(["a", "b"])
    np.testing.assert_allclose(judged.nats_S / judged.tokens_S, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("megabytes", "kills"), [(1.0, 1), pytest.param(24.0, 4, marks=pytest.mark.nightly)]
)
def test_tokenising_that_is_killed_ends_in_the_same_bytes(capsys, megabytes, kills):
    """The benchmark compares the bytes itself, and ends with an error if they differ."""
    tokenizing = importlib.import_module("tokenizing")
    tokenizing.main(tokenizing.Settings(megabytes=megabytes, kills=kills))
    undisturbed, killed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["rows"]
    assert (undisturbed["kills"], undisturbed["work"]) == (0, 1)
    assert killed["kills"] <= kills
    # In each try at most five tasks were under way, and what was read until the signal came.
    assert 1 <= killed["work"] < 1 + kills * 3 / megabytes
    assert 20 < killed["memory, MB"] < 1000
    if megabytes > 20:
        assert killed["kills"] == kills
        assert undisturbed["memory, MB"] < 1000


@pytest.mark.nightly
def test_joint_draws_are_judged_beside_independent_ones(tmp_path, capsys):
    joint = importlib.import_module("joint")
    (tmp_path / "text.txt").write_text(tiny_run.text(400))
    make_run(tmp_path / "run", tiny_run.config("hmm", corpus=str(tmp_path / "text.txt")))
    joint.main(
        joint.Settings(
            checkpoint=tmp_path / "run",
            plot=tmp_path / "plot.png",
            **{"calls": (2,), "window": 6, "num": 4, "below": (1.0,), "temperatures": ()},
        )
    )
    rows = json.loads(capsys.readouterr().out.strip().splitlines()[-2])["rows"]
    assert [row["draws"] for row in rows[1:]] == ["independent", "window 6, below 1.0"]
    assert rows[1]["calls"] == rows[2]["calls"] == 2
    assert rows[1]["nats"] != rows[2]["nats"]
    assert (tmp_path / "plot.png").is_file()


@pytest.mark.nightly
def test_every_proposer_is_judged_beside_event_jump(tmp_path, monkeypatch, capsys):
    speculative = importlib.import_module("speculative")
    monkeypatch.setenv("SEDD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(tiny_run.text(400))
    trunk = tiny_run.config("radd", corpus=str(tmp_path / "text.txt"))
    kinds = {"judge": "ar", "any_subset": "any_subset", "diffusion": "radd", "head": "radd"}

    def trained(workdir, flags, steps):
        config = tiny_run.config(kinds[workdir.name], corpus=trunk.data.corpus)
        if workdir.name == "head":
            assert flags[-2:] == ["--init-from", str(tmp_path / "diffusion")]
            network = options("networks", "causal_head", **values(config.network))
            objective = options("objectives", "self_speculative")
            config = dataclasses.replace(config, network=network, objective=objective)
        make_run(workdir, config)

    monkeypatch.setattr(speculative, "trained", trained)
    settings = speculative.Settings(
        workdir=tmp_path, num=4, batch_size=2, lookahead=(2,), verifications=(1,), event_jump=(2, 4)
    )
    speculative.main(settings)
    rows = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["rows"]
    assert rows[0]["calls"] is None
    by_name = {row["texts"]: row for row in rows[1:]}
    assert len(by_name) == len(rows) - 1 == 2 + 1 + 3 + 1 + 3
    assert by_name["ordered, random"]["calls"] == 12
    assert by_name["batch, K 2, random"]["calls"] == 12  # two calls for two tokens
    assert by_name["event_jump, 2 steps"]["of event_jump"].lstrip("<").startswith("1.00 (")
    for row in by_name.values():
        assert row["tokens/call"] == pytest.approx(12 / row["calls"])
        assert 0 < row["entropy"] < np.log(12)


def test_calls_are_compared_at_the_same_nats():
    """Of calls 8 and 32 with 3 and 1 nats: 2 nats are those of 16 calls."""
    speculative = importlib.import_module("speculative")
    jumps = [{"calls": 8, "nats": 3.0, "± nats": 0.0}, {"calls": 32, "nats": 1.0, "± nats": 0.0}]

    def share(nats, error):
        return speculative.share_of_calls({"calls": 4, "nats": nats, "± nats": error}, jumps)

    assert share(2.0, 0.0) == "0.25 (0.25-0.25)"
    assert share(2.0, 0.5) == "0.25 (0.12-0.50)"
    assert share(0.5, 0.0) == "<0.12 (0.12-0.12)"


@pytest.mark.nightly
def test_constrained_prints_a_row_a_pattern(capsys):
    constrained = importlib.import_module("constrained")
    shape = {"length": 4, "repeats": 1, "hidden_dim": 8, "num_layers": 1}
    constrained.main(constrained.Settings(tokenizer="bytes", **shape))
    line = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert [row["pattern"] for row in line["rows"]] == list(constrained.PATTERNS)
    assert all(row["most likely"] > 0 and row["states"] > 5 for row in line["rows"])


def test_json_schemas_counts_what_is_refused_in_each_suite(tmp_path, capsys):
    schemas = [{"type": "dict", "properties": {"a": {"type": "any"}}}, {"contains": {}}]
    questions = [json.dumps({"function": [{"parameters": schema}]}) for schema in schemas]
    (tmp_path / "bfcl.json").write_text("\n".join(questions))
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "one.json").write_text('{"type": "integer"}')
    groups = [{"schema": {"enum": [1]}, "tests": []}, {"schema": False, "tests": []}]
    (tmp_path / "folder" / "inner" / "tests.json").write_text(json.dumps(groups))
    module = importlib.import_module("json_schemas")
    suites = (tmp_path / "bfcl.json", tmp_path / "folder")
    module.main(module.Settings(suites=suites, tokenizer="bytes"))
    rows = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["rows"]
    assert [(row["suite"], row["schemas"]) for row in rows] == [
        ("bfcl.json", 1),
        ("bfcl.json", 1),
        ("folder", 2),
        ("folder", 1),
    ]
    assert rows[1]["outcome"].startswith("refused: contains: ")


@pytest.mark.nightly
def test_the_variance_of_the_bound(tmp_path, monkeypatch, capsys):
    variance = importlib.import_module("bound_variance")
    monkeypatch.setattr(variance, "SCHEMES", dict([*variance.SCHEMES.items()][-1:]))
    monkeypatch.setenv("SEDD_CACHE", str(tmp_path / "cache"))
    texts = tmp_path / "text.txt"
    texts.write_text(tiny_run.text(400))
    make_run(tmp_path, tiny_run.config("radd", corpus=str(texts)))
    sizes = {"sequences": 2, "repeats": 8, "draws": 2}
    variance.main(variance.Settings(checkpoint=tmp_path, data=str(texts), **sizes))
    line = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert [row["estimator"] for row in line["rows"]] == ["k_dce"] * 2 + ["score_entropy"] * 2
    assert all(row["s.d. of a sequence"] > 0 for row in line["rows"])


@pytest.mark.nightly
def test_the_training_step_beside_its_plain_form(monkeypatch, capsys):
    train_step = importlib.import_module("train_step")
    monkeypatch.setitem(train_step.SHAPES, "small", (16, 1, 2, 11))
    small = {"length": 8, "batch_size": 4, "steps": 1}
    train_step.main(train_step.Settings(**small, objective="score_entropy", process="uniform"))
    line = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert [row["form"] for row in line["rows"]] == ["sedd", "plain loss", "plain"]
    assert all(row["tokens/s"] > 0 for row in line["rows"])
    train_step.main(train_step.Settings(**small, depths=(1, 2)))
    line = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert [row["layers"] for row in line["rows"]] == [1, 2]


@pytest.mark.nightly
def test_the_training_run_beside_its_steps(tmp_path, monkeypatch, capsys):
    training_run = importlib.import_module("training_run")
    monkeypatch.setenv("SEDD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(tiny_run.text(2000))
    shape = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "length": 8, "batch_size": 4}
    loader = {"loader_length": 16, "loader_batch_size": 8, "loader_batches": 3}
    training_run.main(
        training_run.Settings(
            **shape, **loader, steps_between=2, saves=2, corpus=str(tmp_path / "text.txt")
        )
    )
    loader, run = (
        json.loads(line)["rows"]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("{")
    )
    assert loader[0]["Mtokens/s"] > 0
    figures = {row["what"]: row["figure"] for row in run}
    assert figures["parameters"] > 1000
    assert figures["checkpoint MB"] > 4 * figures["parameters"] / 1e6  # zeros take no room
    assert all(figure > 0 for figure in figures.values())


@pytest.mark.nightly
@pytest.mark.parametrize("processes", [1, 2])
def test_a_save_takes_little_more_memory_than_the_local_shards(capsys, processes):
    """Of 50 million parameters; without a bound on the writes it would take 1.7 times as much."""
    saving = importlib.import_module("saving")
    saving.main(saving.Settings(processes=processes))
    rows = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["rows"]
    assert [row["process"] for row in rows] == list(range(processes))
    for row in rows:
        assert row["parameters"] > 49e6
        assert row["local MB"] == pytest.approx(16 * row["parameters"] / 1e6 / processes, rel=0.01)
        assert 0.9 < row["of local"] < 1.3


@pytest.mark.nightly
def test_scaling_reads_what_devices_hold_and_send(monkeypatch, capsys):
    scaling = importlib.import_module("scaling")
    monkeypatch.setattr(scaling, "simulate", lambda number: None)  # the tests have four already
    shape = {"hidden_dim": 32, "num_layers": 2, "num_heads": 2, "num_tokens": 4096, "length": 8}
    scaling.main(scaling.Settings(**shape, devices=(1, 4), run_devices=(1, 4), steps=4))
    tables = [
        json.loads(line)["rows"]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("{")
    ]
    assert all(
        min(row["drawn, sequences/s"], row["evaluated, sequences/s"]) > 0 for row in tables[1]
    )
    one, pmap, alone, fsdp = tables[0][:4]
    for row in tables[0][4:]:
        moved = row["all-gather MB"] + row["all-reduce MB"]
        assert (moved > 0.1) == (row["parallel"] == "fsdp" and row["devices"] == 4)
    assert one["all-reduce MB"] == alone["all-reduce MB"] == one["all-gather MB"] == 0
    # The gradient, the loss and the counts.
    grads = (pmap["inputs MB"] * 1e6 / 4) * (1 - 1e-3)
    assert grads < pmap["all-reduce MB"] * 1e6 < 1.01 * grads
    assert pmap["all-gather MB"] == 0 < fsdp["all-gather MB"]
    assert fsdp["all-reduce MB"] < pmap["all-reduce MB"]
    assert fsdp["inputs MB"] < pmap["inputs MB"] / 2


@pytest.mark.nightly
def test_recipes_are_compared_and_finished_runs_are_kept(tmp_path, capsys):
    """A second call trains the missing seed only; the first recipe differs from itself by 0."""
    recipes = importlib.import_module("recipes")
    (tmp_path / "text.txt").write_text(tiny_run.text(600))
    for name, groups in recipes.RECIPES.items():
        assert (
            recipes.changed(recipes.radd("tiny"), groups) != recipes.radd("tiny") or name == "radd"
        )
    settings = recipes.Settings(
        recipes=("muon", "muon, complementary, power 0"),
        size="tiny",
        tokens=3 * 2048,
        seeds=(0,),
        runs=tmp_path / "runs.jsonl",
        corpus=str(tmp_path / "text.txt"),
        tokenizer="bytes",
    )
    recipes.main(settings)
    capsys.readouterr()
    recipes.main(dataclasses.replace(settings, recipes=("muon",), seeds=(0, 1)))
    out = capsys.readouterr().out
    assert "seed 1" in out
    assert "seed 0" not in out
    [row] = json.loads(out.strip().splitlines()[-1])["rows"]
    assert row["to the first"] == 0
    assert row["±"] > 0
    assert row["tokens"] == 3 * 2048
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [line["steps"] for line in lines] == [3, 6, 3]
    with pytest.raises(UserError, match="either --tokens or --seconds"):
        recipes.main(dataclasses.replace(settings, seconds=1.0))
