"""Checks of the exchange of rows between real processes; part of `distributed_checks.py`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import exchange
from benchmarks.interleaved import time_interleaved
from benchmarks.parity import VARIANTS, parity_config
from moe.all_to_all import ExpertGroup, send_rows, through_experts
from moe.config import MoeConfig
from moe.deepspeed_expert import build_expert_group
from moe.experts import Experts
from moe.layer import MoeLayer
from trainer.distributed import World


def chunks_change_rounding_only(world: World) -> None:
    """Outputs and all gradients with 2 and 3 chunks against those with 1, of each router; compiled against eager.

    Matrix products of fewer rows may round otherwise, and weight gradients are sums over the chunks.
    """
    device = torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    groups = [build_expert_group(world.size, chunks) for chunks in (1, 2, 3)]
    for router in VARIANTS:
        config = parity_config("sgd", world.size, world.size, router).moe
        whole, *others = (gradients_of_layer(config, group, world, device) for group in groups)
        for other in others:
            assert_close(other, whole, router)
    for group in groups[:2]:
        assert group is not None
        eager, compiled = (gradients_of_exchange(group, device, compiling) for compiling in (False, True))
        assert_close(compiled, eager, f"{group.chunks} chunks, compiled")


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], label: str) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        off = float((found[name] - value).norm() / value.norm())
        assert off < 1e-6, (label, name, off)


def gradients_of_layer(
    config: MoeConfig, group: ExpertGroup | None, world: World, device: torch.device
) -> dict[str, Tensor]:
    """Output and gradients of one layer on this rank's images, whose experts lie on all ranks."""
    layer = MoeLayer(config, dim=32, hidden_dim=64, group=group)
    for i, (name, parameter) in enumerate(layer.named_parameters()):
        of_rank = world.rank if name.startswith("experts") else 0
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(100 * of_rank + i))
    layer = layer.to(device)
    x, grad, time = drawn(device, 1000 + world.rank, (4, 16, 32), (4, 16, 32), (4, 32))
    y, stats = layer(x.requires_grad_(), None, x, time)
    ((y * grad).sum() + stats.auxiliary_loss).backward()
    found = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **found}


def gradients_of_exchange(group: ExpertGroup, device: torch.device, compiling: bool) -> dict[str, Tensor]:
    """Output and gradients of experts behind an exchange, which the compiler must take into one graph with them."""
    experts = Experts(2, 8, 16).to(device)
    *values, x, grad = drawn(
        device, group.rank, *(p.shape for p in experts.parameters()), *[(2 * group.size, 6, 8)] * 2
    )
    for parameter, value in zip(experts.parameters(), values, strict=True):
        parameter.data.copy_(value)

    def exchanged(x: Tensor) -> Tensor:
        return through_experts(send_rows(x, group), experts, group)

    run: Callable[[Tensor], Any] = exchanged
    if compiling:
        torch.compiler.reset()
        run = torch.compile(exchanged, backend="aot_eager", fullgraph=True)
    y = run(x.requires_grad_())
    y.backward(grad)
    found = {name: p.grad for name, p in experts.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **found}


def drawn(device: torch.device, seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def exchange_benchmark_measures_what_it_says(world: World) -> None:
    """Each row of its table does something, on all ranks, with more chunks than rows, too."""
    options = exchange.command_line().parse_args(
        ["--experts", "4", "--rows", "3", "--dim", "8", "--chunks", "1", "2", "4"]
    )
    group = build_expert_group(world.size)
    assert group is not None
    work = exchange.build_work(options, group, torch.device("cpu"))
    rows = exchange.summarise(exchange.mean_over_ranks(time_interleaved(work, rounds=2), torch.device("cpu")))
    assert list(rows) == ["experts alone", "exchange alone", "chunks 1", "chunks 2", "chunks 4"]
    assert all(row.wall.median > 0 for row in rows.values()) and rows["experts alone"].wall.median == 1
