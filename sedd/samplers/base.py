"""The base of samplers, and the loop of samplers that proceed round by round.

A ``Sampler`` is a function of a denoiser, keys and given tokens. A ``SteppedSampler`` is one that
is written as ``start``, ``advance`` and ``active`` on a ``State``; most samplers are. The loop that
runs these three methods is here. Samplers that wrap another one (blocks, particles) run the methods
of the inner sampler themselves.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from sedd.denoiser import Denoiser
from sedd.errors import UserError
from sedd.parameterizations.mean import Mean
from sedd.schedules import NoiseSchedule
from sedd.types import Array, Bool, Float, Int, Keys, Shaped
from sedd.watermark.base import Watermark


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Samples:
    """The result of a sampler; what it does not compute is None.

    Attributes:
        tokens_BL: the drawn sequences, with the given tokens.
        calls_B: network calls that each sequence needed; guidance doubles them.
        rows_B: a sequence's entries on the batch axis, summed over these calls.
        trace_TBL: the tokens at the start and after every round, if a trace was asked for.
        rounds: the number of rounds that were run. Frames of the trace after them repeat the last
            one.
        times_T: the diffusion times of the trace's frames, from 1 to 0.
        log_prob_B: log probability of the drawn tokens.
        score_B: score of a search's verifier; [B, E] of an ensemble.
        verifier_calls_B: how many texts a search's verifiers scored.
        log_partition_B: a search's estimate of log E[exp(tilt·score)].
    """

    tokens_BL: Int[Array, "B L"]
    calls_B: Int[Array, " B"]
    rows_B: Int[Array, " B"]
    trace_TBL: Int[Array, "T B L"] | None = None
    rounds: Int[Array, ""] | None = None
    times_T: Float[Array, " T"] | None = None
    log_prob_B: Float[Array, " B"] | None = None
    score_B: Float[Array, "B ..."] | None = None
    verifier_calls_B: Int[Array, " B"] | None = None
    log_partition_B: Float[Array, " B"] | None = None


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """Draws sequences from a denoiser in one compiled program with static shapes.

    Fields with a default are the options of a sampler; ``schedule`` comes from the model. A sampler
    is hashable, because jit takes it as a static argument. Every subclass states the law of its
    samples in its docstring.
    """

    schedule: NoiseSchedule

    needs_absorbing: ClassVar[bool] = False
    needs_time_independent: ClassVar[bool] = False
    # Whether the law is right with a network that takes a new latent in every call.
    takes_latent: ClassVar[bool] = True
    caveat: ClassVar[str] = ""  # a warning for users, if the law is biased at any number of steps
    default_inner: ClassVar[str] = "event_jump"  # of a sampler that wraps another one

    @property
    def left_to_right(self) -> bool:
        """Whether positions are drawn one by one from left to right, as causal models need."""
        return False

    @property
    def by_block(self) -> bool:
        """Whether every block is drawn before the next one, as block models need."""
        return self.left_to_right

    @property
    def width(self) -> int:
        """Sequences that are held in memory for each returned sequence."""
        return 1

    def refuses(self, watermark: Watermark) -> str:
        """Why the sampler cannot keep its law under a watermark; empty if it can.

        A watermark that replaces the noise needs each position to be drawn once, by ``tokens_at``
        with the denoiser's watermark. One that changes the conditionals needs the sampler to draw
        from ``Denoiser.log_conditional_rows``.
        """
        return "it may draw a position more than once" if watermark.replaces_noise else ""

    def within(self, denoiser: Denoiser) -> Denoiser:
        """The model for which an inner sampler has to be checked: this one, by default."""
        return denoiser

    def check(self, denoiser: Denoiser) -> None:
        """Raise UserError if this sampler cannot draw from the model, naming one that can."""
        name = type(self).__module__.rpartition(".")[2]
        if self.needs_absorbing and not denoiser.process.absorbing:
            raise UserError(
                f"sampler {name!r} needs a model of the absorbing process; in the process of this "
                "model visible tokens may be wrong (euler and tweedie work on any process)"
            )
        if self.needs_time_independent and not denoiser.time_independent:
            raise UserError(
                f"sampler {name!r} needs a time-independent model: this one depends on the noise "
                "level (euler, tweedie and remdm work on it)"
            )
        if denoiser.causal and not self.left_to_right:
            raise UserError(
                f"sampler {name!r} cannot draw from an autoregressive model: use the sampler "
                "ordered with the order forward, without steps (--sampler ordered --order "
                "forward)"
            )
        if denoiser.block is not None and not self.by_block:
            raise UserError(
                f"sampler {name!r} cannot draw from a block model by itself, since it fills "
                "positions of all blocks: use semi_autoregressive, with this one as its inner one "
                f"(--sampler semi_autoregressive --inner {name})"
            )
        if denoiser.causal and (denoiser.guided or denoiser.constraint is not None):
            raise UserError(
                "guidance and constraints need predictions at positions after a mask, which this "
                "model, an autoregressive one, cannot make"
            )
        if denoiser.watermark is not None and (reason := self.refuses(denoiser.watermark)):
            kind = type(denoiser.watermark).__name__.lower()
            raise UserError(
                f"sampler {name!r} takes no {kind} watermark: {reason} (event_jump, ordered, "
                "planned, confidence and entropy_bounded take it, also within best_of_n and "
                "semi_autoregressive)"
            )
        self._check_joint(name, denoiser)
        if denoiser.process.absorbing:
            return
        reshape = denoiser.reshape
        # Temperature, top-k and top-p act on x_θ, the prediction of ``Mean``.
        mean = isinstance(denoiser.parameterization, Mean) and not denoiser.guided
        if reshape is not None and not (mean and reshape.logit_processor is None):
            kinds = "temperature, top-k, top-p, guidance and logit processors"
            raise UserError(
                f"{kinds} act on the conditional of clean tokens, which exists on the absorbing "
                "process only; this model is of another process, on which the first three go with "
                "the parameterization mean"
            )
        if denoiser.constraint is not None:
            raise UserError(
                "constraints act on the conditional of clean tokens, which exists on the absorbing "
                "process only; this model is of another process"
            )

    def _check_joint(self, name: str, denoiser: Denoiser) -> None:
        """The part of ``check`` about tokens of a call that are not independent."""
        if denoiser.network.has_latent and not self.takes_latent:
            raise UserError(
                f"sampler {name!r} compares distributions or noise of several calls, which have "
                "different latents here (event_jump, ordered, confidence and others draw from this "
                "model)"
            )
        if denoiser.windows is not None:
            for given, what, flag in (
                (denoiser.constraint, "constraints", "--regex and --json-schema"),
                (denoiser.watermark, "watermarks", "--watermark"),
            ):
                if given is not None:
                    raise UserError(
                        f"windows drawn by an HMM head take no {what}: leave out --window or {flag}"
                    )

    @abstractmethod
    def __call__(
        self,
        denoiser: Denoiser,
        keys_B: Keys,
        tokens_BL: Int[Array, "B L"],
        fixed_BL: Bool[Array, "B L"],
        *,
        trace: bool = False,
    ) -> Samples:
        """Draw one sequence for each key.

        On an absorbing process the free positions follow the model's conditional given the fixed
        tokens, with an error that vanishes as the steps grow. Samplers with another law state it in
        their docstring; ``caveat`` warns users of an unintended bias. On a
        uniform process the free positions do not follow the
        conditional: the score of such a model regards the fixed tokens as noisy. A fixed mask stays
        a mask.

        Args:
            denoiser: the model.
            keys_B: a key for each sequence, or keys of its positions (``sedd.types.Keys``).
            tokens_BL: the given tokens; ignored at free positions.
            fixed_BL: positions that keep their token of ``tokens_BL``.
            trace: also return the tokens after every round.

        Raises:
            UserError: as ``check`` does.
        """


@dataclass(frozen=True)
class SamplerOptions:
    """The name of a sampler with its options, to be built later with a model's schedule.

    ``values`` may hold ``inner``: another sampler, as a name, as options or built.
    """

    name: str
    values: Mapping[str, Any]

    def updated(self, changes: Mapping[str, Any]) -> "SamplerOptions":
        """Return a copy with some options changed.

        A new value replaces the old one. The exception is a mapping for ``inner`` where the old
        ``inner`` is a ``SamplerOptions``: it changes the options of this one.
        """
        values = {**self.values, **changes}
        inner = self.values.get("inner")
        if isinstance(inner, SamplerOptions) and isinstance(values["inner"], Mapping):
            values["inner"] = inner.updated(values["inner"])
        return SamplerOptions(self.name, values)


def options(name: str, /, **values: Any) -> SamplerOptions:
    """Name a sampler and set its options, for ``sedd.sample`` or as the ``inner`` of another.

    Args:
        name: the name of the sampler, which is that of its module: ``event_jump`` for the class
            ``EventJump``, ``remdm`` for ``ReMDM``.
        values: its options. They are checked when the sampler is built.

    Example:
        >>> import sedd
        >>> inner = sedd.samplers.options("confidence", by="margin", steps=16)
        >>> sedd.samplers.options("semi_autoregressive", inner=inner).values["inner"].name
        'confidence'
    """
    return SamplerOptions(name, values)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class State:
    """The state of a ``SteppedSampler`` between two rounds. Every leaf has a row for each sequence.

    Rows can therefore be copied and exchanged, which particles and blocks do. Every sequence counts
    its own rounds and stops by itself.
    """

    x_BL: Int[Array, "B L"]  # current tokens
    free_BL: Bool[Array, "B L"]  # positions to draw; the others are given
    keys_B: Keys
    calls_B: Int[Array, " B"]  # network calls so far; guidance is not counted here
    rows_B: Int[Array, " B"]  # a sequence's entries on the batch axis, summed over these calls
    round_B: Int[Array, " B"]  # rounds in which the sequence was active
    plan: Any  # a pytree of the sampler's own, such as an order, or what rounds hand on
    log_prob_B: Float[Array, " B"] | None = None  # of the tokens drawn so far, in nats

    @classmethod
    def starting(cls, keys_B: Keys, **fields: Any) -> "State":
        """A state with these fields, before any round or network call."""
        zero_B = jnp.zeros(len(keys_B), jnp.int32)
        return cls(keys_B=keys_B, calls_B=zero_B, rows_B=zero_B, round_B=zero_B, **fields)

    def called(self, calls_B: Shaped[Array, " B"], rows_B=None) -> "State":
        """Return the state with further network calls, each of one row unless ``rows_B`` is given.

        Args:
            calls_B: network calls of each sequence; a boolean counts as 0 or 1.
            rows_B: how many entries each sequence had on the batch axis of these calls.
        """
        rows_B = calls_B if rows_B is None else rows_B
        return replace(self, calls_B=self.calls_B + calls_B, rows_B=self.rows_B + rows_B)

    def moved(self, x_BL: Int[Array, "B L"], active_B: Bool[Array, " B"]) -> "State":
        """Return the state one round later, with new tokens at free positions of active rows.

        Args:
            x_BL: new tokens; ignored at given positions and in sequences that are not active.
            active_B: sequences that took part in this round.
        """
        return replace(
            self,
            x_BL=jnp.where(self.free_BL & active_B[:, None], x_BL, self.x_BL),
            round_B=self.round_B + active_B,
        )


@dataclass(frozen=True, kw_only=True)
class SteppedSampler(Sampler):
    """A sampler that proceeds in rounds of at most one network call (two with ``speculative``).

    Calling the sampler runs ``start``, and then ``advance`` while any sequence is ``active``.

    ``calls_on_tokens`` states that ``advance`` calls the network once, by
    ``denoiser.hidden(state.x_BL, …)``, and in no other way. The call can then be made beforehand.
    """

    calls_on_tokens: ClassVar[bool] = False

    @abstractmethod
    def start(
        self,
        denoiser: Denoiser,
        keys_B: Keys,
        tokens_BL: Int[Array, "B L"],
        fixed_BL: Bool[Array, "B L"],
    ) -> State:
        """The state before the first round; arguments as of ``Sampler.__call__``."""

    @abstractmethod
    def active(self, denoiser: Denoiser, state: State) -> Bool[Array, " B"]:
        """Which sequences need another round."""

    @abstractmethod
    def advance(self, denoiser: Denoiser, state: State) -> State:
        """Run one round of the active sequences; the others stay unchanged."""

    @abstractmethod
    def max_rounds(self, denoiser: Denoiser, length: int) -> int:
        """An upper bound on the rounds for ``length`` free positions.

        A trace has one frame more, for the start.
        """

    def sigma(self, state: State) -> Float[Array, " B"]:
        """The total noise of the next round, for networks that are conditioned on it."""
        return jnp.zeros(state.round_B.shape)

    def times(self) -> Float[Array, " T"] | None:
        """Diffusion times of the trace's frames; None if sequences differ in their times."""
        return None

    def __call__(self, denoiser, keys_B, tokens_BL, fixed_BL, *, trace=False):
        self.check(denoiser)
        batch, length = tokens_BL.shape
        state = self.start(denoiser, keys_B, tokens_BL, fixed_BL)
        frames = None
        if trace:
            frames = jnp.zeros(
                (self.max_rounds(denoiser, length) + 1, batch, length), state.x_BL.dtype
            )
            frames = frames.at[0].set(state.x_BL)

        def one_round(carry):
            state, frames, rounds = carry
            state = self.advance(denoiser, state)
            rounds = rounds + 1
            return state, record(frames, rounds, state.x_BL), rounds

        state, frames, rounds = jax.lax.while_loop(
            lambda carry: denoiser.anywhere(self.active(denoiser, carry[0])),
            one_round,
            (state, frames, jnp.zeros((), jnp.int32)),
        )
        return Samples(
            tokens_BL=state.x_BL,
            calls_B=state.calls_B * denoiser.calls_each,
            rows_B=state.rows_B * denoiser.calls_each,
            trace_TBL=None if frames is None else fill(frames, rounds),
            rounds=rounds,
            times_T=self.times() if trace else None,
            log_prob_B=state.log_prob_B,
        )


def layers(sampler: Sampler) -> Iterator[Sampler]:
    """Yield the sampler, the sampler that it wraps, and so on inwards."""
    part: Sampler | None = sampler
    while part is not None:
        yield part
        part = getattr(part, "inner", None)


def record(frames, index, x_BL):
    """Set frame ``index`` to ``x_BL``; None stays None, for calls without a trace."""
    return None if frames is None else frames.at[index].set(x_BL)


def fill(frames_TBL: Int[Array, "T B L"], rounds: Int[Array, ""]) -> Int[Array, "T B L"]:
    """Set the frames after the last round to the frame of the last round."""
    later_T = jnp.arange(frames_TBL.shape[0]) > rounds
    return jnp.where(later_T[:, None, None], frames_TBL[rounds][None], frames_TBL)
