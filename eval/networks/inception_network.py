"""The InceptionV3 graph of 2015-12-05 that defines FID, built from one table (arXiv 1512.00567, 1706.08500).

It differs from torchvision's network: average pools leave the padding out of the count, the last block
pools by maximum, and batch normalisation has no gain and eps 1e-3. Normalisation is folded into the
convolutions. Shapes: N pictures, C channels, H and W pixels, D = 2048 features.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BATCH_NORM_EPS = 1e-3
NUM_FEATURES = 2048


@dataclass(frozen=True)
class Conv:
    """Convolution, normalisation, ReLU; padded to keep the size unless `valid` or strided."""

    out: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    valid: bool = False


Chain = list["Conv | nn.Module | Branches"]
Branches = tuple[Chain, ...]
"""Parallel chains over the same input, concatenated over channels."""

SQUARE, FIVE, WIDE, TALL = (3, 3), (5, 5), (1, 7), (7, 1)
AVERAGE = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
MAXIMUM, HALVE = nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(3, 2)
FORK: Branches = ([Conv(384, (1, 3))], [Conv(384, (3, 1))])


def _block_35(pooled: int) -> Branches:
    double: Chain = [Conv(64), Conv(96, SQUARE), Conv(96, SQUARE)]
    return [Conv(64)], [Conv(48), Conv(64, FIVE)], double, [AVERAGE, Conv(pooled)]


def _block_17(width: int) -> Branches:
    simple: Chain = [Conv(width), Conv(width, WIDE), Conv(192, TALL)]
    double: Chain = [Conv(width), Conv(width, TALL), Conv(width, WIDE), Conv(width, TALL), Conv(192, WIDE)]
    return [Conv(192)], simple, double, [AVERAGE, Conv(192)]


def _block_8(pool: nn.Module) -> Branches:
    return [Conv(320)], [Conv(384), FORK], [Conv(448), Conv(384, SQUARE), FORK], [pool, Conv(192)]


INCEPTION_2015: Chain = [
    Conv(32, SQUARE, 2),
    Conv(32, SQUARE, valid=True),
    Conv(64, SQUARE),
    HALVE,
    Conv(80, valid=True),
    Conv(192, SQUARE, valid=True),
    HALVE,
    *(_block_35(pooled) for pooled in (32, 64, 64)),
    ([Conv(384, SQUARE, 2)], [Conv(64), Conv(96, SQUARE), Conv(96, SQUARE, 2)], [HALVE]),
    *(_block_17(width) for width in (128, 160, 160, 192)),
    ([Conv(192), Conv(320, SQUARE, 2)], [Conv(192), Conv(192, WIDE), Conv(192, TALL), Conv(192, SQUARE, 2)], [HALVE]),
    _block_8(AVERAGE),
    _block_8(MAXIMUM),
]


class _Parallel(nn.ModuleList):
    def forward(self, x_NCHW: Tensor) -> Tensor:
        return torch.cat([chain(x_NCHW) for chain in self], dim=1)


def _build_chain(in_channels: int, chain: Chain) -> tuple[nn.Sequential, int]:
    """The modules of one chain, and how many channels come out of it."""
    modules: list[nn.Module] = []
    for step in chain:
        if isinstance(step, Conv):
            keep = step.stride == 1 and not step.valid
            padding = (step.kernel[0] // 2, step.kernel[1] // 2) if keep else (0, 0)
            conv = nn.Conv2d(in_channels, step.out, step.kernel, step.stride, padding)
            modules += [conv, nn.ReLU(inplace=True)]
            in_channels = step.out
        elif isinstance(step, tuple):
            chains, widths = zip(*(_build_chain(in_channels, inner) for inner in step), strict=True)
            modules.append(_Parallel(chains))
            in_channels = sum(widths)
        else:
            modules.append(step)
    return nn.Sequential(*modules), in_channels


class Inception(nn.Module):
    """Features of pictures that are already resized to 299 and scaled: [N, 3, 299, 299] -> [N, 2048]."""

    def __init__(self) -> None:
        super().__init__()
        self.body, width = _build_chain(3, INCEPTION_2015)
        assert width == NUM_FEATURES
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        features: Tensor = self.body(x_NCHW.contiguous(memory_format=torch.channels_last)).mean((2, 3))
        return features

    def convolutions(self) -> Iterator[nn.Conv2d]:
        """The 94 convolutions in the order of the table."""
        return (module for module in self.modules() if isinstance(module, nn.Conv2d))


def build_inception(state: Mapping[str, Tensor]) -> Inception:
    """Network from a state dict that has `weight`, `beta`, `mean`, `var` per layer, in the table's order.

    Raises ValueError when the layers do not fit the table.
    """
    net = Inception()
    layers = list(dict.fromkeys(name.rsplit(".", 1)[0] for name in state))
    convolutions = list(net.convolutions())
    if len(layers) != len(convolutions):
        raise ValueError(f"{len(layers)} layers in the weights, the network has {len(convolutions)}")
    for layer, conv in zip(layers, convolutions, strict=True):
        weight, beta, mean, var = (state[f"{layer}.{part}"] for part in ("weight", "beta", "mean", "var"))
        if weight.shape != conv.weight.shape:
            raise ValueError(f"{layer} is {tuple(weight.shape)}, the network has {tuple(conv.weight.shape)}")
        # gain 1: y = (conv(x) - mean) / std + beta is a convolution with scaled weights and one bias.
        scale = (var.double() + BATCH_NORM_EPS).rsqrt()
        assert conv.bias is not None
        conv.weight.copy_(weight.double() * scale[:, None, None, None])
        conv.bias.copy_(beta.double() - mean.double() * scale)
    return net
