"""The sum of each token's rows as one GPU kernel, in Triton; `moe.dispatch` uses it where there is a GPU.

One program sums a part of the width for one token, in fp32, the rows in their order: the same bits every time.
PyTorch's `embedding_bag` computes the same, but reads single bf16 values and takes a multiple of the time.

Shapes: R rows, T tokens, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512  # columns of a program: 64 threads that read 16 bytes each


@triton.jit  # type: ignore[untyped-decorator]
def _sum_rows(  # type: ignore[no-untyped-def]
    value, order, first, weight, out, width, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], tl.float32)
    for position in range(tl.load(first + token), tl.load(first + token + 1)):
        row = tl.load(order + position)
        part = tl.load(value + row * width + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            part *= tl.load(weight + row).to(tl.float32)
        total += part
    tl.store(out + token.to(tl.int64) * width + column, total, mask=inside)


def sum_rows(value_RD: Tensor, order_R: Tensor, first_T1: Tensor, weight_R: Tensor | None) -> Tensor:
    """Sum of weight times value over rows order[first[t]] to order[first[t + 1] - 1] of each token t, [T, D]."""
    num_tokens, width = len(first_T1) - 1, value_RD.shape[1]
    out_TD = torch.empty(num_tokens, width, dtype=value_RD.dtype, device=value_RD.device)
    grid = num_tokens, triton.cdiv(width, BLOCK)
    weight = value_RD if weight_R is None else weight_R
    _sum_rows[grid](
        value_RD.contiguous(), order_R, first_T1, weight, out_TD, width, HAS_WEIGHT=weight_R is not None, BLOCK=BLOCK,
        num_warps=2,
    )  # fmt: skip
    return out_TD
