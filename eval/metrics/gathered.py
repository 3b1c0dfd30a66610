"""Metrics of whole feature sets as torchmetrics: rows are gathered over ranks and put in the order of their numbers.

Each row comes with the number of its picture. Sorting by it makes seeded metrics independent of how pictures were
spread; a picture that a padding sampler gave twice counts once. Shapes: N pictures, D features.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric

SetFunction = Callable[[Tensor, Tensor], float]
_SIDES = ("generated", "real")


class GatheredMetric(Metric):
    """A function of generated [N, D] and real [M, D] features, over batches and ranks.

    For instance `GatheredMetric(lambda generated, real: kid(generated, real).mean)`.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, function: SetFunction) -> None:
        super().__init__()
        self.function = function
        for side in _SIDES:
            self.add_state(f"{side}_rows", [], dist_reduce_fx="cat")
            self.add_state(f"{side}_numbers", [], dist_reduce_fx="cat")

    def update(self, features_ND: Tensor, numbers_N: Tensor, *, real: bool) -> None:
        """Add features with the numbers of their pictures."""
        if len(features_ND) != len(numbers_N):
            raise ValueError(f"{len(features_ND)} rows of features with {len(numbers_N)} numbers")
        side = _SIDES[real]
        getattr(self, f"{side}_rows").append(features_ND)
        getattr(self, f"{side}_numbers").append(numbers_N)

    def rows(self, side: str) -> Tensor:
        """All rows of a side in the order of their numbers, each number once; empty without any."""
        rows, numbers = (getattr(self, f"{side}_{name}") for name in ("rows", "numbers"))
        if isinstance(rows, list):  # not yet joined over ranks
            if not rows:
                return torch.empty(0, 1)
            rows, numbers = torch.cat(rows), torch.cat(numbers)
        order = numbers.argsort(stable=True)
        numbers = numbers[order]
        first = torch.ones(len(numbers), dtype=torch.bool, device=numbers.device)
        first[1:] = numbers[1:] != numbers[:-1]
        found: Tensor = rows[order][first]
        return found

    def compute(self) -> Tensor:
        """The function's value, a float64 scalar."""
        return torch.tensor(self.function(self.rows("generated"), self.rows("real")), dtype=torch.float64)
