"""Controls, compute maps, charts and the page, over a real pipeline with untrained weights; the command line."""

import base64
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import DESK, PHONE, find_browser, width_in_browser

from eval.demo.background import background_score, border_colors
from eval.demo.detector import RULES, detect
from eval.demo.prompts import demo_prompts, render_prompts
from eval.files import training_records
from eval.metrics.controls import judge_all, permuted_scores, with_overall
from eval.metrics.geneval import Detection, judge
from eval.pages.compute_map import ComputeMaps, compute_by_region, object_patches, trace_compute
from eval.pages.numbers import flat_numbers
from eval.pictures.image_files import geneval_files, picture_path, write_picture
from eval.pictures.prompts import picture_seed
from eval.run import DEMO_SUITES, main, parse
from eval.scoring.draw_and_score import describe_model, run_folder, run_sections
from eval.scoring.job import ScoreConfig, ScoringJob
from eval.scoring.options import EMBEDDED
from eval.scoring.score_and_report import ScoredSubject, score_and_report
from trainer.config import ConfigError, load_config
from trainer.data.demo.scenes import CATEGORIES
from trainer.data.latents.samples import LatentInfo
from trainer.pipeline import Pipeline
from trainer.telemetry.run_sections import coverage_layers

PER_TAG = 2


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    """The debug model, untrained, behind the real text encoder."""
    info = LatentInfo(
        channels=3,
        height=32,
        width=32,
        text_dim=384,
        max_tokens=24,
        codec="pixel",
        text_encoder="minilm",
        fingerprint="none",
        mean=[0.0] * 3,
        std=[1.0] * 3,
    )
    overrides = ["diffusion.sampling_steps=3", "model.patch_size=4"]
    return Pipeline(load_config("debug", overrides), info, 7, None)


@pytest.fixture(scope="module")
def maps(pipeline: Pipeline) -> ComputeMaps:
    found = trace_compute(pipeline, demo_prompts(0, 1))
    assert found is not None
    return found


class _Page(HTMLParser):
    """Collects what a page refers to and which tags it leaves open."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_permuted_scores_equal_a_loop_over_pairs() -> None:
    prompts = demo_prompts(0, 6)
    rng = random.Random(0)
    found = detect(render_prompts(prompts, 32))
    rng.shuffle(found)
    scores = permuted_scores(prompts, found, RULES)
    for tag in CATEGORIES:
        flags = [
            judge(asked.metadata, items, RULES).correct
            for owner, items in zip(prompts, found, strict=True)
            for asked in prompts
            if owner.tag == asked.tag == tag and owner.text != asked.text
        ]
        assert scores[tag] == pytest.approx(sum(flags) / len(flags))
    assert with_overall({"a": 0.2, "b": 0.6})["overall"] == pytest.approx(0.4)


def test_controls_separate_reading_from_drawing() -> None:
    prompts = demo_prompts(0, 6)
    true = render_prompts(prompts, 32)
    assert judge_all(prompts, detect(true), RULES)[1].overall.value == 1
    assert with_overall(permuted_scores(prompts, detect(true), RULES))["overall"] < 0.2
    assert background_score(prompts, true).value == 1
    assert background_score(prompts, true.roll(6, 0)).value < 0.5
    assert background_score(prompts, true.repeat_interleave(2, 0), num_samples=2).value == 1
    assert border_colors(true[-1:]) == [tuple(clause["color"] for clause in prompts[-1].metadata["include"])]


def test_compute_maps_have_the_capacity_as_their_mean(maps: ComputeMaps, pipeline: Pipeline) -> None:
    assert maps.layers == (1, 3)
    assert maps.times == pytest.approx((1, 2 / 3, 1 / 3))
    assert maps.experts_NTLhw.shape == (6, 3, 2, 8, 8)
    assert maps.experts_NTLhw.mean((3, 4)).allclose(torch.tensor(maps.capacity_factor))
    for number, prompt in enumerate(demo_prompts(0, 1)):
        (alone,) = pipeline.generate([prompt.text], [picture_seed(prompt.id, 0)]).int()
        assert (alone - maps.pictures_NHWC[number].int()).abs().max() <= 1, "the first picture of each prompt"


def test_dense_model_has_no_compute_maps(pipeline: Pipeline) -> None:
    dense = Pipeline(load_config("debug", ["moe.every=0", "diffusion.sampling_steps=1"]), pipeline.info, 0, None)
    assert trace_compute(dense, demo_prompts(0, 1)[:1]) is None


def test_regions_split_patches_by_box(maps: ComputeMaps) -> None:
    box = Detection(name="cat", score=1.0, box=(0.0, 0.0, 16.0, 32.0))
    mask = object_patches([[box], *[[]] * 5], 32, (8, 8))
    assert mask[0, :, :4].all() and not mask[0, :, 4:].any() and not mask[1:].any()
    regions = compute_by_region(maps, mask)
    assert regions is not None
    expected = maps.experts_NTLhw[0, 1, 0, :, :4].mean()
    assert float(regions[0][1, 0]) == pytest.approx(float(expected))
    assert compute_by_region(maps, torch.zeros_like(mask)) is None


def _write_run(folder: Path) -> None:
    """Metrics as a run writes them, with the half line of a killed process."""
    rows = []
    for step in range(10, 110, 10):
        row: dict[str, Any] = {"step": step, "loss": 100 / step, "learning_rate": 1e-3, "grad_norm": 1.0}
        row |= {f"moe/{layer}/coverage_{k}": share for layer in (1, 3) for k, share in enumerate((0.1, 0.4, 0.5))}
        rows.append(json.dumps(row))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join([*rows, '{"step": 11']) + "\n")


def test_metrics_of_a_killed_run_are_read(tmp_path: Path) -> None:
    _write_run(tmp_path)
    rows = training_records(tmp_path)
    assert len(rows) == 10
    assert list(coverage_layers(rows)) == ["moe/1", "moe/3"]
    assert [row["loss"] for row in rows] == [100 / step for step in range(10, 110, 10)]
    assert training_records(tmp_path / "none") == []


def _write_set(folder: Path, pictures: torch.Tensor) -> list[Path]:
    """Pictures in GenEval's layout, one of each prompt."""
    for number, picture in enumerate(pictures):
        write_picture(picture_path(folder, number, 0), picture)
    return geneval_files(folder, len(pictures), 1)


def _score(run: Path, pipeline: Pipeline, out: Path) -> None:
    """Score each prompt's neighbour's true picture, beside an untrained model's pictures."""
    prompts = demo_prompts(0, PER_TAG)
    captions = [prompt.text for prompt in prompts]
    config = ScoreConfig(
        suites=("geneval",), out=out, detector=EMBEDDED, true_pictures=Path(EMBEDDED), reference=Path(EMBEDDED)
    )
    job = ScoringJob(
        config=config,
        prompts=prompts,
        files=_write_set(out / "pictures", render_prompts(prompts, 32).roll(1, 0)),
        folder=out / "pictures",
        untrained_files=_write_set(out / "untrained", pipeline.generate(captions, list(range(len(prompts))))),
    )
    subject = ScoredSubject(
        name=run.name,
        summary=f"{len(prompts)} pictures",
        step=pipeline.step,
        sampling={"checkpoint_step": 7},
        model=describe_model(pipeline),
        run_sections=tuple(run_sections(pipeline, prompts, config, run)),
        run_dir=run,
    )
    score_and_report(job, subject)


def test_report_is_whole_and_needs_no_other_file(
    tmp_path: Path, pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "my <run>"
    out = run / "eval"
    _write_run(run)
    _score(run, pipeline, out)
    report = json.loads((out / "report.json").read_text())
    assert capsys.readouterr().out.startswith("geneval ")
    geneval = report["results"]["geneval"]
    assert geneval["controls"]["ceiling"]["overall"] == 1
    assert geneval["controls"]["untrained"]["overall"] == 0
    # Of each tag's two prompts the second has the first's true picture: right for the other one, as no true picture
    # is; the first of colors happens to show what the second asks for, too.
    assert geneval["controls"]["shuffled"] == pytest.approx(
        {**dict.fromkeys(CATEGORIES, 0.5), "colors": 1, "overall": 3.5 / 6}
    )
    assert geneval["controls"]["chance"] == {tag: 0 for tag in [*CATEGORIES, "overall"]}
    assert flat_numbers(report["results"])["geneval/overall/value"] == geneval["overall"]["value"]
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [line["correct"] for line in lines] == [verdict["correct"] for verdict in geneval["verdicts"]]
    assert lines[1]["filename"] == "00001/samples/0000.png"
    text = (out / "report.html").read_text()
    page = _Page()
    page.feed(text)
    assert not page.open
    assert "script" not in page.tags and "link" not in page.tags
    assert all(link.startswith("data:image/") for link in page.links)
    assert not re.search(r"https?://(?!creativecommons)", re.sub(r"data:[^\"]*", "", text))
    assert "my &lt;run&gt;" in text and "<run>" not in text
    assert text.count("<figure>") == 6 * PER_TAG
    for link in page.links:
        base64.b64decode(link.split(",", 1)[1], validate=True)
    if find_browser():
        for width in (PHONE, DESK):
            assert width_in_browser(out / "report.html", width, tmp_path) <= width


def test_unknown_suite_and_missing_checkpoint_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for argv, message in (
        ([str(tmp_path), "--prompts", "demo", "--suite", "fidd"], "--suite fidd is unknown: choose from geneval, fid"),
        ([str(tmp_path / "absent")], "absent does not exist"),
        ([str(tmp_path)], "--prompts is missing"),
        ([str(tmp_path), "--prompts", "demo"], "checkpoint"),
        ([str(tmp_path), "--prompts", "demo", "--per-category", "0"], "--per-category is 0: use 1 or more"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*argv, "--out", str(out)])
        assert stop.value.code == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert len(error.splitlines()) == 1
    assert not out.exists()


def test_command_line_defaults() -> None:
    demo = ["--prompts", "demo"]
    config = parse(["runs/demo/checkpoints/step_00000010", *demo, "--suite", "fid, geneval"])
    assert config.score.suites == ("fid", "geneval")
    assert config.score.out == Path("runs/demo/eval").resolve()
    assert config.score.detector == EMBEDDED
    assert run_folder(Path("runs/demo")) == Path("runs/demo")
    assert parse(["runs/demo", *demo]).score.suites == DEMO_SUITES
    assert parse(["runs/demo", "--prompts", "geneval", "--suite", "geneval"]).score.true_pictures is None
    with pytest.raises(ConfigError, match="unknown"):
        parse(["runs/demo", *demo, "--suite", "clip"])


@pytest.mark.slow
def test_a_real_run_is_scored_alike_by_one_and_by_two_processes(tmp_path: Path, launcher: Any) -> None:
    images, latents, run = (tmp_path / name for name in ("images", "latents", "run"))
    overrides = [
        f"run_dir={run}",
        "data.source=shards",
        f"data.images={images}",
        f"data.latents={latents}",
        "train.max_steps=2",
        "diffusion.sampling_steps=2",
        "model.patch_size=4",
    ]
    for command in (
        ["-m", "trainer.data.demo.scene_shards", "--out", str(images), "--num-images", "64"],
        ["-m", "trainer.data.encode", "debug", *overrides],
        ["-m", "trainer.train", "debug", *overrides],
        ["-m", "eval.run", str(run), "--suite", "geneval", "--per-category", "3"],
    ):
        done = launcher.run(*command)
        assert done.returncode == 0, done.stderr[-3000:]
    two = tmp_path / "two"
    command = ["-m", "eval.run", str(run), "--suite", "geneval", "--per-category", "3", "--out", str(two)]
    done = launcher.run(*command, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    one = run / "eval"
    pictures = sorted(path.relative_to(one) for path in (one / "pictures").rglob("*.png"))
    assert len(pictures) == 2 * 18
    assert pictures == sorted(path.relative_to(two) for path in (two / "pictures").rglob("*.png"))
    assert (one / "results.jsonl").read_text() == (two / "results.jsonl").read_text()
