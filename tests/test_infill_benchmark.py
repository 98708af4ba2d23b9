"""The infilling benchmark: its files, gaps, draws and scores, and the sandbox of its programs."""

import contextlib
import gzip
import importlib
import json
import os
import signal
import socket
import string
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiny_run
from tiny_run import make_run

import sedd
from sedd.commands.cli import run
from sedd.data.tokenizers import Characters

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
COLUMNS = [
    *("InputStoryid", "InputSentence1", "InputSentence2", "InputSentence3", "InputSentence4"),
    *("RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2", "AnswerRightEnding"),
]
STORIES = [
    ["a", "A cat.", "It sat.", "It ran.", "It ate.", "It fell.", "It slept.", "2"],
    ["b", "A dog.", "He saw.", '"Hi," he said.', "He hid.", "He won.", "He lost.", "1"],
    ["c", "A hen.", "She is " + "very " * 12 + "old.", "So?", "Yes.", "End.", "No.", "1"],
]
TEST = "def check(candidate):\n    assert candidate(2) == 4"
TASK = {
    "task_id": "0",
    "prompt": "def f(x):\n",
    "canonical_solution": "    y = x + x",
    "suffix": "\n    return y",
    "test": TEST,
    "entry_point": "f",
}


@pytest.fixture(scope="module")
def infill():
    with mock.patch.object(sys, "path", [str(BENCHMARKS), *sys.path]):
        return importlib.import_module("infill")


@pytest.fixture(scope="module")
def sandbox(infill):
    return sys.modules["sandbox"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    every = Characters.of("characters", string.printable, eos=True)
    with mock.patch.object(tiny_run, "TOKENIZER", every):
        return make_run(tmp_path_factory.mktemp("run"), tiny_run.config("any_subset", length=64))


def write_stories(path, rows=STORIES, columns=COLUMNS):
    lines = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows]
    path.write_text("\n".join([",".join(columns), *lines]))
    return path


def call(infill, capsys, *arguments):
    """Exit code, output and errors of the benchmark as a command."""
    with (
        mock.patch.object(sys, "argv", ["infill.py", *map(str, arguments)]),
        pytest.raises(SystemExit) as stop,
    ):
        run(lambda words: infill.main(infill.read_settings(words)))
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out, said.err


def last_line(out):
    return json.loads(out.strip().splitlines()[-1])


def test_one_or_three_sentences_are_hidden(infill, tmp_path):
    path = write_stories(tmp_path / "stories.csv")
    first, second, _ = infill.read_stories(path, 1)
    assert (first.before, first.hidden) == ("A cat. It sat.", " It ran.")
    assert first.after == " It ate. It slept."
    assert (second.hidden, second.after) == (' "Hi," he said.', " He hid. He won.")
    first, *_ = infill.read_stories(path, 3)
    assert (first.before, first.after) == ("A cat.", " It slept.")
    assert first.hidden == " It sat. It ran. It ate."


def test_rouge_by_hand(infill):
    """4 of 6 words in common; 1 of 5 pairs; a common subsequence of 4; the mean over draws."""
    target = "the cat sat on the mat"
    scores_S3 = infill.rouge([target, "a b"], [["The cat lay on a mat!", target], ["c", "c"]])
    expected = 100 * np.array([[(4 / 6 + 1) / 2, (1 / 5 + 1) / 2, (4 / 6 + 1) / 2], [0, 0, 0]])
    np.testing.assert_allclose(scores_S3, expected, atol=1e-9)
    uneven = infill.rouge(["one two three four"], [["one two"]])  # precision 1, recall 1/2
    np.testing.assert_allclose(uneven, [[100 * 2 / 3, 50, 100 * 2 / 3]], atol=1e-9)


@pytest.mark.nightly
def test_stories_end_to_end(infill, checkpoint, tmp_path, capsys):
    """Draws do not depend on their batch, gaps have the true length, long stories are counted."""
    path = write_stories(tmp_path / "stories.csv")
    words = ["--checkpoint", checkpoint, "--task", "rocstories", "--data", path]
    words += ["--sentences", "1", "--trials", "2", "--sampler", "speculative", "--draft", "self"]
    texts = []
    for size in (2, 32):
        with mock.patch.object(infill, "rouge", wraps=infill.rouge) as rouge:
            code, out, err = call(infill, capsys, *words, "--batch-size", size)
        assert code == 0, err
        texts.append(rouge.call_args.args)
    assert texts[0] == texts[1]
    hidden, drawn = texts[0]
    assert hidden == [" It ran.", ' "Hi," he said.']
    assert [[len(text) for text in two] for two in drawn] == [[8, 8], [15, 15]]
    assert drawn[0][0] != drawn[0][1]
    line = last_line(out)
    assert [row["measure"] for row in line["rows"]] == ["ROUGE-1", "ROUGE-2", "ROUGE-L"]
    scores = infill.rouge(hidden, drawn)[:, 0]
    assert line["rows"][0]["F × 100"] == pytest.approx(scores.mean())
    assert line["rows"][0]["±"] == pytest.approx(abs(scores[0] - scores[1]) / 2)
    assert (line["drawn"], line["left_out"], line["tokens_a_gap"]) == (2, 1, 11.5)
    assert 1 < line["tokens_a_call"] <= 15
    assert line["rows_a_token"] == pytest.approx(1 / line["tokens_a_call"], abs=2e-3)
    assert "Left out: 1 longer than the model's 64 tokens." in out
    assert "flatters the figures" in out


@pytest.mark.nightly
def test_tasks_end_to_end(infill, checkpoint, tmp_path, capsys):
    """The drawn lines are put into the programs, and what passes is counted."""
    tasks = [{**TASK, "task_id": str(i)} for i in range(3)]
    path = tmp_path / "tasks.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, tasks)).encode()))
    words = ["--checkpoint", checkpoint, "--task", "humaneval", "--data", path]
    code, _, err = call(infill, capsys, *words)
    assert code == 2
    assert "--run-code is missing" in err
    lines = [TASK["canonical_solution"], "    y = x * x", "    y = 3"]
    with mock.patch.object(infill, "gap_text", side_effect=lines):
        code, out, err = call(infill, capsys, *words, "--run-code")
    assert code == 0, err
    (row,) = last_line(out)["rows"]
    assert (row["passed"], row["failed"], row["timed out"]) == (2, 1, 0)
    assert row["pass@1, %"] == pytest.approx(200 / 3)
    assert row["±"] == pytest.approx(100 / 3)
    assert "no defence" in err
    code, out, err = call(infill, capsys, *words, "--run-code")
    assert code == 0, err
    assert last_line(out)["rows"][0]["failed"] == 3  # random text


def test_the_hidden_line_passes(infill, sandbox, tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(TASK) + "\n\n" + json.dumps(TASK))
    first, _ = infill.read_tasks(path)
    assert sandbox.run_code(first.program(first.hidden), seconds=20).outcome == "passed"
    assert sandbox.run_code(first.program("    y = 3"), seconds=20).outcome == "failed"


@pytest.mark.parametrize(
    ("outcome", "program"),
    [
        ("passed", "import math, sys, typing\nassert math.pi > 3\nprint('x' * 10**6)"),
        ("failed", "raise ValueError"),
        ("failed", "def f(:"),
        ("failed", "import sys; sys.exit(0)"),
        ("failed", "import os; os._exit(0)"),
        ("failed", "import os; os.kill(os.getpid(), 9)"),
        ("failed", "input()"),
        ("failed", "bytearray(2 ** 31)"),
        ("failed", "import os; files = [os.open('/dev/null', 0) for _ in range(20)]"),
        ("failed", "open('new', 'w').write('x')"),
        (
            "passed",
            "import os; assert 'SEDD_SECRET' not in os.environ and 'HOME' not in os.environ",
        ),
        ("timed out", "while True: pass"),
        ("timed out", "import time; time.sleep(60)"),
    ],
)
def test_what_becomes_of_a_program(sandbox, monkeypatch, outcome, program):
    monkeypatch.setenv("SEDD_SECRET", "x")
    seconds = 2 if outcome == "timed out" else 30
    assert sandbox.run_code(program, seconds=seconds).outcome == outcome


def test_processor_time_is_limited_too(sandbox, tmp_path):
    """Without the parent, which would kill it after the same time."""
    (tmp_path / "program.py").write_text("while True: pass")
    command = [sys.executable, "-I", sandbox.__file__, str(tmp_path / "program.py"), "1"]
    child = subprocess.run(command, env={}, stdout=subprocess.PIPE, timeout=120)
    assert child.returncode == -signal.SIGXCPU


def test_files_and_network_are_guarded_where_it_says_so(sandbox, tmp_path):
    """Each attempt succeeds exactly where the guard is missing, and nothing is written anyway."""
    kept = tmp_path / "kept"
    kept.write_text("x")
    made = tmp_path / "made"
    verdict = sandbox.run_code(f"import os; os.remove({str(kept)!r})", seconds=30)
    assert (verdict.outcome == "passed") == ("files" not in verdict.guards) == (not kept.exists())
    verdict = sandbox.run_code(f"open({str(made)!r}, 'w').write('x')", seconds=30)
    assert verdict.outcome == "failed"
    assert not made.exists() or ("files" not in verdict.guards and not made.read_text())
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = server.getsockname()
        program = f"import socket; socket.create_connection({place!r}, 5)"
        verdict = sandbox.run_code(program, seconds=30)
    assert (verdict.outcome == "passed") == ("network" not in verdict.guards)
    said = sandbox.described(verdict.guards, 30)
    assert ("NETWORK IS NOT BLOCKED" in said) == ("network" not in verdict.guards)
    assert ("REMOVED" in said) == ("files" not in verdict.guards)


def test_processes_are_refused_or_killed(sandbox):
    """Only root can start one, and it ends with the program."""
    program = "import os\nif os.fork() == 0:\n    import time\n    time.sleep(600)"
    verdict = sandbox.run_code(program, seconds=30)
    assert (verdict.outcome == "passed") == (os.geteuid() == 0)
    assert ("you are root" in sandbox.described(verdict.guards, 30)) == (os.geteuid() == 0)
    end = time.monotonic() + 30
    while remaining(sandbox.__file__) and time.monotonic() < end:
        time.sleep(0.05)
    assert not remaining(sandbox.__file__)


def remaining(file):
    """The processes that were started with ``file`` among their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            if file.encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


def bad_stories(column, value):
    row = dict(zip(COLUMNS, STORIES[1], strict=True)) | {column: value}
    return [STORIES[0], [*row.values()]]


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (STORIES, [*COLUMNS[:3], "Other", *COLUMNS[4:]], "no column InputSentence3"),
        (bad_stories("InputSentence2", " "), COLUMNS, "line 3: InputSentence2 is empty"),
        ([STORIES[0], ["b", "A."]], COLUMNS, "line 3: AnswerRightEnding must be 1 or 2, got ''"),
        (bad_stories("AnswerRightEnding", "3"), COLUMNS, "must be 1 or 2, got '3'"),
        ([], COLUMNS, "nothing to draw: it is empty"),
        ([STORIES[2]], COLUMNS, "nothing to draw: 1 longer than the model's 64 tokens"),
        (bad_stories("InputSentence1", "é")[1:], COLUMNS, "characters that the tokenizer lacks"),
    ],
)
def test_stories_that_cannot_be_used(infill, checkpoint, tmp_path, capsys, rows, columns, message):
    path = write_stories(tmp_path / "stories.csv", rows, columns)
    words = ["--checkpoint", checkpoint, "--task", "rocstories", "--sentences", "1"]
    code, _, err = call(infill, capsys, *words, "--data", path)
    assert code == 2
    assert message in err
    assert err.startswith(f"error: --data {path}: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x", "line 1: not JSON"),
        (b"[]", "line 1: a task is an object with the text 'prompt'"),
        (json.dumps(TASK | {"suffix": 3}).encode(), "the text 'suffix'"),
        (json.dumps(TASK | {"canonical_solution": ""}).encode(), "nothing to hide"),
        (b"\xff\xfe", "not UTF-8 text"),
        (gzip.compress(b"{}", mtime=0)[:-9], "Compressed file ended"),
        (b"\x1f\x8b" + bytes(20), "Unknown compression method"),
    ],
)
def test_tasks_that_cannot_be_used(infill, tmp_path, content, message):
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(content)
    with pytest.raises(sedd.UserError, match=message) as error:
        infill.read_tasks(path)
    assert str(error.value).startswith(f"--data {path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "rocstories"], "--sentences is missing"),
        (["--task", "rocstories", "--sentences", "2"], "--sentences"),
        (["--task", "rocstories", "--sentences", "1", "--trials", "0"], "--trials must be above 0"),
        (
            ["--task", "humaneval", "--run-code", "--trials", "2"],
            "--trials: humaneval has one draw",
        ),
        (["--task", "rocstories", "--sampler", "planned"], "--sampler planned needs a profile"),
        (["--task", "rocstories", "--sentences", "1", "--gamma", "2"], "--gamma: it is a flag of"),
        (["--task", "rocstories", "--sentences", "1"], "--data nowhere: No such file"),
        (["--task", "humaneval", "--run-code"], "--data nowhere: No such file"),
    ],
)
def test_flags_that_are_wrong(infill, checkpoint, capsys, words, message):
    code, _, err = call(infill, capsys, "--checkpoint", checkpoint, "--data", "nowhere", *words)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_missing_library_is_named(infill, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(sedd.UserError, match=r"pip install -e '\.\[rouge\]'"):
        infill.rouge([], [])
