"""Metrics over odd, uneven shares of features, against the same on one process."""

import sys

import pytest
import torch
from named_checks import run_named
from reducing_metrics import ClipScoreMetric, FrechetDistance, GatheredMetric, frechet_from_features, moments
from torch import Tensor

from eval.metrics.clip_score import clip_score, cosines
from eval.metrics.kernel import kid
from eval.metrics.neighbours import neighbours
from trainer.distributed import World

COUNTS, WIDTH = (53, 47), 12


def features() -> tuple[Tensor, Tensor]:
    """Of fake and real pictures, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    fake, real = (torch.randn(count, WIDTH, generator=generator) for count in COUNTS)
    return fake, real


def share(world: World, count: int) -> Tensor:
    """Rows of this rank. Uneven: the first rank has the first five as well as every size-th of the rest."""
    return torch.tensor([*(range(5) if world.is_main else []), *range(5 + world.rank, count, world.size)])


def frechet_distance_is_that_of_all_features(world: World) -> None:
    fake, real = features()
    frechet = FrechetDistance(WIDTH)
    frechet.update(fake[share(world, len(fake))], real=False)
    frechet.update(real[share(world, len(real))], real=True)
    assert float(frechet.compute()) == pytest.approx(frechet_from_features(fake, real), rel=1e-9)
    with frechet.sync_context():
        assert (int(frechet.generated_count), int(frechet.real_count)) == COUNTS
        whole, found = moments(fake), frechet._moments("generated")
        torch.testing.assert_close(found.mean_D, whole.mean_D, atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(found.covariance_DD, whole.covariance_DD, atol=1e-12, rtol=1e-9)


def clip_score_is_that_of_all_pairs(world: World) -> None:
    fake, _ = features()
    mine, clip = fake[share(world, len(fake))], ClipScoreMetric()
    clip.update(mine[:, :6], mine[:, 6:])
    expected = clip_score(cosines(fake[:, :6], fake[:, 6:]))
    assert clip.compute().tolist() == pytest.approx([expected.cosine, expected.standard_error], rel=1e-9)


def gathered_metrics_are_those_of_all_rows_bitwise(world: World) -> None:
    fake, real = features()
    for function in (
        lambda a, b: kid(a, b, subsets=4, subset_size=30).mean,
        lambda a, b: neighbours(a, b, k=3).density,
    ):
        metric = GatheredMetric(function)
        padded = torch.cat([share(world, len(fake)), torch.tensor([0])])  # as a padding sampler repeats a picture
        metric.update(fake[padded], padded, real=False)
        rows = share(world, len(real))
        metric.update(real[rows], rows, real=True)
        assert float(metric.compute()) == function(fake, real)


if __name__ == "__main__":
    run_named(sys.argv[1:], lambda world, name: globals()[name](world))
