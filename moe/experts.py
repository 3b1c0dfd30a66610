"""The local experts' MLPs as batched matmuls: y = GELU(x W1 + b1) W2 + b2 for each expert.

Shapes: e local experts, M rows of an expert, D width, F hidden width.
Both biases of an expert are packed in `w3`, so that ZeRO-3 gathers three tensors and not four.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class _GroupedLinear(torch.autograd.Function):
    """x W^T + b for each expert; [e, M, I], [e, O, I], [e, 1, O] -> [e, M, O].

    Autograd of `baddbmm(b, x, w.transpose(1, 2))` makes the transposed weight gradient and then copies it
    into the parameter's layout: with 64 experts that copy was three quarters of the layer's time. Here the
    gradient is produced in the parameter's layout.
    """

    @staticmethod
    def forward(ctx: Any, x_eMI: Tensor, weight_eOI: Tensor, bias_e1O: Tensor) -> Tensor:
        ctx.save_for_backward(x_eMI, weight_eOI)
        return torch.baddbmm(bias_e1O, x_eMI, weight_eOI.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (grad_eMO,) = grad_outputs
        x_eMI, weight_eOI = ctx.saved_tensors
        grad_weight = torch.bmm(grad_eMO.transpose(1, 2), x_eMI)
        return torch.bmm(grad_eMO, weight_eOI), grad_weight, grad_eMO.sum(1, keepdim=True)


def grouped_linear(x_eMI: Tensor, weight_eOI: Tensor, bias_e1O: Tensor) -> Tensor:
    """A linear map of its own for each expert: [e, M, I] -> [e, M, O]."""
    out: Tensor = _GroupedLinear.apply(x_eMI, weight_eOI, bias_e1O)
    return out


class Experts(nn.Module):
    """`num_local_experts` two-layer GELU MLPs of the same size as the dense MLP they replace.

    `tag` is called with each parameter before the constructor returns: under `zero.Init` a parameter is
    partitioned at that moment, over the group that its tags name.
    """

    def __init__(
        self, num_local_experts: int, dim: int, hidden_dim: int, tag: Callable[[nn.Parameter], None] | None = None
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
        hidden_eMF = functional.gelu(grouped_linear(x_eMD, self.w1, bias1_e1F))
        return grouped_linear(hidden_eMF, self.w2, bias2_e1D)


def biased_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """x W^T + b, [..., I] -> [..., O].

    For a compiler the bias is one for each image, so that its gradient is summed image by image first: that it does in
    the pass which makes the gradient, of GELU for one. A sum over all tokens at once it cuts up, and reads them again.
    """
    if torch.compiler.is_compiling() and x.dim() == 3:
        return functional.linear(x, linear.weight) + linear.bias.expand(x.shape[0], 1, -1)
    out: Tensor = linear(x)
    return out


class Mlp(nn.Module):
    """Two linear maps with GELU between: dense FFN, shared expert (not expert parallel) and text projection."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(in_dim, hidden_dim)
        self.down = nn.Linear(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_dim] -> [..., out_dim]."""
        return biased_linear(functional.gelu(biased_linear(x, self.up)), self.down)
