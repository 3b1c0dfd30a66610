"""Kernels of a transformer block other than matrix products and attention, and the bytes they move, without a device.

    python -m benchmarks.count_kernels                         # blocks of ec_dit_xl_8e, eager and compiled
    python -m benchmarks.count_kernels ec_dit_m_64e --detail   # another recipe, options of trainer.plan; by operator

A block runs forward and backward on tensors that have shapes and no data. Eager: each operator is a kernel, with RMS
norms and attention as on a GPU (one kernel forward; backward one and, for the norm, one more for its scale). Compiled:
what torch.compile plans for an H100, which need not be there (benchmarks/inductor_plan.py). Bytes are per
token and unit of width, of all but products and attention; an expanded axis counts once, router statistics are off.
`kept` are those of a compiled block's that its backward pass needs. `plan` is what trainer/plan says of both.
"""

import argparse


def command_line() -> argparse.ArgumentParser:
    """Options; see the module docstring."""
    parser = argparse.ArgumentParser(prog="benchmarks.count_kernels", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="ec_dit_xl_8e")
    parser.add_argument("--images", type=int, default=256, help="of a micro-batch (default %(default)s)")
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

from benchmarks.as_on_gpu import ATTENTION, as_on_gpu
from benchmarks.inductor_plan import PRODUCTS, is_view, plan, touched_bytes
from benchmarks.interleaved import markdown_table
from moe.layer import MoeLayer
from moe.routers.base import fixed_capacity
from trainer.config import run_cli
from trainer.diffusion.compiled import GPU_OPTIONS
from trainer.diffusion.model import DitBlock
from trainer.plan.__main__ import parse as parse_plan
from trainer.plan.command import plan as plan_job
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
def block_and_inputs(job: Job, images: int, *, moe: bool) -> Iterator[tuple[DitBlock, tuple[Tensor, ...]]]:
    """A block of the job's model and its inputs, all without data."""
    model, dtype = job.config.model, torch.bfloat16
    D, B, S, L = model.dim, images, job.num_tokens, job.text_tokens
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


def count_eager(job: Job, images: int, *, moe: bool) -> Counted:
    """Operators as they are dispatched."""
    with block_and_inputs(job, images, moe=moe) as (block, inputs), as_on_gpu(norms=True), EagerKernels() as counted:
        out, _ = block(*inputs)
        out.backward(torch.empty_like(out))
    kinds = {name: name if name in ATTENTION else "product" if name in PRODUCTS else "" for name in counted.calls}
    kernels = [kinds[name] or name for name, count in counted.calls.items() for _ in range(count)]
    moved = Counter({name: total for name, total in counted.bytes.items() if not kinds[name]})
    return _counted(job, images, kernels, moved)


def count_compiled(job: Job, images: int, *, moe: bool) -> Counted:
    """Kernels that torch.compile makes, with the options of training."""
    torch.compiler.assume_constant_result(fixed_capacity)  # as compiled.py does
    with block_and_inputs(job, images, moe=moe) as (block, inputs), as_on_gpu(norms=False):
        found = plan(lambda *arguments: block(*arguments)[0], inputs, GPU_OPTIONS)
    moved: Counter[str] = Counter()
    for kernel in (kernels := [*found.forward, *found.backward]):
        if kernel.kind not in ("product", *ATTENTION):
            moved[kernel.kind] += kernel.bytes
    return _counted(job, images, [kernel.kind for kernel in kernels], moved, found.kept + touched_bytes(inputs[0]))


def _counted(job: Job, images: int, kernels: list[str], moved: Counter[str], kept: int = 0) -> Counted:
    assert sum(kind in ATTENTION for kind in kernels) == 4, "attention took a path that a GPU does not take"
    unit = images * job.num_tokens * job.config.model.dim
    detail = {name: total / unit for name, total in moved.most_common()}
    products = kernels.count("product")
    return Counted(
        products=products, others=len(kernels) - products - 4, bytes=sum(detail.values()), kept=kept / unit,
        detail=detail,
    )  # fmt: skip


def run(options: argparse.Namespace, rest: list[str]) -> None:
    """Count and print."""
    job = plan_job(parse_plan([options.recipe, *rest]))[1]
    rows, details = [], []
    for moe in (False, True) if job.counts.num_moe else (False,):
        for compiled in (False, True):
            found = (count_compiled if compiled else count_eager)(job, options.images, moe=moe)
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
