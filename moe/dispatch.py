"""Dispatch (gather tokens to expert rows) and combine (weighted scatter-add), each the other's adjoint.

Row order is expert-major, so that the equal blocks of an all-to-all are contiguous.
Shapes: B images, S tokens, D width, E experts, C capacity, N = B * C rows of one expert.
"""

import torch
from torch import Tensor


def flat_index(index_BEC: Tensor, num_tokens: int) -> Tensor:
    """Positions [B, E, C] within images -> row numbers [E * N] in the flat [B * S] tokens, expert-major."""
    B = index_BEC.shape[0]
    first_row_B11 = num_tokens * torch.arange(B, device=index_BEC.device).view(B, 1, 1)  # made there: no copy waits
    return (index_BEC + first_row_B11).transpose(0, 1).reshape(-1)


def dispatch(x_BSD: Tensor, rows: Tensor, num_experts: int) -> Tensor:
    """Copy the chosen tokens to their experts: [B, S, D], row numbers [E * N] -> [E, N, D]."""
    D = x_BSD.shape[-1]
    return x_BSD.reshape(-1, D).index_select(0, rows).view(num_experts, -1, D)


def combine(y_END: Tensor, gate_BEC: Tensor, rows: Tensor, like_BSD: Tensor) -> Tensor:
    """Sum of gate times expert output at each token (equation 8): [E, N, D] -> [B, S, D].

    A token that no expert took gets zeros: it keeps only its residual path.
    """
    D = y_END.shape[-1]
    gate_EN1 = gate_BEC.transpose(0, 1).reshape(y_END.shape[0], -1, 1)
    weighted = (y_END * gate_EN1.to(y_END.dtype)).view(-1, D)
    out = like_BSD.new_zeros(like_BSD.numel() // D, D).index_add(0, rows, weighted.to(like_BSD.dtype))
    return out.view_as(like_BSD)
