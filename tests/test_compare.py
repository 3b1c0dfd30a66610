"""The comparison of routers: equal FLOPs, results that are read again, a table that hides nothing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import compare as compare_module
from benchmarks.compare import DEFAULT_VARIANTS, VARIANTS, compare, parse, result_of, sizes
from benchmarks.compare_report import spread, table
from trainer.config import ConfigError, load_config
from trainer.diffusion.model import EcDit, ModelShape

SHAPE = ModelShape(channels=16, height=8, width=8, text_dim=384)


def made_up(variant: str, seed: int) -> dict[str, Any]:
    return {
        "variant": variant, "seed": seed, "steps": 5, "validation_loss": {"0.1": 1.0 + seed, "0.9": 2.0},
        "mean_validation_loss": 1.5 + seed, "fid": 100.0, "geneval": 0.25,
        "curve": [[1, 3.0], [2, 2.0 + seed]], "parameters": 3_000_000, "active_parameters": 1_500_000,
        "forward_flops": 170e6, "seconds": 60.0,
    }  # fmt: skip


def test_variants_cost_the_same_flops() -> None:
    flops = {name: sizes(load_config("demo", VARIANTS[name]), SHAPE, 20)["forward_flops"] for name in VARIANTS}
    for name, value in flops.items():
        assert value == pytest.approx(flops["expert_choice"], rel=0.03), name
    assert len(DEFAULT_VARIANTS) == 5 and set(DEFAULT_VARIANTS) <= set(VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_builds_and_takes_a_step(variant: str) -> None:
    config = load_config("demo", VARIANTS[variant])
    model = EcDit(replace(config.model, dim=32), config.moe, SHAPE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    text, mask = torch.randn(4, 5, 384), torch.ones(4, 5, dtype=torch.bool)
    out, _ = model(torch.randn(4, 16, 8, 8), torch.rand(4), text, mask)
    out.square().mean().backward()
    assert out.isfinite().all()


def test_finished_runs_are_read_and_others_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse(["--out", str(tmp_path), "--seeds", "0", "1", "--variants", "dense", "diffmoe", "--steps", "5"])
    made: list[tuple[str, int]] = []

    def train(_: object, variant: str, seed: int) -> None:
        made.append((variant, seed))

    monkeypatch.setattr(compare_module, "train", train)
    monkeypatch.setattr(compare_module, "score", lambda _, variant, seed: made_up(variant, seed))
    monkeypatch.setattr(compare_module, "prepare_data", lambda _: None)
    monkeypatch.setattr(compare_module, "measure_speed", lambda _: {"dense": [50.0, 60.0], "diffmoe": [40.0, 40.0]})
    compare(config)
    assert made == [("dense", 0), ("diffmoe", 0), ("dense", 1), ("diffmoe", 1)], "seed by seed"
    result_of(config, "dense", 1)
    assert len(made) == 4, "nothing is trained twice"
    result_of(replace(config, steps=6), "dense", 1)
    assert len(made) == 5, "another setting is another run"
    text = (tmp_path / "compare.md").read_text()
    assert "| dense | 2 | 2.0000 +- 0.7071 | 100.0 | 25.0 |" in text and "4 runs of 5 steps" in text
    assert "| 55 +- 7 |" in text and text.splitlines()[7].endswith("| 40 |")
    assert len(json.loads((tmp_path / "compare.json").read_text())["results"]) == 4
    assert (tmp_path / "compare.png").stat().st_size > 1000
    assert not list(tmp_path.glob("*.tmp*"))


def test_spread_is_shown_only_where_there_is_one() -> None:
    assert spread([2.0], "{:.1f}") == "2.0" and spread([2.0, 2.0], "{:.1f}") == "2.0"
    assert spread([1.0, 3.0], "{:.1f}") == "2.0 +- 1.4"
    assert table([made_up("dense", 0)], {}).count("\n") == 2


def test_speed_is_measured_in_turns_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse(["--out", str(tmp_path), "--variants", "dense", "diffmoe", "--speed-rounds", "2"])
    turns: list[str] = []

    def train(_: object, variant: str, __: int, *changes: str) -> None:
        turns.append(variant)
        run_dir = Path(dict(change.split("=") for change in changes)["run_dir"])
        assert not run_dir.exists()
        run_dir.mkdir(parents=True)
        lines = [{"images_per_second": speed * len(turns)} for speed in (1, 100, 100)]
        (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))

    monkeypatch.setattr(compare_module, "train", train)
    expected = {"dense": [100, 300], "diffmoe": [200, 400]}
    assert compare_module.measure_speed(config) == expected == compare_module.measure_speed(config)
    assert turns == ["dense", "diffmoe"] * 2


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--variants", "moe"], "--variants moe is not known: choose from dense"),
        (["--steps", "0"], "--steps is 0: use 1 or more"),
        (["--processes", "3"], "parallel.ep_size=3 does not divide moe.num_experts=8"),
        (["--set", "moe.num_expert=4"], "did you mean moe.num_experts"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_made(tmp_path: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        compare(parse(["--out", str(tmp_path / "out"), "--variants", "expert_choice", *arguments]))
    assert words in str(error.value) and not (tmp_path / "out").exists()
