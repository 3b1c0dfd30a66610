"""Which parameters decay, and steps of the optimizers by hand. The learning rate's schedule is in test_diffusion.py."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from moe.config import MoeConfig
from trainer.config import ModelConfig, OptimConfig
from trainer.diffusion.model import EcDit, ModelShape
from trainer.engine.optim import build_optimizer, decays, set_learning_rate

SHAPE = ModelShape(channels=3, height=8, width=8, text_dim=32)
MODEL = ModelConfig(dim=16, num_layers=2, num_heads=2, num_kv_heads=1, pooled_text=True)
RATE, BETA1, BETA2, EPS, DECAY = 0.1, 0.8, 0.95, 0.01, 0.3
ADAMW = OptimConfig(learning_rate=RATE, beta1=BETA1, beta2=BETA2, eps=EPS, weight_decay=DECAY)

ATTENTION = ("query.weight", "key_value.weight", "out.weight")
MATRICES = {
    "patch_embedder.weight", "timestep_embedder.up.weight", "timestep_embedder.down.weight",
    "text_projection.up.weight", "text_projection.down.weight", "pooled_projection.weight", "condition.weight",
    *(f"blocks.{i}.{kind}_attention.{name}" for i in (0, 1) for kind in ("self", "cross") for name in ATTENTION),
    "blocks.0.mlp.up.weight", "blocks.0.mlp.down.weight", "blocks.1.mlp.router.weight", "blocks.1.mlp.experts.w1",
    "blocks.1.mlp.experts.w2", "final_modulation.weight", "final.weight",
}  # fmt: skip
VECTORS = {
    "patch_embedder.bias", "timestep_embedder.up.bias", "timestep_embedder.down.bias", "text_projection.up.bias",
    "text_projection.down.bias", "pooled_projection.bias", "condition.bias",
    *(f"blocks.{i}.modulation" for i in (0, 1)),
    *(f"blocks.{i}.{kind}_attention.{n}_norm" for i in (0, 1) for kind in ("self", "cross") for n in ("query", "key")),
    "blocks.0.mlp.up.bias", "blocks.0.mlp.down.bias", "blocks.1.mlp.experts.w3", "final_modulation.bias", "final.bias",
}  # fmt: skip
SHARED = {f"blocks.1.mlp.shared.{name}" for name in ("up.weight", "down.weight")}
SHARED_BIASES = {f"blocks.1.mlp.shared.{name}" for name in ("up.bias", "down.bias")}
PREDICTOR = {f"blocks.1.mlp.predictor.{name}" for name in ("up.weight", "down.weight")}
PREDICTED = {*(f"blocks.1.mlp.predictor.{name}" for name in ("up.bias", "down.bias")), "blocks.1.mlp.threshold.value"}


@pytest.mark.parametrize(
    "moe,matrices,vectors",
    [
        (MoeConfig(num_experts=2, num_shared_experts=1), MATRICES | SHARED, VECTORS | SHARED_BIASES),
        (MoeConfig(num_experts=2, router="diffmoe", pool="batch"), MATRICES | PREDICTOR, VECTORS | PREDICTED),
    ],
    ids=["shared", "diffmoe"],
)
def test_only_matrices_decay(moe: MoeConfig, matrices: set[str], vectors: set[str]) -> None:
    model = EcDit(MODEL, moe, SHAPE)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {g["role"]: g for g in build_optimizer(model.named_parameters(), ADAMW).param_groups}
    found = {role: {name_of[id(parameter)] for parameter in group["params"]} for role, group in groups.items()}
    assert found == {"decay": matrices, "no_decay": vectors}
    assert groups["decay"]["weight_decay"] == DECAY and groups["no_decay"]["weight_decay"] == 0


def test_routers_are_a_group_where_their_rate_is_their_own() -> None:
    moe = MoeConfig(num_experts=2, router_input="unmodulated")
    model = EcDit(MODEL, moe, SHAPE)
    optimizer = build_optimizer(model.named_parameters(), replace(ADAMW, router_lr_ratio=0.1))
    groups = {g["role"]: g for g in optimizer.param_groups}
    assert set(groups) == {"no_decay", "decay", "router"} and groups["router"]["weight_decay"] == DECAY
    (router,) = groups["router"]["params"]
    assert router is dict(model.named_parameters())["blocks.1.mlp.router.weight"]
    set_learning_rate(optimizer, 0.5)
    assert {role: group["lr"] for role, group in groups.items()} == {"no_decay": 0.5, "decay": 0.5, "router": 0.05}


def test_experts_of_several_processes_are_groups_of_their_own() -> None:
    """Told by the tags that DeepSpeed reads; what ZeRO-3 has partitioned is judged by its whole shape."""
    tags = {"ds_zero_placement_family": "autoep_expert", "group_name": "ep_size_2", "ds_shape": (4, 3, 2)}
    plain, expert = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(0))
    for key, value in tags.items():
        setattr(expert, key, value)
    assert decays("w1", expert) and not decays("w3", nn.Parameter(torch.zeros(3)))
    first, second = build_optimizer([("w1", expert), ("weight", plain)], ADAMW).param_groups
    assert first["params"][0] is plain and second["params"][0] is expert
    assert "moe" not in first and (second["moe"], second["name"]) == (True, "ep_size_2")
    assert first["weight_decay"] == second["weight_decay"] == DECAY


def line_with_gradients() -> tuple[nn.Linear, list[dict[str, Tensor]]]:
    """A linear map and the gradients of three steps."""
    torch.manual_seed(0)
    line = nn.Linear(3, 2)
    return line, [{name: torch.randn_like(p) for name, p in line.named_parameters()} for _ in range(3)]


def stepped(line: nn.Linear, config: OptimConfig, gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    optimizer = build_optimizer(line.named_parameters(), config)
    for of_step in gradients:
        for name, parameter in line.named_parameters():
            parameter.grad = of_step[name]
        optimizer.step()
    return {name: parameter.detach() for name, parameter in line.named_parameters()}


def test_adamw_by_hand() -> None:
    """Decoupled decay of the weight only, means of gradient and square, both corrected for their start at 0."""
    line, gradients = line_with_gradients()
    expected = {}
    for name, start in line.named_parameters():
        value, mean, square = start.detach().double(), 0.0, 0.0
        for n, gradient in enumerate((of_step[name].double() for of_step in gradients), start=1):
            mean = BETA1 * mean + (1 - BETA1) * gradient
            square = BETA2 * square + (1 - BETA2) * gradient**2
            kept = value * (1 - RATE * DECAY) if name == "weight" else value
            value = kept - RATE * (mean / (1 - BETA1**n)) / ((square / (1 - BETA2**n)) ** 0.5 + EPS)
        expected[name] = value.float()
    for name, value in stepped(line, ADAMW, gradients).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_sgd_by_hand() -> None:
    """No momentum; the decay of the weight is part of its gradient."""
    line, gradients = line_with_gradients()
    expected = {name: start.detach().clone() for name, start in line.named_parameters()}
    for of_step in gradients:
        expected["weight"] = expected["weight"] - RATE * (of_step["weight"] + DECAY * expected["weight"])
        expected["bias"] = expected["bias"] - RATE * of_step["bias"]
    config = OptimConfig(name="sgd", learning_rate=RATE, weight_decay=DECAY)
    for name, value in stepped(line, config, gradients).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
