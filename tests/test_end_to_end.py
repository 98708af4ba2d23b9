"""The commands as a user runs them: train, go on, sample, evaluate, for each kind of model.

The first kind's run each command in a process of its own; all others are calls in this process.
"""

import functools
import json
import math
import os
import subprocess
import sys

import pytest
import tiny_run
from tiers import daily
from tiny_run import ROOT, TINY, Outcome, call

from sedd.commands.export import main as export

pytestmark = pytest.mark.slow

KINDS = {
    "radd": [],
    "sedd": ["--parameterization", "score", "--objective", "score_entropy"],
    "uniform": [
        *("--process", "uniform", "--parameterization", "score", "--objective", "score_entropy")
    ],
}
FLAGS = [
    *TINY,
    *("--optimizer.learning-rate", "1e-2", "--optimizer.warmup-steps", "2"),
    *("--optimizer.ema-decay", "0.5", "--training.steps", "6", "--training.log-every", "2"),
    *("--training.eval-every", "3", "--training.sample-every", "6"),
    *("--training.checkpoint-every", "3", "--evaluation.max-sequences", "8"),
    *("--evaluation.batch-size", "8", "--evaluation.draws", "4", "--sampler.steps", "2"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    top = tmp_path_factory.mktemp("place")
    (top / "text.txt").write_text(tiny_run.text())
    return top


def command(place, name, *arguments, code=0, process=False) -> Outcome:
    """Run a command; what it prints on standard error must be lines of its own."""
    result = in_a_process(place, name, arguments) if process else call(name, *arguments)
    assert result.code == code, result.err
    assert all(line.startswith(("error: ", "note: ")) for line in result.err.splitlines())
    return result


def in_a_process(place, name, arguments) -> Outcome:
    result = subprocess.run(
        [sys.executable, f"{name}.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "SEDD_CACHE": str(place / "cache")},
        check=False,
    )
    return Outcome(result.returncode, result.stdout, result.stderr)


def train(place, kind, *arguments, workdir=None, process=False):
    flags = ["--workdir", workdir or place / kind, "--data.corpus", place / "text.txt", *FLAGS]
    return command(place, "train", *flags, *KINDS[kind], *arguments, process=process)


@pytest.fixture(scope="module")
def trained(place):
    """A function from a kind to what the command printed; their runs are in ``place``."""
    return functools.cache(lambda kind: train(place, kind, process=kind == "radd"))


@pytest.mark.parametrize("kind", daily(KINDS, ["radd"]))
def test_what_a_run_leaves(place, trained, kind):
    run, out = place / kind, trained(kind).out
    assert "parameters" in out
    assert "validation bound" in out
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["3", "6"]
    assert [path.name for path in (run / "samples").iterdir()] == ["00000006.txt"]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 3, 4, 6]
    assert all(math.isfinite(record.get("loss", 0.0)) for record in records)
    assert records[-1]["validation_bits_per_character"] > 0
    saved = json.loads((run / "config.json").read_text())
    assert saved["process"]["name"] == ("uniform" if kind == "uniform" else "absorbing")
    assert json.loads((run / "tokenizer.json").read_text())["kind"] == "characters"


@pytest.mark.nightly
def test_a_complete_run_says_so_and_more_steps_go_on(place, trained):
    trained("radd")
    run = place / "radd"
    before = (run / "metrics.jsonl").read_text()
    again = train(place, "radd")
    assert "complete at step 6 of 6; to train further, give" in again.out
    assert (run / "metrics.jsonl").read_text() == before

    more = train(place, "radd", "--training.steps", "9")
    assert "resuming" in more.out
    assert "at step 6 of 9" in more.out
    after = (run / "metrics.jsonl").read_text()
    assert after.startswith(before)
    assert json.loads(after.splitlines()[-1])["step"] == 9
    assert (run / "checkpoints" / "9").is_dir()


@pytest.mark.nightly
def test_another_runs_weights_also_where_they_were_published(place, trained):
    trained("sedd")
    flags = ["--checkpoint", place / "sedd", "--output", place / "published"]
    export(list(map(str, flags)))
    losses = {None: first_loss(place / "sedd")}
    for source in ("sedd", "published"):
        begun = ("--init-from", place / source, "--training.steps", "1")
        train(place, "sedd", *begun, workdir=place / f"from_{source}")
        losses[source] = first_loss(place / f"from_{source}")
    assert losses["sedd"] < losses[None]
    assert losses["published"] == pytest.approx(losses["sedd"], rel=1e-5)


def first_loss(run):
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"]


@pytest.mark.parametrize("kind", daily(KINDS, ["radd"]))
def test_sample(place, trained, kind):
    trained(kind)
    checkpoint = ["--checkpoint", place / kind, "--steps", "2"]
    prompted = command(
        *(place, "sample", *checkpoint, "--num", "2", "--seed", "5"),
        *("--prompt", "the", "--suffix", "far", "--output", place / f"{kind}.jsonl"),
        process=kind == "radd",
    )
    lines = [json.loads(line) for line in (place / f"{kind}.jsonl").read_text().splitlines()]
    assert [(line["id"], line["seed"]) for line in lines] == [(0, 5), (1, 6)]
    # event_jump, the default of radd, calls the network in the intervals with an event alone.
    assert all(line["calls"] in ((1, 2) if kind == "radd" else (3,)) for line in lines)
    for line in lines:
        assert line["text"].startswith("the")
        assert line["text"].endswith("far")
        assert len(line["tokens"]) == 12
        assert line["text"] in prompted.out


@pytest.mark.nightly
def test_sample_in_every_way(place, trained):
    trained("radd")
    checkpoint = ["--checkpoint", place / "radd", "--step", "best", "--steps", "2"]
    plain = command(place, "sample", *checkpoint, "--length", "9", "--sampler", "euler")
    assert "0 · seed 0 · 3 network calls" in plain.out

    page = place / "new" / "trace.html"
    filled = command(
        place, "sample", *checkpoint, "--infill", "the {mask:4} sat{mask}", "--trace", page
    )
    assert "the " in filled.out
    html = page.read_text()
    assert "<html" in html
    assert "event_jump" in html

    requests, output = place / "requests.jsonl", place / "answers.jsonl"
    asked = [
        {"id": "prompt", "prompt": "the", "seed": 5},
        {"id": "wrong", "lenght": 3},
        {"id": "gaps", "infill": "a {mask:2} mat", "length": 10},
        {"id": "long", "length": 20, "suffix": "."},
    ]
    requests.write_text("\n".join(map(json.dumps, asked)))
    result = command(
        *(place, "sample", *checkpoint, "--requests", requests, "--output", output), code=2
    )
    assert result.err.startswith(f"error: {requests}, line 2: unknown field 'lenght'")
    assert len(result.err.splitlines()) == 1
    lines = {line["id"]: line for line in map(json.loads, output.read_text().splitlines())}
    assert [len(line["tokens"]) for line in lines.values()] == [12, 10, 20]
    assert lines["gaps"]["text"].startswith("a ")
    assert lines["long"]["text"].endswith(".")


@pytest.mark.parametrize("kind", daily(KINDS, ["radd"]))
def test_evaluate(place, trained, kind):
    trained(kind)
    path = place / f"{kind}.json"
    result = command(
        *(place, "evaluate", "--checkpoint", place / kind, "--data", place / "text.txt"),
        *("--split", "validation", "--draws", "8", "--max-sequences", "10", "--batch-size", "8"),
        *("--json", path),
        process=kind == "radd",
    )
    assert "nats per token" in result.out
    figures = json.loads(path.read_text())
    terms = figures["prior"] + figures["diffusion"] + figures["reconstruction"]
    assert figures["nats_per_token"] == pytest.approx(terms, rel=1e-6)
    assert figures["perplexity"] == pytest.approx(math.exp(terms), rel=1e-6)
    for name in ("standard_error", "standard_error_draws"):
        assert 0 < figures[name] < figures["nats_per_token"]
    # Every token is a character here, but for the end of the text.
    bits = figures["nats_per_token"] / math.log(2) * 120 / figures["num_characters"]
    assert figures["bits_per_character"] == pytest.approx(bits)
    assert figures["num_tokens"] == 120
    assert figures["unigram_nats"] >= figures["unigram_entropy"]  # a run saves its frequencies
    assert figures["estimator"] == ("k_dce" if kind == "radd" else "score_entropy")
    assert (figures["split"], figures["length"]) == ("validation", 12)
