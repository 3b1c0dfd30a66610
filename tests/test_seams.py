"""A router and a codec that nobody has heard of, registered by one line each: every part of the system handles them."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_parts
from test_flops import SHAPE, counted_flops
from test_plan import job_of, kept_bytes, layout_of
from test_routers import D, compare_with_oracle
from tests_launcher import metrics
from torch import nn

from moe.config import MoeConfig
from moe.layer import MoeLayer
from moe.oracle.choice import TWINS
from moe.routers.base import Router
from moe.routers.expert_choice import ExpertChoice
from moe.routers.registry import ROUTERS, build_router, router_class
from trainer.config import ConfigError, ModelConfig, TrainConfig, load_config
from trainer.diffusion.model import EcDit, init_weights
from trainer.encoders.build import CODECS, TEXT_ENCODERS, build_codec, build_text_encoder
from trainer.plan.__main__ import parse
from trainer.plan.command import plan
from trainer.plan.memory import activation_terms
from trainer.telemetry.flops import training_flops

TOY = MoeConfig(num_experts=4, router="toy", pool="batch")
MODEL = ModelConfig(dim=96, num_layers=2, num_heads=3, num_kv_heads=3)


@pytest.fixture
def toys() -> Iterator[None]:
    toy_parts.register()
    yield
    toy_parts.unregister()


@pytest.mark.parametrize("training", [True, False], ids=["training", "sampling"])
def test_toy_router_equals_its_plain_loops(toys: None, training: bool) -> None:
    compare_with_oracle(replace(TOY, auxiliary_weight=0.5), training)


def test_flops_of_a_toy_router_are_counted(toys: None) -> None:
    counted = counted_flops(MODEL, TOY, 64)
    assert 2 * training_flops(MODEL, TOY, SHAPE, 64, 20) == pytest.approx(counted, rel=0.01)
    without = training_flops(MODEL, replace(TOY, router="expert_choice"), SHAPE, 64, 20)
    assert training_flops(MODEL, TOY, SHAPE, 64, 20) - without == 6 * 64 * 96 * 4, "one layer's bonus"


def test_plan_of_toys(toys: None) -> None:
    config = TrainConfig(model=MODEL, moe=TOY)
    assert activation_terms(job_of(config), layout_of())[0].value == pytest.approx(kept_bytes(config, 2), rel=0.1)
    settings = ["debug", "moe.router=toy", "moe.pool=batch", "--world-size", "1"]
    plain, toy = (plan(parse([*settings, f"data.codec={codec}"]))[0] for codec in ("pixel", "toy"))
    # Patches have 2 x 2 latent values of 12 channels instead of 3, into the model and out of it, with biases there.
    assert toy["parameters"]["total"] - plain["parameters"]["total"] == 2 * (64 * 4 * (12 - 3)) + 4 * (12 - 3)
    without = plan(parse(["debug", "--world-size", "1"]))[0]
    assert plain["parameters"]["total"] - without["parameters"]["total"] == 2 * (64 * 8 + 8), "the bonus of two layers"


def test_initial_values_of_a_toy_router(toys: None) -> None:
    model = EcDit(MODEL, TOY, SHAPE)
    init_weights(model, 0)
    values = {name.partition(".mlp.")[2]: p for name, p in model.named_parameters() if ".bonus." in name}
    assert values.keys() == {"bonus.weight", "bonus.bias"} and not values["bonus.bias"].any()
    assert float(values["bonus.weight"].detach().std()) == pytest.approx(0.5, rel=0.1)


def test_a_router_refuses_settings_by_itself(toys: None) -> None:
    with pytest.raises(ConfigError, match=r"moe\.num_experts is 5: the toy router needs an even number"):
        load_config("debug", ["moe.router=toy", "moe.num_experts=5"])
    with pytest.raises(ConfigError, match=r"moe\.tie_break=rotate is for moe\.router=expert_choice, but .* is toy"):
        load_config("debug", ["moe.router=toy", "moe.tie_break=rotate"])
    with pytest.raises(ValueError, match="needs an even number"):
        MoeLayer(replace(TOY, num_experts=5), dim=D, hidden_dim=D)


@pytest.mark.parametrize("part", sorted(Router.__abstractmethods__))
def test_a_forgotten_part_is_an_error(part: str) -> None:
    others = {name: getattr(ExpertChoice, name) for name in (*Router.__abstractmethods__, "traits") if name != part}
    incomplete: Any = type("Incomplete", (Router,), others)
    with pytest.raises(TypeError, match=part):
        incomplete(MoeConfig())


def test_every_registered_router_has_a_twin_and_can_be_built() -> None:
    assert TWINS.keys() == ROUTERS.keys()
    for name in ROUTERS:
        router = build_router(MoeConfig(router=name, **router_class(name).traits.example))
        modules = nn.ModuleDict(router.learned_modules(8))
        assert router.traits.initial_std.keys() <= dict(modules.named_parameters()).keys()


def test_unknown_names_are_answered_with_the_registered_ones(toys: None) -> None:
    with pytest.raises(ConfigError, match=r"use one of expert_choice, token_choice, diffmoe, expert_race, toy$"):
        load_config("debug", ["moe.router=hash"])
    with pytest.raises(ConfigError, match=r"use pixel, dct, vae:FILE, diffusers:DIR or toy of a local model$"):
        build_codec("jpeg")
    sentence = (
        r"use minilm, minilm@LAYER, open_clip:ARCH:FILE, open_clip:DIR, t5:DIR, or several of them joined by [+]$"
    )
    with pytest.raises(ConfigError, match=sentence):
        build_text_encoder("clap")
    assert len(CODECS) == 5 and len(TEXT_ENCODERS) == 3


def test_toy_codec_is_found_by_its_name(toys: None) -> None:
    rgb_BCHW = torch.rand(2, 3, 8, 8)
    codec = build_codec("toy")
    assert torch.equal(codec.decode(codec.encode(rgb_BCHW)), rgb_BCHW)


@pytest.mark.slow
def test_toys_are_trained_on_two_processes(launcher: Any, tmp_path: Path) -> None:
    """Drawn, encoded with the toy codec, trained with the toy router and expert parallelism; a grid is decoded."""
    images, latents, run_dir = (tmp_path / name for name in ("images", "latents", "run"))
    settings = [
        "debug", "data.source=shards", f"data.images={images}", f"data.latents={latents}", "data.codec=toy",
        "data.image_size=16", "moe.router=toy", "moe.pool=batch", f"run_dir={run_dir}",
    ]  # fmt: skip
    training = [
        "train.max_steps=4", "train.checkpoint_every=2", "train.sample_every=4", "sample.prompts=[a dog]",
        "parallel.ep_size=2", "train.micro_batch_size=4",
    ]  # fmt: skip
    for processes, command in (
        (1, ["trainer.data.demo.scene_shards", "--out", str(images), "--num-images", "60", "--image-size", "16"]),
        (1, ["trainer.data.encode", *settings]),
        (2, ["trainer.train", *settings, *training]),
    ):
        done = launcher.run("tests/toy_parts.py", *command, processes=processes)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert json.loads((latents / "dataset.json").read_text())["info"]["channels"] == 12
    lines = metrics(run_dir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and all(line["loss"] > 0 for line in lines)


@pytest.mark.slow
def test_toy_router_is_the_same_with_and_without_expert_parallelism(launcher: Any) -> None:
    done = launcher.run(
        "tests/toy_parts.py", "benchmarks.parity", "--routers", "toy", "--optimizers", "sgd", "--stages", "3",
        "--ep-sizes", "1", "2", "--steps", "2", processes=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("| sgd | toy |") == 2
