"""The MoE layer against its plain-loop oracle, and the seams of it one by one."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch

from moe.config import MoeConfig
from moe.dispatch import combine, dispatch, expert_rows
from moe.experts import grouped_linear
from moe.layer import MoeLayer
from moe.oracle.layer import ReferenceMoe
from moe.routers.expert_choice import choose_tokens, choose_tokens_in_turn
from moe.routing import ChoiceMemory, routing_stats


def filled(layer: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return layer


@pytest.mark.parametrize("tie_break", ["any", "rotate"])
@pytest.mark.parametrize(
    "num_experts,factor,tokens", [(4, 2.0, 16), (4, 1.0, 8), (8, 2.0, 4), (2, 0.5, 12), (3, 1.5, 10)]
)
def test_layer_equals_the_plain_loops_forward_and_backward(
    num_experts: int, factor: float, tokens: int, tie_break: Any
) -> None:
    config = MoeConfig(num_experts=num_experts, capacity_factor=factor, tie_break=tie_break)
    layer = filled(MoeLayer(config, dim=16, hidden_dim=24))
    oracle = filled(ReferenceMoe(config, dim=16, hidden_dim=24))
    x = torch.randn(3, tokens, 16, requires_grad=True)
    x_oracle = x.detach().clone().requires_grad_()
    y, routed = layer(x)
    stats = routed.statistics()
    y_oracle, stats_oracle = oracle(x_oracle)
    grad = torch.randn_like(y)
    y.backward(grad)
    y_oracle.backward(grad)
    torch.testing.assert_close(y, y_oracle, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, x_oracle.grad, rtol=1e-5, atol=1e-5)
    named = dict(oracle.named_parameters())
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, named[name].grad, rtol=1e-5, atol=2e-5, msg=name)
    assert torch.equal(stats.experts_per_token_BS, stats_oracle.experts_per_token_BS)
    torch.testing.assert_close(stats.gate_entropy, stats_oracle.gate_entropy)
    torch.testing.assert_close(stats.affinity_kept, stats_oracle.affinity_kept)


def test_grouped_linear_gradients_are_right() -> None:
    shapes = [(2, 5, 3), (2, 4, 3), (2, 1, 4)]
    tensors = [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(grouped_linear, tensors)
    x, weight, bias = tensors
    expected = torch.stack([x[e] @ weight[e].T + bias[e] for e in range(2)])
    torch.testing.assert_close(grouped_linear(x, weight, bias), expected)


def test_one_expert_that_takes_all_tokens_is_the_dense_mlp() -> None:
    layer = filled(MoeLayer(MoeConfig(num_experts=1, capacity_factor=1.0), dim=8, hidden_dim=16))
    x = torch.randn(2, 6, 8)
    w1, w2, w3 = (p[0] for p in layer.experts.parameters())
    dense = torch.nn.functional.gelu(x @ w1.T + w3[0, :16]) @ w2.T + w3[0, 16:]
    torch.testing.assert_close(layer(x)[0], dense)


def test_output_does_not_depend_on_batch_mates() -> None:
    layer = filled(MoeLayer(MoeConfig(num_experts=4), dim=8, hidden_dim=16))
    x = torch.randn(4, 16, 8)
    torch.testing.assert_close(layer(x)[0][1:2], layer(x[1:2])[0])


def test_combine_is_the_adjoint_of_dispatch() -> None:
    x, y = torch.randn(2, 10, 4, dtype=torch.double), torch.randn(3, 2 * 5, 4, dtype=torch.double)
    index = choose_tokens(torch.rand(2, 10, 3), 5)
    rows = expert_rows(index, 10)
    ones = torch.ones(2, 3, 5, dtype=torch.double)
    left = (dispatch(x, rows, 3) * y).sum()
    right = (x * combine(y, ones, rows, x)).sum()
    torch.testing.assert_close(left, right)


def test_each_expert_takes_its_highest_affinities() -> None:
    affinity = torch.rand(2, 12, 3).softmax(-1)
    index = choose_tokens(affinity, 4)
    for b in range(2):
        for e in range(3):
            assert set(index[b, e].tolist()) == set(affinity[b, :, e].argsort(descending=True)[:4].tolist())
            assert index[b, e].tolist() == sorted(index[b, e].tolist())


@pytest.mark.parametrize("num_experts,factor,tokens", [(4, 2.0, 16), (4, 3.0, 16), (8, 1.0, 8), (3, 1.5, 10)])
def test_rotated_ties_go_to_the_experts_in_turn(num_experts: int, factor: float, tokens: int) -> None:
    """Affinities of few values, so that most are tied: the plain loops choose the same; all tied: evenly."""
    config = MoeConfig(num_experts=num_experts, capacity_factor=factor, tie_break="rotate")
    layer, oracle = (filled(kind(config, dim=8, hidden_dim=8)) for kind in (MoeLayer, ReferenceMoe))
    distinct = torch.randn(3, 8)
    x = distinct[torch.randint(3, (2, tokens), generator=torch.Generator().manual_seed(1))]
    ours, expected = layer(x), oracle(x)
    assert torch.equal(ours[1].statistics().experts_per_token_BS, expected[1].experts_per_token_BS)
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=1e-5)
    capacity = config.capacity(tokens)
    index = choose_tokens_in_turn(torch.full((2, tokens, num_experts), 1 / num_experts), capacity)
    for expert in range(num_experts):
        turn = sorted((expert * tokens // num_experts + j) % tokens for j in range(capacity))
        assert index[:, expert].tolist() == [turn, turn]
    count = torch.bincount(index[0].flatten(), minlength=tokens)
    exact = config.exact_capacity(tokens).denominator == 1 and factor.is_integer()
    assert int(count.max() - count.min()) <= 1 - exact
    assert len({tuple(row.tolist()) for row in index[0]}) == num_experts, "no two experts take the same tokens"
    untied = torch.rand(2, tokens, num_experts)
    assert torch.equal(choose_tokens_in_turn(untied, capacity), choose_tokens(untied, capacity))


def test_statistics_of_a_known_routing() -> None:
    affinity = torch.full((1, 4, 2), 0.5)
    stats = routing_stats(affinity, torch.tensor([[[0, 1], [0, 2]]]))
    assert stats.experts_per_token_BS.tolist() == [[2, 1, 1, 0]]
    assert stats.coverage(2).tolist() == [0.25, 0.5, 0.25]
    assert stats.coverage(1).tolist() == [0.25, 0.75]
    assert float(stats.gate_entropy) == pytest.approx(math.log(2))
    assert float(stats.affinity_kept) == pytest.approx(0.5)


def test_recomputation_repeats_the_choice_among_tied_affinities() -> None:
    layer = filled(MoeLayer(MoeConfig(num_experts=4), dim=8, hidden_dim=16))
    x = torch.ones(1, 16, 8)  # all affinities tied
    memory = ChoiceMemory()
    _, first = layer(x, memory)
    chosen = memory.index_BEC.clone()
    _, second = layer(x + torch.linspace(0, 1, 16).view(1, 16, 1), memory)  # a fresh choice would differ
    assert torch.equal(memory.index_BEC, chosen)
    assert torch.equal(first.statistics().experts_per_token_BS, second.statistics().experts_per_token_BS)
    _, fresh = layer(x + torch.linspace(0, 1, 16).view(1, 16, 1))
    assert not torch.equal(fresh.statistics().experts_per_token_BS, second.statistics().experts_per_token_BS)


def test_router_is_fp32_under_bf16() -> None:
    layer = filled(MoeLayer(MoeConfig(num_experts=4), dim=8, hidden_dim=16)).to(torch.bfloat16)
    assert layer.router(torch.randn(1, 16, 8, dtype=torch.bfloat16)).dtype == torch.float32
    assert layer(torch.randn(1, 16, 8, dtype=torch.bfloat16))[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "values,words",
    [
        ({"num_experts": 0}, "moe.num_experts"),
        ({"num_experts": 4, "capacity_factor": 5.0}, "moe.capacity_factor"),
        ({"every": -1}, "moe.every"),
    ],
)
def test_bad_settings_are_named(values: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MoeConfig(**values)


def test_capacity_is_exact_and_never_below_one() -> None:
    assert MoeConfig(num_experts=64, capacity_factor=2.0).capacity(128) == 4
    assert MoeConfig(num_experts=7, capacity_factor=0.7).capacity(10) == 1
    assert MoeConfig(num_experts=3, capacity_factor=2.0).exact_capacity(16) == Fraction(32, 3)
    with pytest.raises(ValueError, match="capacity below 1"):
        MoeConfig(num_experts=64, capacity_factor=0.5).capacity(64)


def test_placement_of_moe_blocks() -> None:
    assert [i for i in range(6) if MoeConfig(every=2).has_moe(i)] == [1, 3, 5]
    assert not any(MoeConfig(every=0).has_moe(i) for i in range(6))


@pytest.mark.parametrize("router", ["expert_choice", "token_choice"])
def test_only_a_loss_is_left_in_the_graph(router: Any) -> None:
    layer = filled(MoeLayer(MoeConfig(num_experts=4, router=router), dim=8, hidden_dim=16))
    _, routed = layer(torch.randn(2, 16, 8, requires_grad=True))
    assert bool(routed.auxiliary_loss > 0) == (router == "token_choice") == routed.auxiliary_loss.requires_grad
    stats = routed.statistics()
    assert torch.equal(stats.auxiliary_loss, routed.auxiliary_loss)
    assert not routed.logits_BSE.requires_grad and not any(value.requires_grad for value in vars(stats).values())
