"""A network, its parameters and their reading, as one callable."""

from dataclasses import dataclass, field

import jax

from sedd.networks.base import Attend, Network
from sedd.parameterizations.base import Parameterization
from sedd.processes.base import Process
from sedd.types import Array, Float, Int, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """What samplers and bounds call. A pytree: it goes through jit with its parameters traced.

    ``attend`` says which positions see which, for batches with padding.
    """

    params: Params
    network: Network = field(metadata={"static": True})
    parameterization: Parameterization = field(metadata={"static": True})
    attend: Attend | None = None

    @property
    def process(self) -> Process:
        return self.parameterization.process

    @property
    def time_independent(self) -> bool:
        return self.parameterization.time_independent

    def log_score(
        self, x_BL: Int[Array, "B L"], sigma_B: Float[Array, "B"]
    ) -> Float[Array, "B L V"]:
        """log p_t(x with y at i) / p_t(x) for every position i and state y; 0 at x itself."""
        return self.parameterization.log_score(self._raw(x_BL, sigma_B), x_BL, sigma_B[:, None])

    def log_conditional(
        self, x_BL: Int[Array, "B L"], sigma_B: Float[Array, "B"] | None = None
    ) -> Float[Array, "B L N"]:
        """log p(x0_i = y | x), normalised over the real tokens.

        A revealed position is 0 at its token and -1e6 elsewhere. Raises ValueError on a process
        without a mask, and without ``sigma_B`` on a time-dependent model.
        """
        return self.parameterization.log_conditional(self._raw(x_BL, sigma_B), x_BL)

    def _raw(self, x_BL, sigma_B):
        if self.time_independent:
            sigma_B = None
        elif sigma_B is None:
            raise ValueError("this model depends on the time: sigma_B is required")
        return self.network.raw(self.params, x_BL, attend=self.attend, sigma_B=sigma_B)
