"""Operators that stand for a GPU's fused kernels where tensors have no data: attention, and RMS norms.

On a CPU PyTorch makes several operators of each, and of attention sometimes two products and a softmax.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from trainer.diffusion import layers

ATTENTION = ("attention", "attention_backward")


@torch.library.custom_op("ec_dit_count::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Stands for a fused attention kernel."""
    return torch.empty_like(query)


@torch.library.custom_op("ec_dit_count::attention_backward", mutates_args=())
def attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Stands for its gradient."""
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@torch.library.custom_op("ec_dit_count::rms_norm", mutates_args=())
def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """Stands for the fused kernel of a GPU."""
    return torch.empty_like(x)


@torch.library.custom_op("ec_dit_count::rms_norm_input", mutates_args=())
def rms_norm_input(grad: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """Stands for the first kernel of its gradient."""
    return torch.empty_like(x)


@torch.library.custom_op("ec_dit_count::rms_norm_scale", mutates_args=())
def rms_norm_scale(grad: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """Stands for the second."""
    return torch.empty_like(scale)


for stand_in in (attention, attention_backward, rms_norm, rms_norm_input, rms_norm_scale):
    stand_in.register_fake(stand_in._init_fn)
attention.register_autograd(
    lambda ctx, grad: (*attention_backward(grad, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:3]),
)
rms_norm.register_autograd(
    lambda ctx, grad: (rms_norm_input(grad, *ctx.saved_tensors), rms_norm_scale(grad, *ctx.saved_tensors)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class _StandIns(TorchFunctionMode):
    def __init__(self, *, norms: bool) -> None:
        super().__init__()
        self.norms = norms

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if function is functional.scaled_dot_product_attention:
            return attention(*args[:3], given.get("attn_mask"))
        if function is functional.rms_norm and self.norms:
            return rms_norm(args[0], given["weight"] if "weight" in given else args[2])
        return function(*args, **given)


@contextmanager
def as_on_gpu(*, norms: bool) -> Iterator[None]:
    """Inside, attention, and with `norms` RMS norms, are the kernels that a GPU has for them, whatever the length."""
    with mock.patch.object(layers, "attend_by_products", attention), _StandIns(norms=norms):
        yield
