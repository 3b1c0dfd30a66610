"""The page of a training run shows the numbers, pictures, starts and incidents that lie in its folder."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import PHONE, find_browser, width_in_browser
from PIL import Image

from trainer.config import config_to_dict, load_config
from trainer.formats.chart import BINS, Frame, binned, line_chart, share_chart, short, smoothed, ticks
from trainer.loop.run import setup_logging
from trainer.telemetry.metrics_file import read_curves
from trainer.telemetry.page import PageWriter, build_page, main
from trainer.telemetry.run_history import read_history
from trainer.telemetry.run_sections import coverage_section, curve_section, router_table, time_table

LOG = """2026-11-20 10:00:00 run runs/a: 4 processes, ep_size 2, ZeRO stage 3, bf16
2026-11-20 10:00:00 starting fresh
2026-11-20 10:00:09 step 10/40  loss 1.000000  grad_norm 1.0000  lr 1.00e-03  9.0 images/s
2026-11-20 10:00:10 saved runs/a/checkpoints/step_00000010 in 0.1 s
2026-11-20 10:00:10 ended after step 10 of 40 (stop signal)
2026-11-21 10:00:00 run runs/a: 2 processes, ep_size 2, ZeRO stage 3, bf16
2026-11-21 10:00:00 resuming from runs/a/checkpoints/step_00000010
2026-11-21 10:00:04 warning: skipped step 14: its loss is not finite; <b>
2026-11-21 10:00:09 step 20/40  loss 0.900000  grad_norm 1.0000  lr 1.00e-03  9.0 images/s
"""


def metric_rows(steps: range) -> list[dict[str, Any]]:
    routers = {f"moe/{i}/coverage_{k}": share for i in (1, 3) for k, share in enumerate((0.1, 0.4, 0.5))}
    routers |= {f"moe/{i}/t{n}/uncovered": 0.05 * n for i in (1, 3) for n in (1, 3)}
    rows = []
    for step in steps:
        values = {"loss": 2 + 100 / step, "grad_norm": 1.0 + step % 3, "learning_rate": 1e-5 * step, "bad_steps": 1.0}
        rows.append({"step": step, **values, "images_per_second": 50.0, "seconds_per_step": 90.0, **routers})
    return rows


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 40 steps at step 20, in its second start."""
    folder = tmp_path / "a"
    (folder / "samples").mkdir(parents=True)
    lines = [json.dumps(row) for row in metric_rows(range(1, 21))]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 21, "lo']))
    (folder / "train.log").write_text(LOG)
    config = config_to_dict(load_config("debug", ["train.max_steps=40"]))
    (folder / "config.yaml").write_text(json.dumps(config))  # is YAML, too
    for step, width in ((10, 64), (20, 1400)):
        pixels = np.random.default_rng(0).integers(0, 255, (32, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "samples" / f"step_{step:08d}.png")
    return folder


def corners(chart: str, kind: str) -> list[tuple[float, float]]:
    found = re.search(rf'<{kind} points="([^"]*)"', chart)
    assert found
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in found[1].split())]


def test_a_curve_is_the_trend_over_the_range_of_the_values() -> None:
    points = [(float(step), 3.0 + (step % 2)) for step in range(1000)]
    chart = line_chart("Loss", points, from_zero=True)
    frame = Frame(x0=binned(points)[0].x, x1=binned(points)[-1].x, y0=0, y1=4)
    line, band = corners(chart, "polyline"), corners(chart, "polygon")
    assert len(line) == BINS and line[0][0] < line[-1][0]
    assert all(abs(y - frame.y(3.5)) < 5 for _, y in line)
    assert {round(y, 1) for _, y in band} == {round(frame.y(3), 1), round(frame.y(4), 1)}
    assert "Loss <span>4</span>" in chart, "the newest value, not the smoothed one"


def test_few_values_are_drawn_each_and_a_rare_peak_does_not_flatten_the_rest() -> None:
    points = [(float(step), 1.0 * step) for step in range(10)]
    assert [(one.x, one.mean) for one in binned(points)] == points
    assert line_chart("Loss", []) == "" and "circle" in line_chart("Loss", points[:1])
    assert len(binned([*points, (10.0, float("nan"))])) == 10
    chart = line_chart("Norm", [(float(step), 900.0 if step == 50 else 1.0) for step in range(200)])
    assert "1, largest 900" in chart and min(y for _, y in corners(chart, "polygon")) == Frame(
        x0=0, x1=1, y0=0, y1=1
    ).y(1)


def test_a_trend_is_a_mean_over_a_tenth_that_narrows_at_the_ends() -> None:
    values = [float(n) for n in range(40)]
    assert smoothed(values) == values, "a straight line stays one, also at its ends"
    step = smoothed([0.0] * 20 + [1.0] * 20)
    assert step[17] == 0 and step[18] == 0.2 and step[21] == 0.8 and step[22] == 1
    assert ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1] and ticks(3, 3) == [3] and ticks(1, 20, 5) == [5, 10, 15, 20]
    assert [short(value) for value in (1500, 20000, 3e6, 0.025, 0.00025, 0)] == [
        "1,500", "20k", "3M", "0.025", "2.5e-4", "0",
    ]  # fmt: skip


def test_bands_lie_one_above_the_other_and_are_named_by_their_last_share() -> None:
    rows = metric_rows(range(1, 3))
    rows[0] |= {"moe/1/coverage_0": 0.5, "moe/1/coverage_1": 0.3, "moe/1/coverage_2": 0.2}
    section = "".join(coverage_section(rows))
    words = re.findall(r">(\d(?: or more)?: \d+%)<", section)
    assert words == ["0: 10%", "1: 40%", "2 or more: 50%"] * 2
    assert re.findall(r"<figcaption>(Block \d)", section) == ["Block 1", "Block 3"]
    whole = corners(section.rsplit("<polygon", 1)[0], "polygon")
    assert whole[0][1] != whole[1][1] and coverage_section([{"step": 10, "loss": 1.0}]) == []
    assert "100%" in share_chart("one", [("0", [(1.0, 1.0)])]), "one line of metrics is a chart, too"


def test_what_a_run_has_not_logged_has_no_chart() -> None:
    titles = re.findall(r"<figcaption>([^<]*) <", "".join(curve_section([{"step": 1, "loss": 1.0}])))
    assert titles == ["Loss"]
    titles = re.findall(r"<figcaption>([^<]*) <", "".join(curve_section(metric_rows(range(1, 9)))))
    assert titles == ["Loss", "Gradient norm", "Learning rate", "Images per second", "Seconds per step"]
    assert "5e-4" in "".join(curve_section(metric_rows(range(50, 51)))), "the learning rate, not another number"


def test_routers_of_ranges_without_an_image_have_no_number() -> None:
    text = "".join(router_table(metric_rows(range(4, 5))[0]))
    assert "0.25 to 0.5" in text and text.count("<td></td>") == 4 and "15.0%" in text and "10.0%" in text
    assert router_table({"step": 4, "loss": 1.0}) == []


def test_the_newest_measured_step_says_where_its_time_went() -> None:
    rows = [{"step": 4, "time/forward": 9.0}, {"step": 8, "time/forward": 1.0, "time/all_to_all": 3.0}, {"step": 9}]
    text = "".join(time_table(rows))
    assert "step 8" in text and re.findall(r"<td>([^<]*)</td>", text) == [
        "all to all", "3.0000", "75%", "forward", "1.0000", "25%",
    ]  # fmt: skip
    assert time_table(rows[2:]) == []


def test_a_long_file_is_read_in_part_but_for_its_curves(run: Path) -> None:
    curves, rows = read_curves(run, most_whole=7)
    assert [row["step"] for row in curves] == list(range(1, 21)), "without the half line of a killed run"
    assert len(rows) == 7 and rows[-1]["step"] == 20 and "moe/1/coverage_0" in rows[0]
    assert not any("moe" in key for row in curves for key in row)
    assert read_curves(run / "none") == ([], [])


def test_the_history_is_that_of_the_log(run: Path) -> None:
    history = read_history(run)
    assert [(s.processes, s.first, s.last, s.ended) for s in history.starts] == [
        (4, 0, 10, "stop signal"),
        (2, 10, 20, ""),
    ]
    assert history.num_resumed == 1 and history.newest == "2026-11-21 10:00:09"
    assert history.incidents == [("2026-11-21 10:00:04", "skipped step 14: its loss is not finite; <b>")]


def test_the_log_marks_what_the_page_calls_an_incident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("ec_dit")
    for name in ("handlers", "propagate"):
        monkeypatch.setattr(logger, name, getattr(logger, name))
    monkeypatch.setattr(logger, "handlers", [])
    setup_logging(tmp_path / "train.log")
    logger.info("run a: %d processes, ep_size 1, ZeRO stage 3, fp32", 1)
    logger.warning("passed over checkpoint 3")
    for handler in logger.handlers:
        handler.close()
    history = read_history(tmp_path)
    assert [words for _, words in history.incidents] == ["passed over checkpoint 3"] and len(history.starts) == 1


def test_the_page_says_where_the_run_is_and_needs_nothing_else(run: Path, tmp_path: Path) -> None:
    (run / "eval").mkdir()
    (run / "eval" / "report.html").touch()
    text = build_page(run)
    for words in ("step 20 of 40", "resumed once", "2 processes", "still to go", "30<", "minutes", "skipped steps",
                  "step 10<", "skipped step 14: its loss is not finite; &lt;b&gt;", "train.max_steps",
                  "eval/report.html", "data:image/jpeg", "data:image/png"):  # fmt: skip
        assert words in text, words
    assert "<script" not in text and not re.search(r'(?:src|href)="(?!data:|eval/report.html)', text)
    main([str(run), "--out", str(tmp_path / "page.html")])
    if find_browser():
        assert width_in_browser(tmp_path / "page.html", PHONE, tmp_path) <= PHONE


def test_a_run_that_has_logged_nothing_has_a_page(tmp_path: Path) -> None:
    assert "No step is logged yet" in build_page(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])


def test_a_page_that_cannot_be_written_is_said_once_and_ends_nothing(
    run: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("ec_dit"), "propagate", True)
    writer = PageWriter(run)
    (run / "report.html").mkdir()
    for _ in range(3):
        writer.refresh()
    assert len(caplog.messages) == 1 and "report.html" in caplog.messages[0]
    (run / "report.html").rmdir()
    writer.refresh()
    assert (run / "report.html").is_file()
