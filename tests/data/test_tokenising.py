"""Long text: tokenised in processes, interrupted anywhere, read from zstd and Parquet files."""

import gzip
import hashlib
import json
import os
import pickle
import random
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from sedd.data import base, token_files, token_log, token_workers
from sedd.data.base import Corpus, MappedCorpus, WithHeldOut, digest
from sedd.data.corpora import open_corpus
from sedd.data.packing import pack
from sedd.data.row_ranges import Cut
from sedd.data.tokenizer_sources import build_tokenizer
from sedd.data.tokenizers import Bytes
from sedd.errors import UserError

WORDS = ["the", "cat", "sat", "on", "a", "mat", "é", "and", "was\nnot", "", "there", "12", "x"]


def documents(num, seed=0):
    """Documents of random words: most are short, some fill several tasks."""
    draw = random.Random(seed)
    sizes = [draw.choice((0, 3, 20, 20, 300)) for _ in range(num)]
    return [" ".join(draw.choices(WORDS, k=size)) for size in sizes]


TEXTS = tuple(documents(60))


@dataclass(frozen=True, kw_only=True)
class Stored(Corpus):
    """Documents in memory, which can be interrupted after some characters, and counts them."""

    name: str = "stored"
    splits: tuple[str, ...] = ("train",)
    texts: tuple[str, ...] = TEXTS
    stop: int | None = None
    read: list[int] = field(default_factory=list)

    def _documents(self, split):
        return self._documents_from(split, 0)

    def _documents_from(self, split, start):
        for text in self.texts[start:]:
            if self.stop is not None and sum(self.read) + len(text) > self.stop:
                raise KeyboardInterrupt
            self.read.append(len(text))
            yield text

    def fingerprint(self):
        return digest(self.texts)


@pytest.fixture(autouse=True)
def _small_tasks(monkeypatch):
    monkeypatch.setattr(token_files, "TASK_CHARACTERS", 200)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A tokenizer of byte pairs, whose text must not be cut anywhere."""
    cache = tmp_path_factory.mktemp("pairs")
    return build_tokenizer("bpe:280", Stored(), cache_dir=cache)


def made(cache, corpus, tokenizer, **options):
    """The files of the packed tokens by name, with their bytes."""
    cut = Cut(length=options.pop("length", 5), wrap=options.pop("wrap", True))
    options = {"workers": 1, **options}
    pack(corpus, tokenizer, corpus.splits[0], cut, cache_dir=cache, **options)
    [folder] = [path for path in (cache / "packed").iterdir() if path.is_dir()]
    assert not folder.name.startswith(".")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def written_at_once(texts, tokenizer):
    """``tokens.bin`` and ``ends.npy`` as one process would write them from whole documents."""
    ids = [[*i.tolist(), tokenizer.eos_id] for i in tokenizer.encode_batch(texts)]
    tokens = np.array([i for document in ids for i in document], np.uint16).tobytes()
    return tokens, np.cumsum([len(document) for document in ids])


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_neither_workers_nor_processes_change_a_byte(tmp_path, monkeypatch, pairs, workers):
    files = made(tmp_path / "one", Stored(), pairs)
    tokens, ends = written_at_once(TEXTS, pairs)
    assert set(files) == {"tokens.bin", "ends.npy", "meta.json"}
    assert files["tokens.bin"] == tokens
    np.save(tmp_path / "ends.npy", ends)
    assert files["ends.npy"] == (tmp_path / "ends.npy").read_bytes()
    used = []
    process = token_workers.Process
    monkeypatch.setattr(token_workers, "Process", lambda t: used.append(1) or process(t))
    assert made(tmp_path / "threads", Stored(), pairs, workers=workers) == files
    assert not used
    monkeypatch.setattr(token_workers, "THREADS_CHARACTERS", 1000)
    assert made(tmp_path / "processes", Stored(), pairs, workers=workers) == files
    assert bool(used) == (workers > 1)


def test_a_process_builds_a_tokenizer_of_a_json_file(tmp_path, monkeypatch, pairs):
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, "x"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "t.json"))
    tokenizer = build_tokenizer(str(tmp_path / "t.json"), None, cache_dir=tmp_path)
    files = made(tmp_path / "thread", Stored(), tokenizer, workers=2)
    monkeypatch.setattr(token_workers, "THREADS_CHARACTERS", 0)
    assert made(tmp_path / "process", Stored(), tokenizer, workers=2) == files


def test_the_program_of_a_process_loads_no_jax():
    check = (
        "from sedd.data import token_workers; import sys; print({'jax', 'flax'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("at", ["start", "inside a task", "answer"])
def test_a_process_ends_silently_when_the_one_that_started_it_is_killed(at):
    sent = pickle.dumps(Bytes().to_json()) + pickle.dumps(token_workers.Task(["ab"], [True], 0))
    sent = {"start": b"", "inside a task": sent[:-5], "answer": sent}[at]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", token_workers.MAIN], **pipes) as process:
        process.stdout.close()
        process.stdin.write(sent)
        process.stdin.close()
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == b""


def test_a_process_that_is_killed_is_an_error_and_the_next_call_continues(
    tmp_path, monkeypatch, pairs
):
    files = made(tmp_path / "whole", Stored(), pairs)
    monkeypatch.setattr(token_workers, "THREADS_CHARACTERS", 2000)
    monkeypatch.setattr(token_workers, "MAIN", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(UserError, match="was killed by signal 9; if memory ran out, use fewer"):
        made(tmp_path / "cut", Stored(), pairs, workers=2)
    continued = Stored()
    assert made(tmp_path / "cut", continued, pairs) == files
    assert 0 < sum(continued.read) < sum(map(len, TEXTS)) - 500


def test_an_error_in_a_process_is_that_of_the_tokenizer(monkeypatch):
    monkeypatch.setattr(token_workers, "IN_PROCESSES", (type(LETTERS),))
    monkeypatch.setattr(token_workers, "THREADS_CHARACTERS", 0)
    tasks = [token_workers.Task(["aß"], [True], 0)]
    with pytest.raises(UserError, match=r"character 'ß' \(U\+00DF\) is not among"):
        list(token_workers.encode_in_order(tasks, LETTERS, 2))


LETTERS = build_tokenizer("text8", None, cache_dir=Path())


@pytest.mark.parametrize("seed", range(3))
def test_any_interruptions_end_in_the_same_bytes_and_little_is_read_twice(tmp_path, pairs, seed):
    """Interrupted at ten places: a call reads again at most what a queue of tasks holds."""
    files = made(tmp_path / "whole", Stored(), pairs)
    total = sum(map(len, TEXTS))
    draw = random.Random(seed)
    longest = max(map(len, TEXTS))
    work, cut = 0, 0
    while True:
        stop = draw.randrange(1, total // 5) if cut < 10 else None
        corpus = Stored(stop=stop)
        try:
            found = made(tmp_path / "cut", corpus, pairs)
            break
        except KeyboardInterrupt:
            cut += 1
        finally:
            work += sum(corpus.read)
    assert cut == 10
    assert found == files
    # With one worker three tasks are under way, and the document of the last may have begun before.
    assert work <= total + cut * (3 * 200 + 2 * longest)


def test_a_document_of_many_tasks_is_continued_inside(tmp_path, monkeypatch, pairs):
    long = Stored(texts=("the cat sat on the mat " * 200,))
    files = made(tmp_path / "whole", long, pairs)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "cut", long, pairs, progress=raise_after(300))
    begun = []
    encode = token_workers.encode
    monkeypatch.setattr(token_workers, "encode", lambda t, task: begun.append(1) or encode(t, task))
    monkeypatch.setattr(token_files, "TASK_CHARACTERS", 170)  # cut elsewhere than before
    assert made(tmp_path / "cut", long, pairs) == files
    assert 0 < len(begun) < len(long.texts[0]) / 170 - 3


def raise_after(tokens):
    def progress(documents, done):
        if done > tokens:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("name", ["tokens.bin", "ends.bin", "journal.bin"])
@pytest.mark.parametrize("damage", ["cut", "flip", "add", "lose"])
def test_a_damaged_interrupted_build_is_continued_before_the_damage(tmp_path, pairs, name, damage):
    """Whatever a crash of the machine leaves of the files, the result is the same."""
    files = made(tmp_path / "whole", Stored(), pairs)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "cut", Stored(), pairs, progress=raise_after(3000))
    [file] = (tmp_path / "cut").glob(f"packed/.*.partial/{name}")
    data = bytearray(file.read_bytes())
    if damage == "lose":
        file.unlink()
    else:
        if damage == "cut":
            del data[-5:]
        elif damage == "flip":
            data[len(data) // 2] ^= 255
        else:
            data += b"torn"
        file.write_bytes(data)
    continued = Stored()
    assert made(tmp_path / "cut", continued, pairs) == files
    whole = sum(map(len, TEXTS))
    assert (sum(continued.read) < whole) == (damage != "lose")


@pytest.mark.parametrize("where", ["_complete", "_move"])
def test_an_interruption_at_the_end_repeats_no_task(tmp_path, monkeypatch, pairs, where):
    files = made(tmp_path / "whole", Stored(), pairs)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(token_files, where, stop)
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path / "cut", Stored(), pairs)
    assert made(tmp_path / "cut", Stored(stop=0), pairs) == files


KILLED = """
import os, sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
from sedd.data import token_files, token_workers
from sedd.data.tokenizers import tokenizer_from_json
from test_tokenising import Stored, made
import json
token_files.TASK_CHARACTERS, token_workers.THREADS_CHARACTERS = 200, 0
pairs = tokenizer_from_json(json.loads({pairs!r}))
kill = lambda documents, tokens: tokens > {at} and os.kill(os.getpid(), 9)
made(Path({cache!r}), Stored(), pairs, workers=2, progress=kill)
"""


def test_a_build_in_processes_that_is_killed_twice_ends_in_the_same_bytes(tmp_path, request, pairs):
    files = made(tmp_path / "whole", Stored(), pairs)
    environment = {"PYTHONPATH": str(request.config.rootpath), "PATH": os.environ["PATH"]}
    for at in (1500, 4500):
        script = KILLED.format(
            tests=str(request.path.parent),
            pairs=json.dumps(pairs.to_json()),
            cache=str(tmp_path / "cut"),
            at=at,
        )
        command = [sys.executable, "-c", script]
        assert subprocess.run(command, env=environment).returncode == -9
    continued = Stored()
    assert made(tmp_path / "cut", continued, pairs) == files
    assert sum(continued.read) < 0.7 * sum(map(len, TEXTS))


def test_what_is_done_is_said(tmp_path, pairs, capsys):
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, Stored(), pairs, progress=raise_after(3000))
    assert capsys.readouterr().err == ""
    made(tmp_path, Stored(), pairs)
    assert capsys.readouterr().err.endswith(
        " tokens are there from an interrupted run, now the rest\n"
    )


def test_without_locks_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch, pairs):
    def no_locks(file, operation):
        raise OSError("not supported")

    monkeypatch.setattr(base.fcntl, "flock", no_locks)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, Stored(), pairs, progress=raise_after(3000))
    assert [path for path in (tmp_path / "packed").iterdir() if path.is_dir()] == []


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def lines_of(texts):
    return "\n\n".join(json.dumps({"text": text}) for text in texts).encode()


def write_parquet(path, texts, **options):
    table = pa.table({"id": range(len(texts)), "text": texts})
    parquet.write_table(table, path, **{"row_group_size": 7, **options})


@pytest.fixture
def folder(tmp_path):
    """Texts in every format, with documents of several in the order of their names."""
    folder = tmp_path / "data"
    folder.mkdir()
    parts = [list(TEXTS[start : start + 12]) for start in range(0, 60, 12)]
    (folder / "a.jsonl").write_bytes(lines_of(parts[0]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines_of(parts[1])))
    # Two frames, as parallel compressors write them.
    half = len(lines_of(parts[2])) // 2
    data = lines_of(parts[2])
    (folder / "c.jsonl.zst").write_bytes(zstd(data[:half]) + zstd(data[half:]))
    write_parquet(folder / "d.parquet", parts[3], compression="zstd", use_dictionary=["text"])
    write_parquet(folder / "e.parquet", parts[4])
    (folder / "f.txt.zst").write_bytes(zstd("one\r\ntwo é".encode()))
    (folder / "g.md").write_text("the last")
    return folder, [*TEXTS, "one\r\ntwo é", "the last"]


def test_every_format_is_read_from_any_document_on(folder, tmp_path):
    place, texts = folder
    corpus = open_corpus(str(place), cache_dir=tmp_path)
    for split in corpus.splits:
        whole = list(corpus.documents(split))
        if split == "all":
            assert whole == texts
        for start in range(len(whole) + 3):
            assert list(corpus.documents(split, start)) == whole[start:]
    declared = Stored(texts=tuple(texts))
    for held in (WithHeldOut.of(declared), WithHeldOut.of(Stored(texts=tuple(TEXTS[:8])))):
        upper = MappedCorpus(
            name="upper", splits=held.splits, source=held, function=str.upper, label="upper 1"
        )
        for split in held.splits:
            whole = list(upper.documents(split))
            for start in range(len(whole) + 2):
                assert list(upper.documents(split, start)) == whole[start:]


def test_documents_before_the_start_are_not_parsed(folder, tmp_path, monkeypatch):
    place, texts = folder
    parsed = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda line: parsed.append(line) or loads(line))
    corpus = open_corpus(str(place), cache_dir=tmp_path)
    assert not corpus.records  # this parses the first line
    parsed.clear()
    assert next(islice(corpus.documents("all", 30), 1)) == texts[30]
    assert len(parsed) == 1
    groups = []
    iter_batches = parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        parquet.ParquetFile,
        "iter_batches",
        lambda self, rows, group, *args, **options: (
            groups.append(group) or iter_batches(self, rows, group, *args, **options)
        ),
    )
    assert list(islice(corpus.documents("all", 44), 5)) == texts[44:49]
    assert groups == [[1], [0]]  # of d, whose first group has rows 36 to 42, and of e


@pytest.mark.parametrize("column", ["text", "body"])
def test_a_column_is_named_like_a_key(tmp_path, column):
    parquet.write_table(pa.table({column: ["one", "two"]}), tmp_path / "a.parquet")
    spec = f"{tmp_path}/a.parquet" + (":body" if column == "body" else "")
    assert list(open_corpus(spec, cache_dir=tmp_path).documents("all")) == ["one", "two"]


def damaged(data):
    """A frame whose content has another checksum than it states, as ``zstd`` writes them."""
    frame = bytearray(zstd(data))
    frame[4] |= 4  # of the header: a checksum follows the content
    return bytes(frame) + b"sums"


def parquet_of(**columns):
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


NOISE = json.dumps({"text": hashlib.shake_256(b"").hexdigest(3000)}).encode()


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl.zst", damaged(NOISE), "cannot read {}: ZSTD decompress failed: "),
        ("a.jsonl.zst", zstd(NOISE)[:-9], "cannot read {}: Truncated compressed stream"),
        ("a.txt.zst", b"plain text", "cannot read {}: ZSTD decompress failed: Unknown frame"),
        ("a.jsonl.zst", b"", "{} is empty"),
        ("a.jsonl.zst", zstd(b"{"), "{}, line 1: not a line of JSON"),
        (
            "a.parquet",
            parquet_of(body=["x"], id=[1]),
            "{}: no column 'text', the columns are 'body', 'id'; name the text's as {}:KEY",
        ),
        ("a.parquet", parquet_of(text=[1, 2]), "{}: column 'text' is int64, not text"),
        ("a.parquet", parquet_of(text=[["x"]]), "{}: column 'text' is list<element: string>, not"),
        ("a.parquet", parquet_of(text=["x", None]), "{}, row 2: 'text' is null, not text"),
        ("a.parquet", parquet_of(text=pa.array([], pa.string())), "{} is empty"),
        ("a.parquet", parquet_of(text=[NOISE.decode()])[:-30], "cannot read {}: "),
        ("a.parquet", b"text", "cannot read {}: "),
        ("a.parquet", b"", "cannot read {}: "),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name, data, says):
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(UserError) as caught:
        list(open_corpus(str(file), cache_dir=tmp_path).documents("all"))
    assert str(caught.value).startswith(says.replace("{}", str(file)))
    assert "\n" not in str(caught.value)


def test_a_missing_file_of_a_corpus_is_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["x"])
    corpus = open_corpus(str(tmp_path / "a.parquet"), cache_dir=tmp_path)
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(UserError, match=r"cannot read .*a\.parquet: No such file"):
        list(corpus.documents("all"))


def test_split_names_may_be_followed_by_a_compression(tmp_path):
    place = tmp_path / "data"
    place.mkdir()
    write_parquet(place / "train-00000-of-00001.parquet", ["a"])
    (place / "wiki.valid.jsonl.zst").write_bytes(zstd(lines_of(["b"])))
    corpus = open_corpus(str(place), cache_dir=tmp_path)
    assert {s: list(corpus.documents(s)) for s in corpus.splits} == {
        "train": ["a"],
        "validation": ["b"],
    }


def test_a_log_counts_what_its_files_hold(tmp_path):
    """Positions are sums over the tasks; an empty document is a document."""
    tasks = token_files._tasks(iter(TEXTS), Bytes(), 0)
    with token_log.TokenLog(tmp_path, np.dtype(np.uint16)) as log:
        for encoded in token_workers.encode_in_order(tasks, Bytes(), 1):
            log.append(encoded)
        tokens, ends = written_at_once(TEXTS, Bytes())
        whole = "".join(TEXTS)
        assert log.position[:-1] == (60, 0, ends[-1], len(whole), len(whole.encode()))
    assert (tmp_path / "tokens.bin").read_bytes() == tokens
    assert np.fromfile(tmp_path / "ends.bin", np.int64).tolist() == ends.tolist()
