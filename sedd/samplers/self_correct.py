"""Self-correction: changes one token at a time in a drawn text, where the model disagrees with it.

arXiv:2503.04482.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import jax.numpy as jnp

from sedd.arrays import at, fold
from sedd.denoiser import Denoiser
from sedd.errors import FieldError, UserError
from sedd.parameterizations.mean import Mean
from sedd.samplers.base import Sampler, State, SteppedSampler
from sedd.samplers.noise import random_rank, tokens_at, whole
from sedd.types import Array, Bool, Float, Int

Choice = Literal["likeliest", "random"]


@dataclass(frozen=True, kw_only=True)
class SelfCorrect(SteppedSampler):
    """Draw a text by ``inner``, and then change at most one token in each of ``steps`` calls.

    The model must have the parameterization mean, and a process in which visible tokens may be
    wrong. It is called on the text as it is, at the low noise of the time ``t``. Its prediction x_θ
    for a position depends on the other tokens only (``sedd.parameterizations.mean``), so that it
    can disagree with the token that is there.

    - likeliest: a token is drawn from x_θ at every position, at ``correction_temperature``. Of the
      positions whose draw differs from their token, the one whose draw has the highest x_θ takes
      it. A text ends when for ``patience`` calls the share of its tokens that are the likeliest
      under x_θ has not risen above its best. This sharpens texts: its law is not the model's, and
      has no formula.
    - random: a uniformly random position takes a token from x_θ at ``correction_temperature``, in
      each of ``steps`` calls. At temperature 1 this is a Gibbs sampler: as ``t`` falls to 0, where
      x_θ is p(x0_i | all other tokens), every step leaves the model's joint distribution as it is,
      also the one given the fixed tokens.

    The trace begins with the text of ``inner``.
    """

    calls_on_tokens: ClassVar[bool] = True
    default_inner: ClassVar[str] = "tweedie"

    inner: Sampler
    steps: int = 128
    """Network calls of the correction, at most; those of the inner sampler come before them."""
    positions: Choice = "likeliest"
    """Which position is changed: the likeliest of the draws that differ, or a random one."""
    correction_temperature: float = 0.1
    """Temperature of the draws from x_θ, at least 0; 0 takes the most likely token."""
    patience: int = 32
    """With likeliest, calls without progress after which a text is left as it is."""
    t: float = 0.01
    """Time in (0, 1) whose noise level the model is told, while the text is clean."""

    def __post_init__(self):
        for name in ("steps", "patience"):
            if getattr(self, name) < 1:
                raise FieldError(name, f"must be at least 1, got {getattr(self, name)}")
        if self.positions not in get_args(Choice):
            known = " or ".join(get_args(Choice))
            raise FieldError("positions", f"must be {known}, got {self.positions!r}")
        if not 0 <= self.correction_temperature < float("inf"):
            raise FieldError(
                "correction_temperature",
                f"must be finite and at least 0, got {self.correction_temperature}",
            )
        if not 0 < self.t < 1:
            raise FieldError("t", f"must be in (0, 1), got {self.t}")

    @property
    def caveat(self):
        if self.positions == "random":
            return self.inner.caveat
        return (
            "self_correct sharpens texts: its draws are likelier and less varied than the model's "
            "own (--positions random --correction-temperature 1 keeps the model's distribution)"
        )

    @property
    def width(self):
        return self.inner.width

    def refuses(self, watermark):
        return "it replaces tokens that are drawn already"

    def check(self, denoiser):
        super().check(denoiser)
        process = denoiser.process
        if process.absorbing or not isinstance(denoiser.parameterization, Mean):
            names = [type(each).__name__.lower() for each in (denoiser.parameterization, process)]
            raise UserError(
                "sampler 'self_correct' needs the parameterization mean on a process whose visible "
                f"tokens may be wrong, uniform or hybrid; this model has {names[0]} on {names[1]}"
            )
        self.inner.check(denoiser)

    def sigma(self, state):
        return jnp.broadcast_to(
            self.schedule.sigma(jnp.asarray(self.t, jnp.float32)), state.round_B.shape
        )

    def max_rounds(self, denoiser, length):
        return self.steps

    def start(self, denoiser, keys_B, tokens_BL, fixed_BL):
        """The text of the inner sampler; the plan is the best agreement, and its age in rounds."""
        drawn = self.inner(denoiser, fold(keys_B, 0), tokens_BL, fixed_BL)
        batch = len(tokens_BL)
        state = State.starting(
            fold(keys_B, 1),
            x_BL=drawn.tokens_BL,
            free_BL=~fixed_BL,
            plan=(jnp.full(batch, -1), jnp.zeros(batch, jnp.int32)),
        )
        return replace(state, calls_B=drawn.calls_B, rows_B=drawn.rows_B)

    def active(self, denoiser, state):
        """Texts with free positions, until their steps or their patience end."""
        _, waited_B = state.plan
        return (state.round_B < self.steps) & state.free_BL.any(1) & (waited_B < self.patience)

    def advance(self, denoiser, state):
        """Call the network on the text, and change at most one token of each active one."""
        active_B = self.active(denoiser, state)
        hidden = denoiser.hidden(state.x_BL, self.sigma(state))
        choose = self._random if self.positions == "random" else self._likeliest
        x_BL, plan = choose(denoiser, state, hidden, active_B)
        return replace(state.called(active_B).moved(x_BL, active_B), plan=plan)

    def _draw(self, denoiser: Denoiser, state: State, hidden: Any, rows) -> tuple[Array, Array]:
        """A token from x_θ at the temperature for each row, and log x_θ of all tokens."""
        log_probs_RN = denoiser.log_mean_rows(hidden, state.x_BL, rows)
        if self.correction_temperature == 0:
            return log_probs_RN.argmax(-1), log_probs_RN
        keys_B = fold(fold(state.keys_B, state.round_B), 1)
        return tokens_at(keys_B, rows, log_probs_RN / self.correction_temperature), log_probs_RN

    def _random(
        self, denoiser: Denoiser, state: State, hidden: Any, active_B: Bool[Array, " B"]
    ) -> tuple[Int[Array, "B L"], Any]:
        """Draw the token of one random position."""
        order_BL = random_rank(whole(fold(fold(state.keys_B, state.round_B), 0)), state.free_BL)
        chosen_BL = (order_BL == 0) & state.free_BL & active_B[:, None]
        drawn_BL = denoiser.map_rows(
            chosen_BL, lambda rows: self._draw(denoiser, state, hidden, rows)[0], jnp.int32
        )
        return jnp.where(chosen_BL, drawn_BL, state.x_BL), state.plan

    def _likeliest(
        self, denoiser: Denoiser, state: State, hidden: Any, active_B: Bool[Array, " B"]
    ) -> tuple[Int[Array, "B L"], Any]:
        """Draw all positions, and change the one whose draw differs and is the likeliest."""
        x_BL, free_BL = state.x_BL, state.free_BL & active_B[:, None]

        def draw(rows):
            drawn_R, log_probs_RN = self._draw(denoiser, state, hidden, rows)
            # Whether the token of the text is the most likely one is packed into the sign.
            agrees_R = log_probs_RN.argmax(-1) == rows.pick(x_BL)
            return jnp.where(agrees_R, drawn_R, -2 - drawn_R)

        packed_BL = denoiser.map_rows(free_BL, draw, jnp.int32)
        agrees_BL = packed_BL >= -1
        drawn_BL = jnp.where(agrees_BL, packed_BL, -2 - packed_BL)
        differs_BL = free_BL & (drawn_BL != x_BL)

        def log_prob(rows) -> Float[Array, " R"]:
            log_probs_RN = denoiser.log_mean_rows(hidden, x_BL, rows)
            return at(log_probs_RN, jnp.maximum(rows.pick(drawn_BL), 0))

        log_prob_BL = denoiser.map_rows(differs_BL, log_prob, jnp.float32)
        best_B1 = jnp.where(differs_BL, log_prob_BL, -jnp.inf).argmax(1, keepdims=True)
        chosen_BL = differs_BL & (jnp.arange(x_BL.shape[1])[None] == best_B1)
        agreement_B, (most_B, waited_B) = (agrees_BL & free_BL).sum(1), state.plan
        waited_B = jnp.where(agreement_B > most_B, 0, waited_B + active_B)
        plan = jnp.maximum(agreement_B, most_B), waited_B
        return jnp.where(chosen_BL, drawn_BL, x_BL), plan


make = SelfCorrect
