"""What a causal head or an HMM head gains, by the fraction of the tokens that is masked.

Each row has the nats per masked token of the trunk, which predicts the tokens independently, and of
the head, on the same masks of the validation text: a causal head predicts them one after the other
in a random order, an HMM head those of a window jointly. The error is that of the difference, over
sequences.

    python benchmarks/causal_head.py --checkpoint runs/causal_head
    python benchmarks/causal_head.py --checkpoint runs/hmm
"""

from dataclasses import dataclass
from pathlib import Path

import jax
from report import report, start

import sedd
from sedd.configuration.build_data import ValidationRows, build_data
from sedd.evaluation.joint_heads import joint_nats
from sedd.objectives.hmm import Hmm
from sedd.objectives.self_speculative import SelfSpeculative


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    checkpoint: Path
    """A run with a causal or an HMM head."""
    masked: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25, 0.125)
    """Fractions of the tokens that are masked."""
    sequences: int = 128
    """Sequences of the validation split, at most."""
    draws: int = 4
    """Masks and orders for each sequence."""
    seed: int = 0


def main(settings: Settings) -> None:
    """Measure every fraction, and print a table."""
    model = sedd.load(settings.checkpoint)
    if not isinstance(model.parts.objective, SelfSpeculative | Hmm):
        raise sedd.UserError(f"--checkpoint {settings.checkpoint}: it has no such head")
    data = build_data(model.config, tokenizer=model.tokenizer)
    held_out = ValidationRows(
        parts=[packed for packed, _ in data.validation],
        max_sequences=settings.sequences,
        batch_size=min(32, settings.sequences),
    )
    rows = []
    for masked in settings.masked:
        joint, trunk, gain = joint_nats(
            model.denoiser,
            model.parts.objective,
            jax.random.key(settings.seed),
            held_out,
            draws=settings.draws,
            masked=masked,
        )
        rows.append(
            {
                "masked": masked,
                "trunk": trunk.value,
                "head": joint.value,
                "difference": gain.value,
                "±": gain.error,
            }
        )
    report("causal_head", rows, draws=settings.draws, sequences=settings.sequences)


if __name__ == "__main__":
    start(main, Settings, __doc__)
