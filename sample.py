"""Draw text from a trained model: from nothing, after a prompt, or into gaps."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.text import Text

import sedd
from sedd.cli import fail, parse, run, take
from sedd.components import Options, makers, options_type
from sedd.constraints.clamp import Clamp
from sedd.errors import UserError
from sedd.files import check_writable, write_whole
from sedd.requests import Answer, Request, answer, read_requests
from sedd.trace import TraceRow, write_trace

REFUSALS = 20  # lines that are named; a file that holds no requests at all has thousands


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleCommand:
    """The flags of ``sample.py``; the sampler's own (--steps) are among them."""

    checkpoint: Path
    """A run's directory."""
    step: int | Literal["best"] | None = None
    """Which checkpoint: of a step, or the best by validation; the newest by default."""
    sampler: Annotated[Options, tyro.conf.arg(name="")]
    num: int = 1
    """How many sequences; the i-th has seed + i."""
    length: int | None = None
    """Tokens in a sequence, the prompt included; the training length by default."""
    seed: int = 0
    prompt: str = ""
    suffix: str = ""
    infill: str | None = None
    """Text with gaps: "text with {mask:12} gaps" leaves twelve tokens free."""
    requests: Path | None = None
    """A JSONL file, one request a line: {id, prompt | infill, suffix, length, seed}."""
    output: Path | None = None
    """Write JSONL here: id, text, tokens, calls, seed."""
    trace: Path | None = None
    """Write a page here that plays the denoising."""
    batch_size: int = 32

    def __post_init__(self):
        for name in ("num", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def main(arguments: Sequence[str]) -> int:
    """Answer the requests; 2 when one of them was refused, else 0."""
    name, rest = take(arguments, "--sampler")
    kind = options_type("samplers", name or "tweedie")
    command = parse(
        SampleCommand,
        rest,
        default=SampleCommand(checkpoint=tyro.MISSING, sampler=kind()),
        description=f"{__doc__}\n\n--sampler NAME picks one of {', '.join(makers('samplers'))}; "
        f"these are the flags of {kind.name}. {kind.__doc__}",
    )
    for flag, path in (("--output", command.output), ("--trace", command.trace)):
        if path is not None:
            check_writable(path, f"{flag} {path}")
    model = sedd.load(command.checkpoint, step=command.step)
    sampler = command.sampler.build(schedule=model.schedule)
    asked, refused = requested(command, model)
    for error in refused[:REFUSALS]:
        fail(str(error))
    if len(refused) > REFUSALS:
        fail(f"{command.requests}: {len(refused) - REFUSALS} more lines are like these")
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    answers: list[Answer] = []
    if asked:
        for batch in answer(
            model, asked, sampler, batch_size=command.batch_size, trace=command.trace is not None
        ):
            answers += batch
            for one in batch:
                show(console, one, model.tokenizer)
    if command.output is not None:
        lines = "".join(json.dumps(a.to_json(), ensure_ascii=False) + "\n" for a in answers)
        write_whole(command.output, lines.encode())
        console.print(f"wrote {len(answers)} samples to {command.output}")
    if command.trace is not None and answers:
        write_page(command.trace, command, model, answers)
        console.print(f"wrote {command.trace}")
    return 2 if refused else 0


def requested(
    command: SampleCommand, model: sedd.Model
) -> tuple[list[tuple[Request, Clamp]], list[UserError]]:
    """The requests of the file or of the flags, and the lines of the file that were refused."""
    if model.tokenizer is None:
        raise UserError(f"{command.checkpoint}: it has no tokenizer, so there is no text to draw")
    if command.requests is None:
        asked = [
            Request(
                id=i,
                prompt=command.prompt,
                suffix=command.suffix,
                infill=command.infill,
                length=command.length,
                seed=command.seed + i,
            )
            for i in range(command.num)
        ]
        clamp = asked[0].clamp(model.tokenizer, model.length)
        return [(request, clamp) for request in asked], []
    if command.prompt or command.suffix or command.infill is not None:
        raise UserError("--requests holds the prompts: give no --prompt, --suffix or --infill")
    length = model.length if command.length is None else command.length
    found = list(read_requests(command.requests, model.tokenizer, length, command.seed))
    refused = [line for line in found if isinstance(line, UserError)]
    return [line for line in found if not isinstance(line, UserError)], refused


def show(console: Console, one: Answer, tokenizer) -> None:
    """Print a sample: what was given dim, what was drawn plain."""
    about = f"{one.request.id} · seed {one.request.seed} · {one.calls} network calls"
    console.rule(about, style="dim")
    drawn = "bold" if one.clamp.fixed_L.any() else ""
    text = Text()
    start = 0
    for end in range(1, one.clamp.length + 1):
        if end == one.clamp.length or one.clamp.fixed_L[end] != one.clamp.fixed_L[start]:
            text.append(
                tokenizer.decode(one.tokens[start:end]),
                style="dim" if one.clamp.fixed_L[start] else drawn,
            )
            start = end
    console.print(text)


def write_page(
    path: Path, command: SampleCommand, model: sedd.Model, answers: Sequence[Answer]
) -> None:
    """The trace page of every answer."""
    tokenizer = model.tokenizer
    assert tokenizer is not None  # there would be no requests
    write_trace(
        path,
        [
            TraceRow(
                title=f"{a.request.id} · seed {a.request.seed}",
                frames_TL=a.frames,
                fixed_L=a.clamp.fixed_L,
            )
            for a in answers
            if a.frames is not None
        ],
        token_text=lambda i: tokenizer.decode([i], keep_eos=True),
        mask_id=model.process.mask_id,
        eos_id=tokenizer.eos_id,
        description={
            "sampler": command.sampler.name,
            **{k: str(v) for k, v in dataclasses.asdict(command.sampler).items()},
            "network calls": str(max(a.calls for a in answers)),
            "checkpoint": str(command.checkpoint),
        },
        times_T1=None if answers[0].times is None else answers[0].times.tolist(),
    )


if __name__ == "__main__":
    run(main)
