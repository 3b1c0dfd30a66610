"""Oracles: metrics as torchmetrics classes, which are given features in batches and reduce over ranks by themselves.

The evaluation keeps features in a store that all ranks share, and computes each metric from it on one process; these
must agree with it however the pictures were spread over ranks. Shapes: N pictures, D features.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric

from eval.metrics.clip_score import cosines
from eval.metrics.frechet import FrechetReference, Moments

SetFunction = Callable[[Tensor, Tensor], float]
_SIDES = ("generated", "real")


class FrechetDistance(Metric):
    """Frechet distance over features that arrive in batches and live on several ranks.

    State is the count, sum and sum of outer products of each side in float64, reduced by summation, so
    the value does not depend on how the pictures were spread over ranks (up to float64 rounding).
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def __init__(self, num_features: int) -> None:
        super().__init__()
        for side in ("real", "generated"):
            self.add_state(f"{side}_count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{side}_sum", torch.zeros(num_features, dtype=torch.float64), dist_reduce_fx="sum")
            outer = torch.zeros(num_features, num_features, dtype=torch.float64)
            self.add_state(f"{side}_outer", outer, dist_reduce_fx="sum")

    def update(self, features_ND: Tensor, *, real: bool) -> None:
        """Add features [N, D] to the real or to the generated side."""
        side = "real" if real else "generated"
        x_ND = features_ND.double()
        for name, value in (("count", len(x_ND)), ("sum", x_ND.sum(0)), ("outer", x_ND.T @ x_ND)):
            setattr(self, f"{side}_{name}", getattr(self, f"{side}_{name}") + value)

    def _moments(self, side: str) -> Moments:
        count, total, outer = (getattr(self, f"{side}_{name}") for name in ("count", "sum", "outer"))
        if count < 2:
            raise ValueError(f"{int(count)} {side} pictures: need 2 or more")
        mean = total / count
        covariance = (outer - count * mean.outer(mean)) / (count - 1)
        return Moments(count=int(count), mean_D=mean, covariance_DD=covariance)

    def compute(self) -> Tensor:
        """Squared Frechet distance as a float64 scalar; raises ValueError below two pictures on a side."""
        value = FrechetReference.from_moments(self._moments("real")).distance(self._moments("generated"))
        return torch.tensor(value, dtype=torch.float64)


class ClipScoreMetric(Metric):
    """Mean cosine over pictures that arrive in batches and live on several ranks; states are float64 sums."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    count: Tensor
    total: Tensor
    square: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("count", "total", "square"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images_ND: Tensor, texts_ND: Tensor) -> None:
        """Add pairs of features [N, D]."""
        cosine_N = cosines(images_ND, texts_ND)
        self.count = self.count + len(cosine_N)
        self.total = self.total + cosine_N.sum()
        self.square = self.square + cosine_N.square().sum()

    def compute(self) -> Tensor:
        """Mean raw cosine and its standard error, float64 [2]."""
        mean = self.total / self.count
        variance = (self.square / self.count - mean.square()).clamp_min(0) * self.count / (self.count - 1)
        return torch.stack([mean, (variance / self.count).sqrt()])


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


def moments(features_ND: Tensor) -> Moments:
    """Moments of features [N, D] by torch's own covariance."""
    x_ND = features_ND.double()
    return Moments(count=len(x_ND), mean_D=x_ND.mean(0), covariance_DD=torch.cov(x_ND.T).reshape(x_ND.shape[1], -1))


def frechet_from_moments(a: Moments, b: Moments) -> float:
    """Squared Frechet distance of two Gaussians."""
    return FrechetReference.from_moments(a).distance(b)


def frechet_from_features(a_ND: Tensor, b_ND: Tensor) -> float:
    """Squared Frechet distance of two feature sets."""
    return FrechetReference.from_rows(a_ND).distance_to_rows(b_ND)
