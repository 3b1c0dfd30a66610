"""Ways to compute attention with grouped heads, forward and backward, for a table that takes the two in turn.

| kind     |                                                                                              |
|----------|----------------------------------------------------------------------------------------------|
| repeated | the fused kernel that PyTorch chooses, keys and values repeated for each head of queries     |
| grouped  | the same, not repeated                                                                       |
| products | two products and a softmax, on a GPU compiled: all scores in memory, sums in one order       |
| packed   | on a GPU, where there is a mask: real text tokens without padding, so that nothing is masked |

Shapes: B images, H heads of queries, K of keys, S and L tokens, h width of a head.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import varlen

from trainer.diffusion.layers import attend_by_products
from trainer.plan.job import Job

Work = Callable[[], object]


def forward_backward(function: Callable[..., Tensor], *inputs: Tensor) -> Work:
    """Fresh gradients each time, to all inputs of floating point."""
    leaves = [x.requires_grad_() for x in inputs if x.is_floating_point()]
    grad = torch.randn_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*inputs), leaves, grad)


def fused(
    query_BHSh: Tensor, key_BKLh: Tensor, value_BKLh: Tensor, mask_B11L: Tensor | None, *, grouped: bool
) -> Tensor:
    """The kernel that PyTorch chooses."""
    if not grouped:
        groups = query_BHSh.shape[1] // key_BKLh.shape[1]
        key_BKLh, value_BKLh = (x.repeat_interleave(groups, dim=1) for x in (key_BKLh, value_BKLh))
    return functional.scaled_dot_product_attention(
        query_BHSh, key_BKLh, value_BKLh, attn_mask=mask_B11L, enable_gqa=grouped
    )


def packed(
    query_BHSh: Tensor, key_BKLh: Tensor, value_BKLh: Tensor, mask_B11L: Tensor
) -> tuple[Callable[..., Tensor], Tensor, Tensor, Tensor]:
    """A function and its inputs, one row a token; text is packed beforehand, as once for all blocks of a model."""
    B, _, S, _ = query_BHSh.shape
    mask_BL = mask_B11L.flatten(1)
    real_first = (~mask_BL).flatten().to(torch.int8).argsort(stable=True)
    text = functional.pad(mask_BL.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    images = torch.arange(0, B * S + 1, S, device=text.device, dtype=torch.int32)
    # PyTorch 2.11 groups heads unasked.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in varlen.varlen_attn.__annotations__ else {}

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = varlen.varlen_attn(query, key, value, images, text, S, mask_BL.shape[1], **grouped)
        assert isinstance(out, Tensor)
        return out

    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query_BHSh, key_BKLh, value_BKLh))
    return attention, query, key[real_first], value[real_first]


def attention_parts(job: Job, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Work]]:
    """Name and work of each kind, at the tokens that masked training keeps, at all, and against the text."""
    model, B, patch = job.config.model, job.config.train.micro_batch_size, job.config.model.patch_size
    every = job.shape.height * job.shape.width // patch**2
    real = torch.arange(job.text_tokens, device=device) < torch.randint(1, job.text_tokens + 1, (B, 1), device=device)
    kept, text = job.num_tokens, job.text_tokens
    shapes = dict.fromkeys([(kept, kept, False), (every, every, False), (kept, text, False), (kept, text, True)])
    kinds: dict[str, Callable[..., Tensor]] = {
        "repeated": partial(fused, grouped=False),
        "grouped": partial(fused, grouped=True),
        "products": attend_by_products,
    }
    if device.type == "cuda":
        kinds["products"] = torch.compile(attend_by_products, fullgraph=True, dynamic=False)
    for S, L, masked in shapes:
        mask = real[:, None, None, :] if masked else None
        heads = model.num_heads, model.num_kv_heads, model.num_kv_heads
        query, key, value = (
            torch.randn(B, n, tokens, model.dim // model.num_heads, device=device, dtype=dtype)
            for n, tokens in zip(heads, (S, L, L), strict=True)
        )
        name = f"attention {S} x {L}, {'mask' if masked else 'no mask'}"
        for kind, function in kinds.items():
            yield f"{name}, {kind}", forward_backward(partial(function, mask_B11L=mask), query, key, value)
        if mask is not None and device.type == "cuda":
            yield f"{name}, packed", forward_backward(*packed(query.detach(), key.detach(), value.detach(), mask))
