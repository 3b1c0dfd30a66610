"""The router module: a linear map to one affinity per expert, in fp32 (EC-DIT equation 5).

Shapes: B images, S image tokens, D width, E experts.
"""

import torch
from torch import Tensor, nn


class Router(nn.Module):
    """Affinity of each token for each expert: softmax over the experts of `x W_r`, without bias.

    Logits and softmax are fp32 whatever the dtype of the tokens: bf16 affinities tie often, and ties
    decide which tokens are taken.
    """

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim))

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Tokens [B, S, D] -> affinity [B, S, E] fp32, each token's affinities summing to 1."""
        with torch.autocast(x_BSD.device.type, enabled=False):
            logits_BSE = torch.nn.functional.linear(x_BSD.float(), self.weight.float())
            return logits_BSE.softmax(dim=-1)
