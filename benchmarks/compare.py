"""Autoregression, RADD and SEDD compared: the same network, data, batches and steps.

Each model is trained with the seeds 0 to ``seeds`` - 1 by ``train.py`` with
``configs/sotu_radd_small.py``, and evaluated by ``evaluate.py`` on the same validation sequences.
An interrupted comparison resumes when the same command is given again. The columns:

- ``figure``: "exact NLL" for the autoregressive model and for blocks of one token; "bound" for the
  others, whose NLL is at most the figure.
- ``nats/token``, ``perplexity``, ``bits/character``: means over the seeds.
- ``± seeds``, ``± sequences``, ``± draws``: standard errors of nats/token, over the seeds, over the
  sequences of one evaluation, and of its Monte-Carlo draws.
- ``training tokens``: scored tokens in all steps of one run.
- ``tokens/s``: the median speed of training.

    python benchmarks/compare.py --workdir runs/compare --markdown docs/results.md
"""

import dataclasses
import json
import math
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
from report import machine, report, start

from sedd.configuration.build import build_parts
from sedd.errors import UserError
from sedd.evaluation.report import Table
from sedd.files import check_writable, write_whole
from sedd.model import read_config, read_tokenizer
from sedd.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
SEDD = ["--parameterization", "score", "--objective", "score_entropy", "--sampler", "tweedie"]
BLOCK = ["--parameterization", "block", "--objective", "block", "--sampler", "semi_autoregressive"]
MODELS = {  # (name, flags beside those of sotu_radd_small)
    "ar": (
        "autoregressive",
        [
            *("--parameterization", "autoregressive", "--objective", "autoregressive"),
            *("--sampler", "ordered", "--sampler.steps", "None"),
        ],
    ),
    "radd": ("RADD, λ-DCE", []),
    "sedd": ("SEDD, absorbing", SEDD),
    "sedd_uniform": ("SEDD, uniform", [*SEDD, "--process", "uniform"]),
    **{
        f"block_{size}": (f"blocks of {size}", [*BLOCK, "--parameterization.block", str(size)])
        for size in (1, 4, 16, 128)
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that all models share."""

    workdir: Path
    """The directory of the runs, which has a folder for each. Give other settings another one."""
    models: tuple[str, ...] = ("ar", "radd", "sedd", "sedd_uniform")
    """The models to compare, by their names in ``MODELS``; there are block_1, block_4, block_16 and
    block_128 as well."""
    corpus: str = "sotu"
    length: int = 128
    steps: int = 1000
    """Training steps. The learning rate rises during the first tenth of them."""
    batch_size: int = 16
    hidden_dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    seeds: int = 3
    """How many times each model is trained, with different seeds."""
    draws: int = 64
    """Noise levels with which the bound of a sequence is estimated."""
    max_sequences: int = 512
    """Validation sequences to evaluate, evenly spread over the split."""
    markdown: Path | None = None
    """Write the table to this file, with a description of how it was measured."""

    def __post_init__(self):
        for name in self.models:
            if name not in MODELS:
                raise ValueError(f"models has no {name!r}; it has {', '.join(MODELS)}")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")

    def folder(self, name: str, seed: int) -> Path:
        """The directory of the run of a model and a seed."""
        return self.workdir / name / str(seed)


def training_flags(settings: Settings, name: str, seed: int) -> list[str]:
    """The flags of ``train.py`` for a model, beside those of ``trained``."""
    shared = {
        "config": ROOT / "configs" / "sotu_radd_small.py",
        "seed": seed,
        "data.corpus": settings.corpus,
        "data.tokenizer": "characters",
        "data.length": settings.length,
        "training.batch-size": settings.batch_size,
        "training.eval-every": settings.steps,  # only at the end
        "training.sample-every": None,
        "optimizer.name": "adamw",
        "optimizer.learning-rate": 3e-3,
        "optimizer.warmup-steps": settings.steps // 10,
        "network.hidden-dim": settings.hidden_dim,
        "network.num-layers": settings.num_layers,
        "network.num-heads": settings.num_heads,
    }
    given = [word for flag, value in shared.items() for word in (f"--{flag}", str(value))]
    return [*given, *MODELS[name][1]]


def evaluation_flags(settings: Settings, name: str, seed: int) -> list[str]:
    """The flags of ``evaluate.py`` for a model."""
    folder = settings.folder(name, seed)
    shared = {
        "checkpoint": folder,
        "data": settings.corpus,
        "draws": settings.draws,
        "max-sequences": settings.max_sequences,
        "seed": seed,
        "json": folder / "evaluation.json",
    }
    return [word for flag, value in shared.items() for word in (f"--{flag}", str(value))]


def command(name: str, flags: list[str], *, quiet: bool = False) -> None:
    """Run ``train.py`` or ``evaluate.py`` in a process of its own; exit with its code if it fails.

    ``quiet`` suppresses its standard output.
    """
    words = [sys.executable, str(ROOT / f"{name}.py"), *flags]
    code = subprocess.run(words, stdout=subprocess.DEVNULL if quiet else None).returncode
    if code:
        sys.exit(code)


def trained(workdir: Path, flags: list[str], steps: int) -> None:
    """Train a model to its last step with ``train.py``, as far as this is not done yet."""
    command("train", [*flags, "--workdir", str(workdir), "--training.steps", str(steps)])
    last = read_metrics(workdir)[-1]["step"]
    if last < steps:
        raise UserError(
            f"{workdir} was stopped at step {last}; give the same command again to continue"
        )


def figures(settings: Settings, name: str) -> dict[str, Any]:
    """The row of a model: means over its seeds, from the files that the commands wrote."""
    folders = [settings.folder(name, seed) for seed in range(settings.seeds)]
    config, tokenizer = read_config(folders[0]), read_tokenizer(folders[0])
    assert config is not None
    network = build_parts(config, tokenizer.num_tokens).network
    parameters = jax.eval_shape(network.init, jax.random.key(0))
    logged = [
        [record for record in read_metrics(folder) if record.get("tokens") is not None]
        for folder in folders
    ]
    results = [json.loads((folder / "evaluation.json").read_text()) for folder in folders]
    nats = [result["nats_per_token"] for result in results]
    mean = statistics.fmean(nats)
    errors = {"± seeds": statistics.stdev(nats) / len(nats) ** 0.5} if len(nats) > 1 else {}
    for column, key in (("± sequences", "standard_error"), ("± draws", "standard_error_draws")):
        errors[column] = statistics.fmean(result[key] for result in results)
    speeds = [record["tokens_per_second"] for run in logged for record in run]
    return {
        "model": MODELS[name][0],
        "figure": "exact NLL" if results[0]["estimator"] == "exact" else "bound",
        "nats/token": mean,
        **errors,
        "perplexity": math.exp(mean),
        "bits/character": statistics.fmean(result["bits_per_character"] for result in results),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(parameters)),
        "training tokens": sum(record["tokens"] for record in logged[0]),
        "tokens/s": round(statistics.median(speeds)),
        "sequences": results[0]["num_sequences"],
    }


def main(settings: Settings) -> None:
    """Train and evaluate all models, as far as this is not done yet, and print the table."""
    if settings.markdown is not None:
        check_writable(settings.markdown, f"--markdown {settings.markdown}")
    runs = [(name, seed) for seed in range(settings.seeds) for name in settings.models]
    for run in runs:
        trained(settings.folder(*run), training_flags(settings, *run), settings.steps)
    for run in runs:
        command("evaluate", evaluation_flags(settings, *run), quiet=True)
    rows = [figures(settings, name) for name in settings.models]
    sequences = rows[0].pop("sequences")
    for row in rows[1:]:
        row.pop("sequences")
    if settings.markdown is not None:
        write_whole(settings.markdown, page(settings, rows, sequences).encode())
    shown = {f: str(v) if isinstance(v, Path) else v for f, v in vars(settings).items()}
    report("compare", rows, **shown)


def page(settings: Settings, rows: list[dict[str, Any]], sequences: int) -> str:
    """The results as Markdown, with how they were measured."""
    table = Table(columns=list(rows[0]), rows=[list(row.values()) for row in rows])
    about = machine()
    words = ["python", "benchmarks/compare.py", "--workdir", "runs/compare"]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name not in ("workdir", "markdown") and value != field.default:
            listed = value if isinstance(value, tuple) else (value,)
            words += [f"--{field.name.replace('_', '-')}", *map(str, listed)]
    trainings = (
        f'Figures are means over {settings.seeds} trainings\nwith different seeds; "± seeds" is '
        "the standard error of this mean."
        if settings.seeds > 1
        else "Each model was trained once:\nno error includes the effect of another seed."
    )
    return f"""# Results

Autoregression and discrete diffusion with the same transformer, on the same text.

{table.markdown()}

Lower is better. The likelihood of the autoregressive model is computed exactly. For the diffusion
models the table has upper bounds on their negative log likelihood (NLL): their true figures are
lower than shown or equal, so that the difference to the autoregressive model is at most the one
shown. {trainings}

The three errors are standard errors. "± sequences" is that of the mean over the validation
sequences, and includes the noise of the Monte-Carlo draws; "± draws" is that of the draws alone.
Both are those of one training.

## How it was measured

```
{shlex.join(words)}
```

on {about["cores"]} cores ({about["device"]}, {about["machine"]}), Python {about["python"]},
jax {about["jax"]}.

- Data: `{settings.corpus}`, cut into sequences of {settings.length} tokens; {sequences:,} sequences
  of its validation split, the same for all, with {settings.draws} noise levels for each bound.
- Network: {settings.num_layers} layers of width {settings.hidden_dim}, float32. The networks of
  SEDD are also conditioned on the noise level, which takes additional parameters.
- Training: {settings.steps:,} steps of {settings.batch_size} sequences. All models of a seed see
  the same sequences in the same order. The optimizer is AdamW; its rate was chosen
  for RADD and not tuned for the other models.
- Tokens per second are the median over the logged steps of each run, without compilation and
  validation; the runs came one after the other.
"""


if __name__ == "__main__":
    start(main, Settings, __doc__)
