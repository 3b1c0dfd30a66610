"""Kernels of a transformer block other than matrix products and attention, and the bytes they move, without a device.

    python -m benchmarks.count_kernels                         # blocks of ec_dit_xl_8e, eager and compiled
    python -m benchmarks.count_kernels ec_dit_m_64e --detail   # another recipe, options of trainer.plan; by operator

A block runs forward and backward on tensors that have shapes and no data. Eager: each operator is a kernel, with RMS
norms and attention as on a GPU (one kernel forward; backward one and, for the norm, one more for its scale). Compiled:
what a compiler that fuses would make of the traced graph, by the rule in benchmarks/fused_regions.py. Bytes are per
token and unit of width, of all but products and attention; an expanded axis counts once, router statistics are off.
`kept` are those of a compiled block's that its backward pass needs. `plan` is what trainer/plan says of both. An image
has 1024 tokens and as many more text tokens than the recipe's, so that attention does not take its short path of a CPU.
"""

import argparse

TOKENS = 1024  # of an image: more than `attend` computes without the fused kernel on a CPU


def command_line() -> argparse.ArgumentParser:
    """Options; see the module docstring."""
    parser = argparse.ArgumentParser(prog="benchmarks.count_kernels", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="ec_dit_xl_8e")
    parser.add_argument("--detail", action="store_true", help="also the bytes of each operator or kind of kernel")
    return parser


if __name__ == "__main__":
    command_line().parse_known_args()  # --help and mistakes are answered before torch is imported

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.as_on_gpu import ATTENTION, AsOnGpu
from benchmarks.fused_regions import PRODUCTS, is_view, kept_bytes, kernels_of, touched_bytes, traced
from benchmarks.interleaved import markdown_table
from moe.layer import MoeLayer
from trainer.config import run_cli
from trainer.diffusion.model import DitBlock
from trainer.plan.__main__ import parse as parse_plan
from trainer.plan.command import plan
from trainer.plan.job import Job
from trainer.plan.memory import block_bytes
from trainer.plan.passes import bytes_per_token_and_width


class EagerKernels(TorchDispatchMode):
    """Counts operators that start a kernel, and what they read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        tensors = {id(leaf): leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)}
        if not is_view(function) and not name.startswith(("empty", "new_empty")) and isinstance(out, Tensor | tuple):
            self.calls[name] += 1
            self.bytes[name] += sum(touched_bytes(tensor) for tensor in tensors.values())
        return out


@dataclass(frozen=True, kw_only=True)
class Counted:
    """A block's kernels, forward and backward; bytes are per token and unit of width, products and attention apart."""

    products: int
    others: int
    bytes: float
    kept: float  # for the backward pass, its input too; 0 for eager blocks
    detail: dict[str, float]


@contextmanager
def block_and_inputs(job: Job, *, moe: bool) -> Iterator[tuple[DitBlock, tuple[Tensor, ...]]]:
    """A block of the job's model and its inputs, all without data; two images of TOKENS tokens."""
    model, dtype = job.config.model, torch.bfloat16
    D, B, S = model.dim, 2, TOKENS
    L = round(TOKENS * job.text_tokens / job.num_tokens)
    build = partial(MoeLayer, job.config.moe, dim=D, hidden_dim=model.mlp_ratio * D) if moe else None
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(dtype)
        try:
            block = DitBlock(model, build)
        finally:
            torch.set_default_dtype(torch.float32)
        x, condition, text = (
            torch.empty(*shape, D, dtype=dtype, requires_grad=True) for shape in ((B, S), (B, 6), (B, L))
        )
        mask, turn = (torch.empty(B, 1, 1, L, dtype=torch.bool), torch.empty(B, S, D // model.num_heads // 2, 2))
        yield block, (x, condition, text, mask, turn, torch.empty(B, D, dtype=dtype))


def count_eager(job: Job, *, moe: bool) -> Counted:
    """Operators as they are dispatched."""
    with block_and_inputs(job, moe=moe) as (block, inputs), AsOnGpu(norms=True), EagerKernels() as counted:
        out, _ = block(*inputs)
        out.backward(torch.empty_like(out))
    assert counted.calls["attention"] == 2, "attention took a path that a GPU does not take"
    products = sum(counted.calls[name] for name in PRODUCTS)
    apart = {*PRODUCTS, *ATTENTION}
    moved = {name: total for name, total in counted.bytes.items() if name not in apart}
    return _counted(job, products, sum(count for name, count in counted.calls.items() if name not in apart), moved)


def count_compiled(job: Job, *, moe: bool) -> Counted:
    """Kernels that a compiler would fuse."""
    with block_and_inputs(job, moe=moe) as (block, inputs), AsOnGpu(norms=False):

        def run(parameters: dict[str, Tensor], *arguments: Tensor) -> Tensor:
            out: Tensor = torch.func.functional_call(block, parameters, arguments)[0]
            return out

        graphs = traced(run, (dict(block.named_parameters()), *inputs))
        kernels = [kernel for graph in graphs for kernel in kernels_of(graph.graph, ATTENTION)]
    assert sum(kernel.kind == "attention" for kernel in kernels) == 4, "attention took a path that a GPU does not take"
    others = [kernel for kernel in kernels if kernel.kind not in ("product", "attention")]
    moved: Counter[str] = Counter()
    for kernel in others:
        moved[kernel.kind] += kernel.bytes
    kept = kept_bytes(graphs[0].graph) + touched_bytes(inputs[0])
    return _counted(job, sum(kernel.kind == "product" for kernel in kernels), len(others), moved, kept)


def _counted(job: Job, products: int, others: int, moved: dict[str, int], kept: int = 0) -> Counted:
    unit = 2 * TOKENS * job.config.model.dim
    detail = {name: total / unit for name, total in sorted(moved.items(), key=lambda item: -item[1])}
    return Counted(
        products=products, others=others, bytes=sum(detail.values()), kept=kept / unit, detail=detail
    )  # fmt: skip


def run(options: argparse.Namespace, rest: list[str]) -> None:
    """Count and print."""
    job = plan(parse_plan([options.recipe, *rest]))[1]
    rows, details = [], []
    for moe in (False, True) if job.counts.num_moe else (False,):
        for compiled in (False, True):
            found = (count_compiled if compiled else count_eager)(job, moe=moe)
            name = f"{'MoE' if moe else 'dense'}, {'compiled' if compiled else 'eager'}"
            planned = bytes_per_token_and_width(job, moe=moe, compiled=compiled)
            kept = 2 / job.num_bytes * block_bytes(job, 1, moe=moe) / (job.num_tokens * job.config.model.dim)
            row = [name, str(found.products), str(found.others), f"{found.bytes:.0f}", f"{planned:.0f}"]
            rows.append([*row, *([f"{found.kept:.0f}", f"{kept:.0f}"] if compiled else ["", ""])])
            details.append(
                f"{name}: " + ", ".join(f"{key} {value:.1f}" for key, value in found.detail.items() if value >= 1)
            )
    print(markdown_table(["block", "products", "other kernels", "their bytes", "plan", "kept", "plan"], rows))
    if options.detail:
        print("\n" + "\n".join(details))


def main(argv: list[str] | None = None) -> None:
    """Print the table; exit code 2 and one sentence on a wrong option."""
    options, rest = command_line().parse_known_args(argv)
    run_cli(lambda: run(options, rest))


if __name__ == "__main__":
    main()
