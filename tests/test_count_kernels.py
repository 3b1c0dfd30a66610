"""Counted kernels: what inductor plans for a GPU where the answer is known; the plan's bytes against counted ones."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from benchmarks.as_on_gpu import as_on_gpu
from benchmarks.count_kernels import count_compiled, count_eager
from benchmarks.inductor_plan import Kernel, Plan, plan
from benchmarks.step_fit import StepFit, fit_steps, read_sizes
from moe.config import MoeConfig
from moe.experts import Mlp
from trainer.config import ConfigError, ModelConfig, TrainConfig, TrainLoopConfig
from trainer.diffusion.compiled import GPU_OPTIONS
from trainer.diffusion.layers import Attention
from trainer.diffusion.model import ModelShape
from trainer.plan.job import Job
from trainer.plan.memory import block_bytes
from trainer.plan.passes import bytes_per_token_and_width, pass_bytes

ROWS, WIDTH = 4096, 1024
X = 4 * ROWS * WIDTH  # bytes of x: fp32
W = 4 * WIDTH * WIDTH
V = 4 * WIDTH


def planned(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Plan:
    """Of a function of fp32 values."""
    with FakeTensorMode():
        return plan(function, tuple(torch.empty(shape, requires_grad=True) for shape in shapes))


def moved(kernels: list[Kernel]) -> list[tuple[str, int]]:
    """Kind and bytes of each kernel, the largest first; without those of a thousandth of x."""
    found = [(kernel.kind, kernel.bytes) for kernel in kernels if kernel.bytes > X / 1000]
    return sorted(found, key=lambda kernel: -kernel[1])


@pytest.mark.parametrize(
    "function,forward,backward",
    [
        # Kept are x and the sum, from which both gradients come in one pass.
        (lambda x, w: (x + 1).sigmoid() * x, [("fused", 2 * X)], [("fused", 3 * X)]),
        (
            lambda x, w: (x.exp() @ w).sin(),
            [("product", 2 * X + W), ("fused", 2 * X), ("fused", 2 * X)],
            [("fused", 3 * X), ("fused", 3 * X), ("product", 2 * X + W), ("product", 2 * X + W)],
        ),
    ],
)
def test_kernels_that_fuse(
    function: Callable[..., Tensor], forward: list[tuple[str, int]], backward: list[tuple[str, int]]
) -> None:
    gpus = torch.cuda.device_count()
    found = planned(function, (ROWS, WIDTH), (WIDTH, WIDTH))
    assert moved(found.forward) == forward and moved(found.backward) == backward
    assert torch.cuda.device_count() == gpus, "outside it is this machine again"


def test_a_norm_and_its_gradient_are_a_kernel_each() -> None:
    found = planned(lambda x, s: functional.layer_norm(x.sin(), (WIDTH,)) * s, (ROWS, WIDTH), (WIDTH,))
    ((_, norm),) = moved(found.forward)
    assert 2 * X + V <= norm <= 2 * X + V + 3 * 4 * ROWS, "x and scale in, the result and two numbers a row out"
    (_, gradient), (_, of_scale), _ = moved(found.backward)
    assert 3 * X <= gradient <= 1.01 * 3 * X and 2 * X <= of_scale <= 1.01 * 2 * X
    assert 0 < found.kept <= 2 * 4 * ROWS


def test_the_bias_gradient_comes_with_the_one_of_gelu() -> None:
    """Of hidden values 2 are moved in GELU, 3 in its gradient, and nothing more for the bias."""
    mlp = Mlp(1152, 4608, 1152).bfloat16()
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = plan(mlp, (torch.empty(256, 128, 1152, dtype=torch.bfloat16, requires_grad=True),))
    hidden = 2 * 256 * 128 * 4608
    sizes = [kernel.bytes / hidden for kernel in (*found.forward, *found.backward) if kernel.kind == "fused"]
    assert [size for size in sizes if size > 0.9] == pytest.approx([2, 3], rel=0.01)


def test_queries_are_normed_and_turned_in_one_pass() -> None:
    """And not copied for attention, nor what it gives; the gradient in one pass, with that of the norm's scale."""
    B, S, H, h = 256, 128, 18, 64
    attention = Attention(H * h, H, H // 3).bfloat16()
    with FakeTensorMode(allow_non_fake_inputs=True), as_on_gpu(norms=False):
        x = torch.empty(B, S, H * h, dtype=torch.bfloat16, requires_grad=True)
        turn = torch.empty(B, S, h // 2, 2)
        found = plan(lambda x, turn: attention(x, x, turn_BSa2=turn), (x, turn), GPU_OPTIONS)
    query = 2 * B * S * H * h
    forward, backward = (
        sorted(kernel.bytes / query for kernel in graph if kernel.kind == "fused" and kernel.bytes > query / 10)
        for graph in (found.forward, found.backward)
    )
    # Keys and values are one product, so who reads keys counts both; `turn` is a ninth of the queries, and 2 + 1 / 9
    # is all that queries need, 3 + 1 / 9 their gradient.
    assert forward == pytest.approx([1 + 1 / 9, 2 + 1 / 9], rel=0.02)
    # Values' gradient to where the keys' is; the keys'; gradients of two products added; queries'.
    assert backward == pytest.approx([2 / 3, 1 + 1 / 9, 3, 3 + 1 / 9], rel=0.02)


def test_options_are_those_of_inductor() -> None:
    torch.compile(lambda x: x, options=GPU_OPTIONS)
    with pytest.raises(RuntimeError, match="Unexpected optimization option"):
        torch.compile(lambda x: x, options={"realise_reads_threshold": 8})


def job_of(*, text_tokens: int = 120, **model: int) -> Job:
    """64 tokens of width 384 in 6 heads."""
    sizes = {"dim": 384, "num_layers": 4, "num_heads": 6, "num_kv_heads": 2, "patch_size": 2} | model
    config = TrainConfig(
        model=ModelConfig(**sizes), moe=MoeConfig(num_experts=16, capacity_factor=4.0)  # type: ignore[arg-type]
    )  # fmt: skip
    shape = ModelShape(channels=4, height=16, width=16, text_dim=48)
    return Job(config=config, shape=shape, text_tokens=text_tokens, zero={})


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("moe", [False, True])
def test_planned_bytes_are_the_counted_ones(moe: bool, compiled: bool) -> None:
    """Within an eighth; sizes other than those that the plan's numbers were counted with."""
    job = job_of(text_tokens=32, mlp_ratio=2)
    found = (count_compiled if compiled else count_eager)(job, 256, moe=moe)
    planned = bytes_per_token_and_width(job, moe=moe, compiled=compiled)
    assert planned == pytest.approx(found.bytes, rel=0.125)
    if compiled:
        bf16 = replace(job, config=replace(job.config, train=TrainLoopConfig(precision="bf16")))
        assert block_bytes(bf16, 1, moe=moe) / (64 * 384) == pytest.approx(found.kept, rel=0.1)
    assert found.products == (27 if moe else 24), "3 for each of 8 matrices, one more for the router"
    assert (60 if compiled else 130) > found.others > (30 if compiled else 60)


def test_bytes_of_a_block_by_hand() -> None:
    """Two text tokens for each image token, every third head has keys, 4 experts a token of 16."""
    job = job_of(text_tokens=128)
    eager = 220 + 62 / 3 + 2 * 22 / 3
    fused = 98 + 26 / 3 + 2 * 14 / 3
    expected = {
        (False, False): eager + 12 * 4,
        (True, False): eager + 14 + 4 * (22 + 12 * 4) + 48 * 16 / 384,
        (False, True): fused + 10 * 4,
        (True, True): fused + 8 + 4 * (12 + 10 * 4) + 27 * 16 / 384,
    }
    for (moe, compiled), value in expected.items():
        assert bytes_per_token_and_width(job, moe=moe, compiled=compiled) == pytest.approx(value, rel=1e-12)
    ends = 60 * 3 * 64 * 384 + 3 * 128 * (20 * 48 + 6 * 4 * 384)
    values = 3 * 64 * 384 * 2 * (expected[False, True] + expected[True, True])
    assert pass_bytes(job, 3) == pytest.approx(2 * (values + ends), rel=1e-12), "fp32, three images, compiled"
    dense = replace(job, config=replace(job.config, moe=MoeConfig(every=0)))
    values = 3 * 64 * 384 * 4 * expected[False, True]
    assert pass_bytes(dense, 3) == pytest.approx(2 * (values + ends), rel=1e-12)


@pytest.mark.parametrize(
    "seconds,expected",
    [
        ([3.0, 5.0, 9.0, 17.0], StepFit(host=None, image=2.0, fixed=1.0)),
        ([6.0, 6.0, 9.0, 17.0], StepFit(host=6.0, image=2.0, fixed=1.0)),
        ([4.0, 4.0, 4.0, 4.0], StepFit(host=4.0, image=0.0, fixed=0.0)),
    ],
)
def test_a_step_is_the_longer_of_host_and_gpu(seconds: list[float], expected: StepFit) -> None:
    found = fit_steps([1, 2, 4, 8], seconds)
    assert (found.host, found.image, found.fixed) == pytest.approx((expected.host, expected.image, expected.fixed))
    assert found.seconds(1) == pytest.approx(seconds[0])


def test_sizes_are_read_or_refused() -> None:
    assert read_sizes("") == [] and read_sizes("64, 8,16") == [8, 16, 64]
    for text in ("8", "8,8", "8,0", "8,x", "8,,16"):
        with pytest.raises(ConfigError, match=f"--micro-batches is {text}: use two or more different sizes"):
            read_sizes(text)
