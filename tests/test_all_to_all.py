"""The exchange of expert rows, there and back, forward and backward, between simulated ranks of one group."""

from typing import Any

import pytest
import torch
from simulated_ranks import on_ranks
from torch import Tensor

from moe.all_to_all import ExpertGroup, from_local_experts, largest, to_local_experts
from moe.config import MoeConfig
from moe.layer import MoeLayer
from moe.oracle.layer import ReferenceMoe

N, D = 3, 2


def labelled(rank: int, num_experts: int) -> Tensor:
    """Rows that say where they are from: 1000 rank + 100 expert + 10 row + column."""
    numbers = [[[1000 * rank + 100 * e + 10 * n + d for d in range(D)] for n in range(N)] for e in range(num_experts)]
    return torch.tensor(numbers, dtype=torch.float32)


@pytest.mark.parametrize(("size", "num_experts"), [(2, 2), (2, 4), (3, 6), (4, 4)])
def test_rows_go_to_the_rank_of_their_expert_ordered_by_source(size: int, num_experts: int) -> None:
    local = num_experts // size
    found = on_ranks(size, lambda group: to_local_experts(labelled(group.rank, num_experts), group))
    for rank in range(size):
        assert found[rank].shape == (local, size * N, D)
        for j in range(local):
            wanted = [
                [1000 * source + 100 * (rank * local + j) + 10 * n + d for d in range(D)]
                for source in range(size)
                for n in range(N)
            ]
            assert found[rank][j].tolist() == wanted, (rank, j)


@pytest.mark.parametrize(("size", "num_experts"), [(2, 2), (2, 4), (3, 6), (4, 4)])
def test_rows_come_back_to_their_rank_and_expert(size: int, num_experts: int) -> None:
    """The way back by itself: rank r's output for row n of source s of expert e is known, and so is who gets it."""
    local = num_experts // size

    def back(group: ExpertGroup) -> Tensor:
        outputs = [
            [[1000 * s + 100 * (group.rank * local + j) + 10 * n + d for d in range(D)]
             for s in range(size) for n in range(N)]
            for j in range(local)
        ]  # fmt: skip
        return from_local_experts(torch.tensor(outputs, dtype=torch.float32), group)

    for rank, found in enumerate(on_ranks(size, back)):
        assert torch.equal(found, labelled(rank, num_experts))


@pytest.mark.parametrize(("size", "num_experts"), [(2, 4), (3, 6)])
def test_gradients_take_the_same_way_back(size: int, num_experts: int) -> None:
    """Each (rank, expert, row) is multiplied by a number of the rank that holds the expert: that is its gradient."""
    local = num_experts // size

    def work(group: ExpertGroup) -> tuple[Tensor, Tensor]:
        x = labelled(group.rank, num_experts).requires_grad_()
        factor = torch.arange(1.0, size * N + 1).view(1, -1, 1) * (10.0 ** torch.arange(local)).view(-1, 1, 1)
        y = from_local_experts(to_local_experts(x, group) * factor * (group.rank + 1), group)
        (y * (group.rank + 5)).sum().backward()
        assert x.grad is not None
        return y.detach(), x.grad

    for rank, (y, grad) in enumerate(on_ranks(size, work)):
        for e in range(num_experts):
            holder, j = divmod(e, local)
            for n in range(N):
                factor = (rank * N + n + 1) * 10.0**j * (holder + 1)
                torch.testing.assert_close(y[e, n], labelled(rank, num_experts)[e, n] * factor)
                torch.testing.assert_close(grad[e, n], torch.full((D,), factor * (rank + 5)))


VARIANTS: dict[str, dict[str, Any]] = {
    "expert_choice": {},
    "shared_expert": {"num_shared_experts": 1, "normalize_gates": True},
    "token_choice": {"router": "token_choice", "auxiliary_weight": 0.5},
    "race": {"router": "expert_race", "gate": "identity", "pool": "group(2)", "auxiliary_weight": 0.5},
}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_expert_group_computes_what_the_plain_loops_do(variant: str, size: int) -> None:
    """Each rank has images of its own; an expert's gradient is the sum over all of them, a rank has its experts'."""
    config = MoeConfig(num_experts=4, **VARIANTS[variant])
    generator = torch.Generator().manual_seed(0)
    oracle = ReferenceMoe(config, dim=8, hidden_dim=12)
    with torch.no_grad():
        for _, parameter in sorted(oracle.named_parameters()):
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    images, weights = torch.randn(4, 2, 8, 8, generator=generator), torch.randn(4, 2, 8, 8, generator=generator)
    images, weights = images.view(size, -1, 8, 8), weights.view(size, -1, 8, 8)

    def work(group: ExpertGroup) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        layer = MoeLayer(config, dim=8, hidden_dim=12, group=group)
        mine = slice(group.rank * 4 // size, (group.rank + 1) * 4 // size)
        with torch.no_grad():
            for name, whole in oracle.named_parameters():
                layer.get_parameter(name).copy_(whole[mine] if name.startswith("experts") else whole)
        x = images[group.rank].clone().requires_grad_()
        y, stats = layer(x)
        ((y * weights[group.rank]).sum() + stats.auxiliary_loss).backward()
        return y, x.grad, {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}

    found, total = on_ranks(size, work), []
    for rank in range(size):
        x = images[rank].clone().requires_grad_()
        y, stats = oracle(x)
        total.append((y * weights[rank]).sum() + stats.auxiliary_loss)
        torch.testing.assert_close(found[rank][0], y, rtol=1e-5, atol=1e-5)
        (grad,) = torch.autograd.grad(total[-1], x, retain_graph=True)
        torch.testing.assert_close(found[rank][1], grad, rtol=1e-4, atol=1e-5)
    torch.stack(total).sum().backward()
    for name, parameter in oracle.named_parameters():
        parts = [gradients[name] for _, _, gradients in found]
        whole = torch.cat(parts) if name.startswith("experts") else torch.stack(parts).sum(0)
        torch.testing.assert_close(whole, parameter.grad, rtol=1e-4, atol=3e-5, msg=name)


def test_the_largest_number_of_a_group_is_known_to_all_ranks() -> None:
    found = on_ranks(3, lambda group: largest((4, 9, 2)[group.rank], group, torch.device("cpu")))
    assert found == [9, 9, 9]
