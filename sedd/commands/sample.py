"""``sedd sample``: draw text from a model, with or without given text and constraints.

The command works in this order:

1. Read the flags, and check what shows without the model: numbers, files, the user's functions.
2. Load the model, and build and check the sampler.
3. Read all requests once, of ``--requests`` or of the flags (``Survey``), and keep none of them.
   This finds every bad line before anything is drawn, and the sizes that let batches share
   compiled programs.
4. Read the requests again and draw them in batches (``Answering``). Each batch is written to
   ``--output`` and printed when it is done, so that memory does not grow with the number of
   requests and an interruption loses none of the finished batches.
5. Write the page of ``--trace`` at the end.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

import sedd
from sedd.commands.answers import Answer, Answering
from sedd.commands.asking import Asking
from sedd.commands.cli import console, errors, fail, note
from sedd.commands.controlled import Controlled, report
from sedd.commands.devices import is_first
from sedd.commands.sample_flags import SampleCommand, joint_of, read_command, reshape_numbers
from sedd.commands.sampler_flags import flat, sampler_options
from sedd.commands.survey import TRACED, Survey, check_guidance, notes
from sedd.commands.trace import TraceRow, write_trace
from sedd.errors import UserError, printable
from sedd.files import is_stdout, open_stream
from sedd.progress import Activity


def main(arguments: Sequence[str]) -> int:
    """Draw a text for every request, print the texts and write the files.

    Returns:
        0, or 2 if a line of ``--requests`` was refused; the other lines are answered.

    Raises:
        UserError: a flag or a function of the user is wrong, or a file cannot be written.
    """
    command = read_command(arguments)
    mesh = command.on.join()
    if not is_first():
        command = dataclasses.replace(command, output=None, trace=None)
    with Activity(f"loading {command.checkpoint}"):
        model = command.how.load(command.checkpoint, step=command.step, mesh=mesh)
        asking = Asking.of(command, model)
    with contextlib.ExitStack() as stack:
        with Activity("reading the requests"):
            requests = stack.enter_context(asking.requests())
            survey = Survey.of(requests(), asking.processor)
        for message in survey.refused:
            fail(message)
        if survey.num_refused > len(survey.refused):
            more = survey.num_refused - len(survey.refused)
            fail(f"--requests {command.requests}: {more} more lines were refused")
        if not survey.counts:
            return 2
        check_guidance(command, survey)
        sampler = asking.sampler({}, reshape_numbers(command))
        for message in notes(command, model, sampler, survey):
            note(message)
        answering = Answering(
            model=model,
            counts=survey.counts,
            shape=survey.shape,
            batch_size=command.batch_size,
            reshaped=survey.reshaped,
            processor=asking.processor,
            rule=command.rule,
            scheme=asking.scheme,
            joint=joint_of(command),
            traced=0 if command.trace is None else TRACED,
        )
        if command.control.features is not None:
            controlled = Controlled(asking=asking, answering=answering)
            batches = controlled.batches()
            stack.enter_context(contextlib.closing(batches))
            deliver(command, model, batches, asking.processor)
            streamed = command.output is not None and is_stdout(command.output)
            report(controlled, errors if streamed else console)
            return 0
        asked = (one for one in requests() if not isinstance(one, UserError))
        batches = shown(answering.answers(asked), survey.counts.total())
        stack.enter_context(contextlib.closing(batches))
        deliver(command, model, batches, asking.processor)
    return 2 if survey.num_refused else 0


def shown(batches: Iterable[list[Answer]], total: int) -> Generator[list[Answer]]:
    """Yield the batches. While a batch is drawn, show how many of the ``total`` answers are done.

    The first batch is shown as "compiling": its program is compiled before it runs.
    """
    with Activity("compiling and drawing", total=total) as activity:
        for batch in batches:
            with activity.paused():  # the caller prints the batch
                yield batch
            activity.update("drawing", completed=activity.completed + len(batch))


def deliver(
    command: SampleCommand, model: sedd.Model, batches: Iterator[list[Answer]], processor: Any
) -> None:
    """Write and print each batch when it is done, and the trace page at the end.

    An error or an interruption leaves all finished batches in the files. If a batch cannot be
    written, it is printed before the error ends the command. If the reader of standard output goes
    away (``| head``), the files are still completed.

    Args:
        command: the flags.
        model: the model, whose tokenizer shows the tokens.
        batches: the answers, a list for each batch; drawn while they are iterated over.
        processor: the user's logit processor, which reports bad values after each batch; or None.
    """
    traced: list[Answer] = []
    output, count = None, 0
    printing = command.output is None or not is_stdout(command.output)
    with contextlib.ExitStack() as stack:
        try:
            for batch in batches:
                if processor is not None:
                    processor.raise_error()
                traced += [one for one in batch if one.frames is not None]
                try:
                    if command.output is not None:
                        output = output or stack.enter_context(open_stream(command.output))
                        lines = [json.dumps(one.to_json(), ensure_ascii=False) for one in batch]
                        output.write("".join(f"{line}\n" for line in lines).encode())
                        output.flush()
                        count += len(lines)
                finally:
                    printing = printing and printed(batch, model, goes_on=output or command.trace)
        finally:
            if command.trace is not None and traced:
                write_page(command.trace, command, model, traced[:TRACED])
    if printing and output is not None:
        console.print(f"wrote {count} samples to {command.output}")
    if printing and command.trace is not None:
        console.print(f"wrote {command.trace}")


def printed(batch: Sequence[Answer], model: sedd.Model, *, goes_on: Any) -> bool:
    """Print a batch.

    Args:
        batch: the answers.
        model: the model, for its tokenizer.
        goes_on: whether the command writes files, and continues if the reader of standard output
            goes away.

    Returns:
        Whether to print the next batch: False after the reader of standard output has gone away.

    Raises:
        BrokenPipeError: it has gone away, and there is no file to complete.
    """
    try:
        for one in batch:
            show(one, model.tokenizer)
        sys.stdout.flush()
    except BrokenPipeError:
        if not goes_on:
            raise
        return False
    return True


def show(one: Answer, tokenizer: Any) -> None:
    """Print a sample below a line with its id, seed, calls and entropy.

    On a terminal, given text is dim and drawn text is bold. Without given text, drawn text is
    plain. Of a conversation the answer alone is shown.
    """
    about = (
        f"{printable(str(one.request.id))} · seed {one.request.seed} · {one.work} · "
        f"entropy {one.entropy:.2f} nats"
    )
    if one.score is not None:
        each = one.score if isinstance(one.score, list) else [one.score]
        about += f" · score {', '.join(f'{score:.4g}' for score in each)}"
    if len(about) + 4 > console.width:  # a rule would cut it short
        console.print(Text(" ".join(about.split()), style="dim"))
    else:
        console.rule(about, style="dim")
    if one.clamp.end_ids:
        console.print(Text(printable(one.text)))
        return
    fixed_L = one.clamp.fixed_L
    drawn = "bold" if fixed_L.any() else ""
    text, before = Text(), ""
    ends = [*(np.flatnonzero(np.diff(fixed_L)) + 1).tolist(), len(fixed_L)]
    for start, end in zip([0, *ends], ends, strict=False):
        # Decode from the start of the text and cut off what was shown: many tokenizers drop the
        # leading space of tokens that are decoded by themselves.
        whole = tokenizer.decode(one.tokens[:end])
        alone = not whole.startswith(before)  # the boundary cuts a character of several tokens
        stretch = tokenizer.decode(one.tokens[start:end]) if alone else whole[len(before) :]
        text.append(printable(stretch), style="dim" if fixed_L[start] else drawn)
        before = whole
    console.print(text)


def write_page(
    path: Path, command: SampleCommand, model: sedd.Model, answers: Sequence[Answer]
) -> None:
    """Write the page of ``--trace``.

    Args:
        path: the HTML file.
        command: the flags, for the sampler's options above the texts.
        model: the model, whose tokenizer shows the tokens.
        answers: the sequences to play; each has its frames.
    """
    tokenizer = model.tokenizer
    assert tokenizer is not None  # ``Asking.of`` refuses a model without one
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
        decode=lambda ids: tokenizer.decode(ids, keep_eos=True),
        mask_id=model.process.mask_id,
        eos_id=tokenizer.eos_id,
        description={
            "sampler": command.sampler.name,
            **{
                k: str(v)
                for k, v in flat(sampler_options(command.sampler)).items()
                if v is not None
            },
            "network calls": str(max(a.calls for a in answers)),
            "checkpoint": command.checkpoint,
        },
        times_T1=None if answers[0].times is None else answers[0].times.tolist(),
    )
