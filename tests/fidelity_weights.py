"""torch-fidelity's file of Inception weights in the form that our network reads: the oracle of its features."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from eval.networks.inception_network import Inception, build_inception


def full_inception(path: Path) -> Inception:
    """The FID network from torch-fidelity's file of weights."""
    return build_inception(fidelity_layers(torch.load(path, map_location="cpu", weights_only=True)))


def fidelity_layers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torch-fidelity's and pytorch-fid's state dict in the form that `build_inception` reads.

    Its layers come in the table's order, each a convolution and a normalisation whose gain may differ from 1.
    Raises ValueError when a part of a layer is missing.
    """
    found: dict[str, Tensor] = {}
    for name in (key.removesuffix(".conv.weight") for key in state if key.endswith(".conv.weight")):
        parts = {part: state.get(f"{name}.bn.{part}") for part in ("weight", "bias", "running_mean", "running_var")}
        gain, bias, mean, var = parts["weight"], parts["bias"], parts["running_mean"], parts["running_var"]
        if bias is None or mean is None or var is None:
            raise ValueError(f"{name} has no complete normalisation: give the weights of torch-fidelity")
        weight = state[f"{name}.conv.weight"]
        if gain is not None:
            # The gain moves into the convolution, so the mean and the variance scale with it.
            weight, mean = weight * gain[:, None, None, None], mean * gain
        found |= {f"{name}.weight": weight, f"{name}.beta": bias, f"{name}.mean": mean, f"{name}.var": var}
    return found
