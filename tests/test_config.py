"""The configuration: through JSON and back, what it refuses, and how two of them differ."""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_run import ROOT

from sedd.commands.train_start import check_same_data
from sedd.configuration.build import build_parts
from sedd.configuration.components import options
from sedd.configuration.config import (
    RESUMABLE,
    Config,
    DataOptions,
    EvaluationOptions,
    TrainingOptions,
    default_cache_dir,
    differences,
    load_config,
    recipes,
    with_component,
)
from sedd.errors import UserError
from sedd.training.checkpoint import Restored

RECIPES = sorted((ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_json_round_trip(path):
    config = load_config(path)
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "the file must be an object"),
        ({"trainign": {}}, "unknown field trainign; did you mean 'training'"),
        ({"training": {"stpes": 3}}, "unknown field training.stpes; did you mean 'steps'"),
        ({"training": 3}, "training must be an object, got 3"),
        ({"training": {"steps": "3"}}, "training.steps must be int, got '3'"),
        ({"training": {"steps": True}}, "training.steps must be int, got True"),
        ({"training": {"steps": 2.5}}, "training.steps must be int, got 2.5"),
        ({"training": {"eval_every": "x"}}, r"training.eval_every must be int \| None, got 'x'"),
        ({"training": {"steps": 0}}, "training.steps must be at least 1, got 0"),
        ({"data": {"wrap": "no"}}, "data.wrap must be bool, got 'no'"),
        (
            {"optimizer": {"name": "adam"}},
            "optimizer.name must be one of adamw, muon, sgd, got 'adam'",
        ),
        ({"process": "uniform"}, "process must be an object with a name"),
        ({"process": {"name": 3}}, "process must be an object with a name"),
        ({"process": {"name": "unifrom"}}, "'unifrom'; did you mean 'uniform'"),
        ({"network": {"name": "ddit", "layers": 3}}, "no option 'layers'"),
        ({"network": {"name": "ddit", "num_layers": "3"}}, "network.num_layers must be int"),
        ({"network": {"name": "ddit", "dtype": "f4"}}, "dtype must be one of float32, bfloat16"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*32\), got -1"),
    ],
)
def test_json_that_does_not_fit(data, message):
    with pytest.raises(UserError, match=message):
        Config.from_json(data)


def test_a_whole_number_is_a_float():
    config = Config.from_json({"schedule": {"name": "geometric", "sigma_max": 10}})
    assert config.schedule == options("schedules", "geometric", sigma_max=10.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataOptions(length=0),
        lambda: TrainingOptions(steps=0),
        lambda: TrainingOptions(batch_size=0),
        lambda: TrainingOptions(accumulate=0),
        lambda: TrainingOptions(keep=0),
        lambda: TrainingOptions(log_every=0),
        lambda: TrainingOptions(eval_every=-5),
        lambda: EvaluationOptions(draws=6),
        lambda: EvaluationOptions(draws=0),
        lambda: EvaluationOptions(max_sequences=0),
        lambda: Config(seed=2**32),
    ],
)
def test_values_out_of_range(make):
    with pytest.raises(ValueError, match="must be"):
        make()


def test_no_validation_is_none():
    assert TrainingOptions(eval_every=None).cadence.eval_every is None


def changed(config: Config, path: str, value) -> Config:
    section, _, name = path.rpartition(".")
    if not section:
        return dataclasses.replace(config, **{name: value})
    part = dataclasses.replace(getattr(config, section), **{name: value})
    return dataclasses.replace(config, **{section: part})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", 1),
        ("data.corpus", "stdlib"),
        ("data.length", 64),
        ("data.wrap", False),
        ("network.dropout", 0.5),
        ("optimizer.learning_rate", 1.0),
        ("training.batch_size", 4),
        ("training.stratified", False),
    ],
)
def test_differences_name_what_departs(path, value):
    before = Config()
    found = differences(before, changed(before, path, value))
    assert len(found) == 1
    assert found[0].startswith(f"{path} was ")
    assert found[0].endswith(f" and is now {json.dumps(value)}")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("aim", "x"),
        ("data.cache_dir", "x"),
        ("data.workers", 3),
        ("training.steps", 7),
        ("training.log_every", 7),
        ("training.eval_every", None),
        ("training.sample_every", 7),
        ("training.checkpoint_every", 7),
        ("training.keep", 7),
        ("training.nonfinite", "skip"),
        ("training.wandb", "x"),
        ("evaluation.draws", 8),
        ("sampler.steps", 7),
        ("sampler", options("samplers", "euler")),
    ],
)
def test_what_may_change_is_no_difference(path, value):
    assert any(path == allowed or path.startswith(f"{allowed}.") for allowed in RESUMABLE)
    assert differences(Config(), changed(Config(), path, value)) == []


def test_another_component_is_a_difference():
    found = differences(Config(), with_component(Config(), "process", "uniform"))
    assert found == ['process.name was "absorbing" and is now "uniform"']


def test_with_component_keeps_shared_options_that_were_chosen():
    config = Config(sampler=options("samplers", "tweedie", steps=7))
    assert with_component(config, "sampler", "euler").sampler == options(
        "samplers", "euler", steps=7
    )
    config = Config(schedule=options("schedules", "polynomial", clamp=1e-3, power=3.0))
    assert with_component(config, "schedule", "cosine").schedule == options(
        "schedules", "cosine", clamp=1e-3
    )


def test_with_component_there_and_back_changes_nothing():
    scored = with_component(Config(), "parameterization", "score")
    assert with_component(scored, "parameterization", "conditional") == Config()


def test_the_cache_follows_the_environment(monkeypatch):
    monkeypatch.delenv("SEDD_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == "/somewhere/sedd"
    monkeypatch.setenv("SEDD_CACHE", "/elsewhere")
    assert DataOptions().cache_dir == "/elsewhere"


@pytest.mark.parametrize("objective", ["t_dce", "mdlm"])
def test_a_cross_entropy_is_refused_where_it_would_leave_the_score_untrained(objective):
    """A cross entropy does not see a constant added to a row of raw output; a score is changed."""
    config = load_config(ROOT / "configs" / "text8_sedd.py")
    with pytest.raises(UserError, match="cannot train the scale of a score"):
        build_parts(with_component(config, "objective", objective), num_tokens=27)


ONE = ["my.txt (train)", 12, 96, "digest"]
TWO = ["x (train)", 7, 96, "other"]


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        ([ONE], [ONE], None),
        ([ONE[:3]], [ONE], None),  # as older versions recorded it
        ([ONE, TWO], [ONE, TWO], None),
        ([["my.txt (train)", 11, 96, "digest"]], [ONE], "had 11 sequences .* has 12"),
        ([["my.txt (train)", 12, 64, "digest"]], [ONE], "with 64 tokens .* with 96"),
        ([["your.txt (train)", 12, 96, "digest"]], [ONE], "your.txt .* my.txt"),
        ([[*ONE[:3], "another"]], [ONE], "its size is the same, but its text"),
        ([ONE, [*TWO[:3], "another"]], [ONE, TWO], "its size is the same, but its text"),
        ([TWO, ONE], [ONE, TWO], "x .train. had 7"),
    ],
)
def test_a_corpus_that_has_changed_is_not_resumed(there, here, message):
    now = SimpleNamespace(state=lambda: {"parts": [tuple(part) for part in here]})
    restored = Restored(state=None, step=1, data={"parts": there}, pending={})  # pyright: ignore
    expected = contextlib.nullcontext()
    if message is not None:
        expected = pytest.raises(UserError, match=f"corpus has changed .*: .*{message}")
    with expected:
        check_same_data(Path("run"), restored, now)  # pyright: ignore


@pytest.mark.parametrize(
    ("imports", "used"),
    [
        ("from steps_beside import STEPS", "STEPS"),
        ("import steps_beside", "steps_beside.STEPS"),
        ("", "__import__('folder_beside.steps').steps.STEPS"),  # while get_config() runs
    ],
)
def test_a_recipe_may_import_what_is_beside_it(tmp_path, monkeypatch, imports, used):
    (tmp_path / "steps_beside.py").write_text("STEPS = 7\n")
    (tmp_path / "folder_beside").mkdir()
    (tmp_path / "folder_beside" / "steps.py").write_text("STEPS = 7\n")
    (tmp_path / "recipe.py").write_text(
        f"from sedd.configuration import Config, TrainingOptions\n{imports}\n"
        f"def get_config():\n    return Config(training=TrainingOptions(steps={used}))\n"
    )
    monkeypatch.chdir("/")
    before = list(sys.path)
    assert load_config(tmp_path / "recipe.py").training.steps == 7
    assert sys.path == before


def test_the_configuration_of_a_run_is_read(tmp_path):
    config = changed(Config(seed=3), "sampler", options("samplers", "euler", steps=9))
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    assert load_config(tmp_path / "config.json") == config


def test_recipes_are_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipes().keys() == {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert load_config("quickstart") == load_config(ROOT / "configs" / "quickstart.py")
    mine = tmp_path / "quickstart"
    mine.mkdir()  # a folder of that name is no file
    assert load_config("quickstart").network.num_layers
