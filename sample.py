"""Draw text from a trained model: from nothing, after a prompt, or into gaps."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.text import Text

import sedd
from sedd.build import build_sampler
from sedd.cli import fail, first_sentence, load_function, note, parse, run, take
from sedd.components import Options, maker, makers, options_type, values
from sedd.constraints.clamp import Clamp
from sedd.errors import UserError
from sedd.files import check_writable, write_whole
from sedd.requests import Answer, Request, answer, read_requests
from sedd.samplers.base import Sampler
from sedd.sampling import reshape_of, text_verifier
from sedd.trace import TraceRow, write_trace

REFUSALS = 20  # lines that are named; a file that holds no requests at all has thousands


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoOptions:
    """In the place of what a sampler does not have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleCommand:
    """The flags of ``sample.py``; the sampler's own (--steps) are among them."""

    checkpoint: Path
    """A run's directory."""
    step: int | Literal["best"] | None = None
    """Which checkpoint: of a step, or the best by validation; the newest by default."""
    sampler: Annotated[Options, tyro.conf.arg(name="")]
    inner: Annotated[Options | NoOptions, tyro.conf.arg(name="")]
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
    temperature: float = 1.0
    """Of the drawn tokens: sharper below 1, the likeliest at 0."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only."""
    top_p: float | None = None
    """Draw from the likeliest tokens that together have this probability."""
    guidance: float = 0.0
    """Strengthen what is given (classifier-free guidance); 0 is off, else two calls for one."""
    logit_processor: str | None = None
    """file.py:function of (log_probs, tokens, positions), in JAX, that returns log_probs."""
    verifier: str | None = None
    """file.py:function from a list of texts to their scores, for best_of_n and particle."""
    output: Path | None = None
    """Write JSONL here: id, text, tokens, calls, entropy, seed."""
    trace: Path | None = None
    """Write a page here that plays the denoising."""
    batch_size: int = 32
    """Sequences drawn side by side, a search's candidates included."""

    def __post_init__(self):
        for name in ("num", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        reshape_of(self.reshape)

    @property
    def reshape(self) -> dict[str, Any]:
        """The options that change the conditional of clean tokens."""
        processor = None
        if self.logit_processor is not None:
            processor = load_function(self.logit_processor, "--logit-processor")
        named = ("temperature", "top_k", "top_p", "guidance")
        return {name: getattr(self, name) for name in named} | {"logit_processor": processor}


def main(arguments: Sequence[str]) -> int:
    """Answer the requests; 2 when one of them was refused, else 0."""
    name, rest = take(arguments, "--sampler")
    inner_name, rest = take(rest, "--inner")
    kind = options_type("samplers", name or "tweedie")
    fields = {field.name for field in dataclasses.fields(maker("samplers", kind.name))}
    inner_kind = NoOptions
    if "inner" in fields:
        inner_kind = options_type("samplers", inner_name or "event_jump")
    elif inner_name is not None:
        raise UserError(f"--inner {inner_name}: {kind.name} wraps no other sampler")
    command = parse(
        SampleCommand,
        rest,
        default=SampleCommand(checkpoint=tyro.MISSING, sampler=kind(), inner=inner_kind()),
        description=describe(kind, inner_kind),
    )
    for flag, path in (("--output", command.output), ("--trace", command.trace)):
        if path is not None:
            check_writable(path, f"{flag} {path}")
    model = sedd.load(command.checkpoint, step=command.step)
    sampler, reshape = build_command_sampler(command, model), command.reshape
    asked, refused = requested(command, model)
    if command.guidance and asked and not any(clamp.fixed_L.any() for _, clamp in asked):
        raise UserError(
            f"--guidance {command.guidance}: it strengthens what is given, and nothing is; give a "
            "--prompt, --suffix, --infill or --requests"
        )
    if sampler.caveat:
        note(sampler.caveat)
    for error in refused[:REFUSALS]:
        fail(str(error))
    if len(refused) > REFUSALS:
        fail(f"{command.requests}: {len(refused) - REFUSALS} more lines are like these")
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    answers: list[Answer] = []
    if asked:
        for batch in answer(
            model,
            asked,
            sampler,
            batch_size=command.batch_size,
            trace=command.trace is not None,
            **reshape,
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


def describe(kind: type[Options], inner_kind: type) -> str:
    """The help's introduction: every sampler in a line, and the one that was picked in full."""
    lines = [f"  {name}: {first_sentence(make)}" for name, make in makers("samplers").items()]
    flags = kind.name
    if inner_kind is not NoOptions:
        flags += f" and of {inner_kind.name}, which it wraps (--inner NAME picks another)"
    return (
        f"{__doc__}\n\n--sampler NAME picks how (default tweedie):\n"
        + "\n".join(lines)
        + f"\n\nThe flags below are those of {flags}. {kind.name}: {kind.__doc__}"
    )


def build_command_sampler(command: SampleCommand, model: sedd.Model) -> Sampler:
    """The sampler of the flags; UserError where it does not go with the model."""
    verifier = inner = None
    if command.verifier is not None:
        verifier = text_verifier(
            model, load_function(command.verifier, "--verifier"), command.verifier
        )
    options = values(command.sampler)
    if isinstance(command.inner, Options):
        inner = command.inner.name
        options |= values(command.inner)
    sampler = build_sampler(
        command.sampler.name, model.schedule, inner=inner, verifier=verifier, **options
    )
    sampler.check(dataclasses.replace(model.denoiser, reshape=reshape_of(command.reshape)))
    return sampler


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
    about = (
        f"{one.request.id} · seed {one.request.seed} · {one.calls} network calls · "
        f"entropy {one.entropy:.2f} nats"
    )
    if one.score is not None:
        about += f" · score {one.score:.4g}"
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
            **({"inner": command.inner.name} if isinstance(command.inner, Options) else {}),
            **{
                k: str(v)
                for options in (command.sampler, command.inner)
                for k, v in dataclasses.asdict(options).items()
            },
            "network calls": str(max(a.calls for a in answers)),
            "checkpoint": str(command.checkpoint),
        },
        times_T1=None if answers[0].times is None else answers[0].times.tolist(),
    )


if __name__ == "__main__":
    run(main)
