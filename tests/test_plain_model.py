"""The transformer against its plain restatement, forward and backward, and its parts against formulas."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.plain_model import PlainDit, position_waves
from moe.config import MoeConfig
from trainer.config import ModelConfig
from trainer.diffusion.layers import Attention, TimestepEmbedder, attend, sincos_2d
from trainer.diffusion.model import EcDit, ModelShape

SHAPE = ModelShape(channels=3, height=6, width=8, text_dim=12)
SMALL = ModelConfig(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, patch_size=2, mlp_ratio=2, pooled_text=True)
NUCLEUS: dict[str, Any] = {
    "gate": "sigmoid", "router_input": "unmodulated", "normalize_gates": True, "gate_scale": 2.5,
    "num_shared_experts": 1,
}  # fmt: skip
MODELS = {
    "as_it_is": (SMALL, MoeConfig(num_experts=4)),
    "without_pooled_text": (replace(SMALL, pooled_text=False), MoeConfig(num_experts=4)),
    "data": (replace(SMALL, prediction="data"), MoeConfig(num_experts=4)),
    "one_key_head": (replace(SMALL, num_kv_heads=1), MoeConfig(num_experts=4, every=1)),
    "dense": (replace(SMALL, num_kv_heads=4, mlp_ratio=3), MoeConfig(every=0)),
    "router_that_reads_the_time": (SMALL, MoeConfig(num_experts=4, **NUCLEUS)),
}


def filled(model: torch.nn.Module) -> torch.nn.Module:
    """The same random weights by name, none at zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            value = torch.randn(parameter.shape, generator=generator)
            scale = 0.4 if parameter.dim() < 2 or name.endswith("modulation") else parameter.shape[-1] ** -0.5
            parameter.copy_(1 + 0.3 * value if "_norm" in name else scale * value)
    return model


def inputs(seed: int = 1) -> list[Tensor]:
    """Two images, one of them in a text of 5 tokens that ends with 2 that are none."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 6, 8, generator=generator)
    text = 2 + 3 * torch.randn(2, 5, 12, generator=generator)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    return [x, torch.tensor([0.03, 0.6]), text, mask]


def outcome(model: torch.nn.Module, keep: Tensor | None, checkpointing: bool = False) -> tuple[Tensor, Any, Any]:
    """Prediction, statistics and gradients of a fixed weighting of the prediction."""
    x, t, text, mask = inputs()
    text.requires_grad_()
    if isinstance(model, EcDit):
        model.activation_checkpointing = checkpointing
    prediction, stats = filled(model)(x, t, text, mask, keep)
    (prediction * torch.randn(prediction.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    return prediction, stats, {"text": text.grad} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("kept", ["all", "some", "recomputed"])
@pytest.mark.parametrize("name", MODELS)
def test_model_equals_its_plain_restatement_forward_and_backward(name: str, kept: str) -> None:
    config, moe = MODELS[name]
    keep = torch.tensor([[0, 1, 2, 4, 7, 8, 10, 11], [1, 3, 4, 5, 6, 8, 9, 10]]) if kept == "some" else None
    ours, our_stats, our_gradients = outcome(EcDit(config, moe, SHAPE), keep, kept == "recomputed")
    plain, plain_stats, plain_gradients = outcome(PlainDit(config, moe, SHAPE), keep)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    for a, b in zip(our_stats, plain_stats, strict=True):
        assert torch.equal(a.statistics().experts_per_token_BS, b.experts_per_token_BS)
    assert our_gradients.keys() == plain_gradients.keys()
    for parameter, gradient in plain_gradients.items():
        scale = float(gradient.abs().max())
        assert scale > 0, parameter
        torch.testing.assert_close(our_gradients[parameter], gradient, rtol=1e-3, atol=1e-4 * scale, msg=parameter)


def test_positions_are_sinusoids_of_row_and_column() -> None:
    found = sincos_2d(3, 5, 16, torch.device("cpu"))
    assert found.shape == (15, 16)
    for token in range(15):
        row, column = divmod(token, 5)
        for k, frequency in enumerate((1.0, 0.1, 0.01, 0.001)):
            waves = [found[token, part * 4 + k].item() for part in range(4)]
            wanted = [math.sin(row * frequency), math.cos(row * frequency),
                      math.sin(column * frequency), math.cos(column * frequency)]  # fmt: skip
            assert waves == pytest.approx(wanted, abs=1e-6), (token, k)
        assert found[token].tolist() == pytest.approx(position_waves(row, column, 16), abs=1e-6)


def test_timestep_is_embedded_by_sinusoids_of_a_thousand_times_it() -> None:
    """Cosines and sines of 1000 t 10000^(-k / 128), in double precision; fp32 angles of 1000 are good to 6e-5."""
    embedder = TimestepEmbedder(256)
    with torch.no_grad():
        embedder.up.weight.copy_(torch.eye(256))
        embedder.down.weight.copy_(torch.eye(256))
        embedder.up.bias.zero_()
        embedder.down.bias.zero_()
    for t in (0.0, 0.001, 0.37, 1.0):
        angles = [1000 * t * 10000 ** (-k / 128) for k in range(128)]
        waves = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        wanted = [w / (1 + math.exp(-w)) for w in waves]
        assert embedder(torch.tensor([t]))[0].tolist() == pytest.approx(wanted, abs=2e-4), t


@pytest.mark.parametrize(
    "num_queries,repeatable", [(6, False), (513, False), (513, True)], ids=["two matmuls", "fused", "heads repeated"]
)
def test_attention_is_a_mean_by_exponentials_of_scaled_products(num_queries: int, repeatable: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, length, 8, generator=generator)
        for heads, length in ((4, num_queries), (2, 5), (2, 5))
    )  # fmt: skip
    mask = torch.tensor([[[[True, False, True, True, False]]]])
    torch.use_deterministic_algorithms(repeatable)
    try:
        found = attend(query, key, value, mask)
    finally:
        torch.use_deterministic_algorithms(False)
    for head in range(4):
        for s in (0, num_queries - 1):
            weight = {i: math.exp(float(query[0, head, s] @ key[0, head // 2, i]) / math.sqrt(8)) for i in (0, 2, 3)}
            wanted = sum(w * value[0, head // 2, i] for i, w in weight.items()) / sum(weight.values())
            torch.testing.assert_close(found[0, head, s], wanted, rtol=1e-4, atol=1e-5)


def test_cross_attention_is_not_turned_and_self_attention_is() -> None:
    attention = filled(Attention(16, 4, 2))
    x, turn = (
        torch.randn(1, 6, 16),
        torch.stack([torch.arange(12.0).cos(), torch.arange(12.0).sin()], -1).view(1, 6, 2, 2),
    )
    plain = attention(x, x)
    assert not torch.allclose(attention(x, x, turn_BSa2=turn), plain, atol=1e-3)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(attention(x, x[:, order]), plain, rtol=1e-4, atol=1e-5)
