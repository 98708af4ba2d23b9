"""The negative log likelihood of an autoregressive model. arXiv:1706.03762, section 3.1."""

from dataclasses import dataclass

from sedd.objectives.base import Corrupted, DenoisingCrossEntropy


@dataclass(frozen=True, kw_only=True)
class Autoregressive(DenoisingCrossEntropy):
    """-Σ log p(x0_i | x0_<i) over the scored positions: exact, nothing is drawn or corrupted.

    Positions that are not scored are given, but each position sees those before it only: the sum
    is the NLL of the scored tokens given the rest where the rest precedes them (a prompt) or says
    nothing of them (padding at the end).
    """

    causal = True

    def corrupt(self, keys_B, u_B, x0_BL, scored_BL):
        xt_BL, attend = self.parameterization.inputs(x0_BL, None)
        return Corrupted(xt_BL=xt_BL, attend=attend, weight_BL=scored_BL.astype(float))


make = Autoregressive
