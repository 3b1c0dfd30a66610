"""The local experts' MLPs as batched matmuls: y = GELU(x W1 + b1) W2 + b2 for each expert.

Shapes: e local experts, M rows of an expert, D width, F hidden width.
The names `w1`, `w2`, `w3` and the packing of both biases in `w3` are what DeepSpeed's checkpoint code
expects of an expert-parallel layer.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class Experts(nn.Module):
    """`num_local_experts` two-layer GELU MLPs of the same size as the dense MLP they replace.

    `tag` is called with each parameter before the constructor returns: under `zero.Init` a parameter is
    partitioned at that moment, over the group that its tags name.
    """

    def __init__(
        self,
        num_local_experts: int,
        dim: int,
        hidden_dim: int,
        tag: Callable[[nn.Parameter], None] | None = None,
    ) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.w1 = nn.Parameter(torch.empty(num_local_experts, hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(num_local_experts, dim, hidden_dim))
        self.w3 = nn.Parameter(torch.empty(num_local_experts, 1, hidden_dim + dim))
        if tag is not None:
            for parameter in self.parameters():
                tag(parameter)

    def forward(self, x_eMD: Tensor) -> Tensor:
        """Rows [e, M, D] -> outputs [e, M, D]; row m of expert j depends on nothing else."""
        bias1_e1F, bias2_e1D = self.w3.split([self.hidden_dim, x_eMD.shape[-1]], dim=-1)
        hidden_eMF = functional.gelu(torch.baddbmm(bias1_e1F, x_eMD, self.w1.transpose(1, 2)))
        return torch.baddbmm(bias2_e1D, hidden_eMF, self.w2.transpose(1, 2))
