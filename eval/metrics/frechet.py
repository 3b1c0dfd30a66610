"""Frechet distance of feature sets, its limit for infinitely many pictures, and the Inception score; float64.

For Gaussians with means m and covariances S the squared distance is |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)
(arXiv 1706.08500). With any factors S = L L' the last trace is the nuclear norm of L1' L2, so no matrix root is taken.
With fewer pictures than features the centred features themselves are such factors, which is exact and needs no D x D
matrix; the norm is then a sum of singular values: a set is at a distance of 1e-13 from itself, where the roots of the
eigenvalues of the squared product are off by 1e-7. With moments the trace comes from `eigvalsh` of L1' S2 L1, which is
symmetric and never complex.

FID-infinity (arXiv 1911.07023): FID is biased by about c / N, so its values at several N are extrapolated to 1/N = 0.
Inception score (arXiv 1606.03498): exp of the mean KL divergence of the class probabilities from their mean.
Shapes: N pictures, D features, R of them independent, K classes.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg.lapack import dpstrf
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Count, mean [D] and unbiased covariance [D, D] of a feature set, float64."""

    count: int
    mean_D: Tensor
    covariance_DD: Tensor


@dataclass(frozen=True, kw_only=True)
class InceptionScore:
    """Mean and standard deviation over splits."""

    mean: float
    std: float
    splits: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class FidInfinity:
    """The extrapolated value and the (count, FID) pairs it was fitted to."""

    value: float
    counts: tuple[int, ...]
    values: tuple[float, ...]
    seed: int


def moments_of(parts: Iterable[Tensor]) -> Moments:
    """Count, mean and unbiased covariance of features that come in parts [n, D], float64, D x D in memory at most.

    The first part's mean is taken off before outer products are summed, so that nothing cancels.
    Raises ValueError below two pictures.
    """
    count, shift, total, outer = 0, torch.empty(0), torch.empty(0), torch.empty(0)
    for part_ND in parts:
        x_ND = part_ND.double()
        if len(x_ND) == 0:
            continue
        if count == 0:
            shift = x_ND.mean(0)
            total, outer = torch.zeros_like(shift), x_ND.new_zeros(x_ND.shape[1], x_ND.shape[1])
        x_ND = x_ND - shift
        count, total = count + len(x_ND), total + x_ND.sum(0)
        outer.addmm_(x_ND.T, x_ND)
    if count < 2:
        raise ValueError(f"{count} pictures: statistics need 2 or more")
    mean = total / count
    return Moments(count=count, mean_D=shift + mean, covariance_DD=(outer - count * mean.outer(mean)) / (count - 1))


def covariance_factor(covariance_DD: Tensor) -> Tensor:
    """L [D, R] in float64 with L L' = covariance; directions without spread are left out of it.

    A semidefinite covariance needs the Cholesky that takes the largest rest first and ends when none is left: a third
    of the work of an eigendecomposition at full rank, far less below it.
    """
    covariance_DD = covariance_DD.double()
    tolerance = len(covariance_DD) * torch.finfo(torch.float64).eps * float(covariance_DD.diagonal().max())
    factor_DD: Tensor
    factor_DD, failed = torch.linalg.cholesky_ex(covariance_DD)
    if not failed and factor_DD.diagonal().square().min() > tolerance:
        return factor_DD
    lower, order, rank, _ = dpstrf(covariance_DD.cpu().numpy(), lower=1, tol=tolerance)
    found = torch.zeros(len(covariance_DD), int(rank), dtype=torch.float64)
    found[torch.from_numpy(order - 1).long()] = torch.from_numpy(np.tril(lower)[:, : int(rank)])
    return found.to(covariance_DD.device)


class FrechetReference:
    """A reference whose covariance L L' is factored once, for distances to many sets; L is [D, R] of rank R."""

    def __init__(self, mean_D: Tensor, factor_DR: Tensor) -> None:
        self.mean_D, self.factor_DR = mean_D, factor_DR
        self.trace = float(factor_DR.square().sum())

    @classmethod
    def from_moments(cls, moments: Moments) -> "FrechetReference":
        """From mean and covariance."""
        return cls(moments.mean_D.double(), covariance_factor(moments.covariance_DD))

    @classmethod
    def from_rows(cls, x_ND: Tensor) -> "FrechetReference":
        """From features; fewer pictures than features are a factor themselves. ValueError below two pictures."""
        if len(x_ND) >= x_ND.shape[1]:
            return cls.from_moments(moments_of([x_ND]))
        mean_D, rows_ND = _centred(x_ND)
        return cls(mean_D, rows_ND.T)

    def distance(self, other: Moments) -> float:
        """Squared Frechet distance to a Gaussian of these moments."""
        inner_RR = self.factor_DR.T @ other.covariance_DD.double() @ self.factor_DR
        cross = torch.linalg.eigvalsh((inner_RR + inner_RR.T) / 2).clamp_min(0).sqrt().sum()
        shift = (self.mean_D - other.mean_D).square().sum()
        return float(shift + self.trace + other.covariance_DD.trace() - 2 * cross)

    def distance_to_rows(self, x_ND: Tensor) -> float:
        """The same to a set of features; fewer pictures than features need no D x D matrix."""
        if len(x_ND) >= x_ND.shape[1]:
            return self.distance(moments_of([x_ND]))
        mean_D, rows_ND = _centred(x_ND)
        cross = torch.linalg.svdvals(rows_ND @ self.factor_DR).sum()
        shift = (self.mean_D - mean_D).square().sum()
        return float(shift + self.trace + rows_ND.square().sum() - 2 * cross)


def _centred(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and centred rows over sqrt(N - 1), whose covariance is rows' rows; ValueError below two pictures."""
    if len(x_ND) < 2:
        raise ValueError(f"{len(x_ND)} pictures: statistics need 2 or more")
    x_ND = x_ND.double()
    mean_D = x_ND.mean(0)
    return mean_D, (x_ND - mean_D) / (len(x_ND) - 1) ** 0.5


def fid_infinity(
    x_ND: Tensor, reference: FrechetReference, *, points: int = 15, smallest: int = 5000, seed: int = 0
) -> FidInfinity:
    """Extrapolate over `points` seeded subsets of N // 10 (at least 2, at most `smallest`) to N pictures.

    Raises ValueError below 20 pictures or 2 points.
    """
    if len(x_ND) < 20 or points < 2:
        raise ValueError(f"{len(x_ND)} pictures and {points} points: FID-infinity needs 20 pictures and 2 points")
    counts = np.unique(np.linspace(min(smallest, len(x_ND) // 10), len(x_ND), points).astype(int))
    draw = np.random.default_rng(seed)
    values = []
    for count in counts:
        rows = torch.from_numpy(draw.choice(len(x_ND), int(count), replace=False))
        values.append(reference.distance_to_rows(x_ND[rows]))
    slope_and_value = np.polyfit(1 / counts, values, 1)
    return FidInfinity(value=float(slope_and_value[1]), counts=tuple(map(int, counts)), values=tuple(values), seed=seed)


def inception_score(logits_NK: Tensor, *, splits: int = 10, seed: int = 2020) -> InceptionScore:
    """Inception score of logits without bias, in the splits of torch-fidelity; ValueError for fewer pictures."""
    count = len(logits_NK)
    if count < splits:
        raise ValueError(f"{count} pictures make no {splits} splits")
    order = torch.from_numpy(np.random.RandomState(seed).permutation(count))
    logits_NK = logits_NK.double()[order]
    p_NK, log_NK = logits_NK.softmax(1), logits_NK.log_softmax(1)
    scores = []
    for i in range(splits):
        rows = slice(i * count // splits, (i + 1) * count // splits)
        divergence = p_NK[rows] * (log_NK[rows] - p_NK[rows].mean(0, keepdim=True).log())
        scores.append(float(divergence.sum(1).mean().exp()))
    return InceptionScore(mean=float(np.mean(scores)), std=float(np.std(scores)), splits=splits, seed=seed)
