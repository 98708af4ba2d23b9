"""``sedd detect``: test texts for the watermark of a secret, by exact p-values.

The texts are the lines of ``sedd sample --output``, or any JSON Lines file of objects with
``tokens`` or ``text``. What ``sedd sample`` writes beside a watermarked text (``watermark``: its
kind, its nonce, and which tokens carry it) is used where it is there.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import tyro
from rich.table import Table

from sedd.commands.cli import console, fail, note, parse, unset
from sedd.commands.watermark_flags import notes_on_secret, secret_of
from sedd.data.tokenizers import Tokenizer
from sedd.errors import FieldError, UserError
from sedd.interop.hub import fetch
from sedd.interop.layouts.base import find_config, read_layout
from sedd.interop.vocabulary import published_tokenizer, settle
from sedd.model import read_config, read_tokenizer
from sedd.progress import Activity
from sedd.watermark.detection import Detection, detect
from sedd.watermark.scheme import Kind, check_gamma, positions_of

TITLE = "Test texts for the watermark of a secret."


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectCommand:
    """The flags of ``sedd detect``.

    Raises:
        FieldError: a number is out of range.
    """

    texts: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE.jsonl")]
    """The texts: one JSON object a line, with tokens (a list of ids) or text. The lines of
    sample.py --output also say which watermark they have."""
    watermark_key: Path
    """The file of the secret."""
    watermark: Annotated[Kind | None, unset("gumbel|green")] = None
    """The kind of watermark; by default what the line says, or gumbel."""
    checkpoint: Annotated[str | None, unset("DIR|hf://OWNER/NAME")] = None
    """The model whose tokenizer reads texts without tokens."""
    offsets: int = 0
    """gumbel: how many positions a text may be shifted to either side, because text was cut off or
    put before it; 0 for none. All shifts are tried."""
    nonces: Annotated[int | None, unset("INT")] = None
    """gumbel: try the nonces 0 to INT - 1, which are seeds of sample.py; by default the nonce that
    the line says, or 0."""
    candidates: Annotated[int | None, unset("INT")] = None
    """gumbel: try so many candidates of each nonce, the --n of best_of_n; by default the number
    that the line says, or 1."""
    watermark_gamma: Annotated[float | None, unset("FLOAT")] = None
    """green: the share of the vocabulary in a list; by default what the line says, or 0.5."""
    json: bool = False
    """Print a JSON object for each text instead of a table."""

    def __post_init__(self):
        for name, least in (("offsets", 0), ("nonces", 1), ("candidates", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise FieldError(name, f"must be at least {least}, got {value}")
        if self.watermark_gamma is not None:
            check_gamma(self.watermark_gamma, "watermark_gamma")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """One line of the file in tokens, with what it says about its watermark."""

    name: str | int
    tokens_L: np.ndarray
    scored_L: np.ndarray | None
    mark: dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    """Print the p-value of each text.

    Returns:
        0, or 2 if a line was refused; the other lines are tested.

    Raises:
        UserError: a file cannot be read, or holds no texts.
    """
    command = parse(DetectCommand, arguments, description=TITLE)
    secret = secret_of(command.watermark_key)
    for message in notes_on_secret(command.watermark_key, secret):
        note(message)
    tokenizer = None if command.checkpoint is None else tokenizer_of(command.checkpoint)
    table = Table()
    for name in ("id", "p-value", "statistic", "tokens", "watermark", "nonce", "offset", "tests"):
        table.add_column(name, overflow="fold")  # on a narrow terminal nothing is cut off
    code = count = 0
    with Activity("testing texts") as activity:
        for one in tested(command, secret, tokenizer):
            count += 1
            if isinstance(one, UserError):
                with activity.paused():
                    code = fail(str(one))
            elif command.json:
                with activity.paused():
                    print(json.dumps(as_json(*one), ensure_ascii=False))
            else:
                table.add_row(*as_row(*one))
    if not count:
        raise UserError(f"{command.texts}: the file holds no texts")
    if table.row_count:
        console.print(table)
    return code


def tested(
    command: DetectCommand, secret: bytes, tokenizer: Tokenizer | None
) -> Iterator[tuple[Text, Kind, Detection] | UserError]:
    """Yield each text with its result, and for a bad line a UserError that names it.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        file = command.texts.open("rb")
    except OSError as error:
        raise UserError(f"{command.texts}: {error.strerror}") from None
    with file:
        for number, line in enumerate(file, 1):
            if line.strip(b"\xef\xbb\xbf \t\r\n"):
                try:
                    text = text_of(line, number, tokenizer)
                    yield text, *test(text, secret, command)
                except UserError as error:
                    yield UserError(f"{command.texts}, line {number}: {error}")


def test(text: Text, secret: bytes, command: DetectCommand) -> tuple[Kind, Detection]:
    """Test one text; flags come before what its line says."""
    mark = text.mark
    kind = command.watermark or mark.get("kind", "gumbel")
    gamma = command.watermark_gamma or mark.get("gamma", 0.5)
    nonces = [mark.get("nonce", 0)] if command.nonces is None else command.nonces
    return kind, detect(
        text.tokens_L,
        secret,
        kind=kind,
        nonces=nonces,
        candidates=command.candidates or mark.get("candidates", 1),
        offsets=command.offsets,
        scored=text.scored_L,
        gamma=gamma,
    )


def as_json(text: Text, kind: Kind, found: Detection) -> dict[str, Any]:
    """The JSON object of a text."""
    return {"id": text.name, "watermark": kind, **dataclasses.asdict(found)}


def as_row(text: Text, kind: Kind, found: Detection) -> tuple[str, ...]:
    """The row of a text in the table."""
    nonce = "" if found.nonce is None else str(found.nonce)
    if found.candidate:
        nonce += f", candidate {found.candidate}"
    return (
        str(text.name),
        "< 1e-300" if found.p_value == 0 else f"{found.p_value:.3g}",
        f"{found.statistic:.2f}",
        str(found.scored),
        kind,
        nonce,
        "" if found.offset is None else str(found.offset),
        str(found.tests),
    )


def tokenizer_of(checkpoint: str) -> Tokenizer:
    """The tokenizer of a run or of a published checkpoint, without its weights.

    Raises:
        UserError: there is none.
    """
    path = fetch(checkpoint, weights=False)
    if read_config(path) is not None:
        return read_tokenizer(path)
    config = find_config(path)
    if config is None:
        raise UserError(f"--checkpoint {checkpoint}: no config.json, so it is no checkpoint")
    _, tokenizer = settle(read_layout(config), published_tokenizer(path), None, config)
    if tokenizer is None:
        raise UserError(f"--checkpoint {checkpoint}: it has no tokenizer")
    return tokenizer


def text_of(line: bytes, number: int, tokenizer: Tokenizer | None) -> Text:
    """One line of the file.

    Raises:
        UserError: it is malformed, or its text cannot be read.
    """
    try:
        data: Any = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error})") from None
    if not isinstance(data, dict) or not {"tokens", "text"} & data.keys():
        raise UserError("a text must be an object with tokens or text")
    mark = mark_of(data.get("watermark"))
    name = data.get("id", number)
    tokens = data.get("tokens")
    if tokens is None:
        if not isinstance(data["text"], str):
            raise UserError("text must be a string")
        if tokenizer is None:
            raise UserError(
                "it has text and no tokens: give --checkpoint, whose tokenizer reads it"
            )
        return Text(
            name=name,
            tokens_L=tokenizer.encode_batch([data["text"]])[0],
            scored_L=None,
            mark=mark,
        )
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise UserError("tokens must be a list of token ids")
    tokens_L = np.asarray(tokens, np.int64)
    runs = mark.get("scored")
    scored_L = None if runs is None else positions_of(runs, len(tokens))
    return Text(name=name, tokens_L=tokens_L, scored_L=scored_L, mark=mark)


def mark_of(value: Any) -> dict[str, Any]:
    """What a line says about its watermark, checked; empty if it says nothing.

    Raises:
        UserError: a field has the wrong type.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError("watermark must be an object")

    def is_count(number, least):
        return type(number) is int and least <= number < 2**32

    def is_run(run):
        return isinstance(run, list) and len(run) == 2 and all(is_count(end, 0) for end in run)

    fits = {
        "kind": lambda kind: kind in get_args(Kind),
        "nonce": lambda nonce: is_count(nonce, 0),
        "candidates": lambda candidates: is_count(candidates, 1),
        "gamma": lambda gamma: isinstance(gamma, float) and 0 < gamma < 1,
        "scored": lambda runs: isinstance(runs, list) and all(map(is_run, runs)),
    }
    for name, of in fits.items():
        if name in value and not of(value[name]):
            raise UserError(f"watermark.{name}: got {json.dumps(value[name])[:80]}")
    return {name: value[name] for name in fits if name in value}
