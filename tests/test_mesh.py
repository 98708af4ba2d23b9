"""Evaluation and sampling on several devices and processes give what one device gives."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from tiers import daily
from tiny_run import make_run

import sedd
from sedd.errors import FieldError
from sedd.networks import mesh
from sedd.networks.mesh import Placement, device_mesh
from sedd.networks.shard import Shard

SCRIPT = Path(__file__).with_name("two_processes.py")
LENGTH = 20
# Sequences of a batch, on four devices, have given tokens of different lengths: the devices would
# make different numbers of network calls, each of which gathers parts of all.
PROMPTS = ["", "the cat", "a", "the cat sat on", "my", "dog"]


@pytest.fixture(autouse=True)
def _tiny_parts(monkeypatch):
    monkeypatch.setattr(mesh, "LEAST_SPLIT", 16)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("radd"), tiny_run.config())


def longest_first(texts):
    """A verifier."""
    return [float(len(text.strip())) for text in texts]


CASES = {  # kind of model: devices that share a copy, samplers
    "radd": (
        2,
        [
            (
                "best_of_n",
                {
                    "n": 2,
                    "inner": sedd.samplers.options("ordered", steps=2),
                    "verifier": longest_first,
                },
            )
        ],
    ),
    "radd, further samplers": (
        2,
        [
            ("speculative", {"order": "random", "bonus": True}),
            ("particle", {"particles": 2, "resample_every": 2, "verifier": longest_first}),
        ],
    ),
    "any_subset": (4, [("speculative", {"draft": "self"})]),
    "sedd": (1, [("tweedie", {"steps": 4})]),
}


@pytest.mark.parametrize("kind", daily(CASES, ["radd"]))
def test_parts_and_copies_give_what_one_device_gives(kind, tmp_path):
    path = make_run(tmp_path, tiny_run.config(kind.partition(",")[0]))
    fsdp, samplers = CASES[kind]
    one, many = sedd.load(path), sedd.load(path, mesh=device_mesh(fsdp=fsdp))
    assert many.digest == one.digest
    for name, options in samplers:
        wanted, got = (
            sedd.sample(model, 0, prompt=PROMPTS, length=LENGTH, sampler=name, **options)
            for model in (one, many)
        )
        for field in ("tokens", "calls", "rows"):
            np.testing.assert_array_equal(getattr(got, field), getattr(wanted, field))
    x0_BL = np.random.default_rng(0).integers(0, one.process.num_tokens, (7, LENGTH))
    scored_BL = np.arange(LENGTH) >= np.arange(7)[:, None]  # rows need different numbers of calls
    order = None if kind == "sedd" else "random"
    wanted, got = (
        sedd.evaluate(model, x0_BL, scored_BL=scored_BL, order=order, batch_size=4)
        for model in (one, many)
    )
    assert got.num_tokens == wanted.num_tokens == scored_BL.sum()
    np.testing.assert_allclose(got.sequence_nats, wanted.sequence_nats, rtol=1e-5)


def test_no_device_holds_a_whole_layer_outside_of_its_call(run):
    """Blocks stay in parts inside the program, and all else is gathered before the first call."""
    model = sedd.load(run, mesh=device_mesh(fsdp=4))
    placement = Placement.of(model.denoiser.params, "blocks")
    kinds = {}

    def look(params, _, rows):
        is_part = lambda leaf: isinstance(leaf, Shard)  # noqa: E731
        for path, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_part)[0]:
            kinds[jax.tree_util.keystr(path, simple=True, separator="/")] = leaf
        return rows

    placement.run(look, model.denoiser.params, None, np.arange(4))
    parts = {name for name, leaf in kinds.items() if isinstance(leaf, Shard)}
    assert parts
    assert all("blocks" in name for name in parts)
    assert kinds["head/kernel"].shape == model.denoiser.params["head"]["kernel"].shape


def start(command, *arguments):
    """Run a command in two processes; returns the output of the first."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, command, str(i), port, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(os.environ, JAX_NUM_CPU_DEVICES="2"),
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    others = outputs[1][0].splitlines()  # only the first one prints, beside the CPU's collectives
    assert all(line.startswith("[Gloo]") for line in others)
    return outputs[0][0]


@pytest.mark.nightly
@pytest.mark.parametrize("command", ["evaluate", "sample"])
def test_two_processes_with_parts_give_what_one_device_gives(run, tmp_path, command):
    (tmp_path / "text.txt").write_text(tiny_run.text(60))
    words, output = {
        "evaluate": (["--data", tmp_path / "text.txt", "--batch-size", 8], "--json"),
        "sample": (["--num", 3], "--output"),
    }[command]
    one, two = tmp_path / "one", tmp_path / "two"
    for flags, call in (
        (["--devices", 1], lambda name, *words: tiny_run.call(name, *map(str, words))),
        (["--parallel", "fsdp"], start),
    ):
        where = one if call is not start else two
        where.mkdir()
        call(command, "--checkpoint", run, *words, output, where / "out.json", *flags)
    texts = [(where / "out.json").read_text() for where in (one, two)]
    if command == "sample":
        assert texts[0] == texts[1]
    else:
        one_device, parts = map(json.loads, texts)
        assert parts["nats_per_token"] == pytest.approx(one_device["nats_per_token"], rel=1e-6)
        assert parts["num_tokens"] == one_device["num_tokens"]
    assert not list(two.glob("*.partial"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--devices", "0"], "--devices must be at least 1, got 0"),
        (["--devices", "5"], "--devices must be at most 4, got 5"),
        (["--parallel", "tensor"], "--parallel"),
        (["--num-processes", "2"], "--coordinator is missing"),
    ],
)
def test_devices_that_are_not_there(run, flags, message):
    outcome = tiny_run.call("sample", "--checkpoint", str(run), *flags)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_mesh_that_does_not_fit(run):
    with pytest.raises(
        FieldError, match="fsdp must divide the 4 devices, got 3; these do: 1, 2, 4"
    ):
        sedd.load(run, mesh=device_mesh(fsdp=3))
