"""What several routers learn: a linear map from a token to one logit per expert (all of them), and a threshold.

Shapes: B images, S image tokens, D width, E experts.
"""

from typing import Any

import torch
from torch import Tensor, nn

INITIAL_STD = 0.02  # of the linear map: small, so that affinities start near uniform
# What one unit of a threshold's parameter counts for. Adam moves a parameter by about the learning rate per step,
# whatever its gradient; a threshold has to follow scores that move much faster.
THRESHOLD_GAIN = 10.0


def _product(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    return x_TD.float() @ weight_ED.float().t()


def _product_on_gpu(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    if x_TD.dtype != torch.bfloat16 or weight_ED.dtype != torch.bfloat16:
        return _product(x_TD, weight_ED)
    return torch.mm(x_TD, weight_ED.t(), out_dtype=torch.float32)


def _shape_of_product(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    return x_TD.new_empty(x_TD.shape[0], weight_ED.shape[0], dtype=torch.float32)


def _keep_for_gradient(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, Tensor]:
    x_TD, weight_ED = ctx.saved_tensors
    grad_TE = grad_TE.to(x_TD.dtype)
    return grad_TE @ weight_ED.to(x_TD.dtype), (grad_TE.t() @ x_TD).to(weight_ED.dtype)


# An operator of its own, as moe/dispatch.py has one: a product of bf16 values with an fp32 result is exact but for the
# order of its sums, and needs no fp32 copy of all tokens, forward and backward 14 bytes for each of their values.
_LIBRARY = torch.library.Library("ec_dit", "FRAGMENT")
_NAME = "ec_dit::product_in_fp32"
_LIBRARY.define("product_in_fp32(Tensor x, Tensor weight) -> Tensor")
_LIBRARY.impl("product_in_fp32", _product, "CompositeExplicitAutograd")
_LIBRARY.impl("product_in_fp32", _product_on_gpu, "CUDA")
torch.library.register_fake(_NAME, _shape_of_product, lib=_LIBRARY)
torch.library.register_autograd(_NAME, _gradient, setup_context=_keep_for_gradient, lib=_LIBRARY)


def product_in_fp32(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T in fp32 whatever the inputs' dtype, [..., I] -> [..., O]; gradients in the inputs' dtypes."""
    out: Tensor = torch.ops.ec_dit.product_in_fp32(x.flatten(0, -2), weight_OI)
    return out.view(*x.shape[:-1], -1)


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
            if not self.reads_time:
                return product_in_fp32(x_BSD, self.weight)
            assert time_BD is not None, "this router reads the timestep"
            # The product with the concatenation [time, token], which need not be made for every token.
            of_time, of_token = self.weight.chunk(2, dim=1)
            return product_in_fp32(x_BSD, of_token) + product_in_fp32(time_BD, of_time).unsqueeze(1)


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
