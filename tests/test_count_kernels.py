"""Counted kernels: the rule of what fuses on graphs with known answers, and the plan's bytes against counted ones."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from benchmarks.count_kernels import count_compiled, count_eager
from benchmarks.fused_regions import kernels_of, traced
from benchmarks.step_fit import StepFit, fit_steps, read_sizes
from moe.config import MoeConfig
from trainer.config import ConfigError, ModelConfig, TrainConfig, TrainLoopConfig
from trainer.diffusion.model import ModelShape
from trainer.plan.job import Job
from trainer.plan.memory import block_bytes
from trainer.plan.passes import bytes_per_token_and_width, pass_bytes

X = 4 * 8 * 16  # bytes of x: 8 rows of 16 fp32 values
W = 4 * 16 * 16


def moved(function: Callable[[Tensor, Tensor], Tensor | tuple[Tensor, ...]]) -> list[tuple[str, int]]:
    """Kind and bytes of each kernel of a function of x [8, 16] and w [16, 16], in no order."""
    graph = make_fx(function, tracing_mode="fake")(torch.randn(8, 16), torch.randn(16, 16)).graph
    return sorted((kernel.kind, kernel.bytes) for kernel in kernels_of(graph, ()))


@pytest.mark.parametrize(
    "function,expected",
    [
        (lambda x, w: (x + 1).relu() * x, [("fused", 2 * X)]),
        (lambda x, w: x.t().contiguous().view(-1) + 1, [("fused", 2 * X)]),
        (lambda x, w: x * w[0], [("fused", 2 * X + 64)]),  # of w one row is read
        (lambda x, w: x + w[:8, :1].expand(8, 16), [("fused", 2 * X + 32)]),  # an expanded axis once
        # Row sums fuse with what they feed; x is read once.
        (lambda x, w: (x - x.mean(-1, keepdim=True)) * x.amax(-1, keepdim=True), [("fused", 2 * X)]),
        # A product stands between: what it reads and writes is in memory, and x + 1 is not computed again.
        (lambda x, w: ((x + 1) @ w).relu() + (x + 1), [("fused", 2 * X), ("fused", 3 * X), ("product", 2 * X + W)]),
        # A sum over rows reads what its pointwise inputs read.
        (lambda x, w: (x * x.exp()).sum(0), [("fused", X + 64)]),
        # But what is in memory anyway is read there; sums of one input are one kernel.
        (lambda x, w: (x.exp() @ w, x.exp().sum(0)), [("fused", X + 64), ("fused", 2 * X), ("product", 2 * X + W)]),
        (lambda x, w: (x.sum(0), x.amax(0)), [("fused", X + 128)]),
        # Rows are looked up in memory, and the result fuses with what reads it.
        (lambda x, w: (x * 2)[torch.arange(4)] + 1, [("fused", 2 * X), ("fused", X // 2 + X // 2)]),
        (lambda x, w: x.sort(-1)[0].sum(), [("fused", X + 4), ("sort", 4 * X)]),
    ],
)  # fmt: skip
def test_kernels_that_fuse(function: Callable[..., Tensor], expected: list[tuple[str, int]]) -> None:
    assert moved(function) == sorted(expected)


def test_a_norm_and_its_gradient_are_a_kernel_each() -> None:
    with FakeTensorMode():
        x, scale = torch.randn(8, 16, requires_grad=True), torch.randn(16, requires_grad=True)
        forward, backward = traced(lambda x, s: functional.layer_norm(x.sin(), (16,)) * s, (x, scale))
    (norm,) = kernels_of(forward.graph, ())
    assert 2 * X + 64 <= norm.bytes <= 2 * X + 64 + 3 * 32, "x and scale in, the result and a few numbers a row out"
    gradient, of_scale = sorted((kernel.bytes for kernel in kernels_of(backward.graph, ())), reverse=True)
    assert 3 * X <= gradient <= 3 * X + 200 and 2 * X <= of_scale <= 2 * X + 200


def job_of(*, text_tokens: int = 120, **model: int) -> Job:
    """64 tokens of width 384 in 6 heads."""
    sizes = {"dim": 384, "num_layers": 4, "num_heads": 6, "num_kv_heads": 2, "patch_size": 2} | model
    config = TrainConfig(
        model=ModelConfig(**sizes), moe=MoeConfig(num_experts=16, capacity_factor=4.0)  # type: ignore[arg-type]
    )  # fmt: skip
    shape = ModelShape(channels=4, height=16, width=16, text_dim=48)
    return Job(config=config, shape=shape, text_tokens=text_tokens, zero={})


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("moe", [False, True])
def test_planned_bytes_are_the_counted_ones(moe: bool, compiled: bool) -> None:
    """Within an eighth; sizes other than those that the plan's numbers were counted with."""
    job = job_of(text_tokens=32, mlp_ratio=2)
    found = (count_compiled if compiled else count_eager)(job, moe=moe)
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
    eager = 228 + 78 / 3 + 2 * 30 / 3
    fused = 126 + 18 / 3 + 2 * 18 / 3
    expected = {
        (False, False): eager + 12 * 4,
        (True, False): eager + 24 + 4 * (22 + 12 * 4) + 60 * 16 / 384,
        (False, True): fused + 12 * 4,
        (True, True): fused + 22 + 4 * (12 + 12 * 4) + 41 * 16 / 384,
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
