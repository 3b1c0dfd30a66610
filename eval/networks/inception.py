"""Features of the FID network, InceptionV3 of 2015-12-05. Shapes: N pictures, H x W pixels, D features, K classes."""

import torch
from torch import Tensor

from eval.networks.inception_network import NUM_FEATURES, Inception, build_inception
from eval.networks.protocols import ImageEncoder
from eval.networks.resize import check_convention, fid_input
from eval.weights import file_sha256, find_file, find_weights_file
from trainer.encoders.pretrained import read_torchscript

SLIM, FULL = "inception-2015-12-05", "inception-2015-12-05-full"
"""Entries of the weights table: the network without its classifier, and with it."""


class InceptionEncoder(ImageEncoder):
    """Pool features of the FID network, under a named resize convention.

    `net` replaces the listed weights by a network of the caller's.
    """

    def __init__(self, convention: str, net: Inception | None = None, weights_sha256: str = "") -> None:
        self.convention = check_convention(convention)
        if net is None:
            path = find_weights_file(SLIM)
            net, weights_sha256 = build_inception(read_torchscript(path)), file_sha256(path)
        super().__init__(
            net,
            NUM_FEATURES,
            network="inception-2015-12-05",
            weights_sha256=weights_sha256,
            preprocess=f"{convention}-299",
        )

    def prepare(self, picture_HW3: Tensor) -> Tensor:
        """Resize a uint8 picture to 299 x 299 by the convention, and scale it."""
        return fid_input(picture_HW3, self.convention)


def classifier_weight() -> Tensor | None:
    """Weights [K, D] of the FID network's classifier, fp32 [1008, 2048]; None if its full weights are not here.

    The Inception score uses the logits without bias, as torch-fidelity and the original graph do.
    """
    if find_file(FULL) is None:
        return None
    state = torch.load(find_weights_file(FULL), map_location="cpu", weights_only=True)
    weight: Tensor = state["fc.weight"]
    return weight.float()
