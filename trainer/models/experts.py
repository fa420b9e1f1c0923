"""The experts of a mixture (Shazeer et al. 2017): modules of like shape, each of which maps the rows that are sent to it.

A family that has a mixture routes rows by itself and hands them to `Experts`. Whatever model holds one can be divided by
`parallel.ep`: then each rank has a share of the experts, and `exchange` brings rows to where their expert is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

# Maps rows (rows, width) in the order of their experts and the number of each expert's rows, int64 (experts), to rows.
Exchange = Callable[[Tensor, Tensor], Tensor]


class Experts(nn.ModuleList):
    """A list of experts. Where ranks divide them, this rank's are modules and the others None: names stay."""

    exchange: Exchange | None = None

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Map each row by one expert. For the k best of each row, give every row k times and weight what comes back.

        Args:
            x: (rows, width).
            chosen: int64 (rows), the number of the expert of each.

        Returns:
            (rows, width of what experts give), in the order of `x`.
        """
        order = torch.argsort(chosen, stable=True)
        counts = torch.bincount(chosen, minlength=len(self))
        run = self.exchange or self.run
        out = run(x[order], counts)
        return out[torch.argsort(order)]

    def run(self, x: Tensor, counts: Tensor) -> Tensor:
        """Map rows in the order of their experts; `counts` has those of each expert that is here.

        An expert without rows runs too: all ranks build the same graph, and its parameters get zeros.
        """
        here = [expert for expert in self if expert is not None]
        parts = torch.split(x, counts.tolist())
        return torch.cat([expert(part) for expert, part in zip(here, parts, strict=True)])
