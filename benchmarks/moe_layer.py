"""Forward and backward of one MoE layer with expert choice, against its alternatives at equal matmul FLOPs.

    python -m benchmarks.moe_layer                                # the table, a few minutes
    python -m benchmarks.moe_layer --experts 16 --dtypes bf16 --rounds 21 --json moe_layer.json
    python -m benchmarks.moe_layer --device cuda --dim 1152 --batch-size 64 --rounds 11 --repeats 10

All paths push the same number of rows (capacity_factor 2, so twice the tokens) through GELU MLPs of one
size, with biases:
- `dense MLP`          one MLP on all rows: what the FLOPs cost without any routing; every ratio is to this
- `bare matmuls`       the layer's six batched matmuls with outputs allocated beforehand: the floor
- `expert choice`      moe.layer.MoeLayer, the layer under test, as in a step that reports no statistics
- `one-hot einsum`     the same router and experts, tokens moved by one-hot products (the paper's pseudo-code)
- `..., compiled`      the dense MLP and the layer as the blocks of a run are on a GPU (trainer/diffusion/compiled.py);
                       there always, on a CPU with `--compile`, where each column takes a minute more
- `DeepSpeed MoE top-2` deepspeed.moe.layer.MoE: token choice, capacity factor 1, no dropped-token rescue

Shapes: B images, S tokens, D width, F hidden width, E experts, C capacity, N = B * C rows of one expert.
"""

import argparse
from pathlib import Path

from trainer.config import command_parser


def command_line() -> argparse.ArgumentParser:
    """Options; see the module docstring."""
    parser = command_parser("benchmarks.moe_layer", __doc__)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--batch-size", type=int, default=8, help="images (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens per image (default %(default)s)")
    parser.add_argument("--dim", type=int, default=512, help="width, hidden width / 4 (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default %(default)s)")
    parser.add_argument("--threads", type=int, help="of torch (default: what it takes by itself)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="calls of a turn, 10 on a GPU (default %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compiled forms also on a CPU")
    parser.add_argument("--json", type=Path, help="also write ratios with quartiles to this file")
    return parser


if __name__ == "__main__":
    command_line().parse_known_args()  # --help and mistakes are answered before torch is imported

import os

# Read by the OpenMP runtime that torch loads: waiting threads sleep, so CPU time counts work only.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.interleaved import Times, markdown_table, ratio, time_interleaved, write_json
from moe.config import MoeConfig
from moe.experts import Mlp
from moe.layer import MoeLayer
from moe.routers.expert_choice import choose_tokens
from moe.routing import gated
from trainer.config import require, run_cli
from trainer.engine.host_memory import keep_freed_memory

CAPACITY_FACTOR = 2  # token choice top-2 does the same number of rows
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DENSE, FLOOR, LAYER = "dense MLP", "bare matmuls", "expert choice"
ONE_HOT, DEEPSPEED = "one-hot einsum", "DeepSpeed MoE top-2"

Work = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One column of the table."""

    num_experts: int
    dtype: str
    batch_size: int
    num_tokens: int
    dim: int
    hidden_dim: int

    def __post_init__(self) -> None:
        rows = self.num_tokens * CAPACITY_FACTOR
        require(
            rows % self.num_experts == 0,
            f"--experts {self.num_experts} does not divide {CAPACITY_FACTOR} x --tokens {self.num_tokens}: "
            "the capacity would be rounded and the FLOPs would differ from the dense MLP's",
        )

    @property
    def label(self) -> str:
        """Column heading."""
        return f"{self.dtype} E{self.num_experts}"

    @property
    def flops(self) -> int:
        """Matmul FLOPs of a forward and backward pass through the experts (twice the multiply-adds)."""
        rows = self.batch_size * self.num_tokens * CAPACITY_FACTOR
        return 6 * 2 * rows * self.dim * self.hidden_dim


def one_hot_forward(layer: MoeLayer, x_BSD: Tensor) -> Tensor:
    """What `layer` computes, with dispatch and combine as products with one-hot matrices."""
    affinity_BSE = layer.router(x_BSD).softmax(-1)
    index_BEC = choose_tokens(affinity_BSE, layer.config.capacity(x_BSD.shape[1]))
    pick_BECS = functional.one_hot(index_BEC, x_BSD.shape[1]).to(x_BSD.dtype)
    x_EBCD = torch.einsum("becs,bsd->ebcd", pick_BECS, x_BSD)
    y_EBCD = layer.experts(x_EBCD.flatten(1, 2)).view(x_EBCD.shape)
    weight_BECS = pick_BECS * gated(affinity_BSE, index_BEC).to(x_BSD.dtype).unsqueeze(-1)
    return torch.einsum("becs,ebcd->bsd", weight_BECS, y_EBCD)


def bare_matmuls(layer: MoeLayer, case: Case) -> Work:
    """The six batched matmuls of the experts on contiguous rows; nothing is allocated while it runs."""
    w1_EFD, w2_EDF = layer.experts.w1.detach(), layer.experts.w2.detach()
    rows = case.batch_size * case.num_tokens * CAPACITY_FACTOR // case.num_experts
    x_END, grad_END = (torch.randn(case.num_experts, rows, case.dim).to(w1_EFD.dtype) for _ in range(2))
    y_END, hidden_ENF = torch.empty_like(x_END), x_END.new_empty(case.num_experts, rows, case.hidden_dim)
    dw1_EFD, dw2_EDF = torch.empty_like(w1_EFD), torch.empty_like(w2_EDF)

    def run() -> None:
        torch.bmm(x_END, w1_EFD.transpose(1, 2), out=hidden_ENF)
        torch.bmm(hidden_ENF, w2_EDF.transpose(1, 2), out=y_END)
        torch.bmm(grad_END.transpose(1, 2), hidden_ENF, out=dw2_EDF)
        torch.bmm(grad_END, w2_EDF, out=hidden_ENF)
        torch.bmm(hidden_ENF.transpose(1, 2), x_END, out=dw1_EFD)
        torch.bmm(hidden_ENF, w1_EFD, out=y_END)

    return run


def build_deepspeed_moe(case: Case) -> nn.Module:
    """DeepSpeed's own layer: top-2 over the whole batch, without noise, experts like ours."""
    from deepspeed.moe.layer import MoE

    from trainer.distributed import detect_world, init_distributed

    if not torch.distributed.is_initialized():
        init_distributed(detect_world())
    layer: nn.Module = MoE(
        hidden_size=case.dim,
        expert=Mlp(case.dim, case.hidden_dim, case.dim),
        num_experts=case.num_experts,
        k=2,
        capacity_factor=1.0,  # of both choices together: as many rows as the others
        min_capacity=1,
        top2_2nd_expert_sampling=False,
    )
    layer.set_deepspeed_parallelism()  # type: ignore[operator]
    layer.to(DTYPES[case.dtype])
    layer.get_submodule("deepspeed_moe.gate.wg").float()
    return layer


def train_step(forward: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, grad: Tensor) -> Work:
    """Forward and backward to the input and to all parameters, which get fresh gradients."""

    def run() -> None:
        forward(x.detach().requires_grad_()).backward(grad)
        module.zero_grad(set_to_none=True)

    return run


def compiled_form(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A module's output, by its forward as one graph."""
    made: Callable[[Tensor], Any] = torch.compile(module.forward, fullgraph=True, dynamic=False)

    def run(x: Tensor) -> Tensor:
        out = made(x)
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found

    return run


def build_work(case: Case, *, compiled: bool) -> dict[str, Work]:
    """The rows of the table, ready to run; they share the layer's weights where they can."""
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]
    config = MoeConfig(num_experts=case.num_experts, capacity_factor=CAPACITY_FACTOR)
    layer = MoeLayer(config, dim=case.dim, hidden_dim=case.hidden_dim)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    layer.to(dtype)
    dense, native = Mlp(case.dim, case.hidden_dim, case.dim).to(dtype), build_deepspeed_moe(case)
    x_BSD, grad_BSD = (torch.randn(case.batch_size, case.num_tokens, case.dim).to(dtype) for _ in range(2))
    wide = (CAPACITY_FACTOR, 1, 1)
    forms = {name: train_step(compiled_form(module), module, x_BSD.repeat(times), grad_BSD.repeat(times))
             for name, module, times in ((DENSE, dense, wide), (LAYER, layer, (1, 1, 1))) if compiled}  # fmt: skip
    return {
        DENSE: train_step(dense, dense, x_BSD.repeat(wide), grad_BSD.repeat(wide)),
        FLOOR: bare_matmuls(layer, case),
        LAYER: train_step(lambda x: layer(x)[0], layer, x_BSD, grad_BSD),
        **{f"{name}, compiled": work for name, work in forms.items()},
        ONE_HOT: train_step(lambda x: one_hot_forward(layer, x), layer, x_BSD, grad_BSD),
        DEEPSPEED: train_step(lambda x: native(x)[0], native, x_BSD, grad_BSD),
    }


def summarise(case: Case, times: dict[str, Times]) -> dict[str, Any]:
    """Ratios of every path to the dense MLP, and of the layer to the floor and DeepSpeed to the layer."""
    pairs = {name: (name, DENSE) for name in times}
    pairs |= {"expert choice / bare matmuls": (LAYER, FLOOR), "DeepSpeed / expert choice": (DEEPSPEED, LAYER)}
    ratios = {
        name: {
            "cpu": asdict(ratio(times[path].cpu, times[base].cpu)),
            "wall": asdict(ratio(times[path].wall, times[base].wall)),
        }
        for name, (path, base) in pairs.items()
    }
    return {"case": asdict(case), "label": case.label, "flops": case.flops, "ratios": ratios}


def table(results: list[dict[str, Any]], clock: str) -> str:
    """Markdown table of median ratios by one clock; columns are cases."""
    header = [f"{clock} seconds, ratio to dense MLP", *(result["label"] for result in results)]
    names = list(results[0]["ratios"])
    rows = [[name, *(f"{result['ratios'][name][clock]['median']:.2f}" for result in results)] for name in names]
    return markdown_table(header, rows)


def run(options: argparse.Namespace) -> None:
    """Measure every case, print both tables, write the JSON."""
    for flag in ("rounds", "repeats"):
        require(getattr(options, flag) >= 1, f"--{flag} is {getattr(options, flag)}: use 1 or more")
    require(
        options.device == "cpu" or torch.cuda.is_available(),
        "--device cuda: PyTorch finds no GPU here, use --device cpu",
    )
    cases = [
        Case(
            num_experts=num_experts,
            dtype=dtype,
            batch_size=options.batch_size,
            num_tokens=options.tokens,
            dim=options.dim,
            hidden_dim=4 * options.dim,
        )
        for dtype in options.dtypes
        for num_experts in options.experts
    ]
    torch.set_num_threads(options.threads or torch.get_num_threads())
    keep_freed_memory()
    results = []
    for case in cases:
        with torch.device(options.device):
            work = build_work(case, compiled=options.compile or options.device == "cuda")
        times = time_interleaved(work, rounds=options.rounds, repeats=options.repeats)
        results.append(summarise(case, times))
        print(f"{case.label}: {options.rounds} rounds measured", flush=True)
    settings = {
        "rounds": options.rounds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "repeats": options.repeats,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else torch.backends.cpu.get_cpu_capability(),
    }
    clocks = ["wall"] if options.device == "cuda" else ["cpu", "wall"]
    print("\n" + ", ".join(f"{key} {value}" for key, value in settings.items()))
    print("\n" + "\n\n".join(table(results, clock) for clock in clocks))
    if options.json:
        write_json(options.json, {**settings, "results": results})


def main(argv: list[str] | None = None) -> None:
    """Print the ratio tables; exit code 2 and one sentence on a wrong option."""
    options = command_line().parse_args(argv)
    run_cli(lambda: run(options))


if __name__ == "__main__":
    main()
