"""The flags of ``evaluate``, ``sample`` and ``export`` that say how a model is loaded."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from jax.sharding import Mesh

import sedd
from sedd.commands.cli import note, unset
from sedd.errors import FieldError
from sedd.parameterizations.conditional import Normalise


@dataclass(frozen=True, kw_only=True)
class LoadFlags:
    """What a published model may need to be told.

    Raises:
        FieldError: ``mask_id`` is negative.
    """

    dtype: Annotated[Literal["float32", "bfloat16"] | None, unset("float32|bfloat16")] = None
    """Type in which the network computes. By default that of the run; float32 for published SEDD,
    RADD and MDLM; and the type of their parameters for other published models."""
    mask_id: Annotated[int | None, unset("INT")] = None
    """Id of the mask in a published model's own vocabulary, if its files do not state it."""
    normalise: Annotated[Normalise | None, unset("real|all")] = None
    """Which entries of the output the softmax at a mask is over: the tokens (real), or all rows of
    the vocabulary (all), as published samplers of large models compute confidences. By default that
    of the run, and real for published models."""
    trained_block: Annotated[int | None, unset("INT")] = None
    """Tokens in a block, for a published model that was trained by blocks and whose configuration
    does not say so."""

    def __post_init__(self):
        if self.mask_id is not None and self.mask_id < 0:
            raise FieldError("mask_id", f"must be at least 0, got {self.mask_id}")

    def load(self, checkpoint: str, *, step: Any = None, mesh: Mesh | None = None) -> sedd.Model:
        """Load a model with these settings, as ``sedd.load`` does, and print notes on it."""
        model = sedd.load(
            checkpoint,
            step=step,
            dtype=self.dtype,
            mask_id=self.mask_id,
            normalise=self.normalise,
            block=self.trained_block,
            mesh=mesh,
        )
        for line in () if model.layout is None else model.layout.notes:
            note(f"{checkpoint}: {line}")
        return model
