"""Parameter groups and a step of each optimizer against its formula, over the real model's parameters."""

from typing import Any

import pytest
import torch

from moe.config import MoeConfig
from trainer.config import ModelConfig, OptimConfig
from trainer.diffusion.model import EcDit, ModelShape
from trainer.engine.optim import build_optimizer

SHAPE = ModelShape(channels=3, height=8, width=8, text_dim=12)
SMALL = ModelConfig(dim=16, num_layers=2, num_heads=2, num_kv_heads=1, patch_size=2, mlp_ratio=2, pooled_text=True)
MATRICES = {
    "patch_embedder.weight", "timestep_embedder.up.weight", "timestep_embedder.down.weight", "condition.weight",
    "text_projection.up.weight", "text_projection.down.weight", "pooled_projection.weight", "final.weight",
    "final_modulation.weight", "blocks.0.mlp.up.weight", "blocks.0.mlp.down.weight", "blocks.1.mlp.router.weight",
    "blocks.1.mlp.experts.w1", "blocks.1.mlp.experts.w2", "blocks.1.mlp.predictor.up.weight",
    "blocks.1.mlp.predictor.down.weight",
    *(f"blocks.{i}.{kind}_attention.{part}.weight" for i in (0, 1) for kind in ("self", "cross")
      for part in ("query", "key_value", "out")),
}  # fmt: skip


def model_with_gradients() -> EcDit:
    model = EcDit(SMALL, MoeConfig(num_experts=4, router="diffmoe", pool="batch"), SHAPE)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def test_matrices_decay_and_nothing_else_does() -> None:
    model = model_with_gradients()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model.named_parameters(), OptimConfig(weight_decay=0.3)).param_groups
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert decay.keys() == set(names.values()) and set(decay.values()) == {0.3, 0.0}
    assert {name for name, value in decay.items() if value} == MATRICES


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_three_steps_follow_the_formula(kind: Any) -> None:
    """AdamW (arXiv 1711.05101, algorithm 2), and SGD with decay as part of the gradient, in double precision."""
    config = OptimConfig(name=kind, learning_rate=0.05, beta1=0.8, beta2=0.95, eps=0.02, weight_decay=0.3)
    model = model_with_gradients()
    optimizer = build_optimizer(model.named_parameters(), config)
    generator = torch.Generator().manual_seed(1)
    wanted = {name: p.detach().double() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(w) for name, w in wanted.items()}
    second = {name: torch.zeros_like(w) for name, w in wanted.items()}
    for step in (1, 2, 3):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            g, decay = parameter.grad.double(), 0.3 if name in MATRICES else 0.0
            if kind == "sgd":
                wanted[name] = wanted[name] - 0.05 * (g + decay * wanted[name])
                continue
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.95 * second[name] + 0.05 * g * g
            m, v = first[name] / (1 - 0.8**step), second[name] / (1 - 0.95**step)
            wanted[name] = wanted[name] - 0.05 * (m / (v.sqrt() + 0.02) + decay * wanted[name])
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), wanted[name], rtol=1e-5, atol=1e-6, msg=name)
