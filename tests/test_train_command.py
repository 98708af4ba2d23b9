"""``sedd train``: where it may write, how it resumes, and what its last lines compare with."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_run

from sedd.commands.cli import parse_config
from sedd.commands.train import TrainCommand, save_description
from sedd.configuration.config import differences, load_config
from sedd.model import read_config


@pytest.fixture(scope="module")
def begun(tmp_path_factory, text):
    """A run of two steps in a directory with other files, and what it printed."""
    workdir = tmp_path_factory.mktemp("runs") / "begun"
    workdir.mkdir()
    (workdir / "notes.txt").write_text("mine")
    (workdir / "config.json").write_text(json.dumps(tiny_run.config().to_json()))
    flags = ("--data.corpus", text, "--training.steps", 2, "--evaluation.max-sequences", 8)
    outcome = tiny_run.call("train", "--workdir", workdir, *tiny_run.TINY, *flags)
    assert outcome.code == 0, outcome.err
    return workdir, outcome


@pytest.mark.nightly
def test_the_last_lines_compare_with_frequencies_and_a_trigram_model(begun):
    _, outcome = begun
    lines = outcome.out.splitlines()
    [start] = [i for i, line in enumerate(lines) if "validation bound at step 2" in line]
    assert "token frequencies of the training text" in lines[start + 2]
    assert "bits per character" in lines[start + 3]
    trigram = float(lines[start + 4].split()[1])
    assert 0.5 < trigram < 4  # lines of thirteen words
    assert "trigram model" in lines[start + 4]


def test_a_run_resumes_with_its_own_configuration(begun):
    workdir, _ = begun
    before = read_config(workdir)
    outcome = tiny_run.call("train", "--workdir", workdir, "--training.steps", 3)
    assert outcome.code == 0, outcome.err
    assert f"resuming {workdir} at step 2 of 3" in outcome.out
    after = read_config(workdir)
    assert after.network == before.network
    assert after.training.steps == 3


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--training.steps", 1),
        ("--training.keep", 2, "--training.log-every", 7),
        ("--sampler.steps", 3, "--profile", 1),
    ],
)
def test_a_complete_run_is_left_as_it_is(begun, flags):
    workdir, _ = begun
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    outcome = tiny_run.call("train", "--workdir", workdir, *flags)
    assert outcome.code == 0, outcome.err
    steps = read_config(workdir).training.steps
    line = outcome.out.splitlines()[-1]
    assert line.startswith(f"nothing to do: {workdir} is complete at step {steps} of ")
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_a_run_that_was_killed_before_its_plot_is_not_complete(begun):
    workdir, _ = begun
    curves, records = workdir / "curves.png", (workdir / "metrics.jsonl").read_text()
    for change in (curves.unlink, lambda: os.utime(curves, (0, 0))):
        change()
        outcome = tiny_run.call("train", "--workdir", workdir)
        assert outcome.code == 0, outcome.err
        assert "its plot is still missing" in outcome.out
        assert curves.stat().st_mtime > 1
        assert (workdir / "metrics.jsonl").read_text() == records


@pytest.mark.parametrize(
    ("recipe", "flags", "sampler", "steps"),
    [
        ("sotu_radd_small", "--parameterization score", "tweedie", 64),
        ("lm1b_radd", "--parameterization score --process uniform", "tweedie", 128),
        ("text8_sedd", "--parameterization conditional", "event_jump", None),
        ("quickstart", "--parameterization autoregressive", "ordered", None),
        ("owt_ar_small", "--parameterization score", "tweedie", 128),
        ("sotu_radd_small", "--parameterization score --sampler remdm", "remdm", 64),
        ("quickstart", "--parameterization conditional", "event_jump", 64),
    ],
)
def test_the_default_sampler_goes_with_the_model(recipe, flags, sampler, steps):
    """Where the flags change the kind of model and name no sampler."""
    arguments = ["--config", recipe, "--workdir", "x", *flags.split()]
    chosen = parse_config(arguments, TrainCommand, "").config.sampler
    assert (chosen.name, chosen.steps) == (sampler, steps)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--network.num-layers", 2), "its network.num_layers is 1 and --network.num-layers is 2"),
        (("--network.mlp-ratio", 2), "its network.mlp_ratio is 4 and --network.mlp-ratio is 2"),
        (("--network.num-heads", 1), "its network.num_heads is 2 and --network.num-heads is 1"),
    ],
)
def test_init_from_names_the_option_that_differs(begun, tmp_path, text, flags, message):
    workdir, _ = begun
    outcome = tiny_run.call(
        *("train", "--workdir", tmp_path / "new", *tiny_run.TINY, "--data.corpus", text),
        *("--init-from", workdir, *flags),
    )
    assert outcome.code == 2
    assert message in outcome.errors[0]


def test_init_from_names_a_network_of_another_kind(begun, tmp_path, text):
    workdir, _ = begun
    flags = ("--network", "decoder", "--data.corpus", text, "--init-from", workdir)
    outcome = tiny_run.call("train", "--workdir", tmp_path / "new", *tiny_run.RECIPE, *flags)
    assert outcome.code == 2
    [line] = outcome.errors
    assert "its network is ddit, and --network is decoder, which has other parameters" in line


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ("--training.keep 1 --data.cache-dir /elsewhere", True),
        ("--data.corpus stdlib", False),
        ("--process uniform --parameterization score --objective score_entropy", False),
        ("--network.num-layers 1", False),
        ("--data.corpus stdlib --aim mine", None),
    ],
)
def test_the_aim_of_a_recipe_stays_with_what_it_trains(flags, kept):
    arguments = ["--config", "quickstart", "--workdir", "x", *flags.split()]
    aim = parse_config(arguments, TrainCommand, "").config.aim
    assert aim == {True: load_config("quickstart").aim, False: "", None: "mine"}[kept]


@pytest.mark.parametrize("corpus", ["café.txt", "国/*.txt", "x😀", "\udcff.txt"])
def test_a_configuration_is_readable_text(tmp_path, corpus):
    """Characters as they are; half of a surrogate pair, from a path that is no UTF-8, escaped."""
    config = tiny_run.config(corpus=corpus)
    packed = SimpleNamespace(counts=np.ones(3), num_rows=1)
    data = SimpleNamespace(tokenizer=tiny_run.TOKENIZER, train=[(packed, 1.0)])
    save_description(tmp_path, config, data)
    assert read_config(tmp_path) == config
    shown = corpus.replace("\udcff", r"\udcff")
    assert f'"{shown}"' in (tmp_path / "config.json").read_text("utf-8")
    there = differences(config, tiny_run.config())
    assert there == [f'data.corpus was "{corpus}" and is now "stdlib"']


def test_init_from_is_recorded_and_kept(begun, tmp_path, text):
    workdir, _ = begun
    new = tmp_path / "new"
    flags = ("--data.corpus", text, "--training.eval-every", "None", "--training.steps")
    outcome = tiny_run.call(
        "train", "--workdir", new, *tiny_run.TINY, *flags, 1, "--init-from", workdir
    )
    assert outcome.code == 0, outcome.err
    assert "finished; the run was not validated" in outcome.out
    assert read_config(new).init_from == str(workdir)
    tiny_run.call("train", "--workdir", new, *tiny_run.TINY, *flags, 2)
    assert read_config(new).init_from == str(workdir)


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": '{"model_type": "llama"}'},
        {"tokenizer.json": "{}"},
        {"config.json": "{}", "model.safetensors": ""},
        {"config.json": "not JSON"},
    ],
)
def test_files_of_something_else_are_not_overwritten(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    outcome = tiny_run.call("train", "--workdir", tmp_path, *tiny_run.TINY)
    assert outcome.code == 2
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == files
    assert len(outcome.errors) == 1
    assert "choose another directory" in outcome.errors[0] or "config.json" in outcome.errors[0]


@pytest.mark.parametrize("place", ["/", "/etc", "/usr/lib", "~", "/var", "/opt/../tmp/"])
def test_directories_of_the_system_are_refused(place):
    outcome = tiny_run.call("train", "--workdir", place, *tiny_run.TINY)
    assert outcome.code == 2
    assert "a directory of the system" in outcome.errors[0]


def test_a_directory_with_other_files_is_fine(begun):
    workdir, _ = begun
    assert (workdir / "notes.txt").read_text() == "mine"
