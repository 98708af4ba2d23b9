"""The diagnosis of predictions in ``sedd evaluate``: ``--diagnose [RATE ...]``."""

from typing import Any

import jax

from sedd.commands.evaluate_flags import EvaluateCommand
from sedd.errors import FieldError, UserError
from sedd.evaluating.diagnosis import diagnosis_of
from sedd.evaluation.datasets import DataSet
from sedd.evaluation.diagnosis import RATES, check_conditionals, repeats_of
from sedd.evaluation.diagnosis_report import diagnosis_section
from sedd.evaluation.price_draws import check_model, check_scored
from sedd.evaluation.report import Section
from sedd.model import Model
from sedd.progress import track


def check_diagnosis(command: EvaluateCommand, model: Model) -> None:
    """Raise UserError if the predictions of the model cannot be measured as the flags say."""
    assert command.diagnose is not None
    try:
        check_conditionals(model.denoiser)
        repeats_of(command.diagnose or RATES, command.protocol.draws)
    except FieldError as error:
        flag = "--draws" if error.field == "draws" else "--diagnose"
        raise UserError(error.named(flag)) from error
    except UserError as error:
        raise UserError(f"--diagnose: {error}") from error


def diagnosis_of_data(
    command: EvaluateCommand, model: Model, data: DataSet, figures: dict[str, Any]
) -> Section:
    """Measure the predictions on the text of a data set; adds to ``figures``."""
    assert command.diagnose is not None
    found = diagnosis_of(
        model,
        data,
        jax.random.key(command.seed),
        rates=command.diagnose or RATES,
        draws=command.protocol.draws,
        batch_size=command.batch_size,
        track=track,
    )
    commonest = model.text_reader.tokenizer.decode([found.commonest])
    figures["diagnosis"] = found.to_json()
    figures["diagnosis"]["commonest"]["text"] = commonest
    return diagnosis_section(found, commonest=commonest)


def priced_calls(model: Model, data: DataSet) -> tuple[tuple[int, ...], str]:
    """The numbers of network calls whose price belongs to a diagnosis, and why if there are none.

    They are the powers of 2 below the length of a text, and the length.
    """
    try:
        check_model(model.denoiser)
        check_scored(data.counts.sum() == len(data.chosen) * data.length)
    except UserError as error:
        return (), str(error)
    powers = [2**power for power in range((data.length - 1).bit_length())]
    return (*powers, data.length), ""
