"""Kernel distances between feature sets: KID and CMMD, in float64.

KID (arXiv 1801.01401): mean and spread over seeded subsets of the unbiased squared maximum mean discrepancy with the
kernel (x y / D + 1)^3; the subsets are those of torch-fidelity for the same seed. CMMD (arXiv 2401.09603): RBF kernel
of width 10 on normalised CLIP features, all pairs, times 1000. Shapes: N and M pictures, D features.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SEED = 2020
_CHUNK = 4096


@dataclass(frozen=True, kw_only=True)
class Kid:
    """Mean and standard deviation over subsets, and how they were drawn."""

    mean: float
    std: float
    subsets: int
    subset_size: int
    seed: int


def _poly(a_ND: Tensor, b_MD: Tensor) -> Tensor:
    return (a_ND @ b_MD.T / a_ND.shape[1] + 1) ** 3


def polynomial_mmd(a_ND: Tensor, b_ND: Tensor) -> float:
    """Unbiased squared MMD of two sets of the same size, float64."""
    count = len(a_ND)
    aa, bb, ab = _poly(a_ND, a_ND), _poly(b_ND, b_ND), _poly(a_ND, b_ND)
    within = (aa.sum() - aa.trace() + bb.sum() - bb.trace()) / (count * (count - 1))
    return float(within - 2 * ab.mean())


def kid(a_ND: Tensor, b_MD: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = SEED) -> Kid:
    """KID of two feature sets; where one has no more than `subset_size`, subsets are half the smaller set.

    A subset of all would have no spread, and the mean does not depend on the size. Raises ValueError below four
    pictures on a side.
    """
    smaller = min(len(a_ND), len(b_MD))
    if smaller < 4:
        raise ValueError(f"{len(a_ND)} and {len(b_MD)} pictures: need 4 or more on each side")
    size = subset_size if smaller > subset_size else smaller // 2
    a_ND, b_MD = a_ND.double(), b_MD.double()
    draw = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        rows_a = torch.from_numpy(draw.choice(len(a_ND), size, replace=False))
        rows_b = torch.from_numpy(draw.choice(len(b_MD), size, replace=False))
        values.append(polynomial_mmd(a_ND[rows_a], b_MD[rows_b]))
    return Kid(mean=float(np.mean(values)), std=float(np.std(values)), subsets=subsets, subset_size=size, seed=seed)


def _mean_rbf(a_ND: Tensor, b_MD: Tensor, sigma: float) -> float:
    """Mean kernel value over all pairs, a chunk of rows at a time."""
    parts = (torch.cdist(part, b_MD).square() for part in a_ND.split(_CHUNK))
    return sum(float(torch.exp(-square / (2 * sigma**2)).sum()) for square in parts) / (len(a_ND) * len(b_MD))


def cmmd(a_ND: Tensor, b_MD: Tensor, *, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """CLIP-MMD of two sets of CLIP features, which are normalised here; raises ValueError for an empty set."""
    if min(len(a_ND), len(b_MD)) == 0:
        raise ValueError(f"{len(a_ND)} and {len(b_MD)} pictures: need 1 or more on each side")
    a_ND, b_MD = (torch.nn.functional.normalize(x.double(), dim=1) for x in (a_ND, b_MD))
    same = _mean_rbf(a_ND, a_ND, sigma) + _mean_rbf(b_MD, b_MD, sigma)
    return scale * (same - 2 * _mean_rbf(a_ND, b_MD, sigma))
