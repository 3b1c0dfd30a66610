"""Compiled blocks: whole graphs, two for all blocks, equal to what they stand for; the real compiler in slow tests."""

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests_launcher import Launcher, metrics
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode

from moe.config import MoeConfig
from moe.layer import set_capacity_factor
from trainer.config import ModelConfig
from trainer.diffusion import compiled
from trainer.diffusion.compiled import CompiledBlocks, is_wanted
from trainer.diffusion.model import EcDit, ModelShape

SIZE = ModelConfig(dim=16, num_layers=4, num_heads=2, num_kv_heads=1, patch_size=2)
SHAPE = ModelShape(channels=4, height=8, width=8, text_dim=12)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def build(moe: MoeConfig | None = None, *, recompute: bool = False) -> EcDit:
    model = EcDit(SIZE, moe or MoeConfig(num_experts=4), SHAPE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    model.activation_checkpointing = recompute
    return model


def inputs(batch: int = 4) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[0, 3:] = False
    x = torch.randn(batch, 4, 8, 8, generator=generator)
    return x, torch.linspace(0.1, 0.9, batch), torch.randn(batch, 5, 12, generator=generator), mask


def outcome(model: EcDit) -> dict[str, Tensor]:
    """Prediction and all gradients, the routers' losses included."""
    model.zero_grad()
    prediction, routed = model(*inputs())
    (prediction.square().mean() + sum(layer.auxiliary_loss for layer in routed)).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"prediction": prediction.detach()} | gradients


def keeping(graphs: list[tuple[str, list[str]]]) -> Callable[..., Any]:
    """A backend that runs what the compiler would be given, and notes the operators of each graph."""

    def noted(kind: str) -> Callable[..., Any]:
        def compile_graph(module: torch.fx.GraphModule, _: list[Any]) -> Any:
            graphs.append((kind, [str(node.target) for node in module.graph.nodes if node.op == "call_function"]))
            return module.forward

        return compile_graph

    return aot_autograd(
        fw_compiler=noted("forward"), bw_compiler=noted("backward"), partition_fn=min_cut_rematerialization_partition
    )


@pytest.mark.parametrize("recompute", [False, True])
def test_all_blocks_are_two_whole_graphs_equal_to_plain_ones(recompute: bool) -> None:
    graphs: list[tuple[str, list[str]]] = []
    plain, whole = build(recompute=recompute), build(recompute=recompute)
    CompiledBlocks(whole, backend=keeping(graphs))
    for _ in range(2):
        expected, found = outcome(plain), outcome(whole)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 2
    backwards = [operators for kind, operators in graphs if kind == "backward"]
    assert len(graphs) == 4 and len(backwards) == 2, "a dense and an MoE block, forward and backward"
    again = {name for operators in backwards for name in operators}
    assert ("aten.gelu.default" in again) == recompute
    chosen = [name for name in again if name.startswith(("aten.topk", "aten.sort"))]
    assert not chosen, "what the router chose is kept: recomputed with other roundings it could be another choice"


@pytest.mark.parametrize("router", [{"router": "token_choice"}, {"router": "diffmoe", "pool": "batch"}])
def test_routers_of_equal_splits_compile(router: dict[str, Any]) -> None:
    plain, whole = (build(MoeConfig(num_experts=4, **router)) for _ in range(2))
    CompiledBlocks(whole, backend="aot_eager")
    expected, found = outcome(plain), outcome(whole)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 2
    with torch.inference_mode():
        torch.testing.assert_close(whole.eval()(*inputs())[0], plain.eval()(*inputs())[0], rtol=1e-5, atol=1e-6)
    static = router["router"] == "token_choice"
    assert counters["stats"]["unique_graphs"] == (4 if static else 3), "DiffMoE asks how many rows it samples with"


@pytest.mark.parametrize("deterministic", [False, True])
def test_what_a_gpu_runs_is_traced_whole(deterministic: bool) -> None:
    """On tensors that only claim to lie on a GPU, in bf16: its attention and its row sum, without a break."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    torch.use_deterministic_algorithms(deterministic)
    targets: list[str] = []

    def backend(module: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        targets.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
            with torch.device("cuda"):
                model = EcDit(SIZE, MoeConfig(num_experts=4), SHAPE)
                arguments = [
                    value.cuda() if value.dtype == torch.bool else value.cuda().bfloat16() for value in inputs()
                ]
            CompiledBlocks(model, backend=backend)
            prediction, _ = model(*arguments)
        assert prediction.device.type == "cuda" and prediction.shape == (4, 4, 8, 8)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(default)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 2
    assert sum("scaled_dot_product_attention" in name for name in targets) == 4
    assert sum("sum_at_tokens" in name for name in targets) == 1


def test_blocks_run_plainly_where_a_graph_would_not_hold(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the capacity falls, and beyond the number of shapes that are compiled; the log says what it does once."""
    monkeypatch.setattr(compiled, "MAX_GRAPHS", 3)
    caplog.set_level(logging.INFO, logger="ec_dit")
    falling = MoeConfig(num_experts=4, capacity_factor=1.0, capacity_factor_start=2.0, capacity_anneal_steps=10)
    plain, whole = build(falling, recompute=True), build(falling, recompute=True)
    CompiledBlocks(whole, backend="eager")
    for factor in (2.0, 1.5, 1.0, 1.0):
        set_capacity_factor(plain, factor)
        set_capacity_factor(whole, factor)
        expected, found = outcome(plain), outcome(whole)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=3e-6, msg=name)
    assert counters["stats"]["unique_graphs"] == 2
    for batch in (2, 2, 3):
        torch.testing.assert_close(whole(*inputs(batch))[0], plain(*inputs(batch))[0], rtol=1e-5, atol=1e-6)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "compiling dense blocks for training with 4 x 16 image and 5 text tokens, once for this shape (graph 1)",
        "compiling MoE blocks for training with 4 x 16 image and 5 text tokens, once for this shape (graph 2)",
        "compiling dense blocks for training with 2 x 16 image and 5 text tokens, once for this shape (graph 3)",
        "MoE blocks for training with 2 x 16 image and 5 text tokens run uncompiled: there are 3 graphs, and no more "
        "are made",
        "dense blocks for training with 3 x 16 image and 5 text tokens run uncompiled: there are 3 graphs, and no more "
        "are made",
        "MoE blocks for training with 3 x 16 image and 5 text tokens run uncompiled: there are 3 graphs, and no more "
        "are made",
    ]


def test_left_open_a_gpu_compiles_and_a_cpu_does_not() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert is_wanted(None, gpu) and not is_wanted(None, cpu)
    assert is_wanted(True, cpu) and not is_wanted(False, gpu)


@pytest.mark.slow
def test_a_resumed_compiled_run_repeats_an_unbroken_one_bitwise(tmp_path: Path) -> None:
    """With the real compiler, under ZeRO-3, in processes of their own; statistics are reported in every step."""
    small = ["model.dim=16", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1", "data.image_size=8"]
    settings = ["debug", *small, "train.compile=true", "moe.every=1", "train.micro_batch_size=2", "train.max_steps=4"]
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    for run_dir in (unbroken, resumed):
        done = Launcher().run("-m", "trainer.train", *settings, "train.checkpoint_every=2", f"run_dir={run_dir}")
        assert done.returncode == 0, done.stderr[-3000:]
        assert "compiling MoE blocks for training" in done.stdout
        if run_dir == unbroken:  # the other goes on from a copy of its step 2
            shutil.copytree(unbroken, resumed)
            shutil.rmtree(resumed / "checkpoints" / "step_00000004")
    assert "resuming from" in done.stdout
    first, second = metrics(unbroken), metrics(resumed)
    assert [line["step"] for line in second] == [1, 2, 3, 4]
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in first] == [line[name] for line in second]
