"""Model FLOPs of a training step, in closed form, and the peak rates of known devices.

Counted are the multiply-adds (2 FLOPs each) of matrix products; normalisation, activation functions, top-k and the
moving of tokens are not. Backward counts twice the forward (one product for the input, one for the weight).
Recomputation under activation checkpointing does not count: these are the model's FLOPs, as MFU is defined in
PaLM (arXiv 2204.02311, appendix B).

Symbols: S image tokens (kept ones, if masked), L text tokens, D width, m MLP ratio, r = key/value heads per head,
E experts of capacity C, P patch size, c latent channels. Per image, forward:

| part                          | multiply-adds                                        |
|-------------------------------|------------------------------------------------------|
| patches in and out            | 2 S D c P^2                                          |
| text projection               | L D (text width + D)                                 |
| timestep, pooled text, adaLN  | 256 D + D^2 (+ D^2) + 6 D^2 + 2 D^2                  |
| block: self-attention         | S D^2 (2 + 2 r) + 2 S^2 D                            |
| block: cross-attention        | 2 S D^2 + 2 r L D^2 + 2 S L D                        |
| block: dense MLP              | 2 m S D^2                                            |
| block: MoE                    | S D E + 2 m E C D^2                                  |
| shared experts, n of them     | 2 m n S D^2                                          |
| router that reads the time    | D E more                                             |
| what a router learns beside   | as the router says (`Router.multiply_adds`)          |

In pools wider than an image, and with a router without equal splits, E C is S f_c; rows that fill up an expert's share
are not the model's.
"""

import torch

from moe.config import MoeConfig
from moe.routers.registry import build_router
from trainer.config import ModelConfig
from trainer.diffusion.layers import TimestepEmbedder
from trainer.diffusion.model import ModelShape

# Dense bf16 TFLOP/s by a part of the device's name, the more special name first (NVIDIA's data sheets).
PEAK_TFLOPS = {
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "B200": 2250.0,
}


def forward_multiply_adds(
    model: ModelConfig, moe: MoeConfig, shape: ModelShape, num_tokens: int, text_length: int
) -> int:
    """Multiply-adds of one image's forward pass with `num_tokens` image and `text_length` text tokens."""
    S, L, D = num_tokens, text_length, model.dim
    square, patch = D * D, shape.channels * model.patch_size**2
    key_value = 2 * D * (D // model.num_heads) * model.num_kv_heads
    attention = S * (2 * square + key_value) + 2 * S * S * D
    attention += 2 * S * square + L * key_value + 2 * S * L * D
    dense = 2 * model.mlp_ratio * S * square
    total = 2 * S * D * patch + L * D * (shape.text_dim + D)
    total += 2 * TimestepEmbedder.num_frequencies * D + (9 + model.pooled_text) * square
    for layer in range(model.num_layers):
        total += attention + (moe_multiply_adds(model, moe, S) if moe.has_moe(layer) else dense)
    return total


def moe_multiply_adds(model: ModelConfig, moe: MoeConfig, num_tokens: int) -> int:
    """Multiply-adds of one MoE layer's forward pass on one image."""
    S, D, E = num_tokens, model.dim, moe.num_experts
    router = build_router(moe)
    exact = moe.pool == "image" and router.traits.has_equal_splits
    rows = E * moe.capacity(S) if exact else int(S * moe.capacity_factor)
    total = S * D * E + 2 * model.mlp_ratio * (rows + moe.num_shared_experts * S) * D * D
    if moe.router_input == "unmodulated":
        total += D * E
    return total + router.multiply_adds(S, D)


def training_flops(model: ModelConfig, moe: MoeConfig, shape: ModelShape, num_tokens: int, text_length: int) -> int:
    """FLOPs of one image's forward and backward pass: three times 2 for each multiply-add."""
    return 3 * 2 * forward_multiply_adds(model, moe, shape, num_tokens, text_length)


def peak_tflops(device: torch.device) -> float | None:
    """Dense bf16 TFLOP/s of a device, None where they are not known (a CPU, another GPU)."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of(name: str) -> float | None:
    """Dense bf16 TFLOP/s of a device of that name, None if unknown."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
