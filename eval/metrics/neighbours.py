"""Metrics of nearest neighbours in feature space: precision, recall, density, coverage, memorisation; float64.

Precision and recall (arXiv 1904.06991): share of generated pictures within the k-th-neighbour ball of a real one, and
the other way round. Density and coverage (arXiv 2002.09797): balls around real pictures that hold a generated one,
per k; share of real pictures whose ball holds any. Memorisation: generated pictures that lie closer to a training
picture than training pictures lie to each other. Distances are computed a chunk of rows at a time.
Shapes: N generated and M real pictures, D features.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 2048


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Precision, recall, density (may exceed 1) and coverage for one k."""

    precision: float
    recall: float
    density: float
    coverage: float
    k: int


@dataclass(frozen=True, kw_only=True)
class Memorisation:
    """`nearest_N` is each generated picture's training picture, `distance_N` its distance.

    `share` of the generated pictures lies closer than `threshold`, the distance that `quantile` of the training
    pictures have to their own nearest other.
    """

    nearest_N: Tensor
    distance_N: Tensor
    threshold: float
    quantile: float
    share: float


def _distances(a_ND: Tensor, b_MD: Tensor) -> Iterator[tuple[int, Tensor]]:
    """For each chunk of n rows of `a`: the number of its first row, and Euclidean distances to `b`, float64 [n, M]."""
    for start in range(0, len(a_ND), _CHUNK):
        yield start, torch.cdist(a_ND[start : start + _CHUNK], b_MD)


def neighbour_radii(x_ND: Tensor, k: int) -> Tensor:
    """Distance of each picture to its k-th nearest other, float64 [N]; raises ValueError for k + 1 > N."""
    if len(x_ND) <= k:
        raise ValueError(f"{len(x_ND)} pictures have no {k}-th neighbour: use more pictures or a smaller k")
    x_ND = x_ND.double()
    radii = []
    for start, distance_nN in _distances(x_ND, x_ND):
        distance_nN.diagonal(start).fill_(torch.inf)  # of each picture to itself
        radii.append(distance_nN.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def neighbours(generated_ND: Tensor, real_MD: Tensor, *, k: int = 3) -> Neighbours:
    """Precision, recall, density and coverage; raises ValueError when a set has k or fewer pictures."""
    generated_ND, real_MD = generated_ND.double(), real_MD.double()
    real_radius_M, generated_radius_N = neighbour_radii(real_MD, k), neighbour_radii(generated_ND, k)
    precise, dense, covered, recalled = 0, 0, torch.zeros(len(real_MD), dtype=torch.bool), 0
    for _, distance in _distances(generated_ND, real_MD):
        within = distance <= real_radius_M
        precise += int(within.any(1).sum())
        # Naeem et al. count strictly inside.
        inside = distance < real_radius_M
        dense += int(inside.sum())
        covered |= inside.any(0)
    for _, distance in _distances(real_MD, generated_ND):
        recalled += int((distance <= generated_radius_N).any(1).sum())
    return Neighbours(
        precision=precise / len(generated_ND),
        recall=recalled / len(real_MD),
        density=dense / (k * len(generated_ND)),
        coverage=float(covered.double().mean()),
        k=k,
    )


def memorisation(generated_ND: Tensor, training_MD: Tensor, *, quantile: float = 0.01) -> Memorisation:
    """Nearest training picture of each generated one; raises ValueError below two training pictures."""
    generated_ND, training_MD = generated_ND.double(), training_MD.double()
    threshold = float(neighbour_radii(training_MD, 1).quantile(quantile))
    found = [distance.min(1) for _, distance in _distances(generated_ND, training_MD)]
    nearest, distance_N = torch.cat([pair.indices for pair in found]), torch.cat([pair.values for pair in found])
    return Memorisation(
        nearest_N=nearest,
        distance_N=distance_N,
        threshold=threshold,
        quantile=quantile,
        share=float((distance_N < threshold).double().mean()),
    )
