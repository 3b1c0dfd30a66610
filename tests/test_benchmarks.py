"""The benchmarks run, measure what they say, and refuse what they cannot measure fairly."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import determinism, exchange, gather, kernel_shares, moe_layer, on_gpu, sampling, step
from benchmarks.attention_kinds import attention_parts, fused, packed
from benchmarks.interleaved import Times, markdown_table, ratio, time_interleaved
from benchmarks.moe_layer import Case, one_hot_forward, table
from moe.config import MoeConfig
from moe.layer import MoeLayer
from trainer.config import load_config
from trainer.diffusion.layers import attend_by_products
from trainer.engine.zero3_gather import Gathering
from trainer.plan.__main__ import parse as parse_plan
from trainer.plan.command import plan

SMALL = ["--dim", "16", "--tokens", "16", "--batch-size", "2", "--rounds", "2", "--threads", "1"]


def run_benchmark(*options: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, since it joins a process group."""
    command = [sys.executable, "-m", "benchmarks.moe_layer", *SMALL, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_benchmark_prints_and_writes_its_table(tmp_path: Path) -> None:
    file = tmp_path / "deeper" / "result.json"
    done = run_benchmark("--experts", "4", "8", "--json", str(file))
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text())
    assert [result["label"] for result in content["results"]] == ["fp32 E4", "fp32 E8", "bf16 E4", "bf16 E8"]
    for result in content["results"]:
        assert result["flops"] == 12 * (2 * 16 * 2) * 16 * 64
        assert result["ratios"]["dense MLP"]["cpu"] == {"median": 1.0, "low": 1.0, "high": 1.0}
        assert all(clock["median"] > 0 for path in result["ratios"].values() for clock in path.values())
    for clock in ("cpu", "wall"):
        assert table(content["results"], clock) in done.stdout


def test_both_gathers_give_the_same_and_are_timed() -> None:
    options = gather.command_line().parse_args(["--rounds", "2", "--repeats", "1", "--params", "5"])
    times = gather.measure(options, ranks=7)
    assert set(times) == set(gather.SIDES) and all(len(of) == 2 and min(of) > 0 for of in times.values())


def test_a_rank_sends_its_part_from_its_own_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL gathers in place only from there; gloo would not mind."""
    params, _ = gather.cut_parameters(3, 4, "cpu")
    sent: list[tuple[int, int]] = []

    def allgather(output: torch.Tensor, part: torch.Tensor, **_: object) -> None:
        sent.append((part.storage_offset(), part.numel()))

    monkeypatch.setattr("deepspeed.comm.allgather_fn", allgather)
    for param in params:
        param.ds_zero_partition_world_size, param.ds_zero_partition_rank, param.ds_process_group = 4, 2, None
    num = sum(param.ds_tensor.ds_numel for param in params)
    Gathering(params)
    assert sent == [(2 * num, num)]


def test_unfair_shapes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        moe_layer.main([*SMALL, "--experts", "5"])
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --experts 5 does not divide")


def test_one_hot_path_computes_the_same_layer() -> None:
    torch.manual_seed(0)
    layer = MoeLayer(MoeConfig(num_experts=4, capacity_factor=2), dim=8, hidden_dim=32).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x_BSD, grad_BSD = torch.randn(2, 16, 8).double().requires_grad_(), torch.randn(2, 16, 8).double()
    wanted_BSD, found_BSD = layer(x_BSD)[0], one_hot_forward(layer, x_BSD)
    torch.testing.assert_close(found_BSD, wanted_BSD)
    inputs = [x_BSD, *layer.parameters()]
    wanted = torch.autograd.grad(wanted_BSD, inputs, grad_BSD)
    # The router is fp32 whatever the dtype, so its gradient is the same to fp32 rounding only.
    torch.testing.assert_close(torch.autograd.grad(found_BSD, inputs, grad_BSD), wanted, rtol=1e-4, atol=1e-5)


def test_case_counts_the_flops_of_six_matmuls() -> None:
    case = Case(num_experts=4, dtype="fp32", batch_size=2, num_tokens=8, dim=3, hidden_dim=12)
    assert case.flops == 6 * 2 * 32 * 3 * 12
    assert case.label == "fp32 E4"


def test_alternatives_take_turns() -> None:
    calls: list[str] = []
    work = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = time_interleaved(work, rounds=3, warmups=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert all(len(times[name].cpu) == len(times[name].wall) == 3 for name in "abc")


def test_ratio_is_taken_within_rounds() -> None:
    drifting = [1.0, 10.0, 100.0, 1000.0]
    found = ratio([2 * seconds for seconds in drifting], drifting)
    assert (found.low, found.median, found.high) == (2.0, 2.0, 2.0)
    assert ratio([3.0], [2.0]).median == 1.5
    with pytest.raises(ValueError):
        ratio([1.0], [1.0, 2.0])


def test_sampling_benchmark_compares_and_times_each_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sampling.json"
    sampling.main(["debug", "model.dim=32", "--images", "2", "--rounds", "1", "--json", str(file)])
    content, said = json.loads(file.read_text()), capsys.readouterr().out
    measures = ["naive", "gathered experts", "one batch", "keys of text kept", "bf16"]
    assert list(content) == [*measures, "apart"] and content["naive"]["median"] == 1.0
    assert max(content["apart"][name] for name in measures[:4]) < 1e-5 < content["apart"]["bf16"] < 0.5
    assert all(f"| {name} | {content[name]['median']:.2f}x |" in said for name in measures)


def test_what_runs_on_a_gpu_is_asked_for_in_words_that_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    for name, line in on_gpu.RUNS:
        parser = import_module(f"benchmarks.{name}").command_line()
        options, rest = parser.parse_known_intermixed_args(line.split())
        settings = [word for word in [*rest, *getattr(options, "settings", []), *getattr(options, "words", [])]]
        if settings and "=" not in settings[0]:
            load_config(settings[0], settings[1:])
        assert not [word for word in settings if word.startswith("-")], line
    assert not on_gpu.run("sampling", ["--rounds", "0"]) and "--rounds is 0: use 1 or more" in capsys.readouterr().err
    assert on_gpu.run("sampling", ["debug", "model.dim=32", "--images", "1", "--rounds", "1"])


def test_kinds_of_kernels_by_their_names() -> None:
    names = {
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT": "products", "triton_poi_fused_add_gelu_3": "fused passes",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<x>": "attention", "_sum_rows": "row sums",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n": "products", "Memcpy HtoD (Pageable -> Device)": "copies",
        "cudnn_generated_fort_native_sdpa_sm90_fprop": "attention", "vectorized_elementwise_kernel": "other passes",
        "ncclDevKernel_AllGather_RING_LL": "communication",
    }  # fmt: skip
    assert {name: kernel_shares.kind_of(name) for name in names} == names
    assert kernel_shares.shares({"products": 0.006, "attention": 0.002}) == (
        "kernels of a step take 8.0 ms: products 75%, attention 25%"
    )


def test_markdown_table() -> None:
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_the_exchange_is_hidden_by_as_much_as_it_did_not_add(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {"experts alone": 2.0, "exchange alone": 1.0, "chunks 1": 3.0, "chunks 2": 2.5, "chunks 4": 3.5}
    times = {name: Times(cpu=[2 * value, 4.0], wall=[value, 3 * value]) for name, value in seconds.items()}
    rows = exchange.summarise(times)
    assert [row.hidden for row in rows.values()] == [None, None, 0.0, 0.5, -0.5]
    assert "| chunks 2 | 1.25 | 1.25 to 1.25 | 1.12 | 0.50 |" in exchange.table(rows)
    with pytest.raises(SystemExit) as refused:
        exchange.main(["--rounds", "0"])
    assert refused.value.code == 2 and "--rounds is 0: use 1 or more" in capsys.readouterr().err


def test_packed_text_gives_what_a_mask_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernel, which only a GPU has, as a loop over images."""

    def loop(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, text: Tensor, *_: int, **__: bool) -> Tensor:
        found = [
            attend_by_products(*(x.transpose(0, 1)[None] for x in (query[a:b], key[c:d], value[c:d])), None)[0]
            for a, b, c, d in zip(ends, ends[1:], text, text[1:], strict=False)
        ]
        return torch.cat([out.transpose(0, 1) for out in found])

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", loop)
    query, key, value = torch.randn(3, 4, 5, 8), *torch.randn(2, 3, 2, 6, 8)
    mask = (torch.arange(6) < torch.tensor([[2], [6], [1]]))[:, None, None, :]
    attention, *inputs = packed(query, key, value, mask)
    found = attention(*inputs).view(3, 5, 4, 8).transpose(1, 2)
    torch.testing.assert_close(found, fused(query, key, value, mask, grouped=True), rtol=1e-5, atol=1e-6)


def test_parts_are_measured_with_and_without_deterministic_algorithms(capsys: pytest.CaptureFixture[str]) -> None:
    options = determinism.command_line().parse_args(["--rounds", "1", "--repeats", "1"])
    small = ["debug", "train.micro_batch_size=2", "diffusion.mask_ratio=0.5", "data.image_size=16"]
    _, job, _, _ = plan(parse_plan([*small, "--device", "h100", "--world-size", "1"]))
    cpu, modes = torch.device("cpu"), []
    for parts in (attention_parts, determinism.other_parts):
        for name, work in parts(job, cpu, torch.float32):
            cells = determinism.line(name, work, options)
            assert len(cells) == len(determinism.HEADER) and cells[0] == name and float(cells[3]) > 0
            modes.append(name)
    assert len(modes) == len(set(modes)) == 4 * 3 + 4
    found: list[bool] = []
    determinism.line("", lambda: found.append(torch.are_deterministic_algorithms_enabled()), options)
    assert {True, False} == set(found)
    torch.use_deterministic_algorithms(False)
    with pytest.raises(SystemExit) as refused:
        determinism.main(["debug", "--repeats", "0"])
    assert refused.value.code == 2 and "--repeats is 0: use 1 or more" in capsys.readouterr().err


@pytest.mark.slow
def test_checkpoint_benchmark_runs(launcher: Any, tmp_path: Path) -> None:
    small = ["--dim", "64", "--rounds", "1", "--folder", str(tmp_path)]
    done = launcher.run("-m", "benchmarks.checkpoint_io", *small, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| save | plain write |" in done.stdout and "in the background" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_step_benchmark_prints_measured_beside_planned(launcher: Any, tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    options = ["debug", "parallel.ep_size=2", "train.micro_batch_size=2", "data.num_workers=1", "--steps", "2"]
    done = launcher.run("-m", "benchmarks.step", *options, "--json", str(file), processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    content = json.loads(file.read_text())
    assert len(content["measured"]["steps"]) == 2 and min(content["measured"]["steps"]) > 0
    assert {"data", "forward", "backward", "optimizer", "all_to_all"} <= content["measured"]["sections"].keys()
    assert content["lines"]["step, s"][0] == content["plan"]["configured"]["step_seconds"]
    assert done.stdout.count("| step, s |") == 1, "the main process alone prints"
    several = ["debug", "data.num_workers=0", "--micro-batches", "2,1", "--steps", "1", "--warmups", "0"]
    done = launcher.run("-m", "benchmarks.step", *several, "--json", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    content = json.loads(file.read_text())
    assert content["sizes"] == [1, 2] and min(*content["planned"], *content["measured"]) > 0
    fits = [line for line in done.stdout.splitlines() if "ms an image" in line and "host" in line]
    assert [line.split(":")[0] for line in fits] == ["planned", "measured"]


def test_a_step_benchmark_without_steps_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        step.main(["debug", "--steps", "0"])
    assert capsys.readouterr().err.splitlines()[-1] == "error: --steps is 0: use 1 or more"
