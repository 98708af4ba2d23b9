"""The negative log likelihood of an autoregressive model. arXiv:1706.03762, section 3.1."""

from dataclasses import dataclass

from sedd.objectives.base import Corrupted, DenoisingCrossEntropy


@dataclass(frozen=True, kw_only=True)
class Autoregressive(DenoisingCrossEntropy):
    """The loss -Σ log p(x0_i | x0_<i) over the scored positions, without any corruption.

    Each position is conditioned on the positions before it only. If the positions that are not
    scored precede the scored ones (a prompt) or are independent of them (padding at the end), the
    sum is the NLL of the scored tokens given the rest.
    """

    causal = True

    def corrupt(self, keys_B, u_B, x0_BL, scored_BL):
        return Corrupted(xt_BL=x0_BL, weight_BL=scored_BL.astype(float))


make = Autoregressive
