"""Run by torchrun: metrics over odd, uneven shares of features, against the same on one process."""

import os
import sys
import warnings
from typing import Any

import torch
import torch.distributed
from reducing_metrics import ClipScoreMetric, FrechetDistance, GatheredMetric, frechet_from_features, moments

from eval.metrics.clip_score import clip_score, cosines
from eval.metrics.kernel import kid
from eval.metrics.neighbours import neighbours

COUNTS, WIDTH = (53, 47), 12


def check(close: Any) -> None:
    """Every rank computes every metric from its share; `close` compares."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    generator = torch.Generator().manual_seed(0)
    fake, real = (torch.randn(count, WIDTH, generator=generator) for count in COUNTS)
    # Uneven: the first rank has the first five as well as every size-th of the rest.
    shares = [torch.tensor([*(range(5) if rank == 0 else []), *range(5 + rank, count, size)]) for count in COUNTS]
    mine = [x[rows] for x, rows in zip((fake, real), shares, strict=True)]

    frechet = FrechetDistance(WIDTH)
    frechet.update(mine[0], real=False)
    frechet.update(mine[1], real=True)
    close(float(frechet.compute()), frechet_from_features(fake, real), 1e-9)
    with frechet.sync_context():
        assert (int(frechet.generated_count), int(frechet.real_count)) == COUNTS
        whole = moments(fake)
        found = frechet._moments("generated")
        torch.testing.assert_close(found.mean_D, whole.mean_D, atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(found.covariance_DD, whole.covariance_DD, atol=1e-12, rtol=1e-9)

    clip = ClipScoreMetric()
    clip.update(mine[0][:, :6], mine[0][:, 6:])
    expected = clip_score(cosines(fake[:, :6], fake[:, 6:]))
    close(clip.compute().tolist(), [expected.cosine, expected.standard_error], 1e-9)

    for function in (
        lambda a, b: kid(a, b, subsets=4, subset_size=30).mean,
        lambda a, b: neighbours(a, b, k=3).density,
    ):
        metric = GatheredMetric(function)
        padded = torch.cat([shares[0], torch.tensor([0])])  # as a padding sampler repeats a picture
        metric.update(fake[padded], padded, real=False)
        metric.update(mine[1], shares[1], real=True)
        assert float(metric.compute()) == function(fake, real)  # bitwise: the rows are the same


def main() -> None:
    """Join, check, leave."""
    import pytest

    warnings.simplefilter("ignore")
    torch.distributed.init_process_group("gloo")

    def close(found: Any, expected: Any, tolerance: float) -> None:
        assert found == pytest.approx(expected, rel=tolerance)

    check(close)
    torch.distributed.destroy_process_group()
    if os.environ["RANK"] == "0":
        sys.stdout.write("agreed\n")


if __name__ == "__main__":
    main()
