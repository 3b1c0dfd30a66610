"""The timer of a step: nested sections count once, hooks are gone afterwards."""

import time
from types import SimpleNamespace

import pytest
import torch

from moe.all_to_all import ExpertGroup
from moe.config import MoeConfig
from moe.layer import MoeLayer
from trainer.telemetry.step_timer import StepTimer


def test_seconds_inside_are_not_counted_outside() -> None:
    timer = StepTimer(torch.device("cpu"))
    engine = SimpleNamespace(module=torch.nn.Module(), optimizer=None)
    with timer.section("forward"):
        time.sleep(0.01)
    assert timer.take() == {}, "not measuring"
    with timer.measuring(engine, True), timer.section("forward"):
        time.sleep(0.02)
        with timer.section("experts"):
            time.sleep(0.04)
        time.sleep(0.02)
    taken = timer.take()
    assert taken["time/forward"] == pytest.approx(0.04, abs=0.02)
    assert taken["time/experts"] == pytest.approx(0.04, abs=0.02)
    assert timer.take() == {}, "taken once"


def test_layers_are_watched_only_while_measured() -> None:
    group = ExpertGroup(size=2, rank=0, begin=torch.clone, end=torch.Tensor.contiguous)
    layer = MoeLayer(MoeConfig(num_experts=4), dim=8, hidden_dim=8, group=group)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    coordinator = SimpleNamespace(fetch_sub_module=lambda: None)
    fetch = coordinator.fetch_sub_module
    offload = SimpleNamespace(get_param_coordinator=lambda: coordinator)
    engine = SimpleNamespace(module=layer, optimizer=SimpleNamespace(parameter_offload=offload))
    timer, x = StepTimer(torch.device("cpu")), torch.randn(2, 8, 8)
    with timer.measuring(engine, True):
        assert coordinator.fetch_sub_module is not fetch
        with timer.section("forward"):
            y = layer(x)[0]
        with timer.section("backward"):
            y.sum().backward()
    assert set(timer.take()) == {"time/forward", "time/experts", "time/all_to_all", "time/backward"}
    assert layer.group is group and "forward" not in vars(layer.experts) and coordinator.fetch_sub_module is fetch
    with timer.measuring(engine, False):
        layer(x)
    assert timer.take() == {}
