"""Dispatch (copy tokens to expert rows) and combine (weighted sum of rows at each token), each the other's adjoint.

Both directions read: a row looks up its token, a token looks up its rows. Adding rows to their tokens instead, as
`index_add` does, takes atomic additions on a GPU: slow, in another order each time, in bf16 rounded after each.
Row order is expert-major, so that the equal blocks of an all-to-all are contiguous.

Shapes: B images, S tokens, T = B * S tokens of all images, D width, E experts, C capacity, N = B * C rows of one
expert, R = E * N rows of all experts.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Which token each row holds, and which rows each token has. All int64.

    `token_R` number of the row's token among all T; `order_R` the rows, those of the first token first; `first_T1`
    where in `order_R` the rows of each token begin, and where the last ones end.
    """

    token_R: Tensor
    order_R: Tensor
    first_T1: Tensor


def expert_rows(index_BEC: Tensor, num_tokens: int) -> Rows:
    """Rows of the chosen positions [B, E, C] within pools of `num_tokens` tokens; no host synchronisation."""
    B, device = index_BEC.shape[0], index_BEC.device
    # Positions count within a pool, rows look up tokens of all pools. Experts come first, so that what an all-to-all
    # sends to one rank is contiguous.
    first_B11 = num_tokens * torch.arange(B, device=device).view(B, 1, 1)
    token_R = (index_BEC + first_B11).transpose(0, 1).reshape(-1)
    # The way back: sorted by token, each token's rows are one range. The sort is stable, so a token's rows are summed
    # in the order of the experts, in every run and on any topology.
    sorted_R, order_R = token_R.sort(stable=True)
    # A range begins where its token's number would be inserted; a token without rows gets an empty one. `bincount`
    # would say the same, but its size depends on the data, for which the host would have to wait.
    first_T1 = torch.searchsorted(sorted_R, torch.arange(B * num_tokens + 1, device=device))
    return Rows(token_R=token_R, order_R=order_R, first_T1=first_T1)


def _sum_by_bags(
    value_RD: Tensor, weight_R: Tensor | None, token_R: Tensor, order_R: Tensor, first_T1: Tensor
) -> Tensor:
    weight = None if weight_R is None else weight_R[order_R]
    out_TD: Tensor = functional.embedding_bag(
        order_R, value_RD, first_T1, mode="sum", per_sample_weights=weight, include_last_offset=True
    )
    return out_TD


def _sum_on_gpu(
    value_RD: Tensor, weight_R: Tensor | None, token_R: Tensor, order_R: Tensor, first_T1: Tensor
) -> Tensor:
    if value_RD.dtype == torch.double or find_spec("triton") is None:
        return _sum_by_bags(value_RD, weight_R, token_R, order_R, first_T1)
    from moe.row_sum_kernel import sum_rows

    out_TD: Tensor = sum_rows(value_RD, order_R, first_T1, weight_R)
    return out_TD


def _shape_of_sum(
    value_RD: Tensor, weight_R: Tensor | None, token_R: Tensor, order_R: Tensor, first_T1: Tensor
) -> Tensor:
    return value_RD.new_empty(first_T1.shape[0] - 1, value_RD.shape[1])


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value_RD, weight_R, token_R, _, _ = inputs
    ctx.save_for_backward(*([token_R] if weight_R is None else [token_R, value_RD, weight_R]))


def _gradient(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    """A row's gradient is its token's, times its weight; that of a weight is the product of both rows."""
    token_R, *weighted = ctx.saved_tensors
    grad_RD = grad_TD.index_select(0, token_R)
    if not weighted:
        return grad_RD, None, None, None, None
    value_RD, weight_R = weighted
    return grad_RD * weight_R[:, None], (grad_RD * value_RD).sum(-1), None, None, None


# An operator of its own, so that a compiler takes it as it is: on a GPU it is a Triton kernel, with another path beside
# it, and what decides between them cannot be traced. Not by `torch.library.custom_op`, whose first call loads the
# compiler: 2.6 seconds of each process.
_LIBRARY = torch.library.Library("ec_dit", "DEF")
_NAME = "ec_dit::sum_at_tokens"
_LIBRARY.define("sum_at_tokens(Tensor value, Tensor? weight, Tensor token, Tensor order, Tensor first) -> Tensor")
_LIBRARY.impl("sum_at_tokens", _sum_by_bags, "CompositeExplicitAutograd")
_LIBRARY.impl("sum_at_tokens", _sum_on_gpu, "CUDA")
torch.library.register_fake(_NAME, _shape_of_sum, lib=_LIBRARY)
torch.library.register_autograd(_NAME, _gradient, setup_context=_keep_for_gradient, lib=_LIBRARY)


def sum_at_tokens(value_RD: Tensor, rows: Rows, weight_R: Tensor | None = None) -> Tensor:
    """Sum of (weighted) rows of each token, [T, D]; zeros where there are none. Differentiable."""
    out_TD: Tensor = torch.ops.ec_dit.sum_at_tokens(value_RD, weight_R, rows.token_R, rows.order_R, rows.first_T1)
    return out_TD


class _Dispatch(torch.autograd.Function):
    """[T, D] -> [R, D]."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return x_TD.index_select(0, rows.token_R)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return sum_at_tokens(grad_outputs[0], ctx.rows), None


def dispatch(x_BSD: Tensor, rows: Rows, num_experts: int) -> Tensor:
    """Copy the chosen tokens to their experts: [B, S, D] -> [E, N, D]."""
    D = x_BSD.shape[-1]
    x_RD: Tensor = _Dispatch.apply(x_BSD.reshape(-1, D), rows)
    return x_RD.view(num_experts, -1, D)


def combine(y_END: Tensor, gate_BEC: Tensor, rows: Rows, like_BSD: Tensor) -> Tensor:
    """Sum of gate times expert output at each token (equation 8): [E, N, D] -> [B, S, D].

    A token that no expert took gets zeros: it keeps only its residual path.
    """
    weight_R = gate_BEC.transpose(0, 1).reshape(-1).to(y_END.dtype)
    out_TD = sum_at_tokens(y_END.reshape(-1, y_END.shape[-1]), rows, weight_R)
    return out_TD.to(like_BSD.dtype).view_as(like_BSD)
