"""What ``evaluate.py`` says beyond perplexity: of samples, of the conditionals, and its report."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sedd.commands.evaluate_flags import DataSet, EvaluateCommand, Evaluation
from sedd.errors import UserError
from sedd.evaluation.bound import REPLICATES, BoundResult, sequence_nats
from sedd.evaluation.consistency import consistency
from sedd.evaluation.generative_perplexity import generative_perplexity
from sedd.evaluation.judges import Judge, WindowJudge, hugging_face_judge
from sedd.evaluation.mauve import mauve
from sedd.evaluation.report import Section, write_html
from sedd.evaluation.smollm2 import load_smollm2
from sedd.evaluation.statistics import compare
from sedd.model import load

EXACT_GRID = 512  # tokens a position of whose pairs all are tried; beyond, the likeliest 128
MAUVE_TEXTS = 50  # fewer make five buckets or less, and a figure of noise
SHOWN = 3  # samples printed in the report
Results = Sequence[tuple[DataSet, BoundResult]]


def beyond_perplexity(
    evaluation: Evaluation, results: Results
) -> tuple[list[Section], dict[str, Any]]:
    """What else the flags ask for, of the first data set: as sections and as JSON."""
    command, (data, _) = evaluation.command, results[0]
    sections, figures = [], {}
    if command.samples is not None:
        samples = read_samples(command.samples)
        real = real_texts(evaluation, data, len(samples))
        try:
            compared = compare(samples, real, seed=command.seed)
            sections.append(compared.section())
            figures["samples"] = {"file": str(command.samples), **compared.to_json()}
            if command.judge is not None:
                judge = judge_of(command.judge)
                judged = generative_perplexity(samples, judge, reference=real)
                sections.append(judged.section())
                figures["generative_perplexity"] = judged.to_json()
                sections.append(same_regions(judge, samples, real, figures))
        except ValueError as error:
            raise UserError(f"--samples {command.samples}: {error}") from error
        sections.append(Section(title="Samples", samples=samples[:SHOWN]))
    if command.consistency is not None:
        sections.append(conditionals(evaluation, data, command.consistency, figures))
    return sections, figures


def same_regions(
    judge: Judge, samples: Sequence[str], real: Sequence[str], figures: dict[str, Any]
) -> Section:
    """MAUVE from the judge's states, or why there is none."""
    if min(len(samples), len(real)) < MAUVE_TEXTS:
        text = f"Needs {MAUVE_TEXTS} samples and as many real texts: there are {len(samples)} and "
        return Section(title="MAUVE", text=f"{text}{len(real)}.")
    found = mauve(
        judge.features(samples),
        judge.features(real),
        features=f"last state of {judge.name}, of the last token",
    )
    figures["mauve"] = found.to_json()
    return found.section()


def conditionals(
    evaluation: Evaluation, data: DataSet, pairs: int, figures: dict[str, Any]
) -> Section:
    """Whether the model's conditionals belong to one joint, for pairs of adjacent positions."""
    model = evaluation.model
    top = None if model.process.num_tokens <= EXACT_GRID else 128
    x0_BL, scored_BL = data.packed.rows(spread(data.rows, pairs))
    try:
        found = consistency(
            model.denoiser,
            jnp.asarray(x0_BL),
            jnp.asarray(scored_BL),
            jax.random.key(evaluation.command.seed),
            pairs=pairs,
            top=top,
        )
    except ValueError as error:
        raise UserError(f"--consistency {pairs}: {error}") from error
    figures["consistency"] = found.to_json()
    return found.section()


def read_samples(path: Path) -> list[str]:
    """The texts of a file of ``sample.py --output``; UserError naming a bad line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"--samples {path}: {reason}") from error
    texts = []
    for number, line in enumerate(lines, start=1):
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'--samples {path}, line {number}: no JSON with a "text"') from error
        if not isinstance(text, str):
            raise UserError(f'--samples {path}, line {number}: "text" must be a string')
        texts.append(text)
    return texts


def real_texts(evaluation: Evaluation, data: DataSet, number: int) -> list[str]:
    """Held-out text in rows of the model's length, as many as there are samples, evenly spread."""
    tokenizer = evaluation.model.tokenizer
    assert tokenizer is not None  # Evaluation checks it
    x0_BL, scored_BL = data.packed.rows(spread(data.rows, number))
    return [
        tokenizer.decode(x0_L[scored_L]) for x0_L, scored_L in zip(x0_BL, scored_BL, strict=True)
    ]


def spread(rows: np.ndarray, number: int) -> np.ndarray:
    """``number`` of the rows, evenly spread, or all of fewer."""
    return rows[np.linspace(0, len(rows) - 1, min(number, len(rows))).astype(int)]


def judge_of(name: str) -> Judge:
    """smollm2, hf:NAME, or a directory of an autoregressive model of this project."""
    if name == "smollm2":
        return load_smollm2().judge()
    if name.startswith("hf:"):
        return hugging_face_judge(name.removeprefix("hf:"))
    model = load(name)
    if not model.denoiser.causal or model.tokenizer is None:
        raise UserError(
            f"--judge {name}: a judge is an autoregressive model with a tokenizer, and that is "
            "another one; smollm2 and hf:NAME are judges too"
        )
    tokenizer = model.tokenizer

    def hidden(ids_BL):
        # A position is given the token before it: the state that has seen token i is the next one.
        # One column more would do, but cuDNN wants an even length. Later ids change no state.
        return model.denoiser.hidden(jnp.pad(ids_BL, ((0, 0), (0, 2))))[0][:, 1:-1]

    def nats(ids_BL, scored_BL):
        keys_B = jax.random.split(jax.random.key(0), len(ids_BL))  # nothing is drawn
        scored = sequence_nats(
            model.denoiser, model.schedule, keys_B, ids_BL, scored_BL, draws=REPLICATES
        )
        return scored.diffusion_BR[:, 0]

    return WindowJudge(
        name=name,
        encode=tokenizer.encode_batch,
        nats=jax.jit(nats),
        hidden=jax.jit(hidden),
        context=model.length,
        scores_first=True,
    )


def write_report(
    command: EvaluateCommand, evaluation: Evaluation, results: Results, more: Sequence[Section]
) -> None:
    """One HTML page: the tables, how they came about, the run's curves, what else was asked for."""
    assert command.report is not None
    curves = Path(command.checkpoint) / "curves.png"
    how = f"Model: {command.checkpoint}. Command: evaluate.py {shlex.join(command.arguments)}"
    sections = [
        Section(
            title=evaluation.title(results[0][1]),
            text=f"{how}\n\nEach figure is explained in docs/evaluation.md.",
            tables=[evaluation.table(results), *(evaluation.detail(*r) for r in results)],
        )
    ]
    if curves.is_file():
        sections.append(Section(title="Training", figures=[curves]))
    write_html(command.report, f"Evaluation of {command.checkpoint}", [*sections, *more])
