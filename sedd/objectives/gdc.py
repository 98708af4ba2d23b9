"""Fine-tuning to a control's law: k-DCE on weighted texts of the starting model.

arXiv:2012.11635, section 2.2.
"""

from dataclasses import dataclass
from typing import ClassVar

from sedd.objectives.k_dce import KDCE


@dataclass(frozen=True, kw_only=True)
class GDC(KDCE):
    """The loss w(x)·k-DCE(x) of texts x that the starting model a has drawn.

    Here w(x) = exp(λ·φ(x)) / Z is the weight of the text under a control, p = a·w. The mean over a
    is the k-DCE of p, which bounds the cross entropy E_p[-log π(x)] of the trained model π. Its
    minimum over π is that of the forward divergence KL(p‖π), as in the paper, which has the
    likelihood of an autoregressive model in place of k-DCE. The rows of the data bring their
    weights (``sample.py --method weigh``). If another model than a has drawn them (``--base``), it
    is the starting model, and the weight is p over its law.
    """

    weighted: ClassVar[bool] = True


make = GDC
