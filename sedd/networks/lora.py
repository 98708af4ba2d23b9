"""Low-rank adapters (LoRA, arXiv:2106.09685): training few parameters beside a frozen network.

An adapted linear layer computes x·W + (α/r)·(x·A)·B with the frozen kernel W [in, out] and two
trained factors, A [in, r] and B [r, out]. B is 0 at the start, so that training begins at the
frozen network. Adding (α/r)·A·B to W gives an ordinary layer with the same output.

The factors are the entry ``adapters`` of a network's parameters, apart from all others:
``adapters/blocks/LAYER/a`` and ``…/b``, with an axis of layers in front.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sedd.errors import FieldError, did_you_mean
from sedd.types import Params

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Which linear layers of the blocks have adapters, and their size.

    Raises ``FieldError`` if a value is out of its range.
    """

    rank: int = 0
    """Rank r of the adapters, the only parameters that are trained; 0 for no adapters."""
    alpha: float | None = None
    """The adapters' output is multiplied by alpha / rank; by default alpha is twice the rank."""
    layers: str = ALL
    """The linear layers of the blocks that have an adapter: all, or names with commas between them.
    """

    def __post_init__(self):
        if self.rank < 0:
            raise FieldError("rank", f"must not be negative, got {self.rank}")
        if self.alpha is not None and not self.alpha > 0:
            raise FieldError("alpha", f"must be positive, got {self.alpha}")

    @property
    def scale(self) -> float:
        """The factor α/r of the adapters' output."""
        return 2.0 if self.alpha is None else self.alpha / max(self.rank, 1)

    def names(self, known: Collection[str]) -> tuple[str, ...]:
        """The layers that have an adapter; none if the rank is 0.

        Args:
            known: the linear layers of a block.

        Raises:
            FieldError: if the network has no layer of a name in ``layers``.
        """
        if not self.rank:
            return ()
        chosen = known if self.layers == ALL else [each.strip() for each in self.layers.split(",")]
        for name in chosen:
            if name not in known:
                raise FieldError(
                    "layers",
                    f"has {name!r}{did_you_mean(name, known)}; the linear layers of this network "
                    f"are {', '.join(known)}",
                )
        return tuple(name for name in known if name in chosen)


def merged(network: Any, params: Params) -> tuple[Any, Params]:
    """Add the adapters to the kernels: an ordinary network with the same output up to rounding.

    The sum is computed in float32, one layer at a time, and rounded to the type of the kernel.

    Args:
        network: a network with the field ``lora``. Others are returned as they are.
        params: its parameters.

    Returns:
        The network without adapters and its parameters, of which the adapted kernels are new numpy
        arrays, and the others those of ``params``.
    """
    lora = getattr(network, "lora", Lora())
    if not lora.rank:
        return network, params
    blocks = dict(params["trunk"]["blocks"])
    for name, factors in params["adapters"]["blocks"].items():
        kernel, a, b = (np.asarray(x) for x in (blocks[name]["kernel"], factors["a"], factors["b"]))
        total = np.empty_like(kernel)
        for layer in range(len(kernel)):
            change = np.float32(lora.scale) * (a[layer] @ b[layer])
            total[layer] = (kernel[layer].astype(np.float32) + change).astype(kernel.dtype)
        blocks[name] = {**blocks[name], "kernel": total}
    rest = {name: tree for name, tree in params.items() if name != "adapters"}
    params = {**rest, "trunk": {**params["trunk"], "blocks": blocks}}
    return replace(network, lora=Lora()), params
