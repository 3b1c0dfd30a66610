"""What only a GPU can show: equal results, no waiting inside the model, exact resume, the device of each command.

One GPU is enough. On several: `torchrun --nproc-per-node 8 -m benchmarks.parity`.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_moe import filled
from test_train import MODULE, stable
from tests_launcher import metrics, run_checks
from torch import Tensor, nn

from moe.all_to_all import ExpertGroup
from moe.config import MoeConfig
from moe.layer import MoeLayer
from moe.oracle.layer import ReferenceMoe
from moe.routers.modules import product_in_fp32
from moe.routers.registry import ROUTERS, router_class
from moe.routing import ChoiceMemory
from trainer.config import ModelConfig
from trainer.data.latents.packed_text import pack_text
from trainer.diffusion.flow import NoisedBatch, training_loss
from trainer.diffusion.model import EcDit, ModelShape
from trainer.engine.determinism import make_deterministic

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: kernels and waits that a CPU has not"),
]

GPU = torch.device("cuda")
EQUAL_SPLITS = [name for name in ROUTERS if router_class(name).traits.has_equal_splits]


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    """Anything that makes the host wait for the GPU raises; what is compiled or loaded at first use must be warm."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def deterministic() -> Iterator[None]:
    make_deterministic()
    yield
    torch.use_deterministic_algorithms(False)


def backward(module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output and all gradients of a layer, on the CPU."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    y, stats = module(x)
    total = (y * grad).sum() + stats.auxiliary_loss
    total.backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {name: value.detach().cpu() for name, value in (found | {"y": y, "x": x.grad}).items()}


def config_of(router: Any, **settings: Any) -> MoeConfig:
    pool = router_class(router).traits.example.get("pool", "image")
    return MoeConfig(num_experts=4, capacity_factor=2.0, router=router, pool=pool, **settings)


@pytest.mark.parametrize("router", ROUTERS)
def test_layer_equals_the_plain_loops(router: Any) -> None:
    config = config_of(router, num_shared_experts=1)
    layer = filled(MoeLayer(config, dim=16, hidden_dim=24)).to(GPU)
    x, grad = torch.randn(3, 16, 16), torch.randn(3, 16, 16)
    wanted = backward(filled(ReferenceMoe(config, dim=16, hidden_dim=24)), x, grad)
    found = backward(layer, x.to(GPU), grad.to(GPU))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("router", EQUAL_SPLITS)
def test_layer_never_waits_for_the_gpu(router: Any, dtype: torch.dtype, waiting_is_an_error: None) -> None:
    layer = filled(MoeLayer(config_of(router), dim=16, hidden_dim=24)).to(GPU, dtype)
    x_BSD = torch.randn(3, 16, 16, device=GPU, dtype=dtype, requires_grad=True)
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        memory = ChoiceMemory()
        for _ in range(2):  # the second time as in recomputation
            y_BSD, stats = layer(x_BSD, memory)
            (y_BSD.sum() + stats.auxiliary_loss).backward()


def batch_of(size: int) -> NoisedBatch:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 4, 16, 16, generator=generator)
    keep = torch.stack([torch.randperm(64, generator=generator)[:32].sort().values for _ in range(size)])
    return NoisedBatch(
        index_B=torch.arange(size), x_BCHW=x, t_B=torch.rand(size, generator=generator), target_BCHW=x.flip(0),
        text=pack_text(list(torch.randn(size, 4, 24, generator=generator)), 6), keep_BS=keep,
    )  # fmt: skip


def model_of(device: torch.device, dtype: torch.dtype = torch.float32) -> EcDit:
    shape = ModelShape(channels=4, height=16, width=16, text_dim=24)
    moe = MoeConfig(num_experts=8, capacity_factor=2.0, every=2)
    model = EcDit(ModelConfig(dim=64, num_layers=4, num_heads=4, num_kv_heads=2, pooled_text=True), moe, shape)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # zeros, as the modulation starts with, would hide the blocks
        for parameter in model.parameters():
            std = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
    return model.to(device, dtype)


def loss_of(model: EcDit, batch: NoisedBatch) -> Tensor:
    out, _ = model(batch.x_BCHW, batch.t_B, batch.text_BLD, batch.text_mask_BL, batch.keep_BS)
    return training_loss(out, batch, 2)


def gradients(model: EcDit, batch: NoisedBatch) -> dict[str, Tensor]:
    model.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    found = {name: p.grad.detach().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach().cpu()}


@pytest.mark.parametrize("masked", [True, False])
def test_model_and_its_gradients_are_those_of_the_cpu(masked: bool) -> None:
    batch = batch_of(4) if masked else replace(batch_of(4), keep_BS=None)
    wanted = gradients(model_of(torch.device("cpu")), batch)
    found = gradients(model_of(GPU), batch.to(GPU))
    off = {name: float((found[name] - value).norm() / value.norm()) for name, value in wanted.items()}
    assert max(off.values()) < 1e-4, off


def test_logits_of_bf16_tokens_are_those_of_the_cpu() -> None:
    """There the product is one of fp32 values; here one of bf16 values with an fp32 result."""
    x, weight = torch.randn(5, 300, 1152).bfloat16(), torch.randn(8, 1152).bfloat16()
    found, wanted = product_in_fp32(x.to(GPU), weight.to(GPU)), product_in_fp32(x, weight)
    assert found.dtype == torch.float32 and found.shape == (5, 300, 8)
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("recompute", [False, True])
def test_model_and_its_data_never_wait_for_the_gpu(recompute: bool, waiting_is_an_error: None) -> None:
    model, batch = model_of(GPU, torch.bfloat16), batch_of(4)
    model.activation_checkpointing = recompute
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        loss_of(model, batch.pin_memory().to(GPU)).backward()


@pytest.mark.parametrize("router", ROUTERS)
def test_each_router_has_a_deterministic_form(router: Any, deterministic: None) -> None:
    layer = filled(MoeLayer(config_of(router, normalize_gates=True), dim=16, hidden_dim=24)).to(GPU)
    x, grad = torch.randn(3, 16, 16, device=GPU), torch.randn(3, 16, 16, device=GPU)
    first = backward(layer, x, grad)
    assert all(torch.equal(value, first[name]) for name, value in backward(layer, x, grad).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_gradients_repeat_bitwise(dtype: torch.dtype, deterministic: None) -> None:
    model, batch = model_of(GPU, dtype), batch_of(64).to(GPU)
    first = gradients(model, batch)
    for _ in range(5):
        assert all(torch.equal(value, first[name]) for name, value in gradients(model, batch).items())


def run(launcher: Any, run_dir: Path, *overrides: str) -> None:
    done = launcher.run(*MODULE, f"run_dir={run_dir}", *overrides)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("stage,precision", [(1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16")])
def test_stopped_run_goes_on_bitwise(launcher: Any, tmp_path: Path, stage: int, precision: str) -> None:
    settings = [
        f"parallel.deepspeed_config=ds_configs/zero{stage}.json", f"train.precision={precision}",
        "train.async_save=true", "train.activation_checkpointing=true", "diffusion.mask_ratio=0.5",
    ]  # fmt: skip
    run(launcher, tmp_path / "whole", *settings)
    for last in (10, 20):
        run(launcher, tmp_path / "cut", f"train.stop_at_step={last}", *settings)
    assert stable(tmp_path / "cut") == stable(tmp_path / "whole")
    assert len(stable(tmp_path / "cut")) == 20


@pytest.mark.slow
def test_run_on_the_gpu_says_what_it_uses_and_equals_the_cpus(
    launcher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(launcher, tmp_path / "gpu", "optim.name=sgd")
    run(launcher, tmp_path / "fast", "train.precision=bf16", "train.profile_every=5")
    found = metrics(tmp_path / "fast")[-1]
    assert 0 < found["memory_gb"] < 10
    assert {"time/forward", "time/backward", "time/optimizer", "time/experts"} <= found.keys()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    run(launcher, tmp_path / "cpu", "optim.name=sgd")
    for a, b in zip(stable(tmp_path / "gpu"), stable(tmp_path / "cpu"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["cuda", "cpu"])
def test_a_checkpoint_goes_on_on_the_other_device(
    launcher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    for device, last in ((first, 10), ("cpu" if first == "cuda" else "cuda", 20)):
        with monkeypatch.context() as patch:
            patch.setenv("DS_ACCELERATOR", device)
            if device == "cpu":
                patch.setenv("CUDA_VISIBLE_DEVICES", "")
            run(launcher, tmp_path / "moved", f"train.stop_at_step={last}", "optim.name=sgd")
    run(launcher, tmp_path / "whole", "optim.name=sgd")
    for a, b in zip(stable(tmp_path / "moved"), stable(tmp_path / "whole"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.slow
def test_doctor_names_the_gpu_and_finds_it_sound(launcher: Any, tmp_path: Path) -> None:
    done = launcher.run("-m", "trainer.doctor", "debug", f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert torch.cuda.get_device_name() in done.stdout


@pytest.mark.slow
def test_more_processes_than_gpus_are_refused_in_one_sentence(launcher: Any, tmp_path: Path) -> None:
    number = torch.cuda.device_count() + 1
    done = launcher.run(*MODULE, f"run_dir={tmp_path / 'run'}", processes=number, timeout=120)
    assert done.returncode != 0
    assert f"error: {number} processes on this node and {number - 1} GPUs" in done.stderr
    assert "trainer/loop/run.py" not in done.stderr, "a traceback of ours, not only torchrun's"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a GPU for each of two ranks: NCCL refuses two on one")
def test_chunks_of_an_exchange_change_rounding_only() -> None:
    check = "chunks_change_rounding_only"
    found = run_checks("tests/distributed_checks.py", [check])
    assert not found.problems[check], found.problems[check]


@pytest.fixture
def alone_on_nccl() -> Iterator[ExpertGroup]:
    """A process group of this process, which stands for both ranks of an expert group."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    name, collectives = torch.distributed.group.WORLD.group_name, torch.ops._c10d_functional

    def begin(tensor: Tensor) -> Tensor:
        output: Tensor = collectives.all_to_all_single(tensor, [len(tensor)], [len(tensor)], name)
        return output

    yield ExpertGroup(size=2, rank=0, begin=begin, end=collectives.wait_tensor)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_exchanges_on_a_stream_of_their_own_take_rows_when_they_are_there(
    alone_on_nccl: ExpertGroup, chunks: int, waiting_is_an_error: None
) -> None:
    """With one rank an exchange is a copy, which must neither come too early nor let the host wait."""
    config = config_of("expert_choice", num_shared_experts=1)
    copying = replace(alone_on_nccl, begin=torch.clone, end=Tensor.contiguous)
    x_BSD, grad_BSD = torch.randn(8, 256, 256, device=GPU), torch.randn(8, 256, 256, device=GPU)

    def run(group: ExpertGroup) -> list[Tensor]:
        layer = filled(MoeLayer(config, dim=256, hidden_dim=1024, group=group)).to(GPU)
        inputs = [x_BSD.detach().requires_grad_(), *layer.parameters()]
        for mode in ("default", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            y_BSD, _ = layer(inputs[0])
            found = [y_BSD.detach(), *torch.autograd.grad(y_BSD, inputs, grad_BSD)]
        torch.cuda.set_sync_debug_mode("default")
        return found

    for found, wanted in zip(run(replace(alone_on_nccl, chunks=chunks)), run(copying), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
