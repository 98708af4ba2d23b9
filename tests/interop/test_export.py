"""``sedd export``: it writes what it read, whole or not at all."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
import tiny_run
from safetensors import safe_open
from safetensors.numpy import load_file
from test_load_published import NUM_TOKENS, TOKENIZER, edit, with_tokenizer
from test_published import GOLDEN
from tiers import daily

import sedd
from sedd.configuration.components import options
from sedd.interop import tensor_files
from sedd.training.checkpoint import find_checkpoints

MEASURED = {"validation_standard_error": 0.25, "validation_perplexity": 7.5}


def export(*arguments):
    return tiny_run.call("export", *arguments)


def exported(checkpoint, output, *more):
    result = export("--checkpoint", checkpoint, "--output", output, *more)
    assert result.code == 0, result.err
    return result


def timed(**changes):
    """MDLM's kind of model: a conditional that depends on the time."""
    kind = {
        "parameterization": options("parameterizations", "conditional", time_independent=False),
        "objective": options("objectives", "t_dce"),
    }
    return dataclasses.replace(tiny_run.config("radd"), **(kind | changes))


CONFIGS = {
    "sedd": tiny_run.config("sedd"),
    "uniform": dataclasses.replace(
        tiny_run.config("uniform"),
        schedule=options("schedules", "geometric", sigma_min=1e-3, sigma_max=7.0),
    ),
    "radd": tiny_run.config("radd"),
    "mdlm": timed(),
    "gidd": timed(
        process=options("processes", "hybrid", uniform=0.2, gamma=1.0),
        parameterization=options("parameterizations", "mean", condition="time"),
        objective=options("objectives", "score_entropy", weighting="dynamic"),
    ),
}
LAYOUTS = {"sedd": "SEDD", "uniform": "SEDD", "radd": "RADD", "mdlm": "MDLM", "gidd": "GIDD"}


@pytest.fixture(scope="module", params=daily(CONFIGS, ["uniform", "radd"]))
def run(request, tmp_path_factory):
    """A run of each kind, with two checkpoints, and its name."""
    directory = tmp_path_factory.mktemp(request.param)
    tiny_run.make_run(directory, CONFIGS[request.param], steps=(2, 4))
    record = {"step": 4, "validation_nats_per_token": 2.125, **MEASURED}
    (directory / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return request.param, directory


def test_an_exported_run_is_the_same_model(run, tmp_path):
    kind, directory = run
    result = exported(directory, tmp_path / "out")
    assert f"wrote {tmp_path / 'out'} in the layout of {LAYOUTS[kind]}" in result.out
    assert (result.err == "") == (kind != "radd")  # whose norms get biases of 0
    before, after = sedd.load(directory), sedd.load(tmp_path / "out")
    x = np.random.default_rng(0).integers(0, before.process.num_states, (3, 12))
    sigma = np.array([0.1, 1.0, 3.0], np.float32)
    np.testing.assert_array_equal(before.log_score(x, sigma), after.log_score(x, sigma))
    assert after.tokenizer == before.tokenizer == tiny_run.TOKENIZER
    for part in ("process", "schedule", "time_independent", "length"):
        assert getattr(after, part) == getattr(before, part), part
    for part in ("process", "schedule", "parameterization", "network"):
        ours, theirs = getattr(before.config, part), getattr(after.config, part)
        if (kind, part) == ("radd", "network"):  # a width that is of no use there is not read
            ours = dataclasses.replace(ours, norm_bias=True, condition_dim=theirs.condition_dim)
        assert theirs == ours
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing else is left
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_card_says_what_the_model_is(run, tmp_path):
    kind, directory = run
    exported(directory, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: sedd\n")
    assert f"- {LAYOUTS[kind].lower()}\n---\n" in card
    model = sedd.load(directory)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.denoiser.params))
    assert f"| parameters | {parameters:,} |" in card
    assert f"| process | {model.config.process.name} " in card
    assert "| training step | 4, averaged (EMA) parameters |" in card
    assert "2.1250 ± 0.2500 nats per token" in card
    assert "perplexity at most 7.500" in card
    assert 'sedd.load("DIRECTORY")' in card
    dump = json.loads(re.search(r"```json\n(.*)\n```", card, re.DOTALL)[1])  # pyright: ignore
    assert "cache_dir" not in dump["data"]  # it names a place on this machine
    assert type(model.config).from_json(dump).optimizer == model.config.optimizer


def test_a_bound_is_not_that_of_another_step(tmp_path):
    directory = tiny_run.make_run(tmp_path / "run", CONFIGS["radd"], steps=(2, 4))
    record = {"step": 4, "validation_nats_per_token": 2.125, **MEASURED}
    (directory / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    exported(directory, tmp_path / "a", "--step", 2)
    card = (tmp_path / "a" / "README.md").read_text()
    assert "| training step | 2, " in card
    assert "Validation" not in card
    exported(directory, tmp_path / "b", "--step", "best")
    best = find_checkpoints(directory).best()
    assert f"| training step | {best}, " in (tmp_path / "b" / "README.md").read_text()
    # What is damaged is not what is described.
    tiny_run.truncate(directory / "checkpoints" / "4" / "ema_params")
    exported(directory, tmp_path / "c")
    assert "| training step | 2, " in (tmp_path / "c" / "README.md").read_text()
    tiny_run.collect_failed_reads()


@pytest.mark.parametrize("name", ["sedd_absorb", "sedd_uniform", "radd", "mdlm"])
def test_golden_tensors_come_out_as_they_went_in(tmp_path, name):
    path = with_tokenizer(name, tmp_path / name) if name == "radd" else GOLDEN / name
    if name == "mdlm":  # what it is without this: below
        path = shutil.copytree(path, tmp_path / name)
        edit(path / "config.json", time_conditioning=True)
    exported(path, tmp_path / "out")
    before = load_file(path / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    (constant,) = before.keys() - after.keys()
    assert constant.endswith("rotary_emb.inv_freq")
    assert not after.keys() - before.keys()
    for full, tensor in after.items():
        assert tensor.dtype == before[full].dtype
        np.testing.assert_array_equal(tensor, before[full], err_msg=full)
    assert sedd.load(tmp_path / "out").config == sedd.load(path).config
    assert (tmp_path / "out" / "tokenizer.json").exists() == (name == "radd")
    assert "Training configuration" not in (tmp_path / "out" / "README.md").read_text()


def test_mdlm_at_a_constant_sigma_leaves_as_what_it_was_read_as(tmp_path):
    """An unconditioned network with biases: RADD's layout."""
    exported(GOLDEN / "mdlm", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tokens"] == NUM_TOKENS
    x = np.load(GOLDEN / "mdlm.npz")["xt"]
    before, after = (
        sedd.load(path).log_conditional(x) for path in (GOLDEN / "mdlm", tmp_path / "out")
    )
    np.testing.assert_array_equal(before, after)


def test_a_tokenizer_of_hugging_face_is_written_as_theirs(tmp_path):
    theirs = {
        "version": "1.0",
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {"[UNK]": 0, **{f"word{i}": i for i in range(1, NUM_TOKENS)}},
        },
    }
    exported(with_tokenizer("radd", tmp_path / "a", theirs), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == theirs


# ------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            timed(
                network=dataclasses.replace(tiny_run.NETWORK, mlp_ratio=2, norm_bias=True),
                schedule=options("schedules", "cosine"),
            ),
            "the layout of MDLM cannot hold this model: network.mlp_ratio must be 4, got 2; "
            "network.norm_bias must be False, got True; schedule must be log_linear, got cosine",
        ),
        (
            dataclasses.replace(
                tiny_run.config("sedd"), schedule=options("schedules", "log_linear", eps=1e-4)
            ),
            "the layout of SEDD cannot hold this model: schedule.eps must be 0.001, got 0.0001",
        ),
        (
            dataclasses.replace(tiny_run.config("sedd"), process=options("processes", "hybrid")),
            "the layout of SEDD cannot hold this model: process must be absorbing or uniform, got "
            "hybrid",
        ),
        (
            tiny_run.config("ar"),
            "this model is autoregressive, and has no published layout: BD3-LM, GIDD, MDLM, RADD "
            "or SEDD hold other kinds",
        ),
    ],
)
def test_what_no_layout_holds_is_refused_with_all_reasons(tmp_path, config, message):
    directory = tiny_run.make_run(tmp_path / "run", config)
    result = export("--checkpoint", directory, "--output", tmp_path / "out")
    assert (result.code, result.errors) == (2, [f"error: {message}"])
    assert not (tmp_path / "out").exists()


def test_what_is_dropped_is_said(tmp_path):
    network = dataclasses.replace(tiny_run.NETWORK, dtype="bfloat16", remat=True)
    config = dataclasses.replace(tiny_run.config("sedd"), network=network)
    result = exported(tiny_run.make_run(tmp_path / "run", config), tmp_path / "out")
    assert result.err.splitlines() == [
        "note: network.dtype bfloat16 is not kept: sedd.load computes in float32 what it reads "
        "from this layout",
        "note: network.attention and network.remat are not kept: they change no result",
    ]


def test_nothing_is_replaced(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    exported(GOLDEN / "radd", output)  # empty is as good as absent
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    result = export("--checkpoint", GOLDEN / "sedd_absorb", "--output", output)
    message = f"error: --output {output}: it is not empty; nothing is replaced, name another dir"
    assert result.errors[0].startswith(message)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    result = export("--checkpoint", GOLDEN / "radd", "--output", output / "config.json")
    assert result.errors[0].startswith(f"error: --output {output / 'config.json'}: it is a file")


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_files, "save_file", fail)
    result = export("--checkpoint", GOLDEN / "radd", "--output", tmp_path / "out")
    assert result.errors == [f"error: cannot write {tmp_path / 'out'}: No space left on device"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "missing --checkpoint STR, --output PATH"),
        (["--checkpoint", "none", "--output", "{out}"], "checkpoint none: no such dir"),
        (
            ["--checkpoint", str(GOLDEN / "radd"), "--output", "{out}", "--step", "3"],
            "--step 3: checkpoint .* is a published one",
        ),
    ],
)
def test_mistakes_of_the_command_line(tmp_path, arguments, message):
    arguments = [argument.format(out=tmp_path / "out") for argument in arguments]
    result = tiny_run.call("export", *arguments)
    assert result.code == 2
    assert re.match(f"error: {message}", result.errors[0])


def test_the_tokenizer_is_the_run_s(tmp_path):
    exported(with_tokenizer("sedd_absorb", tmp_path / "a"), tmp_path / "out")
    assert sedd.load(tmp_path / "out").tokenizer == TOKENIZER
