"""Any-subset models through the commands: started from RADD, sampled, and evaluated in one call."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_run
from tiers import nightly

import sedd
from sedd.configuration.components import options, values

SHAPE = {"norm_bias": True, "condition_dim": 128}  # that of published checkpoints


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text, a RADD run of it, and an any-subset run from that."""
    place = tmp_path_factory.mktemp("any_subset")
    (place / "text.txt").write_text(tiny_run.text())
    radd = tiny_run.config("radd", corpus=str(place / "text.txt"))
    network = options("networks", "ddit", **values(radd.network) | SHAPE)
    tiny_run.make_run(place / "radd", replace(radd, network=network))
    begin(place, "radd")
    return place


def begin(place, source):
    """Train a step from a model in the folder."""
    outcome = tiny_run.call(
        *("train", "--workdir", place / f"from_{source}", "--init-from", place / source),
        *(*tiny_run.TINY, "--data.corpus", place / "text.txt", "--training.steps", 1),
        *("--network.norm-bias", "--network.condition-dim", 128),
        *("--parameterization", "any_subset", "--objective", "any_subset"),
        *("--optimizer.learning-rate", 1e-9, "--evaluation.max-sequences", 8),
    )
    assert outcome.code == 0, outcome.err
    assert "validation NLL at step 1" in outcome.out


@pytest.mark.parametrize("source", ["radd", nightly("published")])
def test_it_starts_from_the_parameters_of_radd(place, source):
    if source == "published":
        outcome = tiny_run.call(
            "export", "--checkpoint", place / "radd", "--output", place / "published"
        )
        assert outcome.code == 0, outcome.err
        begin(place, source)
    begun = jax.tree.leaves(sedd.load(place / f"from_{source}").denoiser.params)
    there = jax.tree.leaves(sedd.load(place / "radd").denoiser.params)
    for one, other in zip(begun, there, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_samples_are_drawn_from_left_to_right(place):
    output = place / "samples.jsonl"
    outcome = tiny_run.call(
        *("sample", "--checkpoint", place / "from_radd", "--num", 2, "--prompt", "the"),
        *("--output", output),
    )
    assert outcome.code == 0, outcome.err
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["calls"] for line in lines] == [12 - 3] * 2


@pytest.mark.nightly
@pytest.mark.parametrize("draft", ["self", "stale", "ngram"])
def test_speculative_samples_from_the_command(place, draft):
    """In one row a call; guidance is refused."""
    output = place / "speculative.jsonl"
    command = ("sample", "--checkpoint", place / "from_radd", "--num", 2, "--prompt", "the")
    command += ("--sampler", "speculative", "--draft", draft, "--output", output)
    outcome = tiny_run.call(*command)
    assert outcome.code == 0, outcome.err
    for line in map(json.loads, output.read_text().splitlines()):
        assert line["text"].startswith("the")
        assert line["rows"] == line["calls"] <= 12 - 3
        assert line["log_prob"] < 0
    outcome = tiny_run.call(*command, "--guidance", 1)
    assert outcome.code == 2
    assert "takes no guidance with an any-subset model" in outcome.err


def figures(place, *flags):
    outcome = tiny_run.call(
        *("evaluate", "--checkpoint", place / "from_radd", "--data", place / "text.txt"),
        *("--max-sequences", 8, "--json", place / "figures.json", *flags),
    )
    assert outcome.code == 0, outcome.err
    return json.loads((place / "figures.json").read_text()), outcome.out


def test_it_is_evaluated_in_an_order(place):
    auto, table = figures(place)
    assert (auto["estimator"], auto["exact"], auto["draws"]) == ("forward order", True, 0)
    assert "Exact negative log likelihood of the tokens in one order" in table
    named, _ = figures(place, "--estimator", "ordered", "--order", "forward")
    assert named["nats_per_token"] == auto["nats_per_token"]
    averaged, table = figures(place, "--order", "random", "--orders", 4)
    assert averaged["estimator"] == "4 random orders"
    assert (averaged["is_bound"], averaged["exact"], averaged["draws"]) == (True, False, 4)
    assert "error of the draws" not in table  # it is not estimated


def test_no_published_layout_holds_it(place):
    outcome = tiny_run.call(
        "export", "--checkpoint", place / "from_radd", "--output", place / "none"
    )
    assert outcome.code == 2
    assert outcome.errors == [
        "error: this model is any_subset, and has no published layout: BD3-LM, GIDD, MDLM, RADD or "
        "SEDD hold other kinds"
    ]
