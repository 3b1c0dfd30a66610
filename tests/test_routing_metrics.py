"""Routing statistics of training: known cases, and means over batches that are means of the whole."""

import math
from typing import Any

import pytest
import torch

from moe.config import MoeConfig
from moe.layer import MoeLayer
from moe.routing import RoutingStats, routing_stats
from trainer.telemetry.routing_metrics import router_histograms, router_metrics, router_vector, vector_size


def stats_of(x: torch.Tensor, **settings: Any) -> list[RoutingStats]:
    layer = MoeLayer(MoeConfig(num_experts=4, **settings), dim=8, hidden_dim=8)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(layer.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return [layer(x)[1].statistics()]


def test_ranges_of_timesteps_are_kept_apart() -> None:
    x, t = torch.randn(6, 16, 8), torch.tensor([0.1, 0.2, 0.3, 0.9, 0.95, 1.0])
    stats = stats_of(x, pool="batch")
    metrics = router_metrics(router_vector(stats, t).tolist(), [3])
    count = stats[0].experts_per_token_BS.float()
    assert metrics["moe/3/t0/experts"] == pytest.approx(float(count[:2].mean()))
    assert metrics["moe/3/t1/experts"] == pytest.approx(float(count[2].mean()))
    assert metrics["moe/3/t3/uncovered"] == pytest.approx(float((count[3:] == 0).float().mean()))
    assert metrics["moe/3/t3/gate_entropy"] == pytest.approx(float(stats[0].entropy_B[3:].mean()))
    assert not [name for name in metrics if "/t2/" in name], "no image had such a timestep"
    assert metrics["moe/3/coverage_0"] == pytest.approx(float((count == 0).float().mean()))
    assert metrics["moe/3/max_load"] == pytest.approx(1.0) and metrics["moe/3/dropped"] == 0


def test_mean_over_batches_is_that_of_all_images() -> None:
    """With the image as pool a batch cut in two gives the same numbers, ranges with images in one half included."""
    x, t = torch.randn(8, 16, 8), torch.tensor([0.1, 0.6, 0.1, 0.1, 0.9, 0.9, 0.9, 0.3])
    whole = router_metrics(router_vector(stats_of(x), t).tolist(), [0])
    halves = [router_vector(stats_of(part), time) for part, time in zip(x.chunk(2), t.chunk(2), strict=True)]
    mean = router_metrics(torch.stack(halves).mean(0).tolist(), [0])
    assert len(halves[0]) == vector_size(1) and vector_size(0) == 0 and not len(router_vector([], t))
    for name, value in whole.items():
        if "/t" in name or name.split("/")[-1] in ("gate_entropy", "affinity_kept", "coverage_1"):
            assert mean[name] == pytest.approx(value, rel=1e-5), name


def test_dead_alike_and_overlapping_experts_are_seen() -> None:
    affinity = torch.tensor([[[0.4, 0.4, 0.199, 0.001]]]).repeat(1, 8, 1)
    index = torch.arange(4).expand(1, 4, 4).clone()
    index[0, 2] += 4
    metrics = router_metrics(router_vector([routing_stats(affinity, index)], torch.rand(1)).tolist(), [0])
    assert metrics["moe/0/dead_experts"] == 1
    assert metrics["moe/0/overlap"] == pytest.approx(3 / 6), "experts 0, 1 and 3 take the same tokens, 2 others"
    assert metrics["moe/0/similarity"] == pytest.approx(1.0), "affinities are in proportion"


def test_distributions_for_tensorboard() -> None:
    histograms = router_histograms(stats_of(torch.randn(2, 16, 8)), [5])
    assert set(histograms) == {"moe/5/experts_per_token", "moe/5/load", "moe/5/mass"}
    assert histograms["moe/5/mass"].sum() == pytest.approx(4.0)


def test_statistics_of_two_images_in_one_pool() -> None:
    """Two tokens each: token 0 is taken by both experts, 1 by expert 0, 2 by none, 3 by expert 1 (and a filled row)."""
    affinity = torch.tensor([[[0.5, 0.5], [0.9, 0.1], [0.5, 0.5], [0.2, 0.8]]])
    index, valid = torch.tensor([[[0, 1, 1], [0, 3, 2]]]), torch.tensor([[[True, True, True], [True, True, False]]])
    stats = routing_stats(affinity, index, valid, num_images=2)
    assert stats.experts_per_token_BS.tolist() == [[2, 1], [0, 1]]
    entropy = [-sum(p * math.log(p) for p in row) for row in affinity[0].tolist()]
    assert float(stats.gate_entropy) == pytest.approx(sum(entropy) / 4)
    assert stats.entropy_B.tolist() == pytest.approx([sum(entropy[:2]) / 2, sum(entropy[2:]) / 2])
    assert float(stats.affinity_kept) == pytest.approx((1.0 + 0.9 + 0.8) / 4)
    assert stats.kept_B.tolist() == pytest.approx([1.9 / 2, 0.8 / 2])
    assert stats.load_E.tolist() == pytest.approx([0.5, 0.5]), "2 of the 4 taken pairs are each expert's"
    assert stats.mass_E.tolist() == pytest.approx([1.4 / 2.7, 1.3 / 2.7])
    assert stats.together_EE.tolist() == [[0.5, 0.25], [0.25, 0.5]]
    columns = affinity[0].T.double()
    cosine = float(columns[0] @ columns[1]) / math.sqrt(float(columns[0] @ columns[0]) * float(columns[1] @ columns[1]))
    torch.testing.assert_close(stats.alike_EE, torch.tensor([[1.0, cosine], [cosine, 1.0]]))
