"""Every router and variant against its plain loops, and the rules of each one by one."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from moe.config import MoeConfig
from moe.layer import MoeLayer, auxiliary_loss, set_capacity_factor
from moe.oracle.layer import ReferenceMoe
from moe.routers.base import pack
from moe.routers.expert_race import race, similarity_loss
from moe.routers.modules import product_in_fp32
from moe.routers.registry import build_router
from moe.routers.token_choice import balance_loss, place_tokens
from moe.routing import ChoiceMemory, chosen_mask, gated

E, S, D = 4, 8, 12
VARIANTS: dict[str, dict[str, Any]] = {
    "group": {"pool": "group(2)"},
    "batch": {"pool": "batch"},
    "sigmoid": {"gate": "sigmoid"},
    "identity": {"gate": "identity", "pool": "batch"},
    "token_choice": {"router": "token_choice"},
    "token_choice_top_1_in_batch": {"router": "token_choice", "top_k": 1, "capacity_factor": 1.5, "pool": "batch"},
    "token_choice_sigmoid": {"router": "token_choice", "gate": "sigmoid", "capacity_factor": 1.0},
    "diffmoe": {"router": "diffmoe", "pool": "batch"},
    "diffmoe_by_gate": {"router": "diffmoe", "pool": "batch", "sampling_choice": "gate"},
    "diffmoe_groups": {"router": "diffmoe", "pool": "group(2)", "capacity_factor": 1.0},
    "race": {"router": "expert_race", "gate": "identity", "pool": "batch"},
    "race_per_image": {"router": "expert_race", "capacity_factor": 1.0},
    "nucleus": {
        "gate": "sigmoid", "router_input": "unmodulated", "normalize_gates": True, "gate_scale": 2.5,
        "num_shared_experts": 1,
    },
    "everything": {
        "router": "diffmoe", "pool": "batch", "router_input": "unmodulated", "normalize_gates": True,
        "num_shared_experts": 2,
    },
}  # fmt: skip


def filled(layer: torch.nn.Module, seed: int = 0) -> Any:
    """The same random weights by name; thresholds near zero, where scores lie."""
    named = sorted(layer.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in named:
            scale = 0.01 if "threshold" in name else 0.4
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return layer


def config_of(variant: str) -> MoeConfig:
    return MoeConfig(**({"num_experts": E, "auxiliary_weight": 0.5} | VARIANTS[variant]))


def inputs(batch: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = (batch, S, D), (batch, S, D), (batch, D)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("training", [True, False], ids=["training", "sampling"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_equals_the_plain_loops_forward_and_backward(variant: str, training: bool) -> None:
    compare_with_oracle(config_of(variant), training)


def compare_with_oracle(config: MoeConfig, training: bool) -> None:
    """Outputs, statistics and all gradients of a layer with these settings."""
    results, grad = [], torch.randn(4, S, D, generator=torch.Generator().manual_seed(3))
    for kind in (MoeLayer, ReferenceMoe):
        layer = filled(kind(config, dim=D, hidden_dim=16)).train(training)
        x, plain, time = inputs()
        y, found = layer(x, None, plain, time)
        ((y * grad).sum() + found.auxiliary_loss).backward()
        stats = found.statistics() if kind is MoeLayer else found
        gradients = {name: p.grad for name, p in layer.named_parameters()}
        results.append((y, stats, gradients | {"x": x.grad, "plain": plain.grad, "time": time.grad}))
    (y, stats, ours), (y_oracle, expected, oracle) = results
    torch.testing.assert_close(y, y_oracle, rtol=1e-5, atol=1e-5)
    assert torch.equal(stats.experts_per_token_BS, expected.experts_per_token_BS)
    for name in ("gate_entropy", "affinity_kept", "dropped", "auxiliary_loss"):
        torch.testing.assert_close(getattr(stats, name), getattr(expected, name), rtol=1e-5, atol=1e-6, msg=name)
    assert ours.keys() == oracle.keys()
    for name, gradient in oracle.items():
        if gradient is None:
            assert ours[name] is None or not ours[name].any(), name
        else:
            torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=3e-5, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputation_repeats_the_choice(variant: str) -> None:
    layer = filled(MoeLayer(config_of(variant), dim=D, hidden_dim=16))
    x, plain, time = inputs()
    memory = ChoiceMemory()
    _, first = layer(x, memory, plain, time)
    index = memory.index_BEC
    assert index is not None
    _, second = layer(x.flip(1), memory, plain.flip(1), time)
    assert torch.equal(memory.index_BEC, index)
    assert torch.equal(first.statistics().experts_per_token_BS, second.statistics().experts_per_token_BS)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("race", "race_per_image")])
def test_experts_take_equally_many_rows(variant: str) -> None:
    config = config_of(variant)
    assert build_router(config).traits.has_equal_splits
    layer = filled(MoeLayer(config, dim=D, hidden_dim=16))
    memory = ChoiceMemory()
    layer(*inputs()[:1], memory, *inputs()[1:])
    per_pool = config.pool_images(4)
    assert memory.index_BEC is not None
    assert tuple(memory.index_BEC.shape) == (4 // per_pool, E, config.capacity(per_pool * S))


def test_an_expert_that_is_full_turns_later_tokens_away() -> None:
    affinity = torch.tensor([[[0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.7, 0.2, 0.1], [0.1, 0.8, 0.1]]])
    chosen = place_tokens(affinity, top_k=2, capacity=2)
    # First choices 0 0 0 1: token 2 finds expert 0 full. Second choices 1 2 1 then 0: token 0 gets the last of 1.
    assert chosen.mask_BSE[0].int().tolist() == [[1, 1, 0], [1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert float(chosen.dropped) == pytest.approx(3 / 8)
    torch.testing.assert_close(chosen.sum_BS1[0, :, 0], torch.tensor([0.9, 0.9, 0.9, 0.9]))


def test_balance_loss_is_one_if_even_and_e_if_one_expert_has_all() -> None:
    even = torch.full((2, 8, 4), 0.25)
    first = torch.eye(4).repeat(2, 1).expand(2, 8, 4)
    assert float(balance_loss(even, first)) == pytest.approx(1.0)
    one = torch.zeros(2, 8, 4).index_fill_(2, torch.tensor([3]), 1.0)
    assert float(balance_loss(one, one)) == pytest.approx(4.0)


def test_similarity_loss_grows_when_experts_take_the_same_tokens() -> None:
    logits = 8 * torch.eye(4).repeat(4, 1).unsqueeze(0)
    apart = logits > 1
    paired = logits + logits[..., [1, 0, 3, 2]]
    together = paired > 1
    assert float(similarity_loss(logits, apart)) < float(similarity_loss(paired, together))


def test_race_takes_the_best_pairs_wherever_they_are() -> None:
    score = torch.tensor([[[9.0, 8.0], [7.0, 1.0], [0.0, 2.0]]])
    mask, last = race(score, 3)
    assert mask[0].int().tolist() == [[1, 1], [1, 0], [0, 0]] and last.tolist() == [7.0]
    index, valid = pack(mask, 2)
    assert index[0].tolist() == [[0, 1], [0, 1]] and valid[0].tolist() == [[True, True], [True, False]]
    assert torch.equal(chosen_mask(index, valid, 3)[0], mask[0].float())
    assert not gated(score, index, valid)[0, 1, 1]


@pytest.mark.parametrize("variant", ["diffmoe", "race"])
def test_a_learned_threshold_makes_pictures_independent_of_their_batch(variant: str) -> None:
    layer = filled(MoeLayer(replace(config_of(variant), capacity_factor=1.0), dim=D, hidden_dim=16))
    x = inputs()[0] * torch.tensor([4.0, 1, 1, 1]).view(4, 1, 1)  # the first picture's scores are the most extreme
    assert not torch.allclose(layer(x)[0][:1], layer(x[:1])[0], atol=1e-3), "in training pictures compete"
    layer.eval()
    torch.testing.assert_close(layer(x)[0][:1], layer(x[:1])[0], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        layer.threshold.value.fill_(1e3)
    y, routed = layer(x)
    assert not y.any() and not routed.statistics().experts_per_token_BS.any(), (
        "no pair above the threshold: nothing is computed"
    )


@pytest.mark.parametrize("variant", ["diffmoe", "race"])
def test_threshold_learns_the_share_of_training(variant: str) -> None:
    """SGD on the auxiliary loss alone: sampling then takes as many experts per token as training."""
    layer = filled(MoeLayer(config_of(variant), dim=D, hidden_dim=16))
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("threshold" in name)
    optimizer = torch.optim.SGD([layer.threshold.value], lr=1e-2)
    generator = torch.Generator().manual_seed(2)
    for _ in range(60):
        layer(torch.randn(16, S, D, generator=generator))[1].auxiliary_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    layer.eval()
    _, routed = layer(torch.randn(64, S, D, generator=generator))
    assert routed.statistics().experts_per_token_BS.float().mean() == pytest.approx(2.0, rel=0.15)


def test_capacity_factor_falls_along_its_schedule() -> None:
    config = MoeConfig(num_experts=8, capacity_factor=2.0, capacity_factor_start=4.0, capacity_anneal_steps=10)
    assert [config.factor_at(step) for step in (0, 5, 10, 99)] == [4.0, 3.0, 2.0, 2.0]
    layer = filled(MoeLayer(config, dim=D, hidden_dim=16))
    x = torch.randn(2, 16, D)
    for step, rows in ((0, 8), (5, 6), (10, 4)):
        set_capacity_factor(layer, config.factor_at(step))
        assert int(layer(x)[1].statistics().experts_per_token_BS.sum()) == 2 * 8 * rows
    set_capacity_factor(layer, 4.0)
    layer.eval()
    assert int(layer(x)[1].statistics().experts_per_token_BS.sum()) == 2 * 8 * 4, "sampling uses the final factor"


def test_a_batch_that_groups_do_not_divide_has_smaller_groups() -> None:
    config = MoeConfig(num_experts=E, pool="group(4)")
    assert [config.pool_images(n) for n in (8, 6, 3, 1)] == [4, 2, 1, 1]
    assert MoeConfig(pool="batch").pool_images(6) == 6 and MoeConfig().pool_images(6) == 1


def test_only_routers_with_a_loss_of_their_own_add_one() -> None:
    for variant, has in (("batch", False), ("token_choice", True), ("diffmoe", True), ("race", True)):
        layer = filled(MoeLayer(config_of(variant), dim=D, hidden_dim=16))
        routed = [layer(inputs()[0])[1] for _ in range(2)]
        loss = auxiliary_loss(routed)
        assert (loss is not None) == has
        if loss is not None:
            torch.testing.assert_close(loss, 2 * routed[0].auxiliary_loss)


def test_statistics_know_load_and_overlap() -> None:
    layer = filled(MoeLayer(config_of("batch"), dim=D, hidden_dim=16))
    stats = layer(inputs()[0])[1].statistics()
    torch.testing.assert_close(stats.load_E, torch.full((E,), 1 / E))
    assert stats.together_EE.shape == (E, E) and torch.equal(stats.together_EE, stats.together_EE.T)
    torch.testing.assert_close(stats.together_EE.diagonal(), torch.full((E,), 0.5))
    assert math.isclose(float(stats.together_EE.diagonal().sum()), 2.0)


def test_gates_of_a_token_are_normalised_over_the_experts_that_took_it() -> None:
    index = torch.tensor([[[0, 1, 2], [0, 3, 4], [0, 1, 5], [5, 6, 7]]])
    gate = gated(torch.rand(1, S, E), index, normalize=True, scale=3.0)
    total = torch.zeros(S).scatter_add(0, index.flatten(), gate.flatten())
    torch.testing.assert_close(total, torch.full((S,), 3.0))


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_logits_are_a_product_in_fp32(dtype: torch.dtype, tolerance: float) -> None:
    """Of bf16 tokens, too: exact but for the order of the sums. Gradients have the dtype and precision of inputs."""
    x, weight = torch.randn(3, S, D).to(dtype).requires_grad_(), torch.randn(E, D).to(dtype).requires_grad_()
    exact_x, exact_weight = (value.detach().double().requires_grad_() for value in (x, weight))
    found, expected = product_in_fp32(x, weight), torch.einsum("bsd,ed->bse", exact_x, exact_weight)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    up = torch.randn(3, S, E)
    (found * up).sum().backward()
    (expected * up).sum().backward()
    for value, exact in ((x, exact_x), (weight, exact_weight)):
        assert value.grad is not None and exact.grad is not None and value.grad.dtype == dtype
        torch.testing.assert_close(value.grad.double(), exact.grad, rtol=tolerance, atol=5 * tolerance)
