"""Draw text from a trained model: from nothing, after a prompt, or into gaps."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

import sedd
from sedd.commands.cli import console, fail, note
from sedd.commands.sample_flags import (
    SampleCommand,
    build_command_sampler,
    check_requests,
    notes,
    read_command,
    requested,
    reshape_options,
)
from sedd.commands.sampler_flags import flat, sampler_options
from sedd.commands.trace import TraceRow, write_trace
from sedd.files import write_whole
from sedd.requests import Answer, answer

REFUSALS = 20  # lines that are named; a file that holds no requests at all has thousands


def main(arguments: Sequence[str]) -> int:
    """Answer the requests; 2 when one of them was refused, else 0."""
    command = read_command(arguments)
    model = sedd.load(command.checkpoint, step=command.step)
    reshape = reshape_options(command, model)
    sampler = build_command_sampler(command, model, reshape)
    asked, refused = requested(command, model)
    for error in refused[:REFUSALS]:
        fail(str(error))
    if len(refused) > REFUSALS:
        fail(f"{command.requests}: {len(refused) - REFUSALS} more lines are like these")
    if not asked:
        return 2
    check_requests(command, sampler, asked)
    for line in notes(command, model, sampler, asked):
        note(line)
    processor = reshape["logit_processor"]
    answers: list[Answer] = []
    try:
        for batch in answer(
            model,
            asked,
            sampler,
            batch_size=command.batch_size,
            trace=command.trace is not None,
            rule=command.rule,
            **reshape,
        ):
            if processor is not None:
                processor.raise_error()
            answers += batch
            for one in batch:
                show(console, one, model.tokenizer)
    finally:  # an error later on does not lose what was answered before
        if answers:
            save(console, command, model, answers)
    return 2 if refused else 0


def show(console: Console, one: Answer, tokenizer) -> None:
    """Print a sample: what was given dim, what was drawn plain."""
    about = (
        f"{one.request.id} · seed {one.request.seed} · {one.calls} network calls · "
        f"entropy {one.entropy:.2f} nats"
    )
    if one.score is not None:
        about += f" · score {one.score:.4g}"
    if len(about) + 4 > console.width:  # a rule would cut it short
        console.print(Text(" ".join(about.split()), style="dim"))
    else:
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


def save(
    console: Console, command: SampleCommand, model: sedd.Model, answers: Sequence[Answer]
) -> None:
    """Write the files that were asked for."""
    if command.output is not None:
        lines = "".join(json.dumps(a.to_json(), ensure_ascii=False) + "\n" for a in answers)
        write_whole(command.output, lines.encode())
        console.print(f"wrote {len(answers)} samples to {command.output}")
    if command.trace is not None:
        write_page(command.trace, command, model, answers)
        console.print(f"wrote {command.trace}")


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
                spans=[(s.start, s.length, s.automaton.pattern) for s in a.spans],
            )
            for a in answers
            if a.frames is not None
        ],
        token_text=lambda i: tokenizer.decode([i], keep_eos=True),
        mask_id=model.process.mask_id,
        eos_id=tokenizer.eos_id,
        description={
            "sampler": command.sampler.name,
            **{k: str(v) for k, v in flat(sampler_options(command.sampler)).items()},
            "network calls": str(max(a.calls for a in answers)),
            "checkpoint": command.checkpoint,
        },
        times_T1=None if answers[0].times is None else answers[0].times.tolist(),
    )
