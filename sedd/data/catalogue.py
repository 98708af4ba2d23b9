"""Corpora that are downloaded once: benchmarks, the TFDS catalogue and the Hugging Face hub.

Published benchmarks that TFDS lacks are built by ``sedd.data.builders``. TFDS and ``datasets`` are
imported only when such a corpus is opened.
"""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sedd.data.base import Corpus, digest, exclusive
from sedd.data.network import why_hub_unreachable
from sedd.errors import UserError

# For each split of a benchmark, the TFDS expression that reads it.
WHOLE = {"train": "train", "validation": "validation", "test": "test"}
OPENWEBTEXT = {"train": "train[:-100000]", "validation": "train[-100000:]"}
# name: (class in ``builders``, its splits)
BENCHMARKS = {
    "text8": ("Text8", WHOLE),
    "wikitext2": ("Wikitext2", WHOLE),
    "wikitext103": ("Wikitext103", WHOLE),
    "ptb": ("PennTreebank", WHOLE),
    "lambada": ("Lambada", WHOLE),
    "openwebtext": ("OpenWebText", OPENWEBTEXT),
}

# Other benchmarks of published zero-shot evaluations, with the corpus that holds their text.
ELSEWHERE = {
    "ag_news": "hf:fancyzhx/ag_news:text",
    "pubmed": "tfds:scientific_papers/pubmed:article",
    "arxiv": "tfds:scientific_papers/arxiv:article",
}


@dataclass(frozen=True, kw_only=True)
class BenchmarkCorpus(Corpus):
    """A data set of ``builders``, downloaded and converted when it is first read.

    Before an address is downloaded, a file with the last part of its name is looked for in the
    folder ``cache_dir/downloads``: ``downloads/text8.zip`` for
    ``http://mattmahoney.net/dc/text8.zip``. If the file exists, it is read and nothing is
    downloaded.
    """

    builder: str  # name of the class in ``builders``
    reads: tuple[tuple[str, str], ...]  # (split, TFDS expression that reads it)
    cache_dir: Path

    @classmethod
    def of(cls, name: str, cache_dir: Path) -> "BenchmarkCorpus":
        """The benchmark called ``name``, a key of ``BENCHMARKS``."""
        builder, reads = BENCHMARKS[name]
        return cls(
            name=name,
            splits=tuple(reads),
            builder=builder,
            reads=tuple(reads.items()),
            cache_dir=cache_dir,
        )

    def _class(self) -> Any:
        """The builder class; imported here, because its module imports TFDS."""
        return getattr(importlib.import_module("sedd.data.builders"), self.builder)

    def _documents(self, split: str) -> Iterator[str]:
        return self._documents_from(split, 0)

    def _documents_from(self, split: str, start: int) -> Iterator[str]:
        downloads = self.cache_dir / "downloads"
        with _quiet():
            builder = self._class()(data_dir=self.cache_dir / "tfds", file_format="array_record")
        builder.downloads = downloads
        _prepare(builder, downloads)
        return _texts(builder, dict(self.reads)[split], "text", start)

    def fingerprint(self) -> str:
        """A hash of the name, the version of the builder, its address and the splits."""
        made = self._class()
        return digest(["tfds", self.name, str(made.VERSION), made.url, self.reads])


@dataclass(frozen=True, kw_only=True)
class CatalogueCorpus(Corpus):
    """A data set of the TFDS catalogue.

    It is downloaded and converted when it is opened, because its splits are not known before.
    """

    builder: Any  # of TFDS, prepared
    key: str  # name of the feature that is the text

    @classmethod
    def of(cls, name: str, spec: str, cache_dir: Path) -> "CatalogueCorpus":
        """Open a data set of the catalogue.

        Args:
            name: the name that the user wrote, for messages.
            spec: ``NAME[/config][:text_key]``.
            cache_dir: directory for downloads and converted data.

        Raises:
            UserError: if a package is missing, or the data set is unknown, cannot be downloaded or
                has no text called ``text_key``.
        """
        import tensorflow_datasets as tfds

        dataset, _, key = spec.partition(":")
        try:
            with _quiet():
                builder: Any = tfds.builder(
                    dataset, data_dir=cache_dir / "tfds", file_format="array_record"
                )
            _prepare(builder, cache_dir / "downloads")
        except UserError:
            raise
        except ImportError as error:
            missing = error.name or str(error)
            package = "-e '.[tf]'" if missing.startswith("tensorflow") else missing
            raise UserError(
                f"corpus {name!r} needs {missing}, which is not installed: pip install {package}"
            ) from error
        # TFDS has an error class of its own for each of unknown names, unknown configurations and
        # failures in a data set's code.
        except Exception as error:
            raise UserError(f"corpus {name!r}: {_one_line(error)}") from error
        features = builder.info.features
        texts = [k for k, feature in features.items() if isinstance(feature, tfds.features.Text)]
        return cls(
            name=name,
            splits=tuple(builder.info.splits),
            builder=builder,
            key=_text_key(name, key, texts),
        )

    def _documents(self, split: str) -> Iterator[str]:
        return self._documents_from(split, 0)

    def _documents_from(self, split: str, start: int) -> Iterator[str]:
        return _texts(self.builder, split, self.key, start)

    def fingerprint(self) -> str:
        """A hash of the full name, which includes configuration and version, and of the feature."""
        return digest(["tfds", self.builder.info.full_name, self.key])


@dataclass(frozen=True, kw_only=True)
class BillionWords(CatalogueCorpus):
    """The One Billion Word Benchmark, whose held-out set is both the validation and the test split.

    Published models train on the whole training set and report figures on the held-out set.
    """

    splits: tuple[str, ...] = ("train", "validation", "test")

    @classmethod
    def of(cls, name: str, spec: str, cache_dir: Path) -> "BillionWords":
        """Open ``lm1b:text``; UserError without TensorFlow, which TFDS needs to build it."""
        if importlib.util.find_spec("tensorflow") is None:
            raise UserError(f"corpus {name!r} needs TensorFlow to be built: pip install -e '.[tf]'")
        entry = CatalogueCorpus.of(name, spec, cache_dir)
        return cls(name=name, builder=entry.builder, key=entry.key)

    def _documents_from(self, split: str, start: int) -> Iterator[str]:
        return super()._documents_from("train" if split == "train" else "test", start)


@dataclass(frozen=True, kw_only=True)
class HubCorpus(Corpus):
    """A data set of the Hugging Face hub, read with ``datasets`` (the extra ``hub``)."""

    builder: Any  # of ``datasets``, prepared
    key: str  # name of the column that is the text

    @classmethod
    def of(cls, name: str, spec: str, cache_dir: Path) -> "HubCorpus":
        """Open a data set of the hub; without a network, a copy in the hub's cache.

        Args:
            name: the name that the user wrote, for messages.
            spec: ``OWNER/NAME[/config][:text_key]``.
            cache_dir: parent of the directory ``hub`` for downloads.

        Raises:
            UserError: if the package ``datasets`` is missing, or the data set cannot be read.
        """
        path, _, key = spec.partition(":")
        owner, _, rest = path.partition("/")
        dataset, _, config = rest.partition("/")
        if not owner or not dataset:
            hint = "; hf://OWNER/NAME is a checkpoint" if spec.startswith("//") else ""
            raise UserError(f"corpus {name!r}: expected hf:OWNER/NAME[/config][:text_key]{hint}")
        unreachable = why_hub_unreachable()  # sets a variable that ``datasets`` reads on import
        try:
            datasets: Any = importlib.import_module("datasets")
        except ImportError as error:
            raise UserError(f"corpus {name!r} needs datasets: pip install -e '.[hub]'") from error
        try:
            builder = datasets.load_dataset_builder(
                f"{owner}/{dataset}", config or None, cache_dir=str(cache_dir / "hub")
            )
            builder.download_and_prepare()
        # Errors of the hub, of the network and of damaged files have no common class.
        except Exception as error:
            if unreachable:
                raise UserError(
                    f"corpus {name!r}: the hub cannot be reached ({unreachable}), and the data set "
                    f"is not in its cache {cache_dir / 'hub'}; copy that folder from a machine "
                    "with a network, or give the path of JSON lines"
                ) from error
            raise UserError(f"corpus {name!r}: {_one_line(error)}") from error
        features = builder.info.features
        texts = [k for k, f in features.items() if getattr(f, "dtype", "") in STRINGS]
        return cls(
            name=name,
            splits=tuple(builder.info.splits),
            builder=builder,
            key=_text_key(name, key, texts),
        )

    def _documents(self, split: str) -> Iterator[str]:
        for row in self.builder.as_dataset(split=split):
            yield row[self.key]

    def fingerprint(self) -> str:
        """A hash of the name, the cached revision, the sizes of the splits and the column."""
        sizes = {split: info.num_examples for split, info in self.builder.info.splits.items()}
        return digest(["hub", self.name, str(self.builder.cache_dir), sizes, self.key])


STRINGS = ("string", "large_string")  # the types of text columns
RETRIES = 4  # of a download; they take 3 s


def _text_key(name: str, key: str, texts: list[str]) -> str:
    """Choose the text among the features ``texts``: ``key``, else "text", else the only one."""
    if key and key not in texts:
        raise UserError(f"corpus {name!r} has no text called {key!r}: it has {', '.join(texts)}")
    if key:
        return key
    if "text" in texts:
        return "text"
    if len(texts) == 1:
        return texts[0]
    if not texts:
        raise UserError(f"corpus {name!r} holds no text")
    raise UserError(
        f"corpus {name!r} has several texts, {', '.join(texts)}: name one as {name}:{texts[0]}"
    )


def _prepare(builder: Any, downloads: Path) -> None:
    """Download and convert a data set unless this was done before, one process at a time.

    TFDS would try each download ten times with growing pauses, 205 s in all. It has no option for
    the number of tries, so that its constant is changed.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import downloader

    downloader.MAX_RETRIES = RETRIES
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    with exclusive(downloads / builder.name), _quiet():
        builder.download_and_prepare(download_dir=downloads / "tfds", download_config=config)


def _texts(builder: Any, read: str, key: str, start: int) -> Iterator[str]:
    """The texts of a prepared data set after the first ``start``, in its own order."""
    source = builder.as_data_source(split=read)
    for number in range(start, len(source)):
        yield source[number][key].decode()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Send the output of TFDS to standard error, because standard output is for results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _one_line(error: Exception) -> str:
    """The class and the message of an error in one line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
