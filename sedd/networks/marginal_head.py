"""A scalar head that approximates log marginals, on a trunk (arXiv:2310.12920).

A masked diffusion model gives conditionals c(x_i | x_S) of a token given the tokens at some
positions S. The log probability of these tokens themselves takes a network call for each of them.
The head gives it from one call, as

    f(x_S) = Σ_(i∈S) (log unigram(x_i) + g(x_S)),

where g is an MLP on the mean of the trunk's hidden states, with masks outside of S. The first term
is the log probability of independent tokens, so that g has to learn a few nats per token only. The
sum over S makes f 0, the log probability of no tokens, where all positions are masked. A new head
has g = 0. The objective ``marginal`` trains g.

The paper penalises f(no tokens)², and its head has to learn log probabilities of hundreds of nats.
"""

import math
from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from sedd.errors import FieldError
from sedd.networks.ddit import DDiT
from sedd.networks.shard import whole
from sedd.types import Array, Float, Int, Key, Params

WIDER = 4  # width of the MLP's two hidden layers, as a multiple of D


@dataclass(frozen=True, kw_only=True)
class MarginalHead(DDiT):
    """The network ddit (the trunk) and a scalar head on its hidden states.

    Parameters are ``{"trunk": …, "head": …, "marginal": …, "unigram": …}``. The first two are those
    of ``DDiT``, and so are ``hidden`` and ``head``: samplers and bounds give the results of the
    trunk. ``unigram`` holds the log probability of each token, which is never trained. The last
    state is the mask. arXiv:2310.12920.

    Raises ``ValueError`` as ``DDiT`` does.
    """

    has_marginal_head = True

    freeze: bool = True
    """Train the scalar head only, on a trunk that was trained before (--init-from)."""

    def __post_init__(self):
        super().__post_init__()
        if self.lora.rank:
            raise FieldError(
                "lora.rank",
                "goes with ddit and decoder: marginal_head trains a head of its own, use it "
                "without",
            )

    def init(self, key: Key[Array, ""]) -> Params:
        """Draw fresh float32 parameters; those of the trunk are ``DDiT.init`` with this key.

        The frequencies of tokens are equal. A run that adds the head to a trunk (--init-from)
        replaces them by the trunk's mean prediction for a text of masks.
        """
        tokens = self.num_states - 1
        return super().init(key) | {
            "marginal": _init(self.hidden_dim, jax.random.fold_in(key, 1)),
            "unigram": {"log_prob": jnp.full(tokens, -math.log(tokens), jnp.float32)},
        }

    @property
    def frozen_trunk(self) -> bool:
        """Whether training changes the scalar head only."""
        return self.freeze

    def trainable(self, params: Params) -> Params:
        """The scalar head if the trunk is frozen, else all parameters but the frequencies."""
        trained = ("marginal",) if self.freeze else ("trunk", "head", "marginal")
        return {name: params[name] for name in trained}

    def log_marginal(
        self, params: Params, hidden_BLD: Float[Array, "B L D"], tokens_BL: Int[Array, "B L"]
    ) -> Float[Array, " B"]:
        """Compute f(x_S), which approximates the log probability of the visible tokens in nats.

        Args:
            params: parameters.
            hidden_BLD: the result of ``hidden`` for ``tokens_BL``.
            tokens_BL: the tokens x_S, and masks at all other positions.
        """
        log_prob_N = whole(params["unigram"])["log_prob"]
        pooled_BD = hidden_BLD.astype(jnp.float32).mean(1)
        mlp = _Mlp(self.hidden_dim).bind({"params": whole(params["marginal"])})
        each_BL = log_prob_N.at[tokens_BL].get(mode="clip") + mlp(pooled_BD)[:, None]
        return jnp.where(tokens_BL < len(log_prob_N), each_BL, 0.0).sum(1)

    def training_flops(self, length: int, read: float) -> float:
        """Count the FLOPs of training on one sequence; arguments as of ``Network.training_flops``.

        ``read`` is the number of steps of a path (``Marginal.window``): the trunk is called once
        more than that, and the output layer reads one row of each call but the last. With a frozen
        trunk there is no backward pass through it.
        """
        calls, width = read + 1, self.hidden_dim
        mlp = 2 * (WIDER + WIDER**2) * width**2 + 2 * WIDER * width
        trunk = calls * self.flops(length, 0.0) + 2 * read * width * self.num_states
        return (1 if self.freeze else 3) * trunk + 3 * calls * mlp


@partial(jax.jit, static_argnums=0)
def _init(width: int, key: Key[Array, ""]) -> Params:
    """Fresh parameters of the MLP for hidden states of this width."""
    return _Mlp(width).init(key, jnp.zeros((1, width)))["params"]


class _Mlp(nn.Module):
    """D → 4D → 4D → 1 with GELU, in float32; 0 when it is new."""

    width: int

    @nn.compact
    def __call__(self, x_BD):
        for name in ("in", "middle"):
            x_BD = nn.gelu(nn.Dense(WIDER * self.width, name=name)(x_BD))
        return nn.Dense(1, kernel_init=nn.initializers.zeros, name="out")(x_BD)[:, 0]


make = MarginalHead
