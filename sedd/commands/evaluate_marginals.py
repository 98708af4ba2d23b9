"""Log marginals in ``sedd evaluate``: ``--marginals FILE`` and ``--marginal-check ORDERS``."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sedd.commands.evaluate_flags import EvaluateCommand
from sedd.errors import UserError
from sedd.evaluating.marginals import visible_tokens
from sedd.evaluation.datasets import DataSet
from sedd.evaluation.marginals import (
    LevelIdentity,
    check_head,
    log_marginals,
    marginals_section,
)
from sedd.evaluation.report import Section
from sedd.evaluation.scoring import EvaluationResult
from sedd.model import Model
from sedd.progress import track


@dataclass(frozen=True, kw_only=True, eq=False)
class RankedTexts:
    """The texts of ``--marginals``, checked, and the comparisons with the first data set.

    Args:
        command: the flags.
        model: the model, which has a marginal head.
        texts: the texts; none without ``--marginals``.
        x_SL: their tokens.
        visible_SL: the positions that are not in a gap.
    """

    command: EvaluateCommand
    model: Model
    texts: list[str]
    x_SL: np.ndarray
    visible_SL: np.ndarray

    @classmethod
    def of(cls, command: EvaluateCommand, model: Model) -> "RankedTexts | None":
        """Read the texts; None if neither flag is given.

        Raises:
            UserError: the model has no marginal head, or the file cannot be read, holds no gap, or
                has a text that does not fit; the message names its line.
        """
        if command.marginals is None and command.marginal_check is None:
            return None
        flag = "--marginal-check" if command.marginals is None else "--marginals"
        try:
            check_head(model.denoiser)
        except UserError as error:
            raise UserError(f"{flag}: {error}") from error
        lines = [] if command.marginals is None else list(read_texts(command.marginals))
        rows = []
        for number, text in lines:
            try:
                rows.append(visible_tokens(model, text))
            except UserError as error:
                where = f"--marginals {command.marginals}, line {number}"
                raise UserError(f"{where}: {error}") from error
        shape = (len(rows), model.length)
        return cls(
            command=command,
            model=model,
            texts=[text for _, text in lines],
            x_SL=np.array([x_L for x_L, _ in rows], np.int32).reshape(shape),
            visible_SL=np.array([visible_L for _, visible_L in rows], bool).reshape(shape),
        )

    def check(self, data: DataSet) -> None:
        """Check that the rows of ``data`` are texts of the head's length with a k-DCE bound.

        Raises:
            UserError: they have another length or padding, or another estimator was asked for.
        """
        flag = "--marginal-check" if self.command.marginals is None else "--marginals"
        if data.length != self.model.length or data.counts.sum() != len(data.chosen) * data.length:
            raise UserError(
                f"{flag}: the head was trained on rows of {self.model.length} tokens without "
                f"padding, and the first data set has rows of {data.length}"
                f"{'' if data.length != self.model.length else ' with padding'}"
            )
        if self.command.order is not None:
            raise UserError(f"{flag} compares with the k-DCE bound: leave out --order")

    def section(self, data: DataSet, result: EvaluationResult, figures: dict[str, Any]) -> Section:
        """Compute the log marginals of the texts and of the rows of ``data``.

        Args:
            data: the first data set.
            result: its bound.
            figures: the result is added to it under ``marginals``.
        """
        orders, size = self.command.marginal_check or 0, self.command.batch_size
        key = jax.random.key(self.command.seed)
        found = None
        if self.texts:
            starts = range(0, len(self.texts), size)
            batches = (
                (self.x_SL[start : start + size], self.visible_SL[start : start + size])
                for start in starts
            )
            batches = track(batches, "log marginals of the texts", len(starts))
            found = log_marginals(self.model.denoiser, key, batches, orders=orders)
        starts = range(0, len(data.chosen), size)
        batches = track(
            (data.rows(start, size)[:2] for start in starts),
            f"log marginals of {data.label}",
            len(starts),
        )
        rows = log_marginals(self.model.denoiser, key, batches, orders=orders)
        assert result.sequence_nats is not None
        identity = LevelIdentity.of(rows.log_marginal_S, result.sequence_nats, rows.known_S)
        ofdata = {k: v for k, v in rows.to_json().items() if k != "texts"}
        figures["marginals"] = {"level_identity": identity.to_json(), **ofdata}
        if found is not None:
            ranked = found.to_json()
            for text, one in zip(self.texts, ranked["texts"], strict=True):
                one["text"] = text
            figures["marginals"]["texts"] = ranked["texts"]
        return marginals_section(self.texts, found, rows, identity)


def read_texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each line of a file that is not empty.

    Raises:
        UserError: the file cannot be read, a line is not JSON with an "infill" or a "text", or no
            line of text has a gap.
    """
    where = f"--marginals {path}"
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"{where}: {reason}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"{where}: the file is empty")
    if path.suffix == ".jsonl":
        yield from (
            (number, _of_json(line, f"{where}, line {number}")) for number, line in numbered
        )
        return
    if not any("{mask" in line for _, line in numbered):
        raise UserError(
            f"{where}: no line has a gap; write {{mask:12}} for one of twelve tokens, also behind "
            "a text that ends before the length of the model"
        )
    yield from ((number, line.removesuffix("\r")) for number, line in numbered)


def _of_json(line: str, where: str) -> str:
    """The text of a line of JSON, as ``sedd sample`` reads and writes them."""
    try:
        value = json.loads(line)
        text = value["infill"] if "infill" in value else value["text"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f'{where}: no JSON with an "infill" or a "text"') from error
    if not isinstance(text, str):
        raise UserError(f'{where}: "infill" and "text" must be strings')
    return text
