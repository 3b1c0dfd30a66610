"""The comparison of dense and expert choice: equal FLOPs, scenes, runs that go on, and numbers that hide nothing."""

import json
import math
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.compare import compute, data, training, validation
from benchmarks.compare.__main__ import command_line
from benchmarks.compare.compute import correlation, detail
from benchmarks.compare.data import MAX_TOKENS, encoder, training_batch
from benchmarks.compare.kinds import BINS, NUM_KINDS, OFFSET, kinds
from benchmarks.compare.records import parameters_of, training_flops_of
from benchmarks.compare.report import write_report
from benchmarks.compare.run import Comparison, compare
from benchmarks.compare.scenes import GRID, OBJECTS_PER_SCENE, RELATIONS, SIZE, Placed, Scene, render, scene
from benchmarks.compare.statistics import estimate, fit_line, reduction, speedup, steps_to
from benchmarks.compare.studies import SIZES, STUDIES, VARIANTS, Job, Size, jobs_of, run_config
from benchmarks.compare.training import Record, Run, train
from benchmarks.compare.validation import PLACES, places
from trainer.config import ConfigError
from trainer.encoders.dct import DctCodec
from trainer.engine.optim import build_optimizer

TINY = Size(dim=32, num_layers=2, batch_size=4, learning_rate=2e-3, steps=6)
CPU = torch.device("cpu")


@pytest.fixture
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fewer scenes of fewer kinds to be drawn for statistics and validation."""
    for module, name, value in ((data, "STATISTICS", 16), (data, "NUM_KINDS", 8), (validation, "HELD_OUT", 8)):
        monkeypatch.setattr(module, name, value)
    data.statistics.cache_clear()
    yield
    data.statistics.cache_clear()


def made_up(losses: dict[int, float], rare: float = 2.0) -> Record:
    measured = {str(step): {"mean": {"all": loss, "rare": rare * loss}} for step, loss in losses.items()}
    return Record(of={}, device="cpu", step=max(losses), seconds=1.0, measured=measured)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_cost_what_they_say(name: str) -> None:
    size = SIZES["small"]
    dense = training_flops_of(run_config("dense", size, steps=10, seed=0))
    ratio = training_flops_of(run_config(name, size, steps=10, seed=0)) / dense
    if VARIANTS[name].extra:
        assert abs(ratio - 1) > 0.03, "it says that it costs something else"
    else:
        assert ratio == pytest.approx(1, abs=0.03), "equal but for the router"


@pytest.mark.parametrize("name", ["expert_choice", "no_shared", "experts_32", "factor_4"])
def test_gates_begin_at_one_in_all(name: str) -> None:
    """Softmax affinities are 1 / E at first, of which a token keeps as many as experts take it."""
    moe = run_config(name, SIZES["small"], steps=10, seed=0).moe
    assert moe.gate == "softmax" and moe.gate_scale * moe.capacity_factor / moe.num_experts == 1


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_takes_a_step(few_scenes: None, name: str) -> None:
    run = Run(run_config(name, TINY, steps=6, seed=0, num_kinds=8), CPU, compiled=False)
    loss = run.train_step(training_batch(0, 0, 4, 2.0, 8))
    assert loss.isfinite() and run.record.step == 1
    assert any(not torch.equal(value, run.average[key]) for key, value in run.masters.items())


def test_sizes_are_those_that_the_words_say() -> None:
    for size, low, high in (("small", 1.5, 2.5), ("large", 60, 100)):
        for variant in ("dense", "expert_choice"):
            _, active = parameters_of(run_config(variant, SIZES[size], steps=10, seed=0))
            assert low < active / 1e6 < high, (size, variant)


def test_a_third_of_all_objects_falls_into_each_bin() -> None:
    assert [r for ranks in BINS.values() for r in ranks] == list(range(NUM_KINDS)) == [k.rank for k in kinds()]
    assert len({k.name for k in kinds()}) == len({k.character for k in kinds()}) == NUM_KINDS
    found = [kinds()[item.rank].bin for i in range(3000) for item in scene(0, i).objects[:1]]
    for name in BINS:
        assert found.count(name) / 3000 == pytest.approx(1 / 3, abs=0.05)
    assert np.mean([len(scene(0, i).objects) for i in range(3000)]) == pytest.approx(OBJECTS_PER_SCENE, rel=0.03)
    shares = [found.count(name) / 3000 for name in BINS]
    weights = [1 / (rank + OFFSET) for rank in range(NUM_KINDS)]
    expected = [sum(weights[r] for r in ranks) / sum(weights) for ranks in BINS.values()]
    np.testing.assert_allclose(shares, expected, atol=0.03)


def test_scenes_are_what_their_captions_say() -> None:
    for index in range(400):
        drawn = scene(3, index)
        assert drawn == scene(3, index), "a function of seed and index"
        names = [kinds()[item.rank].name for item in drawn.objects]
        assert all(name in drawn.caption for name in names) and drawn.caption.endswith(f"{drawn.pattern} {drawn.color}")
        for item in drawn.objects:
            assert item.left % GRID == item.top % GRID == 0
            assert 0 <= min(item.left, item.top) and max(item.left, item.top) + item.side <= SIZE
        boxes = [(i.left, i.top) for i in drawn.objects]
        assert len(set(boxes)) == len(boxes), "no object hides another"
        if drawn.category == "relation":
            (a, b), words = drawn.objects, drawn.caption
            holds = {
                "left of": a.left + a.side <= b.left, "right of": b.left + b.side <= a.left,
                "above": a.top + a.side <= b.top, "below": b.top + b.side <= a.top,
            }  # fmt: skip
            (said,) = (relation for relation in RELATIONS if f" {relation} " in words)
            assert holds[said]
    assert scene(3, 0) != scene(4, 0)


def test_pictures_show_their_objects_and_captions_fit() -> None:
    scenes = [scene(1, i, 8) for i in range(64)]
    for drawn in scenes:
        picture, empty = render(drawn), render(Scene("", "", (), drawn.color, drawn.pattern))
        assert picture.shape == (3, SIZE, SIZE) and np.abs(picture).max() <= 1.0001
        changed = np.abs(picture - empty).max(0) > 0.02
        inside = np.zeros((SIZE, SIZE), bool)
        for item in drawn.objects:
            box = slice(item.top, item.top + item.side), slice(item.left, item.left + item.side)
            assert changed[box].any()
            inside[box] = True
        assert not changed[~inside].any()
    assert max(len(tokens) for tokens in encoder().encode([s.caption for s in scenes])) <= MAX_TOKENS
    decoded = DctCodec().decode(DctCodec().encode(torch.from_numpy(render(scenes[0]))[None]))
    assert float((decoded[0] - torch.from_numpy(render(scenes[0]))).square().mean()) < 0.05


def test_tokens_are_told_apart_by_what_they_show() -> None:
    rare, common = BINS["rare"][0], BINS["common"][0]
    drawn = Scene("pair", "", (Placed(rare, 0, 0, 16), Placed(common, 32, 8, 24)), "red", "plain")
    expected = np.full((8, 8), PLACES.index("background"))
    expected[:2, :2] = PLACES.index("rare")
    expected[1:4, 4:7] = PLACES.index("common")
    np.testing.assert_array_equal(places([drawn])[0].reshape(8, 8), expected)


def test_batches_are_functions_of_seed_and_step(few_scenes: None) -> None:
    first, again = (training_batch(1, 5, 3, 2.0, 8) for _ in range(2))
    assert torch.equal(first.x_BCHW, again.x_BCHW) and torch.equal(first.text_BLD, again.text_BLD)
    other, seed = training_batch(1, 6, 3, 2.0, 8), training_batch(2, 5, 3, 2.0, 8)
    assert not torch.equal(first.t_B, other.t_B) and not torch.equal(first.t_B, seed.t_B)
    assert not torch.equal(first.text_BLD, other.text_BLD) and not torch.equal(first.text_BLD, seed.text_BLD)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(few_scenes: None, tmp_path: Path) -> None:
    config = run_config("expert_choice", TINY, steps=6, seed=0, num_kinds=8)
    whole, part = (Run(config, CPU, compiled=False) for _ in range(2))
    assert train(whole, tmp_path / "whole.pt", log_every=2)
    assert not train(part, tmp_path / "part.pt", log_every=2, stop=lambda: part.record.step >= 3)
    resumed = Run(config, CPU, compiled=False)
    assert train(resumed, tmp_path / "part.pt", log_every=2)
    for name, value in whole.masters.items():
        assert torch.equal(value, resumed.masters[name]) and torch.equal(whole.average[name], resumed.average[name])
    records = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "part")]
    for key in ("measured", "curve", "step"):
        assert records[0][key] == records[1][key], key
    with pytest.raises(ValueError, match="run of other settings"):
        train(Run(run_config("dense", TINY, steps=6, seed=0, num_kinds=8), CPU, compiled=False), tmp_path / "part.pt")


def test_all_runs_are_made_once_and_shown(
    few_scenes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "CompiledBlocks", lambda model: None)
    monkeypatch.setattr(compute, "SCENES", 8)
    given = command_line().parse_args(["--out", str(tmp_path), "--studies", "pair", "--seeds", "0", "--steps", "3"])
    asked = replace(Comparison.of(given), size=TINY, side_by_side=1)
    compare(replace(asked, until=0))
    assert not list((tmp_path / "runs").iterdir()), "no time, no run"
    compare(asked)
    compare(asked)
    said = capsys.readouterr().out
    assert said.count("step 3 of 3") == 2 and "2 runs, 2 of them done" in said
    where = json.loads((tmp_path / "where.json").read_text())
    for found in where.values():
        assert -1 <= found["correlation"] <= 1 and 0 <= found["untaken_on_background"] <= 1
    assert "Where do the experts compute?" in (tmp_path / "compare.html").read_text()


def test_a_step_is_that_of_a_plain_loop(few_scenes: None) -> None:
    """fp32 throughout, SGD by hand: the masters move by the rate times the clipped mean gradient."""
    config = run_config("expert_choice", TINY, steps=6, seed=0)
    run, plain = (Run(config, CPU, compiled=False) for _ in range(2))
    for each in (run, plain):
        each.model.float()
        each.weights = dict(each.model.named_parameters())
        each.publish(each.masters)
    run.optimizer = build_optimizer(run.masters.items(), replace(config.optim, name="sgd"))
    noised = training_batch(0, 0, 4, 2.0, 8)
    run.train_step(noised)
    velocity, _ = plain.predict(noised)
    ((velocity - noised.target_BCHW) ** 2).mean().backward()
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in plain.weights.values() if p.grad is not None))
    rate = config.optim.learning_rate / config.optim.warmup_steps
    for name, start in plain.masters.items():
        average = 2 / 11 * start + 9 / 11 * run.masters[name]  # a young average forgets faster
        torch.testing.assert_close(run.average[name], average.detach(), rtol=1e-6, atol=1e-7)
    for name, weight in plain.weights.items():
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        share = 0.1 if name.endswith("router.weight") else 1
        expected = weight.detach() - share * rate * gradient * min(1, config.optim.max_grad_norm / norm)
        torch.testing.assert_close(run.masters[name].detach(), expected, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(run.weights[name].detach(), expected, rtol=1e-4, atol=1e-7)


def test_statistics_are_those_of_the_textbook() -> None:
    base = {0: made_up({10: 2.0, 20: 1.0}), 1: made_up({10: 2.2, 20: 1.1})}
    other = {0: made_up({10: 1.4, 20: 0.9}), 1: made_up({10: 1.5, 20: 1.0}), 2: made_up({20: 9.0})}
    lower = reduction(base, other)
    assert lower.value == pytest.approx(100 * (0.1 + 1 / 11) / 2)
    assert lower.margin == pytest.approx(12.7062 * np.std([10, 100 / 11], ddof=1) / math.sqrt(2), rel=1e-4)
    assert lower.is_clear == (lower.value > lower.margin)
    assert steps_to(other[0], 1.0) == pytest.approx(18) and math.isinf(steps_to(other[0], 0.5))
    assert steps_to(other[0], 1.5) == 10
    assert speedup(base, other).value == pytest.approx((20 / 18 + 20 / 18) / 2)
    assert str(estimate([9.0, 11.0, 10.0])) == "10.0 +- 2.5"
    assert math.isnan(estimate([3.0]).margin) and str(estimate([3.0])) == "3" and not estimate([3.0]).is_clear
    line = fit_line([1, 2, 4, 8], [4, 3.5, 3, 2.5])
    assert line.slope.value == pytest.approx(-0.5) and line.at(16) == pytest.approx(2)


def test_detail_is_where_neighbours_differ() -> None:
    pixels = torch.zeros(1, 3, SIZE, SIZE)
    pixels[..., :8, 8:16] = (torch.arange(8) % 2).float()
    found = detail(pixels)[0].view(8, 8)
    assert found.argmax() == 1 and float(found[4:].abs().max()) == 0
    assert correlation(torch.arange(4.0), -torch.arange(4.0)) == pytest.approx(-1)


def test_every_study_has_a_row_of_each_variant(tmp_path: Path) -> None:
    """A page of made-up runs: what it says follows from them."""
    seeds = (0, 1, 2)
    jobs = {name: jobs_of(study, TINY, steps=8, seeds=seeds) for name, study in STUDIES.items()}
    (tmp_path / "runs").mkdir()
    for group in jobs.values():
        for job in group:
            write_made_up(tmp_path, job, 0.9 if "expert" in job.variant else 1.0)
    write_report(tmp_path, jobs)
    text = (tmp_path / "compare.html").read_text()
    assert "Expert choice has the lower validation loss" in text and ">9.99" in text
    for name in {variant for study in STUDIES.values() for variant in study.variants}:
        assert VARIANTS[name].words in text, name
    found = json.loads((tmp_path / "compare.json").read_text())
    assert found["lower_percent"]["value"] == pytest.approx(10, abs=0.02) and set(found["final"]) == set(STUDIES)


def write_made_up(out: Path, job: Job, loss: float) -> None:
    of = job.config.as_json()
    loss += 0.001 * job.config.seed
    step = job.config.steps
    by_place = dict.fromkeys((*PLACES, "all"), loss)
    measured = {
        str(at): {time: by_place for time in ("0.1", "0.3", "0.5", "0.7", "0.9", "mean")} for at in (step // 2, step)
    }
    record = {"of": of, "device": "cpu", "step": step, "seconds": 2.0, "curve": [[step, 1.0]], "measured": measured}
    (out / "runs" / f"{job.name}.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--studies", "pears"], "--studies pears is not known: choose from pair"),
        (["--steps", "0"], "--steps is 0: use more than 0"),
        (["--minutes", "-1"], "--minutes is -1.0: use more than 0"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_made(arguments: list[str], words: str) -> None:
    given: Namespace = command_line().parse_args(arguments)
    with pytest.raises(ConfigError) as error:
        Comparison.of(given)
    assert words in str(error.value)
