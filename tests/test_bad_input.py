"""A user's mistakes: one line that names the value, exit code 2, and nothing that is lost."""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny_run
from tiny_run import ROOT, TINY, call, compile_quickly  # noqa: F401

import sedd.files
from sedd.training.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Files of every sort, and runs that are whole, damaged and incomplete."""
    top = tmp_path_factory.mktemp("place")
    (top / "text.txt").write_text(tiny_run.text())
    (top / "empty.txt").write_text("")
    (top / "binary.bin").write_bytes(bytes(range(256)) * 20)
    (top / "latin1.txt").write_bytes("caf\xe9 ".encode("latin1") * 99)
    (top / "nothing.py").write_text("x = 1\n")
    (top / "raises.py").write_text("def get_config():\n    return 1 / 0\n")
    (top / "mistaken.py").write_text(
        "from sedd.config import Config, TrainingOptions\n\n"
        "def get_config():\n    return Config(training=TrainingOptions(steps=0))\n"
    )
    (top / "unknown.py").write_text("import sedd.nothing_of_the_name\n")
    (top / "returns.py").write_text("def get_config():\n    return {'steps': 3}\n")
    (top / "uncallable.py").write_text("get_config = 3\n")
    (top / "syntax.py").write_text("def get_config(:\n")
    (top / "requests.jsonl").write_text('{"id": "good"}\n{"id": "bad", "prompt": 7}\n')
    config = tiny_run.config(corpus=str(top / "text.txt"))
    config = replace(config, training=replace(config.training, batch_size=8))
    whole = tiny_run.make_run(top / "run", config)
    for name in ("truncated", "other", "no_config", "no_checkpoint"):
        shutil.copytree(whole, top / name)
    tiny_run.truncate(top / "truncated" / "checkpoints" / "4" / "ema_params")
    described = json.loads((whole / "config.json").read_text())
    described["network"]["mlp_ratio"] = 2
    (top / "other" / "config.json").write_text(json.dumps(described))
    (top / "no_config" / "config.json").unlink()
    shutil.rmtree(top / "no_checkpoint" / "checkpoints")
    return top


TRAIN = [
    ("--data.corpus stdlb", "unknown corpus 'stdlb', did you mean 'stdlib'?"),
    ("--data.corpus {place}/none.txt", "no such file"),
    ("--data.corpus {place}/empty.txt", "empty.txt is empty"),
    ("--data.corpus {place}/binary.bin", "binary.bin is not text"),
    ("--data.corpus {place}/latin1.txt", "latin1.txt, line 1: not UTF-8"),
    ("--data.corpus {text} --data.length 99999", "length 99999 is longer than the data"),
    ("--data.corpus {text} --data.tokenizer chars", "unknown tokenizer 'chars'"),
    ("--data.corpus {text} --data.tokenizer bpe:9", "tokenizer 'bpe:9': expected bpe:SIZE"),
    ("--data.corpus {text}*0+sotu", "the weight of {text} must be positive, got 0"),
    ("--trainig.steps 3", "unrecognized option --trainig.steps"),
    ("--training.stpes 3", "--training.stpes; did you mean --training.steps?"),
    ("--data.corpus", "--data.corpus needs a value"),
    ("--training.steps many", "--training.steps: not a whole number: 'many'; expected"),
    ("--optimizer.learning-rate fast", "--optimizer.learning-rate: not a number: 'fast'"),
    ("--optimizer.schedule linaer", "'linaer' for argument '--optimizer.schedule'. Expected one"),
    ("--optimizer.learning-rate 0", "optimizer.learning_rate must be positive, got 0.0"),
    ("--optimizer.ema-decay 1", "optimizer.ema_decay must be in [0, 1), got 1.0"),
    ("--training.steps 0", "training.steps must be at least 1, got 0"),
    ("--training.eval-every 0", "training.eval_every must be at least 1, got 0"),
    ("--training.keep 0", "training.keep must be at least 1, got 0"),
    ("--evaluation.draws 6", "evaluation.draws must be a positive multiple of 4, got 6"),
    ("--data.length 0", "data.length must be at least 1, got 0"),
    ("--seed -1", "seed must be in [0, 2**32), got -1"),
    ("--network.num-heads 3", "networks 'ddit': hidden_dim must be .* got 16 with 3 heads"),
    ("--network.dropout 1", "networks 'ddit': dropout must be in [0, 1), got 1.0"),
    ("--schedule.eps 2", "schedules 'log_linear': eps must be in (0, 1), got 2.0"),
    ("--sampler.steps 0", "samplers 'tweedie': steps must be at least 1, got 0"),
    ("--process unifrom", "--process unifrom: processes has no 'unifrom'; did you mean 'uniform'"),
    ("--process uniform", "parameterizations 'conditional': it needs an absorbing process; score"),
    ("--parameterization score", "objectives 'lambda_dce': it needs the parameterization"),
    ("--training.batch-size 6", "batch_size must be divisible by devices × accumulate = 4 × 1"),
    ("--training.batch-size 8 --training.accumulate 4", "4 × 4 = 16, got 8; the nearest"),
    ("--config {place}/none.py", "--config {place}/none.py: no such file"),
    ("--config {place}/syntx.py", "no such file; did you mean 'syntax.py'?"),
    ("--config {place}", "--config {place}: no such file"),
    ("--config {place}/nothing.py", "nothing.py: it defines no get_config()"),
    ("--config {place}/raises.py", "raises.py, line 2: ZeroDivisionError: division by zero"),
    ("--config {place}/mistaken.py", "mistaken.py, line 4: training.steps must be at least 1"),
    ("--config {place}/unknown.py", "unknown.py, line 1: ModuleNotFoundError: No module named"),
    ("--config {place}/returns.py", "get_config() must return a Config, got dict"),
    ("--config {place}/uncallable.py", "TypeError: 'int' object is not callable"),
    ("--config {place}/syntax.py", "SyntaxError: .*(syntax.py, line 1)"),
    ("--workdir {text}", "--workdir {text}: {text} is a file, not a directory"),
    ("--workdir {text}/a/b", "{text} is a file, not a directory"),
    ("--workdir {run} --data.corpus {text} --seed 3", "seed is 0 there and 3 here"),
    ("--workdir {run} --data.corpus sotu", 'data.corpus is "{text}" there and "sotu" here'),
    ("--workdir {place}/no_config", "it holds checkpoints but no config.json"),
    ("--init-from {place}/none", "--init-from {place}/none: not a run's directory"),
    ("--init-from {run} --data.tokenizer bytes", "its tokenizer is characters, and --data.token"),
    ("--init-from {run} --data.corpus {text} --network.mlp-ratio 2", "of another configuration"),
]
SAMPLE = [
    ("--checkpoint {place}/none", "checkpoint {place}/none: no such directory"),
    ("--checkpoint {text}", "checkpoint {text}: no such directory"),
    ("--checkpoint {place}", "not a run's directory (it has no config.json)"),
    ("--checkpoint {run}/checkpoints", "(it has no config.json); did you mean {run}?"),
    ("--checkpoint {place}/no_checkpoint", "no checkpoint in {place}/no_checkpoint"),
    ("--checkpoint {place}/truncated", "no checkpoint in .*truncated/checkpoints is whole"),
    ("--checkpoint {place}/other", "of another configuration: .* there and .* here"),
    ("--step 3", "no checkpoint of step 3 in {run}/checkpoints; there are [4]"),
    ("--step newest", "--step: no type matching"),
    ("--num 0", "num must be at least 1, got 0"),
    ("--batch-size 0", "batch_size must be at least 1, got 0"),
    ("--steps 0", "samplers 'tweedie': steps must be at least 1, got 0"),
    ("--sampler tweedi", "samplers has no 'tweedi'; did you mean 'tweedie'"),
    ("--sampler", "--sampler needs a value"),
    ("--seed -3", "seed must be in [0, 2**32), got -3"),
    ("--length 0", "length must be in 1.."),
    ("--length 99999999999", "length must be in 1.."),
    ("--prompt farawayfromhere", "prompt (15 tokens): longer than the length of 12"),
    ("--prompt sat --suffix farawayfrom", "prompt (3 tokens) and suffix (11 tokens): longer"),
    ("--prompt Zebra", "prompt: character 'Z' (U+005A) is not among the"),
    ("--infill a{{mask:x}}", "infill gap '{{mask:x}}': the size must be a whole number"),
    ("--infill a{{mask:3", "infill gap '{{mask:3' cannot be read"),
    ("--infill abc", "has no gap; write {{mask:12}}"),
    ("--infill a{{mask:9}} --length 5", "(10 tokens): longer than the length of 5"),
    ("--infill a{{mask}} --prompt b", "infill already holds its context"),
    ("--requests {place}/none.jsonl", "--requests {place}/none.jsonl: No such file"),
    ("--requests {place}/empty.txt", "--requests {place}/empty.txt: the file is empty"),
    ("--requests {place}/binary.bin", "binary.bin: not UTF-8 text"),
    ("--requests {place}/requests.jsonl --prompt a", "--requests holds the prompts"),
    ("--output {text}/x.jsonl", "--output {text}/x.jsonl: {text} is a file, not a directory"),
    ("--output {place}", "--output {place}: it is a directory, not a file"),
    ("--trace {text}/x.html", "--trace {text}/x.html: {text} is a file, not a directory"),
]
EVALUATE = [
    ("", "missing --data STR"),
    ("--data {text} --checkpoint {place}/none", "checkpoint {place}/none: no such directory"),
    ("--data {text} --draws 6", "draws must be a positive multiple of 4, got 6"),
    ("--data {text} --draws 0", "draws must be a positive multiple of 4, got 0"),
    ("--data {text} --max-sequences 0", "max_sequences must be at least 1, got 0"),
    ("--data {text} --seed -1", "seed must be in [0, 2**32), got -1"),
    ("--data {text} --split tset", "has no split 'tset': it has train, validation, all"),
    ("--data corpus:stdlb", "unknown corpus 'stdlb', did you mean 'stdlib'?"),
    ("--data {place}/empty.txt", "empty.txt is empty"),
    ("--data corpus:sotu", "is not among the"),
    ("--data {text} --json {place}", "--json {place}: it is a directory, not a file"),
    ("--data {text} --json {text}/x.json", "{text} is a file, not a directory"),
]
CASES = [
    *(("train", arguments, message) for arguments, message in TRAIN),
    *(("sample", arguments, message) for arguments, message in SAMPLE),
    *(("evaluate", arguments, message) for arguments, message in EVALUATE),
]


def matches(message: str, line: str) -> bool:
    """Whether the parts of ``message`` between ``.*`` occur in the line in order."""
    end = 0
    for part in message.split(".*"):
        end = line.find(part, end)
        if end < 0:
            return False
        end += len(part)
    return True


@pytest.mark.parametrize(("command", "arguments", "message"), CASES)
def test_a_mistake_is_one_line(place, tmp_path, command, arguments, message):
    names = {"place": place, "run": place / "run", "text": place / "text.txt"}
    given = [argument.format(**names) for argument in arguments.split()]
    cache = [f"--{'data.' if command == 'train' else ''}cache-dir", tmp_path / "cache"]
    before = {
        "train": ["--workdir", tmp_path / "new", *TINY, *cache],
        "sample": ["--checkpoint", place / "run"],
        "evaluate": ["--checkpoint", place / "run", *cache],
    }[command]
    result = call(command, *before, *given)
    if "truncated" in arguments:
        tiny_run.collect_failed_reads()
    assert result.code == 2
    assert len(result.errors) == 1
    assert matches(message.format(**names), result.errors[0]), result.errors[0]
    assert result.out == "" or "parameters" in result.out
    assert not (tmp_path / "new" / "checkpoints").exists()


def test_a_flag_that_is_not_utf8_is_one_line(place):
    result = call("sample", "--checkpoint", place / "run", "--prompt", "a\udcff")
    assert (result.code, result.errors) == (2, ["error: prompt is not text: it has no UTF-8"])


def test_refused_requests_do_not_stop_the_others(place, tmp_path):
    lines = [{"id": "good", "prompt": "the"}, {"prompt": 7}, {"id": "[/red]", "infill": "{mask:3}"}]
    path, output = tmp_path / "requests.jsonl", tmp_path / "new" / "out.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    result = call(
        *("sample", "--checkpoint", place / "run", "--steps", 2),
        *("--requests", path, "--output", output),
    )
    assert result.code == 2
    assert result.errors == [f"error: {path}, line 2: prompt must be a string, got 7"]
    assert "[/red] · seed 2 · 3 network calls" in result.out  # text, not the console's markup
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == [
        "good",
        "[/red]",
    ]


def test_a_file_of_anything_but_requests_does_not_fill_the_screen(place):
    result = call("sample", "--checkpoint", place / "run", "--requests", place / "text.txt")
    assert result.code == 2
    assert len(result.errors) == 21
    assert result.errors[0].startswith(f"error: {place}/text.txt, line 1: not JSON")
    assert result.errors[-1].endswith("180 more lines are like these")


@pytest.mark.parametrize("flag", ["--output", "--trace"])
def test_samples_are_printed_though_they_cannot_be_written(place, tmp_path, monkeypatch, flag):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    path = tmp_path / "out"
    result = call(
        *("sample", "--checkpoint", place / "run", "--steps", 2, "--prompt", "the cat", flag, path)
    )
    assert result.code == 2
    assert "the cat" in result.out
    assert result.errors == [f"error: cannot write {path}: No space left on device"]
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_figures_are_printed_though_they_cannot_be_written(place, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "out.json"
    monkeypatch.setattr(sedd.files, "_write_whole", full)
    result = call(
        *("evaluate", "--checkpoint", place / "run", "--data", place / "text.txt", "--draws", 4),
        *("--max-sequences", 4, "--cache-dir", tmp_path / "cache", "--json", path),
    )
    assert result.code == 2
    assert "nats per token" in result.out
    assert result.errors == [f"error: cannot write {path}: No space left on device"]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
@pytest.mark.parametrize(("command", "flag"), [("train", "--workdir"), ("sample", "--output")])
def test_a_place_without_permission(place, tmp_path, command, flag):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    given = tiny_run.RECIPE if command == "train" else ["--checkpoint", place / "run"]
    result = call(command, *given, flag, closed / "new")
    assert result.code == 2
    assert result.errors == [f"error: {flag} {closed}/new: no permission to write there"]


def test_a_full_disk_during_a_save(place, tmp_path):
    """The commands' own process: a limit on the size of files stands in for the disk's."""
    program = (
        "import resource, runpy, sys; "
        "sys.dont_write_bytecode = True; "  # a limit would cut what Python caches, for good
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        "runpy.run_path('train.py', run_name='__main__')"
    )
    workdir, cache = tmp_path / "run", tmp_path / "cache"
    flags = [
        *tiny_run.RECIPE,
        *("--workdir", workdir, "--data.corpus", place / "text.txt", "--data.cache-dir", cache),
        *("--network.hidden-dim", 32, "--network.num-layers", 1, "--network.num-heads", 2),
        *("--data.length", 8, "--training.batch-size", 4, "--training.steps", 2),
        *("--training.checkpoint-every", 1, "--training.sample-every", "None"),
        *("--sampler.steps", 1, "--evaluation.max-sequences", 4, "--evaluation.draws", 4),
    ]
    result = subprocess.run(
        [sys.executable, "-c", program, *map(str, flags)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        check=False,
    )
    outcome = tiny_run.Outcome(result.returncode, result.stdout, result.stderr)
    assert outcome.code == 2
    (line,) = outcome.errors
    assert line.startswith(f"error: cannot write a checkpoint to {workdir}/checkpoints: File too l")
    assert line.endswith("make room and start again; no checkpoint is complete")
    assert Checkpoints(workdir / "checkpoints").latest_good() is None


def test_debug_shows_where(place):
    result = subprocess.run(
        [sys.executable, "sample.py", "--checkpoint", str(place / "none"), "--debug"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "no such directory" in result.stderr
