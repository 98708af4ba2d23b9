"""Bound the perplexity of a trained model on a corpus or a file, with its standard errors."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

import sedd
from sedd.build import HeldOut, pack_split
from sedd.cli import parse, run
from sedd.data.corpora import parse_mixture
from sedd.evaluation.bound import BoundResult, check_draws, evaluate_bound
from sedd.files import check_writable, write_whole
from sedd.model import text_counter


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """The flags of ``evaluate.py``."""

    checkpoint: str
    """A run's directory, a published checkpoint's, or hf://OWNER/NAME."""
    step: int | Literal["best"] | None = None
    """Which checkpoint: of a step, or the best by validation; the newest by default."""
    data: str
    """corpus:NAME, tfds:NAME, hf:NAME, or a file or folder of text."""
    split: str | None = None
    """All of a file, the validation split of a corpus or of what the run was trained on."""
    draws: int = 64
    """Noise levels a sequence; a multiple of 4."""
    max_sequences: int | None = None
    """Evenly spread over the split; all of them by default."""
    batch_size: int = 32
    seed: int = 0
    """Of the noise: the same seed, the same figures."""
    json: Path | None = None
    """Write every figure here."""
    cache_dir: Path | None = None
    """Where packed tokens are kept; the run's own place by default."""

    def __post_init__(self):
        check_draws(self.draws)
        for name in ("batch_size", "max_sequences"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {self.seed}")


def main(arguments: Sequence[str]) -> None:
    """Evaluate, print the table, write the JSON."""
    command = parse(EvaluateCommand, arguments, description=__doc__ or "")
    if command.json is not None:
        check_writable(command.json, f"--json {command.json}")
    model = sedd.load(command.checkpoint, step=command.step)
    if model.tokenizer is None:
        raise sedd.UserError(
            f"checkpoint {command.checkpoint}: it has no tokenizer to read {command.data} with; "
            "put its tokenizer.json beside its config.json"
        )
    packed, split = pack_split(
        command.data,
        command.split or trained_on(command.data, model),
        model.tokenizer,
        model.config.data,
        cache_dir=(command.cache_dir or Path(model.config.data.cache_dir)).expanduser(),
    )
    batches = HeldOut(
        parts=[packed], max_sequences=command.max_sequences, batch_size=command.batch_size
    )
    console = Console(stderr=True)
    result = evaluate_bound(
        model.denoiser,
        model.schedule,
        jax.random.key(command.seed),
        track(
            batches,
            "evaluating",
            console=console,
            transient=True,
            disable=not console.is_terminal,  # it would leave an empty line
        ),
        draws=command.draws,
        count_text=text_counter(model.tokenizer),
    )
    show(result, batches.unigram_entropy(), f"{command.data} · {split}")
    if command.json is not None:
        about = {
            "checkpoint": command.checkpoint,
            "data": command.data,
            "split": split,
            "length": model.length,
            "wrap": model.config.data.wrap,
            "tokenizer": model.tokenizer.name,
            "seed": command.seed,
        }
        write_whole(command.json, json.dumps(about | result.to_json(), indent=2).encode())


def trained_on(data: str, model: sedd.Model) -> str | None:
    """The validation split, where the data is what the run was trained on."""
    parts = [spec for spec, _ in parse_mixture(model.config.data.corpus)]
    return "validation" if data.removeprefix("corpus:") in parts else None


def show(result: BoundResult, unigram_entropy: float, what: str) -> None:
    """Print the figures as a table."""
    title = (
        "Negative log likelihood" if result.exact else "Upper bound on the negative log likelihood"
    )
    title, at_most = f"{title}: {escape(what)}", "" if result.exact else " ≤"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("± standard error", justify="right")
    table.add_row(
        "nats per token", f"{result.nats_per_token:.4f}", f"{result.standard_error:.4f} (sequences)"
    )
    table.add_row("", "", f"{result.standard_error_draws:.4f} (draws)")
    table.add_row(
        f"perplexity{at_most}",
        f"{result.perplexity:.3f}",
        f"{result.perplexity * result.standard_error:.3f}",
    )
    for name, value in (
        (f"bits per character{at_most}", result.bits_per_character),
        (f"bits per byte{at_most}", result.bits_per_byte),
    ):
        if value is not None:
            error = value * result.standard_error / result.nats_per_token
            table.add_row(name, f"{value:.4f}", f"{error:.4f}")
    if not result.exact:
        table.add_section()
        for name in ("prior", "diffusion", "reconstruction"):
            table.add_row(f"  {name}", f"{getattr(result, name):.4f}", "")
    table.add_section()
    table.add_row("unigram entropy of the data", f"{unigram_entropy:.4f}", "")
    table.add_row("sequences · tokens", f"{result.num_sequences:,} · {result.num_tokens:,}", "")
    table.add_row("draws · estimator", f"{result.draws} · {result.estimator}", "")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    run(main)
