"""The flags of ``sedd sample`` for distributional control, and the checks that need no model."""

import math
from dataclasses import dataclass
from typing import Annotated

from sedd.commands.cli import unset
from sedd.configuration.user_function import load_function
from sedd.control.draws import POOL, Method
from sedd.control.features import Features
from sedd.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ControlFlags:
    """Features of the texts whose means are to be ``--moments``; see docs/control.md."""

    features: Annotated[str | None, unset("FILE.py:FUNCTION,…")] = None
    """Functions from a list of texts to a finite number each, such as 1 for a text with a property
    and 0 for one without. The texts get the means --moments, and else follow the model."""
    moments: Annotated[str | None, unset("FLOAT,…")] = None
    """The wanted mean of each feature, in the order of --features. 1 or 0 for a feature with the
    values 0 and 1 is a condition that every text meets."""
    method: Annotated[Method | None, unset("reject|resample|qrs|particle|weigh")] = None
    """reject (the default) is exact up to the error of the weights, for features between 0 and 1;
    qrs accepts more texts and deviates by --total-variation; resample picks from a pool, with
    repeats; particle steers the sampler --inner and is approximate, for rare features; weigh writes
    a pool with a weight for each text, for train.py --objective gdc."""
    pool: Annotated[int | None, unset("INT")] = None
    """Texts drawn to determine the weights of the features, and as many again for the figures and
    to draw from; by default 1024."""
    total_variation: Annotated[float | None, unset("FLOAT")] = None
    """The largest total variation between the law of qrs and the controlled one, as the first pool
    estimates it; by default 0.05."""
    base: Annotated[str | None, unset("DIR|hf://OWNER/NAME")] = None
    """The model whose law is controlled, if --checkpoint only proposes texts, for resample and
    weigh. Needs --sampler ordered in a fixed order, whose law is known, and no given text."""

    @property
    def wanted(self) -> list[float]:
        """The moments.

        Raises:
            UserError: one of them is no finite number.
        """
        found = []
        for word in (self.moments or "").split(","):
            try:
                found.append(float(word))
            except ValueError:
                raise UserError(
                    f"--moments {self.moments}: {word.strip()!r} is no number"
                ) from None
            if not math.isfinite(found[-1]):
                raise UserError(f"--moments {self.moments}: {word} is not finite")
        return found

    def load(self) -> Features:
        """Load the functions. Features are named FUNCTION, or FILE.py:FUNCTION if two names clash.

        Raises:
            UserError: a function cannot be loaded.
        """
        specs = [spec.strip() for spec in (self.features or "").split(",")]
        names = [spec.rpartition(":")[2] for spec in specs]
        names = specs if len(set(names)) < len(names) else names
        if len(set(names)) < len(names):
            raise UserError(f"--features {self.features}: the same feature twice")
        functions = (load_function(spec, "--features") for spec in specs)
        return Features(dict(zip(names, functions, strict=True)))


def check_control(command) -> None:
    """Check the flags of control against each other and against the other flags of ``sample``.

    Args:
        command: the ``SampleCommand``.

    Raises:
        UserError: a flag is missing, out of range, or does not go with another one.
    """
    flags: ControlFlags = command.control
    names = ("moments", "method", "pool", "total_variation", "base")
    given = {f"--{name.replace('_', '-')}": getattr(flags, name) for name in names}
    if flags.features is None:
        for flag, value in given.items():
            if value is not None:
                raise UserError(f"{flag} {value}: it controls features, give --features as well")
        return
    where = f"--features {flags.features}"
    if flags.moments is None:
        raise UserError(f"{where}: give --moments as well, the wanted mean of each feature")
    features, wanted = flags.load(), flags.wanted
    if len(wanted) != len(features.names):
        raise UserError(
            f"--moments {flags.moments}: must be one for each of the features "
            f"{', '.join(features.names)}, got {len(wanted)}"
        )
    if flags.pool is not None and flags.pool < 2:
        raise UserError(f"--pool must be at least 2, got {flags.pool}")
    if flags.total_variation is not None:
        if flags.method != "qrs":
            raise UserError(
                f"--total-variation {flags.total_variation}: it is a flag of --method qrs"
            )
        if not 0 <= flags.total_variation < 1:
            raise UserError(f"--total-variation must be in [0, 1), got {flags.total_variation}")
    if command.seed + 2 * (flags.pool or POOL) + command.num > 2**32:
        raise UserError(f"--seed {command.seed}: the seeds of two pools go beyond 2**32 - 1")
    if command.requests is not None:
        raise UserError(
            f"--requests {command.requests}: a control belongs to one form of request; give "
            "--prompt, --infill and the like, and --num"
        )
    if command.trace is not None:
        raise UserError(f"--trace {command.trace}: --features draws texts that are not returned")
    if flags.method == "weigh" and command.num != 1:
        raise UserError(f"--num {command.num}: --method weigh writes all texts of a --pool")
    if flags.base is not None:
        _check_proposing(command)
    if flags.method == "particle":
        _check_particle(command)


def _check_proposing(command) -> None:
    """Check the flags beside --base: with it, the law of the proposals must be the sampler's own.

    Args:
        command: the ``SampleCommand``.

    Raises:
        UserError: another method or sampler, or a flag that changes the law.
    """
    flags: ControlFlags = command.control
    where = f"--base {flags.base}"
    if flags.method not in ("resample", "weigh"):
        raise UserError(
            f"{where}: it goes with --method resample or weigh, since the ratio of two models has "
            "no known bound"
        )
    sampler = command.sampler
    if sampler.name != "ordered" or sampler.steps is not None or sampler.order == "random":
        raise UserError(
            f"{where}: the law of the proposals must be known: give --sampler ordered in a fixed "
            "--order, without --steps"
        )
    names = ("prompt", "suffix", "infill", "chat", "regex", "json_schema", "top_k", "top_p")
    given = {name: getattr(command, name) for name in (*names, "guidance", "logit_processor")}
    given["temperature"] = command.temperature != 1
    given["watermark"] = command.mark.watermark
    for name, value in given.items():
        if value:
            raise UserError(
                f"--{name.replace('_', '-')}: with {where} the law of the proposals must be the "
                "model's own, from nothing"
            )


def _check_particle(command) -> None:
    """Check the flags beside --method particle, which is a sampler itself.

    Args:
        command: the ``SampleCommand``.

    Raises:
        UserError: a flag of the sampler contradicts the method.
    """
    if command.sampler.name != "particle":
        raise UserError(
            f"--sampler {command.sampler.name}: the method particle is a sampler itself; write "
            f"--inner {command.sampler.name} for the one that it steers"
        )
    if command.verifier:
        raise UserError(
            f"--verifier {' '.join(command.verifier)}: with --method particle the features are the "
            "score"
        )
    if command.sampler.tilt != 1:
        raise UserError(f"--tilt {command.sampler.tilt}: --method particle determines the weights")
