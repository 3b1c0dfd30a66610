"""A learned score above which a token is taken when sampling, shared by the routers that let pictures compete."""

import torch
from torch import Tensor, nn

# What one unit of the parameter counts for. Adam moves a parameter by about the learning rate per step, whatever its
# gradient; a threshold has to follow scores that move much faster.
THRESHOLD_GAIN = 10.0


class Threshold(nn.Module):
    """One score for all experts, or one for each.

    The papers keep a moving average of the last taken score of each batch. Here it is a parameter whose squared
    distance to that score is part of the loss: SGD on it is that moving average, and being a parameter it is averaged
    over ranks, checkpointed, exported and part of the EMA like any other.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.empty(size))

    def forward(self) -> Tensor:
        """The threshold, [size] fp32."""
        return self.value.float() * THRESHOLD_GAIN


def threshold_loss(threshold: Tensor, target: Tensor) -> Tensor:
    """Half the squared distance of the threshold to each pool's last taken score; see `Threshold`."""
    return 0.5 * (threshold - target.detach()).square().mean()
