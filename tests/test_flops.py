"""The closed formula of training FLOPs against PyTorch's counter of operations."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe.config import MoeConfig
from trainer.config import ModelConfig
from trainer.diffusion.model import EcDit, ModelShape, init_weights
from trainer.telemetry.flops import peak_of, peak_tflops, training_flops

SHAPE = ModelShape(channels=4, height=16, width=16, text_dim=48)
BATCH, TEXT_TOKENS = 2, 20


@pytest.mark.parametrize(
    "model,moe,kept",
    [
        (ModelConfig(dim=128, num_layers=4, num_heads=4, num_kv_heads=2, pooled_text=True), MoeConfig(), 64),
        (ModelConfig(dim=128, num_layers=3, num_heads=4, num_kv_heads=4, patch_size=1), MoeConfig(every=0), 256),
        (ModelConfig(dim=96, num_layers=4, num_heads=2, num_kv_heads=1), MoeConfig(capacity_factor=3.0, every=1), 32),
        (ModelConfig(dim=96, num_layers=4, num_heads=2), MoeConfig(router="token_choice", gate="sigmoid"), 64),
        (ModelConfig(dim=96, num_layers=4, num_heads=2), MoeConfig(router="diffmoe", pool="batch"), 64),
        (ModelConfig(dim=96, num_layers=4, num_heads=2), MoeConfig(pool="group(2)", gate="identity"), 64),
        (
            ModelConfig(dim=96, num_layers=4, num_heads=2),
            MoeConfig(router_input="unmodulated", num_shared_experts=2, normalize_gates=True),
            64,
        ),
    ],
)
def test_formula_agrees_with_counted_operations(model: ModelConfig, moe: MoeConfig, kept: int) -> None:
    formula = BATCH * training_flops(model, moe, SHAPE, kept, TEXT_TOKENS)
    assert formula == pytest.approx(counted_flops(model, moe, kept), rel=0.02)


def counted_flops(model: ModelConfig, moe: MoeConfig, kept: int) -> int:
    """Of a forward and backward pass of two images with `kept` tokens each and 20 tokens of text."""
    B, L = BATCH, TEXT_TOKENS
    network = EcDit(model, moe, SHAPE)
    init_weights(network, seed=0)
    num_tokens = (SHAPE.height // model.patch_size) * (SHAPE.width // model.patch_size)
    keep = torch.arange(kept).expand(B, -1) if kept < num_tokens else None
    x, text = torch.randn(B, SHAPE.channels, SHAPE.height, SHAPE.width), torch.randn(B, L, SHAPE.text_dim)
    with FlopCounterMode(display=False) as counter:
        out, _ = network(x, torch.rand(B), text, torch.ones(B, L, dtype=torch.bool), keep)
        out.square().mean().backward()
    return counter.get_total_flops()


def test_peaks_of_known_devices() -> None:
    assert peak_tflops(torch.device("cpu")) is None
    assert peak_of("NVIDIA H100 80GB HBM3") == 989 and peak_of("NVIDIA H100 PCIe") == 756
    assert peak_of("NVIDIA A100-SXM4-80GB") == 312 and peak_of("NVIDIA B200") == 2250
    assert peak_of("Tesla V100") is None
