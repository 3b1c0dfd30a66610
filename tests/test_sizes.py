"""The recipes of the paper's sizes: parameter counts against its printed digits, layouts against the planner."""

import re
import time
from functools import cache
from pathlib import Path

import pytest

from moe.experts import Experts
from trainer.config import ConfigError, TrainConfig, load_config
from trainer.diffusion.model import ModelShape
from trainer.plan.__main__ import parse
from trainer.plan.command import plan
from trainer.plan.job import count_parameters, meta_model
from trainer.plan.recipes import lines_of, settled

CONFIGS = Path(__file__).resolve().parent.parent / "trainer" / "configs"
RECIPES = sorted(CONFIGS.glob("ec_dit_*.yaml"))
SHAPE = ModelShape(channels=16, height=32, width=32, text_dim=4096)
BILLION = 1e9
SMALL = "ec_dit_b_8e"  # for one node or one GPU; not among the paper's

# EC-DIT, table 1: billions of parameters, dense twin and with the most experts, as printed (frozen encoders included),
# and how much the activated size grows over the dense twin.
PRINTED = {"xl": (1.47, "32e", 6.08, 0.101), "xxl": (2.35, "32e", 13.47, 0.153), "3xl": (4.50, "32e", 32.15, 0.198)}
# Printed dense total - ours. About 0.7 is the frozen text encoder; the rest grows with layers x width^2, so the paper's
# blocks have matrices that its text does not mention (2 to 3 width^2 each, as a modulation of each block would have),
# where these have one modulation for all blocks.
RESIDUE = {"xl": 0.96, "xxl": 1.15, "3xl": 1.61}


@cache
def recipe(size: str, kind: str) -> TrainConfig:
    return load_config(f"ec_dit_{size}_{kind}")


def biases(config: TrainConfig) -> int:
    """Expert biases, which the paper's counts leave no room for."""
    model = meta_model(config, SHAPE)
    return sum(m.w3.numel() for m in model.modules() if isinstance(m, Experts))


@pytest.mark.parametrize("size", PRINTED)
def test_totals_are_the_printed_ones_but_for_one_residue(size: str) -> None:
    printed_dense, kind, printed_moe, _ = PRINTED[size]
    dense, config = count_parameters(recipe(size, "dense"), SHAPE), recipe(size, kind)
    mixture = count_parameters(config, SHAPE)
    residue = printed_dense - dense.total / BILLION
    assert residue == pytest.approx(RESIDUE[size], abs=0.01)
    total = (mixture.total - biases(config)) / BILLION + residue
    assert total == pytest.approx(printed_moe, abs=0.01), "both numbers are rounded to two digits"


@pytest.mark.parametrize("size", PRINTED)
@pytest.mark.parametrize("num_experts", [8, 16, 32])
def test_experts_add_eight_squares_of_the_width_each(size: str, num_experts: int) -> None:
    """The paper's own rule, exact: (E - 1) * 8 d^2 in half of the layers, nothing shared, no third matrix."""
    dense, config = recipe(size, "dense"), recipe(size, f"{num_experts}e")
    counts = count_parameters(config, SHAPE)
    d, num_moe = config.model.dim, config.model.num_layers // 2
    assert dense.model == config.model
    assert counts.experts - biases(config) == num_moe * num_experts * 8 * d * d
    # Router and biases apart, what is no expert is the dense twin without the MLPs that the experts replace.
    left = count_parameters(dense, SHAPE).total - num_moe * (8 * d * d + 5 * d)
    assert counts.rest - num_moe * num_experts * d == left


@pytest.mark.parametrize("size", PRINTED)
def test_activated_parameters_grow_as_printed(size: str) -> None:
    printed_dense, kind, _, growth = PRINTED[size]
    config = recipe(size, kind)
    more = count_parameters(config, SHAPE).active - count_parameters(recipe(size, "dense"), SHAPE).total
    assert more / BILLION / printed_dense == pytest.approx(growth, abs=0.002)


def test_97_billion_are_built_without_memory_in_seconds() -> None:
    """M-64E drops 46 layers to 38. Printed: 97.21B in all and 8.27B activated, whose difference has no residue."""
    start = time.perf_counter()
    config = recipe("m", "64e")
    counts = count_parameters(config, SHAPE)
    assert time.perf_counter() - start < 10
    assert config.model.num_layers == 38 and recipe("m", "dense").model.num_layers == 46
    inactive = (counts.total - counts.active - biases(config) * (1 - 2 / 64)) / BILLION
    assert inactive == pytest.approx(97.21 - 8.27, abs=0.01)
    residue = 97.21 - (counts.total - biases(config)) / BILLION
    assert residue == pytest.approx(2.06, abs=0.01)
    dense = count_parameters(recipe("m", "dense"), SHAPE)
    assert 8.03 - dense.total / BILLION == pytest.approx(2.28, abs=0.01)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_has_the_layout_that_the_plan_finds_best(path: Path) -> None:
    """And says so: `python -m trainer.plan.recipes trainer/configs/ec_dit_*.yaml` would change nothing."""
    text = path.read_text()
    nodes = re.search(r"Hardware: (\d+) nodes? of 8 x H100", text)
    assert nodes is not None
    report = plan(parse([str(path), "--nodes", nodes[1]]))[0]
    assert report["configured"]["fits"] and report["best"]["layout"] == report["configured"]["layout"]
    assert report["global_batch_size"] == (2048 if path.stem == SMALL else 4096), "the paper's"
    for pattern, line in lines_of(report, path.stem, nodes[1]):
        assert re.search(pattern, text) and re.sub(pattern, line, text, count=1) == text
    speed, memory = report["configured"]["images_per_second"], report["configured"]["peak_bytes"] / 1e9
    assert f"{memory:.0f} GB per device" in text and f"{speed:.0f} images/s" in text


def test_a_recipe_gets_the_best_layout_and_keeps_the_rest() -> None:
    text = (CONFIGS / "ec_dit_xl_8e.yaml").read_text()
    wrong = (
        text.replace("zero1", "zero3")
        .replace("ep_size: 1", "ep_size: 4")
        .replace("micro_batch_size: 128", "micro_batch_size: 64")
    )
    wrong = re.sub(
        "# Chosen: .*\n", "", wrong.replace("gradient_accumulation_steps: 1", "gradient_accumulation_steps: 2")
    )
    assert wrong != text and settled(wrong, "ec_dit_xl_8e") == text
    with pytest.raises(ConfigError, match="mine has no line '# Hardware: N nodes"):
        settled("seed: 0", "mine")
    large = (CONFIGS / "ec_dit_m_64e.yaml").read_text().replace("Hardware: 16 nodes", "Hardware: 1 nodes")
    with pytest.raises(ConfigError, match="ec_dit_m_64e fits on 1 nodes in no layout: name more"):
        settled(large, "ec_dit_m_64e")


def test_every_size_of_the_paper_has_its_recipes() -> None:
    kinds = {size: ["dense", "8e", "16e", "32e"] for size in PRINTED} | {"m": ["dense", "64e"]}
    expected = {f"ec_dit_{size}_{kind}" for size, names in kinds.items() for kind in names}
    assert {path.stem for path in RECIPES} == expected | {SMALL}


def test_the_small_recipe_is_what_its_header_says() -> None:
    """Its encoders are not here: their sizes come from the list of well-known ones."""
    report, job, *_ = plan(parse([SMALL]))
    assert job.shape == ModelShape(channels=4, height=32, width=32, text_dim=768) and job.text_tokens == 77
    total, active = (round(report["parameters"][name] / 1e6) for name in ("total", "active"))
    assert f"{total}M parameters, {active}M activated" in (CONFIGS / f"{SMALL}.yaml").read_text()
    assert 100 <= active <= 200
