"""Tokenise generated text with several processes, undisturbed and killed again and again.

The text is JSON lines of made-up words, in documents of about 2,000 characters. It is
tokenised once undisturbed. Then it is tokenised into another cache, and the process is killed with
SIGKILL whenever another share of the text has been handed to the tokenizer, until it has been
killed often enough and ends. The bytes of both caches are compared.

The columns are the time, the text per second, the largest memory of all processes together (their
proportional set sizes), and the work: the text that was handed to the tokenizer, in all tries
together, divided by the length of the text. The time includes the start of every try.

    python benchmarks/tokenizing.py --megabytes 200 --workers 2 --kills 10
"""

import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import psutil

from sedd.data.base import Corpus
from sedd.data.corpora import open_corpus
from sedd.data.packing import pack
from sedd.data.row_ranges import Cut
from sedd.data.tokenizer_sources import build_tokenizer

LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
SAMPLE_SECONDS = 0.02  # between measurements of memory


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the benchmark."""

    megabytes: float = 200.0  # of text
    workers: int = 2
    kills: int = 10
    tokenizer: str = "gpt2"  # or another that needs no training: bytes, or a JSON file
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Counted(Corpus):
    """A corpus that adds the characters that are read of it to a number in a file.

    The number is the last one when the process is killed.
    """

    source: Corpus
    number: np.ndarray = field(repr=False)  # [1], mapped from the file

    def _documents(self, split: str) -> Iterator[str]:
        return self._documents_from(split, 0)

    def _documents_from(self, split: str, start: int) -> Iterator[str]:
        for text in self.source.documents(split, start):
            self.number[0] += len(text)
            yield text

    def fingerprint(self) -> str:
        """The fingerprint of the source."""
        return self.source.fingerprint()


def counter(path: Path) -> np.ndarray:
    """An integer in a file, shared by the processes that map it."""
    if not path.exists():
        path.write_bytes(bytes(8))
    with path.open("r+b") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 8), np.int64)


def write_text(path: Path, megabytes: float, seed: int) -> int:
    """Write documents of made-up words; returns the number of characters of their text."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(2, len(LETTERS) + 2)
    letters = rng.choice(list(LETTERS), (30_000, 12), p=shares / shares.sum())
    lengths = rng.integers(2, 12, len(letters))
    words = np.array(["".join(row[:n]) for row, n in zip(letters, lengths, strict=True)])
    shares = 1 / np.arange(10, len(words) + 10)
    written = 0
    with path.open("w") as file:
        while written < megabytes * 1e6:
            drawn = rng.choice(words, 30_000, p=shares / shares.sum())
            for part in np.split(drawn, np.sort(rng.integers(0, len(drawn), 100))):
                text = " ".join(part)
                written += len(text)
                file.write(json.dumps({"text": text}) + "\n")
    return written


def tokenise(text: Path, cache: Path, number: Path, tokenizer: str, workers: int) -> None:
    """Tokenise the text as ``pack`` does, in this process and those that it starts."""
    source = open_corpus(str(text), cache_dir=cache)
    made = build_tokenizer(tokenizer, None, cache_dir=cache)
    corpus = Counted(name="text", splits=source.splits, source=source, number=counter(number))
    cut = Cut(length=1024, wrap=True)
    pack(corpus, made, "all", cut, cache_dir=cache, workers=workers)


def memory(process: psutil.Process) -> int:
    """Bytes of memory of a process and of those that it started; shared pages count once."""
    total = 0
    try:
        for each in (process, *process.children(recursive=True)):
            total += each.memory_full_info().pss
    except psutil.Error:  # one of them has just ended
        pass
    return total


def attempt(arguments: list[str], read: np.ndarray, stop: int | None) -> tuple[float, int, bool]:
    """Run ``tokenise`` in a new process.

    Args:
        arguments: of ``tokenise``.
        read: characters that the tries have read so far, changed by the process.
        stop: kill the process when as many have been read.

    Returns:
        Seconds, the largest memory in bytes, and whether the process was killed.
    """
    begin, most = time.perf_counter(), 0
    command = [sys.executable, __file__, "--tokenise", *arguments]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}) as p:
        watched = psutil.Process(p.pid)
        while p.poll() is None:
            most = max(most, memory(watched))
            if stop is not None and read[0] >= stop:
                p.kill()
                break
            time.sleep(SAMPLE_SECONDS)
    if p.returncode not in (0, -9):
        raise SystemExit(f"tokenising ended with code {p.returncode}")
    return time.perf_counter() - begin, most, p.returncode != 0


def measure(settings: Settings, folder: Path) -> list[dict]:
    """Tokenise undisturbed and with kills; a row for each, after comparing their files."""
    text = folder / "text.jsonl"
    characters = write_text(text, settings.megabytes, settings.seed)
    rng = np.random.default_rng(settings.seed)
    rows, files = [], []
    for kills in (0, settings.kills):
        cache, number = folder / f"cache{kills}", folder / f"read{kills}"
        read = counter(number)
        arguments = [str(text), str(cache), str(number), settings.tokenizer, str(settings.workers)]
        seconds, most, killed = 0.0, 0, 0
        # The k-th kill is at a random place of the k-th of ``kills`` equal parts of the text.
        for k in range(kills + 1):
            stop = int(characters * (k + rng.uniform(0.1, 0.9)) / kills) if k < kills else None
            took, peak, was_killed = attempt(arguments, read, stop)
            seconds, most, killed = seconds + took, max(most, peak), killed + was_killed
        [made] = cache.glob("packed/*/meta.json")
        files.append({p.name: p.read_bytes() for p in made.parent.iterdir()})
        rows.append(
            {
                "kills": killed,
                "s": seconds,
                "MB/s": characters / 1e6 / seconds,
                "memory, MB": most / 1e6,
                "work": int(read[0]) / characters,
            }
        )
    if files[0] != files[-1]:
        raise SystemExit("the killed run ended in other bytes than the undisturbed one")
    return rows


def main(settings: Settings) -> None:
    """Print a row for the undisturbed run and one for the killed one."""
    from report import report

    with tempfile.TemporaryDirectory() as folder:
        rows = measure(settings, Path(folder))
    report("Tokenising", rows, **asdict(settings))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--tokenise"]:  # the process that is killed; it does not load JAX
        text, cache, number, tokenizer, workers = sys.argv[2:]
        tokenise(Path(text), Path(cache), Path(number), tokenizer, int(workers))
    else:
        from report import start

        start(main, Settings, __doc__)
