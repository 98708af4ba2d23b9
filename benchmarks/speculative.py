"""Speculative decoding beside other samplers: calls, rows, seconds, and the quality of the texts.

Four models of one network are trained on the quick start's text, unless ``workdir`` has them: the
diffusion model of ``sotu_radd_small``, a causal head on it, an any-subset model, and an
autoregressive model. The last is the judge of the texts of the others, which share its tokenizer.
Every sampler draws ``num`` texts without a prompt. The columns:

- ``calls``: network calls of a text, on average; ``tokens/call`` and ``rows/token``: tokens of all
  texts by their calls, and rows of the batches of these calls by tokens.
- ``s/text``: seconds for a text in batches of ``batch_size``. The fastest batch counts, without the
  first, which compiles.
- ``nats``: -log p of a text under the judge, per token. ``entropy``: that of the frequencies of a
  text's own tokens, in nats; it is low for repetitive texts, which a judge prefers. ``±`` is a
  standard error over texts.
- ``of event_jump``: calls, as a share of those that event_jump takes until its texts have the same
  ``nats``, interpolated between its rows; in brackets for two standard errors less and more. "<"
  if the texts of event_jump never become as good: its most calls are then taken.

    python benchmarks/speculative.py --workdir runs/speculative
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from compare import ROOT, trained
from report import report, start
from scipy.optimize import isotonic_regression

import sedd
from sedd.configuration.build_data import build_data
from sedd.evaluation.diversity import measure_diversity

RADD = [
    *("--config", str(ROOT / "configs/sotu_radd_small.py")),
    *("--training.sample-every", "None"),
]
ORDERED = ["--sampler", "ordered"]
MODELS = {  # the flags of train.py, beside those of the steps
    "diffusion": RADD,
    "head": ["--config", str(ROOT / "configs/sotu_causal_head.py")],
    "any_subset": [
        *RADD,
        *("--parameterization", "any_subset", "--objective", "any_subset", *ORDERED),
    ],
    "judge": [
        *RADD,
        *("--parameterization", "autoregressive", "--objective", "autoregressive"),
        *(*ORDERED, "--sampler.steps", "None"),
    ],
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The models and the texts."""

    workdir: Path = Path("runs/speculative")
    """The directory of the runs, one folder for each. Give other settings another one."""
    steps: int = 1500
    """Training steps of each model; the judge has twice as many."""
    num: int = 512
    """Texts for each row."""
    batch_size: int = 64
    """Texts that are drawn together."""
    lookahead: tuple[int, ...] = (2, 4, 8)
    """Numbers of drafts, K."""
    verifications: tuple[int, ...] = (1, 2, 4)
    """Rounds that a call serves, R, with the causal head."""
    event_jump: tuple[int | None, ...] = (4, 8, 16, 32, 64, None)
    """Steps of event_jump."""
    seed: int = 0

    def __post_init__(self):
        if self.num < 2 * self.batch_size or self.num % self.batch_size:
            raise ValueError(
                f"num must be a multiple of batch_size, at least twice it, got {self.num} and "
                f"{self.batch_size}"
            )


def settings_of(settings: Settings) -> list[tuple[str, str, str, dict[str, Any]]]:
    """Each row: its model, its name, its sampler and the options of the sampler."""
    rows: list[tuple[str, str, str, dict[str, Any]]] = [
        ("diffusion", f"event_jump, {n or 'all'} steps", "event_jump", {"steps": n})
        for n in settings.event_jump
    ]
    rows.append(("diffusion", "ordered, random", "ordered", {"order": "random"}))
    for draft in ("stale", "batch", "ngram"):
        for k in settings.lookahead:
            given = {"draft": draft, "lookahead": k, "order": "random"}
            rows.append(("diffusion", f"{draft}, K {k}, random", "speculative", given))
    for verifications in settings.verifications:
        for k in settings.lookahead:
            given = {"draft": "head", "lookahead": k, "verifications": verifications}
            label = f"head, K {k}, R {verifications}, random"
            rows.append(("head", label, "speculative", {**given, "order": "random"}))
    for draft in ("self", "stale", "ngram"):
        for k in settings.lookahead:
            given = {"draft": draft, "lookahead": k, "order": "forward"}
            rows.append(("any_subset", f"any-subset {draft}, K {k}", "speculative", given))
    return rows


def drawn(
    model: sedd.Model, settings: Settings, sampler: str, options: dict[str, Any]
) -> tuple[np.ndarray, dict[str, Any]]:
    """The token ids of all texts [S, L], and what they cost."""
    results, times = [], []
    for batch in range(settings.num // settings.batch_size):
        key = jax.random.fold_in(jax.random.key(settings.seed), batch)
        begin = time.perf_counter()
        results.append(sedd.sample(model, key, num=settings.batch_size, sampler=sampler, **options))
        times.append(time.perf_counter() - begin)
    tokens_SL = np.concatenate([result.tokens for result in results])
    calls, rows = (
        sum(int(getattr(result, name).sum()) for result in results) for name in ("calls", "rows")
    )
    return tokens_SL, {
        "calls": calls / settings.num,
        "tokens/call": tokens_SL.size / calls,
        "rows/token": rows / tokens_SL.size,
        "s/text": min(times[1:]) / settings.batch_size,
    }


def judged(judge: sedd.Model, tokens_SL: np.ndarray) -> dict[str, float | None]:
    """What the judge says of the texts, and their entropy."""
    result = sedd.evaluate(judge, tokens_SL)
    entropy = measure_diversity(list(tokens_SL), tokenization="").entropy
    return {
        "nats": result.nats_per_token,
        "± nats": result.standard_error,
        "entropy": entropy.value,
        "± entropy": entropy.error,
    }


def share_of_calls(row: dict[str, Any], jumps: list[dict[str, Any]]) -> str:
    """The calls of a row, as a share of event_jump's at the same nats."""
    calls_J = np.array([jump["calls"] for jump in jumps])
    nats_J = isotonic_regression([jump["nats"] for jump in jumps], increasing=False).x
    error = math.hypot(row["± nats"], max(jump["± nats"] for jump in jumps))

    def share(nats: float) -> float:
        # np.interp wants rising abscissas: better texts have fewer nats.
        log_calls = np.interp(-nats, -nats_J, np.log(calls_J))
        return row["calls"] / math.exp(log_calls)

    low, high = share(row["nats"] - 2 * error), share(row["nats"] + 2 * error)
    below = "<" if row["nats"] < nats_J[-1] else ""
    return f"{below}{share(row['nats']):.2f} ({low:.2f}-{high:.2f})"


def main(settings: Settings) -> None:
    """Train what is missing, draw with every sampler, and print a table."""
    for name, flags in MODELS.items():
        steps = settings.steps * (2 if name == "judge" else 1)
        trunk = ["--init-from", str(settings.workdir / "diffusion")] if name == "head" else []
        trained(settings.workdir / name, [*flags, *trunk], steps)
    models = {name: sedd.load(settings.workdir / name) for name in MODELS}
    judge = models["judge"]
    packed = build_data(judge.config, tokenizer=judge.tokenizer).validation[0][0]
    chosen = np.linspace(0, packed.num_rows - 1, settings.num).astype(int)
    empty = {"calls": None, "tokens/call": None, "rows/token": None, "s/text": None}
    rows: list[dict[str, Any]] = [
        {"texts": "held-out text", **empty, **judged(judge, packed.rows(chosen)[0])}
    ]
    for model, label, sampler, options in settings_of(settings):
        tokens_SL, costs = drawn(models[model], settings, sampler, options)
        rows.append({"texts": label, **costs, **judged(judge, tokens_SL)})
        print(f"{label}: {costs['calls']:.2f} calls, {rows[-1]['nats']:.3f} nats", flush=True)
    jumps = rows[1 : 1 + len(settings.event_jump)]
    for row in rows:
        row["of event_jump"] = share_of_calls(row, jumps) if row["calls"] else "–"
    report("speculative", rows, texts=settings.num, batch=settings.batch_size, steps=settings.steps)


if __name__ == "__main__":
    start(main, Settings, __doc__)
