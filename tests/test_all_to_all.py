"""The exchange of expert rows, there and back, forward and backward, between simulated ranks of one group."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from simulated_ranks import on_ranks
from torch import Tensor
from torch._inductor.utils import run_fw_bw_and_get_code
from torch.utils.checkpoint import checkpoint

from moe.all_to_all import COMPILER_OPTIONS, ExpertGroup, largest, send_rows, through_experts
from moe.config import MoeConfig
from moe.experts import Experts
from moe.layer import MoeLayer
from moe.oracle.layer import ReferenceMoe
from moe.routing import ChoiceMemory

N, D = 3, 2


def labelled(rank: int, num_experts: int) -> Tensor:
    """Rows that say where they are from: 1000 rank + 100 expert + 10 row + column."""
    numbers = [[[1000 * rank + 100 * e + 10 * n + d for d in range(D)] for n in range(N)] for e in range(num_experts)]
    return torch.tensor(numbers, dtype=torch.float32)


@pytest.mark.parametrize(("size", "num_experts", "chunks"), [(2, 2, 1), (2, 4, 1), (2, 4, 2), (3, 6, 3), (4, 4, 8)])
def test_rows_go_to_the_rank_of_their_expert_ordered_by_source(size: int, num_experts: int, chunks: int) -> None:
    local = num_experts // size

    def seen_by_experts(group: ExpertGroup) -> list[Tensor]:
        seen: list[Tensor] = []
        through_experts(send_rows(labelled(group.rank, num_experts), group), lambda x: seen.append(x) or x, group)  # type: ignore[func-returns-value]
        return seen

    for rank, parts in enumerate(on_ranks(size, seen_by_experts, chunks)):
        assert len(parts) == {1: 1, 2: 2, 3: 3, 8: 3}[chunks], "N is 3"
        first = 0
        for part in parts:
            rows = part.shape[1] // size
            assert part.shape == (local, size * rows, D)
            for j in range(local):
                wanted = [
                    [1000 * source + 100 * (rank * local + j) + 10 * n + d for d in range(D)]
                    for source in range(size)
                    for n in range(first, first + rows)
                ]
                assert part[j].tolist() == wanted, (rank, j)
            first += rows
        assert first == N


@pytest.mark.parametrize(("size", "num_experts", "chunks"), [(2, 2, 1), (2, 4, 2), (3, 6, 1), (4, 4, 3)])
def test_rows_come_back_to_their_rank_and_expert(size: int, num_experts: int, chunks: int) -> None:
    """Experts that add 10^5 times their rank: what comes back says who computed it."""

    def back(group: ExpertGroup) -> Tensor:
        sent = send_rows(labelled(group.rank, num_experts), group)
        return through_experts(sent, lambda x: x + 1e5 * group.rank, group)

    holder = torch.arange(num_experts).view(-1, 1, 1) // (num_experts // size)
    for rank, found in enumerate(on_ranks(size, back, chunks)):
        assert torch.equal(found, labelled(rank, num_experts) + 1e5 * holder)


@pytest.mark.parametrize(("size", "num_experts", "chunks"), [(2, 4, 1), (3, 6, 1), (2, 4, 2), (3, 6, 3)])
def test_gradients_take_the_same_way_back(size: int, num_experts: int, chunks: int) -> None:
    """Each (rank, expert, row) is multiplied by a number of the rank that holds the expert: that is its gradient."""
    local = num_experts // size

    def work(group: ExpertGroup) -> tuple[Tensor, Tensor]:
        x = labelled(group.rank, num_experts).requires_grad_()
        factor = torch.arange(1.0, local + 1).view(-1, 1, 1) * (group.rank + 1)
        y = through_experts(send_rows(x, group), lambda rows: rows * factor, group)
        (y * weight(group.rank)).sum().backward()
        assert x.grad is not None
        return y.detach(), x.grad

    def weight(rank: int) -> Tensor:
        return torch.arange(1.0, num_experts * N * D + 1).view(num_experts, N, D) + 100 * rank

    factor = torch.tensor([(e % local + 1.0) * (e // local + 1) for e in range(num_experts)]).view(-1, 1, 1)
    for rank, (y, grad) in enumerate(on_ranks(size, work, chunks)):
        assert torch.equal(y, labelled(rank, num_experts) * factor)
        assert torch.equal(grad, weight(rank) * factor)


def test_experts_compute_while_rows_are_under_way() -> None:
    """What is begun before what is waited for, forward and backward; the shared expert's turn included."""

    def work(group: ExpertGroup) -> list[str]:
        said: list[str] = []
        layer = MoeLayer(MoeConfig(num_experts=4, num_shared_experts=1), dim=8, hidden_dim=8, group=group)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
        layer.group = replace(group, begin=telling(said, "begin", group.begin), end=telling(said, "end", group.end))
        for name in ("experts", "shared"):
            module = layer.get_submodule(name)
            module.register_forward_hook(lambda *_, name=name: said.append(name))
            module.register_full_backward_hook(lambda *_, name=name: said.append(name))
        y, _ = layer(torch.randn(2, 8, 8, requires_grad=True))
        said.append("|")
        y.sum().backward()
        return said

    forward = "begin begin shared end experts begin end experts begin end end"
    backward = "begin begin end experts begin end experts begin shared end end"
    for said in on_ranks(2, work, chunks=2):
        assert " ".join(said) == f"{forward} | {backward}"


def test_recomputation_ends_each_exchange_that_it_begins() -> None:
    """It stops when it has what the backward pass needs, which must not be between begin and end; same gradients."""

    def work(group: ExpertGroup) -> None:
        layer, x = MoeLayer(MoeConfig(num_experts=4), dim=8, hidden_dim=8, group=group), torch.randn(2, 8, 8)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
        found = []
        for run in (layer, lambda x: checkpoint(layer, x, ChoiceMemory(), use_reentrant=False)):
            x = x.detach().requires_grad_()
            (run(x)[0] * x.detach()).sum().backward()
            found.append(x.grad)
        assert torch.equal(*found)

    on_ranks(2, work, chunks=2)


def telling(said: list[str], name: str, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(tensor: Tensor) -> Tensor:
        said.append(name)
        return function(tensor)

    return run


VARIANTS: dict[str, dict[str, Any]] = {
    "expert_choice": {},
    "shared_expert": {"num_shared_experts": 1, "normalize_gates": True},
    "token_choice": {"router": "token_choice", "auxiliary_weight": 0.5},
    "race": {"router": "expert_race", "gate": "identity", "pool": "group(2)", "auxiliary_weight": 0.5},
}


@pytest.mark.parametrize(("size", "chunks"), [(1, 1), (2, 1), (4, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_expert_group_computes_what_the_plain_loops_do(variant: str, size: int, chunks: int) -> None:
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

    found, total = on_ranks(size, work, chunks), []
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


@pytest.fixture
def alone() -> Iterator[ExpertGroup]:
    """A process group of this process, which stands for both ranks of an expert group."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    name, collectives = torch.distributed.group.WORLD.group_name, torch.ops._c10d_functional

    def begin(tensor: Tensor) -> Tensor:
        output: Tensor = collectives.all_to_all_single(tensor, [len(tensor)], [len(tensor)], name)
        return output

    yield ExpertGroup(size=2, rank=0, begin=begin, end=collectives.wait_tensor, chunks=2)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_compiled_experts_compute_while_rows_are_under_way(alone: ExpertGroup) -> None:
    """Inductor's own order begins and waits at once in the backward pass; with our options it does not."""
    experts = Experts(2, 8, 16)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)

    def exchanged(x_END: Tensor) -> Tensor:
        return through_experts(send_rows(x_END.sin(), alone), experts, alone)

    compiled = torch.compile(exchanged, fullgraph=True, options={**COMPILER_OPTIONS, "fx_graph_cache": False})
    _, programs = run_fw_bw_and_get_code(lambda: compiled(torch.randn(4, 6, 8, requires_grad=True)))
    short = {"all_to_all_single": "begin", "wait_tensor": "end", "baddbmm": "bmm", "bmm": "bmm"}
    call = re.compile(r"(?:_c10d_functional|extern_kernels)\.(\w+)(?:\.default)?\(")
    forward, backward = (" ".join(short[name] for name in call.findall(program)) for program in programs)
    assert forward == "begin begin end bmm bmm begin end bmm bmm begin end end"
    weights = "bmm bmm bmm bmm"  # their gradients: what is not sent comes last
    assert backward == f"begin begin end bmm bmm begin end bmm bmm begin {weights} end end"
