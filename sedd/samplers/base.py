"""The base of samplers, and the loop of those that proceed round by round."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from sedd.denoiser import Denoiser
from sedd.errors import UserError
from sedd.schedules import NoiseSchedule
from sedd.types import Array, Bool, Float, Int, Key


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Samples:
    """The result of a sampler."""

    tokens_BL: Int[Array, "B L"]
    calls_B: Int[Array, " B"]  # network calls that each sequence needed; guidance doubles them
    trace_TBL: Int[Array, "T B L"] | None = None  # the state at first and after every round
    rounds: Int[Array, ""] | None = None  # how many there were: the rest of the trace repeats
    times_T: Float[Array, " T"] | None = None  # diffusion times of the trace's frames, 1 to 0
    score_B: Float[Array, " B"] | None = None  # the verifier's, where there is one


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """Draws sequences from a denoiser, under one jit with static shapes; a key a sequence.

    The options are the fields with a default; ``schedule`` comes from the model. A sampler is
    hashable, so that jit takes it as a static argument.
    """

    schedule: NoiseSchedule

    needs_absorbing: ClassVar[bool] = False
    needs_time_independent: ClassVar[bool] = False
    caveat: ClassVar[str] = ""  # a warning for users: in what way the law is biased

    @property
    def left_to_right(self) -> bool:
        """Whether each position is drawn given those before it: for autoregressive models."""
        return False

    @property
    def width(self) -> int:
        """How many sequences are held in memory for each one that is returned."""
        return 1

    def check(self, denoiser: Denoiser) -> None:
        """Raise UserError if the model is not of the kind that this sampler needs."""
        name = type(self).__module__.rpartition(".")[2]
        if self.needs_absorbing and not denoiser.process.absorbing:
            raise UserError(
                f"sampler {name!r} needs a model of the absorbing process: this one's lets visible "
                "tokens be wrong (euler and tweedie work on any)"
            )
        if self.needs_time_independent and not denoiser.time_independent:
            raise UserError(
                f"sampler {name!r} needs a time-independent model: this one depends on the noise "
                "level (euler, tweedie and remdm work on it)"
            )
        if denoiser.causal and not self.left_to_right:
            raise UserError(
                f"sampler {name!r} cannot draw from this model, which is autoregressive: use "
                "--sampler ordered --order forward, without steps"
            )
        if denoiser.causal and (denoiser.guided or denoiser.constraint is not None):
            raise UserError(
                "guidance and constraints read positions that follow masks, of which this model, "
                "an autoregressive one, knows nothing"
            )
        for what, given in (
            ("temperature, top-k, top-p, guidance and logit processors", denoiser.reshape),
            ("constraints", denoiser.constraint),
        ):
            if given is not None and not denoiser.process.absorbing:
                raise UserError(
                    f"{what} act on the conditional of clean tokens, which exists on the absorbing "
                    "process only: this model's is another"
                )

    @abstractmethod
    def __call__(
        self,
        denoiser: Denoiser,
        keys_B: Key[Array, " B"],
        tokens_BL: Int[Array, "B L"],
        fixed_BL: Bool[Array, "B L"],
        *,
        trace: bool = False,
    ) -> Samples:
        """Draw one sequence a key; where ``fixed_BL``, the token of ``tokens_BL`` is kept.

        On an absorbing process the other positions follow the conditional given the fixed tokens,
        as the steps grow. On a uniform process they do not: its score takes given tokens for noisy
        ones. A fixed mask stays a mask, and carries no information.

        Each sampler states its law in its docstring. Raises UserError as ``check`` does.
        """


@dataclass(frozen=True)
class SamplerOptions:
    """A sampler by name with its options, to be built with a model's schedule.

    ``values`` may hold ``inner``: the name, the options or the instance of another sampler.
    """

    name: str
    values: Mapping[str, Any]

    def updated(self, changes: Mapping[str, Any]) -> "SamplerOptions":
        """These options with some changed; a mapping in place of ``inner`` changes those within."""
        values = {**self.values, **changes}
        inner = self.values.get("inner")
        if isinstance(inner, SamplerOptions) and isinstance(values["inner"], Mapping):
            values["inner"] = inner.updated(values["inner"])
        return SamplerOptions(self.name, values)


def options(name: str, /, **values: Any) -> SamplerOptions:
    """The sampler of that name with options of its own, for ``sedd.sample`` and as ``inner``.

    Names and values are checked when the sampler is built.

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
    """The state between two rounds. Every leaf has a row a sequence.

    Rows can therefore be copied and exchanged, which blocks and particles do. Each sequence counts
    its own rounds, and its count stops once it is done.
    """

    x_BL: Int[Array, "B L"]
    free_BL: Bool[Array, "B L"]  # positions to draw; the others are given
    keys_B: Key[Array, " B"]
    calls_B: Int[Array, " B"]
    round_B: Int[Array, " B"]
    plan: Any  # decisions made in advance, such as an order

    def moved(self, x_BL: Int[Array, "B L"], called_B: Bool[Array, " B"], active_B) -> "State":
        """The state one round later: active sequences take the new tokens at free positions."""
        return replace(
            self,
            x_BL=jnp.where(self.free_BL & active_B[:, None], x_BL, self.x_BL),
            calls_B=self.calls_B + called_B,
            round_B=self.round_B + active_B,
        )


@dataclass(frozen=True, kw_only=True)
class SteppedSampler(Sampler):
    """A sampler that proceeds in rounds of at most one network call.

    Calling it runs ``start``, then ``advance`` while any sequence is ``active``. Samplers that wrap
    another one (blocks, particles) run these three methods themselves.
    """

    @abstractmethod
    def start(
        self,
        denoiser: Denoiser,
        keys_B: Key[Array, " B"],
        tokens_BL: Int[Array, "B L"],
        fixed_BL: Bool[Array, "B L"],
    ) -> State:
        """The state before the first round."""

    @abstractmethod
    def active(self, denoiser: Denoiser, state: State) -> Bool[Array, " B"]:
        """Which sequences need another round."""

    @abstractmethod
    def advance(self, denoiser: Denoiser, state: State) -> State:
        """Run one round of the active sequences; the others stay unchanged."""

    @abstractmethod
    def max_rounds(self, length: int) -> int:
        """An upper bound on the rounds for ``length`` free positions; the trace has that size."""

    def sigma(self, state: State) -> Float[Array, " B"]:
        """The total noise given to the network in the next round, if it is time-conditioned."""
        return jnp.zeros(state.round_B.shape)

    def times(self) -> Float[Array, " T"] | None:
        """Diffusion times of the trace's frames, if all sequences share them."""
        return None

    def __call__(self, denoiser, keys_B, tokens_BL, fixed_BL, *, trace=False):
        self.check(denoiser)
        batch, length = tokens_BL.shape
        state = self.start(denoiser, keys_B, tokens_BL, fixed_BL)
        frames = None
        if trace:
            frames = jnp.zeros((self.max_rounds(length) + 1, batch, length), state.x_BL.dtype)
            frames = frames.at[0].set(state.x_BL)

        def one_round(carry):
            state, frames, rounds = carry
            state = self.advance(denoiser, state)
            rounds = rounds + 1
            return state, record(frames, rounds, state.x_BL), rounds

        state, frames, rounds = jax.lax.while_loop(
            lambda carry: self.active(denoiser, carry[0]).any(),
            one_round,
            (state, frames, jnp.zeros((), jnp.int32)),
        )
        return Samples(
            tokens_BL=state.x_BL,
            calls_B=state.calls_B * denoiser.calls_each,
            trace_TBL=None if frames is None else fill(frames, rounds),
            rounds=rounds,
            times_T=self.times() if trace else None,
        )


def record(frames, index, x_BL):
    """The frames with frame ``index`` set to ``x_BL``; None if no trace is kept."""
    return None if frames is None else frames.at[index].set(x_BL)


def fill(frames_TBL: Int[Array, "T B L"], rounds: Int[Array, ""]) -> Int[Array, "T B L"]:
    """The frames, with those after the last round set to the last round's."""
    later_T = jnp.arange(frames_TBL.shape[0]) > rounds
    return jnp.where(later_T[:, None, None], frames_TBL[rounds][None], frames_TBL)
