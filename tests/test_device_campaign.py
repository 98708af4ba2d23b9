"""The GPU campaign of ``benchmarks/device/``, rehearsed on the CPU."""

import importlib
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

import sedd
from sedd.commands import train
from sedd.commands.cli import parse_config
from sedd.configuration.build import build_parts

DEVICE = Path(__file__).parents[1] / "benchmarks" / "device"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(DEVICE.parent))
    monkeypatch.syspath_prepend(str(DEVICE))


@pytest.fixture
def make_campaign(tmp_path):
    module = importlib.import_module("campaign")
    return lambda seconds: module.Campaign(
        output=tmp_path,
        deadline=time.monotonic() + seconds,
        environment={},
        reserve=0,
    )


def python(code, name="it", seconds=60, **settings):
    stage = importlib.import_module("campaign").Stage
    return stage(name=name, command=[sys.executable, "-c", code], seconds=seconds, **settings)


@pytest.mark.nightly
@pytest.mark.slow
def test_the_rehearsal_runs_every_stage_and_its_weights_load(tmp_path):
    command = [sys.executable, str(DEVICE / "campaign.py"), "--rehearse", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    log = (tmp_path / "log.txt").read_text("utf-8", "replace")
    stages = {s["stage"]: s for s in json.loads((tmp_path / "results.json").read_text())["stages"]}
    print({name: f"{stage['seconds']:.1f} s" for name, stage in stages.items()})
    missing = importlib.util.find_spec("torch") is None
    for name, stage in stages.items():
        plain = name.startswith("PyTorch")
        assert stage["status"] == ("torch is not installed" if plain and missing else "ok"), log
    assert done.returncode == missing, done.stderr
    assert stages["device"]["rows"][0]["platform"] == "cpu"
    assert "5 passed, 10 skipped" in stages["pytest -m gpu"]["summary"]
    steps = stages["sedd steps"]["rows"]
    assert [row["model"] for row in steps] == ["sedd", "radd", "ar"]
    assert all(row["FLOPs"] > 0 and row["s/step"] > 0 for row in steps)
    assert [row["batch"] for row in stages["sedd sampling"]["rows"]] == [1, 2]
    first, last = stages["training"]["rows"]
    assert last["step"] > first["step"] > 0
    assert "validation_nats_per_token" in last
    assert last["samples"].startswith("--- 0")
    model = sedd.load(tmp_path / "model")
    assert model.length == 16
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) <= 8
    assert ("torch is not installed" in (tmp_path / "results.md").read_text("utf-8")) == missing


def test_stages_that_fail_or_take_too_long_do_not_stop_the_next(make_campaign, monkeypatch):
    monkeypatch.setattr("campaign.LEAST", 0)
    campaign = make_campaign(60)
    rows = 'print(\'ROW {"model": "sedd", "s/step": 2.0}\', flush=True)\n'
    campaign.run(python("1/0", "PyTorch steps"))
    campaign.run(python(rows + "import time; time.sleep(60)", "sedd steps", seconds=2))
    campaign.run(python("", needs="nonexistent"))
    campaign.run(python("print('3 passed')"))
    statuses = [stage["status"] for stage in campaign.stages]
    assert statuses[0] == "failed with exit code 1"
    assert statuses[1].startswith("stopped: it took more than 2 s")
    assert statuses[2:] == ["nonexistent is not installed", "ok"]
    text = (campaign.output / "results.md").read_text()
    assert "ZeroDivisionError" in text
    assert "| sedd | sedd | 2e+03 | not measured |" in text
    assert "ok: 3 passed" in text
    assert json.loads((campaign.output / "results.json").read_text())["stages"] == campaign.stages


def test_without_time_a_stage_is_not_run(make_campaign):
    record = make_campaign(1).run(python("print('ran')"))
    assert record["status"] == "not run: no time was left"


def test_ratios_and_mfu_are_those_of_the_rows():
    markdown = importlib.import_module("campaign").markdown
    ours = {"model": "ar", "s/step": 0.1, "FLOPs": 4e13, "peak FLOP/s": 1e15, "tokens/s": 10.0}
    stages = [
        {"stage": name, "status": "ok", "seconds": 1, "rows": rows}
        for name, rows in {
            "sedd steps": [ours],
            "PyTorch steps": [{"model": "ar", "s/step": 0.2}],
            "sedd sampling": [{"batch": 8, "s/sample": 0.5}],
            "PyTorch sampling": [{"batch": 8, "s/sample": 0.75}, {"batch": 64, "error": "OOM"}],
        }.items()
    ]
    lines = markdown(stages).splitlines()
    assert any(line.startswith("| ar | sedd | 100 | 2 | 10 | 40.0% |") for line in lines)
    assert any(line.startswith("| ar | PyTorch | 200 |  | not meas") for line in lines)
    assert sum("20.0%" in line for line in lines) == 1
    assert any(line.startswith("| 8 | 0.5 |") and line.endswith("| 1.5 |") for line in lines)
    assert any(line.startswith("| 64 | not measured |") for line in lines)
    assert "Training run: not measured." in lines


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_wheels_are_those_of_the_lock_without_jax(version):
    wheels = importlib.import_module("wheels")
    lines = wheels.locked(version)
    assert all("==" in lines[name] and " --hash=sha256:" in lines[name] for name in wheels.NAMES)
    assert {"jax", "jaxlib", "numpy", "scipy"}.isdisjoint(wheels.NAMES)


def test_the_weights_of_the_run_fit_into_16_mb():
    module, stages = (importlib.import_module(name) for name in ("campaign", "stages"))
    flags = ["--workdir", "run", *module.RUN.split()]
    config = parse_config(flags, train.TrainCommand, "").config
    network = build_parts(config, num_tokens=4096).network
    params = jax.eval_shape(network.init, jax.random.key(0))
    size = 2 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert 0.8 * stages.WEIGHTS_BYTES < size < 0.95 * stages.WEIGHTS_BYTES
    assert stages.OBJECTIVES.keys() == set(module.MODELS)
