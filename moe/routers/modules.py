"""What several routers learn: a linear map from a token to one logit per expert (all of them), and a threshold.

Shapes: B images, S image tokens, D width, E experts.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

INITIAL_STD = 0.02  # of the linear map: small, so that affinities start near uniform
# What one unit of a threshold's parameter counts for. Adam moves a parameter by about the learning rate per step,
# whatever its gradient; a threshold has to follow scores that move much faster.
THRESHOLD_GAIN = 10.0


class RouterLinear(nn.Module):
    """Logit of each token for each expert: `x W_r`, without bias (EC-DIT equation 5 before its softmax).

    With `reads_time` the input is the timestep's embedding beside the token (Nucleus-Image, arXiv 2604.12163:
    the scale of the modulation would swamp the token). Logits are fp32 whatever the dtype of the tokens: bf16
    affinities tie often, and ties decide which tokens are taken.
    """

    def __init__(self, dim: int, num_experts: int, *, reads_time: bool = False) -> None:
        super().__init__()
        self.reads_time = reads_time
        self.weight = nn.Parameter(torch.empty(num_experts, 2 * dim if reads_time else dim))

    def forward(self, x_BSD: Tensor, time_BD: Tensor | None = None) -> Tensor:
        """Tokens [B, S, D] (and timestep embedding [B, D]) -> logits [B, S, E] fp32."""
        with torch.autocast(x_BSD.device.type, enabled=False):
            weight = self.weight.float()
            if not self.reads_time:
                return functional.linear(x_BSD.float(), weight)
            assert time_BD is not None, "this router reads the timestep"
            # The product with the concatenation [time, token], which need not be made for every token.
            of_time, of_token = weight.chunk(2, dim=1)
            time_B1E = functional.linear(time_BD.float(), of_time).unsqueeze(1)
            return functional.linear(x_BSD.float(), of_token) + time_B1E


class Threshold(nn.Module):
    """Learned score above which a token is taken when sampling; one for all experts or one for each.

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
