"""What routers do in training, as numbers: per MoE layer, and per layer and range of timesteps.

| metric `moe/LAYER/...`  | meaning                                                                                 |
|-------------------------|-----------------------------------------------------------------------------------------|
| `coverage_K`            | share of tokens taken by K experts (the last: or more)                                  |
| `gate_entropy`          | of the softmax over experts, in nats                                                    |
| `affinity_kept`         | share of the softmax's mass on chosen pairs                                             |
| `dropped`               | share of a token's choices that found their expert full (token choice)                  |
| `dead_experts`          | experts with less than a tenth of their even share of the kept mass                     |
| `max_load`              | rows of the fullest expert, 1 is its even share                                         |
| `overlap`               | how often two experts take the same token, cosine, mean over pairs                      |
| `similarity`            | how alike two experts' affinities are over the tokens, cosine, mean over pairs          |
| `tN/experts`, `tN/...`  | experts per token, share of uncovered tokens, entropy and kept mass for timesteps in the |
|                         | N-th of four ranges (t = 1 is noise); left out when no image was in it                  |

Shapes: B images, S tokens, E experts.
"""

import torch
from torch import Tensor

from moe.routing import RoutingStats
from trainer.telemetry.metrics_file import NUM_BINS

MAX_COVERAGE = 4
LAYER_KINDS = [f"coverage_{k}" for k in range(MAX_COVERAGE + 1)] + [
    "gate_entropy", "affinity_kept", "dropped", "dead_experts", "max_load", "overlap", "similarity",
]  # fmt: skip
BIN_KINDS = ["experts", "uncovered", "gate_entropy", "affinity_kept"]
_PER_LAYER = len(LAYER_KINDS) + NUM_BINS * len(BIN_KINDS)


def vector_size(num_layers: int) -> int:
    """Length of `router_vector`."""
    return NUM_BINS * bool(num_layers) + num_layers * _PER_LAYER


def router_vector(stats: list[RoutingStats], t_B: Tensor) -> Tensor:
    """Statistics of one batch as a flat fp32 vector whose mean over batches and ranks is theirs; no host sync.

    First the share of images in each range of timesteps, then for each layer its values and, summed over
    the images of each range and divided by B, those per range.
    """
    if not stats:
        return torch.zeros(0)
    bins_B = (t_B * NUM_BINS).long().clamp(0, NUM_BINS - 1)
    member_NB = torch.nn.functional.one_hot(bins_B, NUM_BINS).T.float() / len(t_B)
    rows = [member_NB.sum(1)]
    for s in stats:
        count_BS = s.experts_per_token_BS.float()
        per_image = torch.stack([count_BS.mean(1), (count_BS == 0).float().mean(1), s.entropy_B, s.kept_B])
        rows += [_of_layer(s), (member_NB @ per_image.T.float()).flatten()]
    return torch.cat(rows)


def _of_layer(s: RoutingStats) -> Tensor:
    E = len(s.load_E)
    took_E = s.together_EE.diagonal()
    overlap_EE = s.together_EE / (took_E[:, None] * took_E[None, :]).sqrt().clamp_min(1e-12)
    values = [
        s.gate_entropy, s.affinity_kept, s.dropped, (s.mass_E * E < 0.1).sum(), s.load_E.max() * E,
        _mean_of_pairs(overlap_EE), _mean_of_pairs(s.alike_EE),
    ]  # fmt: skip
    return torch.cat([s.coverage(MAX_COVERAGE), torch.stack([value.float() for value in values])])


def _mean_of_pairs(matrix_EE: Tensor) -> Tensor:
    """Mean off the diagonal, 0 for a single expert."""
    E = len(matrix_EE)
    return (matrix_EE.sum() - matrix_EE.diagonal().sum()) / max(1, E * (E - 1))


def router_metrics(vector: list[float], layers: list[int]) -> dict[str, float]:
    """Named values of a reduced `router_vector`."""
    share = vector[:NUM_BINS]
    metrics: dict[str, float] = {}
    for number, layer in enumerate(layers):
        start = NUM_BINS + number * _PER_LAYER
        values = vector[start : start + _PER_LAYER]
        metrics |= {f"moe/{layer}/{kind}": value for kind, value in zip(LAYER_KINDS, values, strict=False)}
        for n in range(NUM_BINS):
            for k, kind in enumerate(BIN_KINDS):
                if share[n] > 0:
                    metrics[f"moe/{layer}/t{n}/{kind}"] = values[len(LAYER_KINDS) + n * len(BIN_KINDS) + k] / share[n]
    return metrics


def router_histograms(stats: list[RoutingStats], layers: list[int]) -> dict[str, Tensor]:
    """What TensorBoard shows as distributions, on the host: experts per token, load and mass of experts."""
    histograms = {}
    for layer, s in zip(layers, stats, strict=True):
        E = len(s.load_E)
        histograms[f"moe/{layer}/experts_per_token"] = s.experts_per_token_BS.flatten().cpu()
        histograms[f"moe/{layer}/load"] = (s.load_E * E).cpu()
        histograms[f"moe/{layer}/mass"] = (s.mass_E * E).cpu()
    return histograms
