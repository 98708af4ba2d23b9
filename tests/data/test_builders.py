"""The TFDS builders on archives made here, in the layout of the published ones.

The published files themselves are not fetched by any test.
"""

import contextlib
import io
import os
import sys
import tarfile
import threading
import time
import types
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from sedd.data import builders, catalogue, network
from sedd.data.corpora import open_corpus
from sedd.data.network import why_unreachable
from sedd.errors import UserError

tfds = pytest.importorskip("tensorflow_datasets")


def add(archive, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def tar(members, mode):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in members.items():
            add(archive, name, data)
    return buffer.getvalue()


def put_zip(cache, name, members):
    folder = cache / "downloads"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)


def everything(corpus):
    return {split: list(corpus.documents(split)) for split in corpus.splits}


def test_text8_is_cut_at_its_three_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(builders.Text8, "sizes", (18, 1, 1))
    text = "abcdefghij klmnopq x"
    put_zip(tmp_path, "text8.zip", {"text8": text})
    corpus = open_corpus("text8", cache_dir=tmp_path)
    assert everything(corpus) == {"train": [text[:18]], "validation": [" "], "test": ["x"]}
    assert "tensorflow" not in sys.modules


def test_text8_of_another_size_is_refused(tmp_path):
    put_zip(tmp_path, "text8.zip", {"text8": "too short"})
    with pytest.raises(UserError, match="holds 9 characters, not 100,000,000"):
        open_corpus("text8", cache_dir=tmp_path).documents("train")


@pytest.mark.parametrize("size", ["2", "103"])
def test_wikitext_keeps_every_row_in_order(tmp_path, size):
    raw = " \n = Title = \n \n Some “text” . \n"
    folder = f"wikitext-{size}-raw"
    members = {f"{folder}/wiki.{split}.raw": split + raw for split in ("train", "valid", "test")}
    put_zip(tmp_path, f"{folder}-v1.zip", members)
    corpus = open_corpus(f"corpus:wikitext{size}", cache_dir=tmp_path)
    rows = [" = Title = \n", "", " Some “text” . \n"]
    assert everything(corpus) == {
        "train": ["train \n", *rows],
        "validation": ["valid \n", *rows],
        "test": ["test \n", *rows],
    }


def test_ptb_is_a_sentence_an_example(tmp_path):
    folder = tmp_path / "downloads"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        (folder / f"ptb.{split}.txt").write_text(f" {split} <unk> \n no N \n")
    corpus = open_corpus("ptb", cache_dir=tmp_path)
    assert list(corpus.documents("validation")) == ["valid <unk>", "no N"]


def test_lambada_trains_on_novels_and_evaluates_passages(tmp_path):
    novels = tar({"train-novels/a/one.txt": b"\nA novel.\n\n", "train-novels/b/2.txt": b"B"}, "w")
    data = {
        "lambada_development_plain_text.txt": b"p one\np two\n",
        "lambada_test_plain_text.txt": b"t one\n",
        "train-novels.tar": novels,
        "lambada-vocab-2.txt": b"not a passage",
    }
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "lambada-dataset.tar.gz").write_bytes(tar(data, "w:gz"))
    assert everything(open_corpus("lambada", cache_dir=tmp_path)) == {
        "train": ["A novel.", "B"],
        "validation": ["p one", "p two"],
        "test": ["t one"],
    }


def test_openwebtext_reads_archives_in_an_archive(tmp_path, monkeypatch):
    reads = {"train": "train[:-1]", "validation": "train[-1:]"}  # the last one, not 100,000
    monkeypatch.setitem(catalogue.BENCHMARKS, "openwebtext", ("OpenWebText", reads))
    shards = {
        "openwebtext/urlsf_subset00-1_data.xz": tar({"1.txt": b"a\n\n\n\nb\n"}, "w:xz"),
        "openwebtext/urlsf_subset00-2_data.xz": tar({"2.txt": b"c", "3.txt": b"d"}, "w:xz"),
    }
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "openwebtext.tar.xz").write_bytes(tar(shards, "w:xz"))
    corpus = open_corpus("openwebtext", cache_dir=tmp_path)
    assert everything(corpus) == {"train": ["a\n\nb", "c"], "validation": ["d"]}


@contextlib.contextmanager
def serving(folder):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def direct(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_a_download_is_made_once_and_its_copy_kept(tmp_path, monkeypatch, direct, capsys):
    served = tmp_path / "served"
    served.mkdir()
    for split in ("train", "valid", "test"):
        (served / f"ptb.{split}.txt").write_text(split)
    cache = tmp_path / "cache"
    with serving(served) as address:
        monkeypatch.setattr(builders.PennTreebank, "url", address + "/ptb.{}.txt")
        assert list(open_corpus("ptb", cache_dir=cache).documents("test")) == ["test"]
    assert list(open_corpus("ptb", cache_dir=cache).documents("train")) == ["train"]
    assert capsys.readouterr().out == ""


def test_a_failed_download_names_the_address_and_where_a_copy_may_go(tmp_path, monkeypatch, direct):
    with serving(tmp_path) as address:
        url = address + "/text8.zip"
        monkeypatch.setattr(builders.Text8, "url", url)
        with pytest.raises(UserError) as caught:
            open_corpus("text8", cache_dir=tmp_path / "cache").documents("train")
    message = str(caught.value)
    assert f"cannot download {url}" in message
    assert str(tmp_path / "cache" / "downloads" / "text8.zip") in message
    assert "\n" not in message


# A closed port, a name that does not exist, and a proxy that is not there.
@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("http://127.0.0.1:9/text8.zip", ""),
        ("http://no-such-host.invalid/text8.zip", ""),
        ("http://example.org/text8.zip", "http://127.0.0.1:9"),
    ],
)
def test_without_a_network_a_download_fails_at_once(tmp_path, monkeypatch, capsys, url, proxy):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, proxy)
    monkeypatch.setattr(builders.Text8, "url", url)
    began = time.monotonic()
    with pytest.raises(UserError, match=f"cannot download {url} .*, put it at ") as caught:
        open_corpus("text8", cache_dir=tmp_path / "cache").documents("train")
    assert time.monotonic() - began < 20  # with TFDS's own retries 205 s
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_a_server_that_refuses_is_a_server(direct, tmp_path):
    with serving(tmp_path) as address:
        assert why_unreachable(address + "/no-such-file") is None
    assert "refused" in str(why_unreachable(address))


def test_a_hub_that_cannot_be_reached_says_what_to_do(tmp_path, monkeypatch):
    def load_dataset_builder(path, config, cache_dir):
        assert os.environ["HF_HUB_OFFLINE"] == "1"  # so that the library gives up at once
        raise ConnectionError("offline")

    fake = types.SimpleNamespace(load_dataset_builder=load_dataset_builder)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    network.why_hub_unreachable.cache_clear()
    try:
        with pytest.raises(UserError, match=r"the hub cannot be reached .*; copy that folder"):
            open_corpus("hf:owner/name", cache_dir=tmp_path)
    finally:
        network.why_hub_unreachable.cache_clear()


@pytest.mark.parametrize("spec", ["hf://owner/name", "hf://owner"])
def test_a_checkpoints_address_is_no_corpus(tmp_path, spec):
    with pytest.raises(UserError, match=r"expected hf:OWNER/NAME.*; hf://OWNER/NAME is a checkpoi"):
        open_corpus(spec, cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["text8", "lambada"])
def test_a_broken_archive_is_named(tmp_path, name):
    file = {"text8": "text8.zip", "lambada": "lambada-dataset.tar.gz"}[name]
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / file).write_bytes(b"not an archive")
    with pytest.raises(UserError, match=rf"{file} cannot be read as a"):
        open_corpus(name, cache_dir=tmp_path).documents("test")


def test_the_address_is_in_the_fingerprint(tmp_path, monkeypatch):
    before = open_corpus("text8", cache_dir=tmp_path).fingerprint()
    monkeypatch.setattr(builders.Text8, "url", "http://elsewhere/text8.zip")
    assert open_corpus("text8", cache_dir=tmp_path).fingerprint() != before


class TinyCatalogueEntry(tfds.core.GeneratorBasedBuilder):
    """A registered builder: what ``tfds:NAME`` finds."""

    VERSION = tfds.core.Version("1.2.3")

    def _info(self):
        text = tfds.features.Text()
        features = {"title": text, "body": text, "n": tfds.features.Scalar(np.int64)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(3), "test": self._generate_examples(1)}

    def _generate_examples(self, count):
        for n in range(count):
            yield n, {"title": f"t{n}", "body": f"é{n}", "n": n}


def test_a_catalogue_entry_declares_its_splits_and_its_text(tmp_path):
    corpus = open_corpus("tfds:tiny_catalogue_entry:body", cache_dir=tmp_path)
    assert corpus.splits == ("train", "test", "validation")
    assert corpus.evaluation_split == "test"
    assert sorted(corpus.documents("train")) == ["é0", "é1", "é2"]
    assert list(corpus.documents("test")) == ["é0"]
    titles = open_corpus("tfds:tiny_catalogue_entry:title", cache_dir=tmp_path)
    assert titles.fingerprint() != corpus.fingerprint()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tfds:tiny_catalogue_entry", "has several texts"),
        ("tfds:tiny_catalogue_entry:n", "no text called 'n': it has "),
        ("tfds:no_such_entry", "no_such_entry"),
    ],
)
def test_a_catalogue_entry_that_cannot_be_read_is_refused(tmp_path, spec, message):
    with pytest.raises(UserError, match=message) as caught:
        open_corpus(spec, cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_lm1b_says_that_it_needs_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lm1b.*pip install -e '\.\[tf\]'"):
        open_corpus("lm1b", cache_dir=tmp_path)


def test_lm1b_validates_on_its_test_set(tmp_path, monkeypatch):
    """With a small entry in the place of the catalogue's, which needs TensorFlow and a download."""
    monkeypatch.setattr(catalogue.importlib.util, "find_spec", lambda name: "found")
    builder = tfds.builder("tiny_catalogue_entry", data_dir=tmp_path, file_format="array_record")
    monkeypatch.setattr(tfds, "builder", lambda name, **options: {"lm1b": builder}[name])
    corpus = catalogue.BillionWords.of("lm1b", "lm1b:body", tmp_path)
    assert [len(texts) for texts in everything(corpus).values()] == [3, 1, 1]


class FakeBuilder:
    """Stands in for ``datasets.load_dataset_builder``; ``datasets`` itself is not exercised."""

    def __init__(self, rows, cache_dir):
        self.rows = rows
        self.cache_dir = cache_dir
        string, integer = (
            types.SimpleNamespace(dtype="string"),
            types.SimpleNamespace(dtype="int64"),
        )
        self.info = types.SimpleNamespace(
            features={"text": string, "id": integer},
            splits={s: types.SimpleNamespace(num_examples=len(r)) for s, r in rows.items()},
        )

    def download_and_prepare(self):
        pass

    def as_dataset(self, split):
        return [{"text": text, "id": n} for n, text in enumerate(self.rows[split])]


def test_the_hub_is_asked_for_owner_name_and_configuration(tmp_path, monkeypatch):
    asked = []

    def load_dataset_builder(path, config, cache_dir):
        asked.append((path, config))
        return FakeBuilder({"train": ["a", "b"], "validation": ["c"]}, cache_dir)

    fake = types.SimpleNamespace(load_dataset_builder=load_dataset_builder)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(catalogue, "why_hub_unreachable", lambda: None)
    corpus = open_corpus("hf:owner/name/small:text", cache_dir=tmp_path)
    assert asked == [("owner/name", "small")]
    assert everything(corpus) == {"train": ["a", "b"], "validation": ["c"]}
    with pytest.raises(UserError, match="no text called 'id'"):
        open_corpus("hf:owner/name:id", cache_dir=tmp_path)
    with pytest.raises(UserError, match="expected hf:OWNER/NAME"):
        open_corpus("hf:name", cache_dir=tmp_path)


def test_the_hub_without_its_extra_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[hub\]'"):
        open_corpus("hf:owner/name", cache_dir=tmp_path)
