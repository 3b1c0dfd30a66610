"""One step of a sampler with classifier-free guidance, made fast one measure at a time.

    python -m benchmarks.sampling                                             # a CPU, the small model of the defaults
    python -m benchmarks.sampling ec_dit_xl_8e --device cuda --images 16      # 256 px; 50 Heun steps are 99 of these

| row                   | what changes                                                                              |
|-----------------------|-------------------------------------------------------------------------------------------|
| `naive`               | fp32, experts reached by one-hot products, captions and empty captions in two passes      |
| `gathered experts`    | rows copied to their experts: `moe.layer` as it is                                        |
| `one batch`           | both halves of the guidance in one pass                                                   |
| `keys of text kept`   | the text's keys and values computed once per caption: what `trainer.pipeline` does        |
| `bf16`                | the weights of a run in bf16                                                              |
| `compiled`            | blocks as whole graphs (`train.compile`); with `--compile`, always on a GPU               |

Medians over rounds of ratios within a round, wall clock on a GPU and CPU seconds elsewhere. The velocity of each fp32
row is compared with the naive one's: they have to agree to 1e-5 of its largest value.
"""

import argparse
from pathlib import Path

from trainer.config import command_parser

SMALL = [
    "debug",
    "model.dim=256",
    "model.num_layers=4",
    "model.num_heads=8",
    "data.image_size=32",
    "moe.num_experts=16",
]


def command_line() -> argparse.ArgumentParser:
    """Options; see the module docstring."""
    parser = command_parser("benchmarks.sampling", __doc__)
    parser.add_argument("settings", nargs="*", default=SMALL, help="recipe and overrides (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default %(default)s)")
    parser.add_argument("--images", type=int, default=4, help="drawn together (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default %(default)s)")
    parser.add_argument("--compile", action="store_true", help="also on a CPU, where that takes a minute or two")
    parser.add_argument("--json", type=Path, help="also write ratios with quartiles to this file")
    return parser


if __name__ == "__main__":
    command_line().parse_known_args()  # --help and mistakes are answered before torch is imported

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.interleaved import markdown_table, ratio, time_interleaved, write_json
from benchmarks.moe_layer import one_hot_forward
from moe.layer import MoeLayer
from moe.routing import Routed
from trainer.config import TrainConfig, load_config, require, run_cli
from trainer.diffusion.compiled import CompiledBlocks
from trainer.diffusion.model import EcDit, ModelShape
from trainer.plan.__main__ import parse as parse_plan
from trainer.plan.command import data_shape

GUIDANCE = 5.0
Step = Callable[[], Tensor]


def guided(captioned: Tensor, empty: Tensor) -> Tensor:
    """Classifier-free guidance."""
    return empty + GUIDANCE * (captioned - empty)


class Sampler:
    """A model with random weights, and what one step of the solver gives it."""

    def __init__(self, config: TrainConfig, shape: ModelShape, text_tokens: int, images: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model = EcDit(config.model, config.moe, shape).eval().requires_grad_(False)
        for _, parameter in sorted(self.model.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
        self.model.to(device)
        size = shape.channels, shape.height, shape.width
        self.x_NCHW = torch.randn(images, *size, generator=generator).to(device)
        self.text = torch.randn(2 * images, text_tokens, shape.text_dim, generator=generator).to(device)
        self.mask = torch.ones(2 * images, text_tokens, dtype=torch.bool, device=device)
        self.t_B = torch.full((2 * images,), 0.5, device=device)

    def two_passes(self, model: EcDit) -> Tensor:
        """Captions, then empty captions."""
        half = len(self.x_NCHW)
        parts = [slice(0, half), slice(half, None)]
        captioned, empty = (model(self.x_NCHW, self.t_B[p], self.text[p], self.mask[p])[0] for p in parts)
        return guided(captioned, empty)

    def one_batch(self, model: EcDit, cache: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """Both in one pass, as `trainer.diffusion.solver.guided`."""
        both = model(torch.cat([self.x_NCHW] * 2), self.t_B, self.text, self.mask, text_cache=cache)[0]
        return guided(*both.chunk(2))


@contextmanager
def one_hot_experts() -> Iterator[None]:
    """Inside, MoE layers move tokens by products with one-hot matrices, and say nothing of their choice."""

    def forward(layer: MoeLayer, x_BSD: Tensor, *_: object) -> tuple[Tensor, Routed | None]:
        return one_hot_forward(layer, x_BSD), None

    with patch.object(MoeLayer, "forward", forward):
        yield


def discard(step: Step) -> None:
    """For the clock, which wants no result."""
    step()


def steps(sampler: Sampler, *, with_compiled: bool) -> dict[str, Step]:
    """The rows of the table."""
    model = sampler.model
    low = copy.deepcopy(model).bfloat16()
    kept, kept_low = model.cache_text(sampler.text), low.cache_text(sampler.text)

    def naive() -> Tensor:
        with one_hot_experts():
            return sampler.two_passes(model)

    found: dict[str, Step] = {
        "naive": naive,
        "gathered experts": lambda: sampler.two_passes(model),
        "one batch": lambda: sampler.one_batch(model),
        "keys of text kept": lambda: sampler.one_batch(model, kept),
        "bf16": lambda: sampler.one_batch(low, kept_low),
    }
    if with_compiled:
        whole = copy.deepcopy(low)
        CompiledBlocks(whole)
        found["compiled"] = lambda: sampler.one_batch(whole, kept_low)
    return found


@torch.inference_mode()
def run(options: argparse.Namespace) -> None:
    """Compare velocities, time, print the table."""
    require(options.rounds >= 1, f"--rounds is {options.rounds}: use 1 or more")
    require(options.images >= 1, f"--images is {options.images}: use 1 or more")
    require(
        options.device == "cpu" or torch.cuda.is_available(),
        "--device is cuda, but torch sees no GPU: use --device cpu",
    )
    config = load_config(options.settings[0], options.settings[1:])
    shape, text_tokens = data_shape(config, parse_plan(options.settings))
    sampler = Sampler(config, shape, text_tokens, options.images, options.device)
    rows = steps(sampler, with_compiled=options.compile or options.device == "cuda")
    reference = rows["naive"]()
    apart = {name: float((step() - reference).abs().max() / reference.abs().max()) for name, step in rows.items()}
    for name in ("gathered experts", "one batch", "keys of text kept"):
        require(apart[name] <= 1e-5, f"the row {name} differs from the naive one by {apart[name]:.1e}: a fault")
    times = time_interleaved({name: partial(discard, step) for name, step in rows.items()}, rounds=options.rounds)
    clock = "wall" if options.device == "cuda" else "cpu"
    ratios = {name: ratio(getattr(times["naive"], clock), getattr(found, clock)) for name, found in times.items()}
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, {config.model.num_layers} blocks, {options.images} images, {clock} seconds")
    cells = [[key, f"{value.median:.2f}x", f"{apart[key]:.1e}"] for key, value in ratios.items()]
    print(markdown_table(["one guided step", "times as fast", "largest difference"], cells), flush=True)
    if options.json:
        write_json(options.json, {key: asdict(value) for key, value in ratios.items()} | {"apart": apart})


def main(argv: list[str] | None = None) -> None:
    """Print the table; exit code 2 and one sentence on a wrong option."""
    options = command_line().parse_args(argv)
    run_cli(lambda: run(options))


if __name__ == "__main__":
    main()
