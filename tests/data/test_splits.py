"""Splits that names declare, and files that are not the plain text they seem to be."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path

import pytest

from sedd.data.corpora import open_corpus, parse_mixture
from sedd.data.splits import split_of
from sedd.errors import UserError


def write(folder, *names):
    """Files that hold their own name, as text or as a line of JSON."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) if path.suffix == ".jsonl" else name)
    return folder


def tar_of(*names):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


def documents(spec, tmp_path):
    corpus = open_corpus(str(spec), cache_dir=tmp_path)
    return {split: list(corpus.documents(split)) for split in corpus.splits}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.jsonl", "train"),
        ("validation-00000-of-00001.parquet", "validation"),
        ("data/test/0.txt", "test"),
        ("wiki.valid.txt", "validation"),
        ("wikitext_train.jsonl.gz", "train"),
        ("Dev_Set.txt", "validation"),
        ("training/test/1.txt", "train"),  # the outermost folder decides
        ("eval.txt", "validation"),
        ("contest.txt", None),
        ("my-test-notes.txt", None),
        ("trainer.py", None),
        ("00001.txt", None),
    ],
)
def test_a_name_declares_a_split(name, split):
    assert split_of(Path(name)) == split


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00002.jsonl", "validation-00000-of-00001.jsonl", "test-00000.jsonl"),
        ("train.txt", "eval.txt", "testing.txt"),
        ("en/train/a.txt", "en/dev/a.txt", "en/test/a.txt"),
        ("wiki.train.txt", "wiki.valid.txt", "wiki.test.txt"),
    ],
)
@pytest.mark.parametrize("pattern", ["", "/**/*.*"])
def test_splits_are_kept_apart_at_every_level_and_printed(tmp_path, capsys, names, pattern):
    folder = write(tmp_path / "data", *names)
    found = documents(f"{folder}{pattern}", tmp_path)
    assert list(found) == ["train", "validation", "test"]
    assert [texts == [name] for texts, name in zip(found.values(), names, strict=True)] == [
        True
    ] * 3
    assert "by split, from their names: train 1, validation 1, test 1" in capsys.readouterr().err


def test_names_that_look_like_splits_and_are_none_are_noted(tmp_path, capsys):
    folder = write(tmp_path / "data", "a.txt", "b.txt", "test.txt")
    assert sorted(open_corpus(str(folder), cache_dir=tmp_path).documents("all")) == [
        *("a.txt", "b.txt", "test.txt"),
    ]
    assert "test.txt look like splits by name" in capsys.readouterr().err


def test_source_code_has_no_splits(tmp_path, capsys):
    names = ("train.py", "tests/a.py", "test_b.py", "lib/c.py", "lib/d.py", "lib/e.py", "lib/f.py")
    folder = write(tmp_path / "code", *names)
    assert len(list(open_corpus(str(folder), cache_dir=tmp_path).documents("all"))) == len(names)
    assert "train.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ([{"content": "one"}, {"content": "two"}], ["one", "two"]),
        ({"content": "one", "id": 3}, ["one"]),
    ],
)
def test_a_key_of_a_json_file_is_honoured(tmp_path, content, texts):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(content))
    assert list(open_corpus(f"{file}:content", cache_dir=tmp_path).documents("all")) == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json:body", '{"content": "x"}', "no key 'body', the keys are 'content'"),
        ("a.json:content", "[1]", "item 1: expected an object, got int"),
        ("a.json:content", "{", "not JSON"),
        ("a.json:content", "[" * 100_000, "a.json: not JSON"),
        ("a.jsonl", "[" * 100_000, "line 1: not a line of JSON"),
        ("a.ndjson:body", '{"body":' * 50_000, "line 1: not a line of JSON"),
        ("a.txt:content", "x", "it has no key 'content'; PATH:KEY is for .json"),
    ],
)
def test_a_key_that_cannot_be_honoured_is_refused(tmp_path, name, content, message):
    (tmp_path / name.split(":")[0]).write_text(content)
    with pytest.raises(UserError, match=message):
        list(open_corpus(f"{tmp_path}/{name}", cache_dir=tmp_path).documents("all"))


def test_linked_folders_are_read_once(tmp_path):
    write(tmp_path / "elsewhere", "far.txt")
    folder = write(tmp_path / "data", "near.txt")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    assert list(open_corpus(str(folder), cache_dir=tmp_path).documents("all")) == [
        *("far.txt", "near.txt"),
    ]


@pytest.mark.parametrize("name", ["c++.txt", "a*2.txt", "x+y*0.5", "c++/*.txt", "a+b.jsonl:body"])
def test_a_path_is_no_mixture(tmp_path, name):
    write(tmp_path, name.replace("*.", "1.").split(":")[0])
    path = f"{tmp_path}/{name}"
    assert parse_mixture(path) == [(path, 1.0)]
    assert parse_mixture(f"{path}*0.7+sotu*0.3") == [(path, 0.7), ("sotu", 0.3)]
    assert parse_mixture(f"sotu+{path}") == [("sotu", 1.0), (path, 1.0)]


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("x.jsonl", b"\x28\xb5\x2f\xfd\x04\x00", "compressed with zstd, not text; .*zstd -d"),
        ("x.bin", b"PAR1\x15\x04\x15", "a Parquet file, not text; give it the suffix .parquet"),
        (
            "x.jsonl",
            gzip.compress(b'{"text": "x"}', mtime=0),
            "compressed with gzip, not text; .*suffix",
        ),
        ("x.txt.bz2", bz2.compress(b"text"), "compressed with bzip2"),
        ("x.txt", lzma.compress(b"text"), "compressed with xz"),
        ("x.pdf", b"%PDF-1.7", "a PDF document"),
        ("x.txt", b"7z\xbc\xaf\x27\x1c\0\x04", "a 7-Zip archive"),
        ("x.txt.lz4", b"\x04\x22M\x18D@", "compressed with lz4"),
        ("x.npy", b"\x93NUMPY\x01\0", "a NumPy array"),
        ("x.tar", tar_of("x.txt"), "a tar archive"),
        ("x.tar.gz", gzip.compress(tar_of("a", "b"), mtime=0), "a tar archive"),
    ],
    ids=["zst", "parquet", "gzip", "bz2", "xz", "pdf", "7z", "lz4", "npy", "tar", "tar.gz"],
)
def test_what_is_no_plain_text_is_named(tmp_path, name, content, kind):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=kind):
        list(open_corpus(str(tmp_path / name), cache_dir=tmp_path).documents("all"))
