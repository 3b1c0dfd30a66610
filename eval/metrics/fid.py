"""Frechet distance between two sets of features (arXiv 1706.08500), in float64 and without matrix roots.

For Gaussians with means m and covariances S the squared distance is |m1 - m2|^2 + tr S1 + tr S2 -
2 tr (S1 S2)^(1/2). The last trace is the nuclear norm of L1' L2 for any factors S = L L'. With fewer
pictures than features the centred features themselves are such factors, which is exact and fast;
otherwise L1 comes from Cholesky, with pivots where S1 is not safely positive definite, and the trace from
`eigvalsh` of L1' S2 L1: symmetric, never complex.
Shapes: N pictures, D features.
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


def moments(features_ND: Tensor) -> Moments:
    """Moments of features [N, D]; raises ValueError below two pictures."""
    _check_count(features_ND)
    x_ND = features_ND.double()
    return Moments(count=len(x_ND), mean_D=x_ND.mean(0), covariance_DD=torch.cov(x_ND.T).reshape(x_ND.shape[1], -1))


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


def _check_count(features_ND: Tensor) -> None:
    if features_ND.ndim != 2 or len(features_ND) < 2:
        raise ValueError(f"features of shape {tuple(features_ND.shape)}: need [N, D] with N of 2 or more")


def covariance_factor(covariance_DD: Tensor) -> Tensor:
    """L [D, R] in float64 with L L' = covariance; directions without spread are left out of it."""
    covariance_DD = covariance_DD.double()
    negligible = len(covariance_DD) * torch.finfo(torch.float64).eps
    factor_DD: Tensor
    factor_DD, failed = torch.linalg.cholesky_ex(covariance_DD)
    pivots = factor_DD.diagonal().square()
    if not failed and pivots.min() > negligible * covariance_DD.diagonal().max():
        return factor_DD
    return _pivoted_factor(covariance_DD, negligible)


def _pivoted_factor(covariance_DD: Tensor, negligible: float) -> Tensor:
    """The factor of a semidefinite covariance: Cholesky that takes the largest rest first and ends when none is left.

    A third of the work of an eigendecomposition at full rank, far less below it.
    """
    tolerance = negligible * float(covariance_DD.diagonal().max())
    lower, order, rank, _ = dpstrf(covariance_DD.cpu().numpy(), lower=1, tol=tolerance)
    found = torch.zeros(len(covariance_DD), int(rank), dtype=torch.float64)
    found[torch.from_numpy(order - 1).long()] = torch.from_numpy(np.tril(lower)[:, : int(rank)])
    return found.to(covariance_DD.device)


def frechet_from_moments(a: Moments, b: Moments) -> float:
    """Squared Frechet distance of two Gaussians, float64."""
    factor_DR = covariance_factor(a.covariance_DD)
    inner_RR = factor_DR.T @ b.covariance_DD.double() @ factor_DR
    cross = torch.linalg.eigvalsh((inner_RR + inner_RR.T) / 2).clamp_min(0).sqrt().sum()
    traces = a.covariance_DD.trace() + b.covariance_DD.trace()
    return float((a.mean_D - b.mean_D).square().sum() + traces - 2 * cross)


def frechet_from_features(a_ND: Tensor, b_ND: Tensor) -> float:
    """Squared Frechet distance of two feature sets [N, D] and [M, D]; no D x D matrix when N, M < D.

    Raises ValueError for sets below two pictures.
    """
    _check_count(a_ND)
    _check_count(b_ND)
    if max(len(a_ND), len(b_ND)) >= a_ND.shape[1]:
        return frechet_from_moments(moments(a_ND), moments(b_ND))
    a_ND, b_ND = a_ND.double(), b_ND.double()
    a_mean, b_mean = a_ND.mean(0), b_ND.mean(0)
    # Rows over sqrt(N - 1): the covariance is factor' factor.
    a_factor = (a_ND - a_mean) / (len(a_ND) - 1) ** 0.5
    b_factor = (b_ND - b_mean) / (len(b_ND) - 1) ** 0.5
    cross = torch.linalg.svdvals(a_factor @ b_factor.T).sum()
    traces = a_factor.square().sum() + b_factor.square().sum()
    return float((a_mean - b_mean).square().sum() + traces - 2 * cross)
