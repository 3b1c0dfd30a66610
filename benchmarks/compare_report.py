"""Table and plots of a comparison: mean and standard deviation over seeds, nothing left out."""

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.interleaved import markdown_table

Result = dict[str, Any]
Speed = dict[str, list[float]]  # images/s of each round
COLUMNS = (
    ("mean_validation_loss", "validation loss", "{:.4f}", 1.0),
    ("fid", "FID", "{:.1f}", 1.0),
    ("geneval", "GenEval-style, %", "{:.1f}", 100.0),
    ("active_parameters", "activated parameters, M", "{:.3f}", 1e-6),
    ("parameters", "parameters, M", "{:.3f}", 1e-6),
    ("forward_flops", "forward MFLOPs per image", "{:.1f}", 1e-6),
)


def spread(values: Sequence[float], form: str) -> str:
    """Mean, and the standard deviation over seeds where there are several that differ."""
    mean = form.format(statistics.mean(values))
    if len(values) < 2 or max(values) == min(values):
        return mean
    return f"{mean} +- {form.format(statistics.stdev(values))}"


def by_variant(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results of each variant, in the order of their first appearance."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result["variant"], []).append(result)
    return groups


def table(results: Sequence[Result], speed: Speed) -> str:
    """Markdown: one row per variant, mean +- standard deviation over its seeds; speed over its rounds."""
    header = ["", "seeds", *(name for _, name, _, _ in COLUMNS), "images/s in training"]
    rows = []
    for variant, group in by_variant(results).items():
        cells = [spread([scale * float(r[key]) for r in group], form) for key, _, form, scale in COLUMNS]
        rows.append([variant, str(len(group)), *cells, spread(speed[variant], "{:.0f}") if speed else "-"])
    return markdown_table(header, rows)


def loss_by_time(results: Sequence[Result]) -> str:
    """Markdown: validation loss at each timestep."""
    times = list(results[0]["validation_loss"])
    rows = [
        [variant, *(spread([r["validation_loss"][time] for r in group], "{:.4f}") for time in times)]
        for variant, group in by_variant(results).items()
    ]
    return markdown_table(["validation loss at t =", *times], rows)


def _mean_curve(group: Sequence[Result]) -> tuple[list[float], list[float]]:
    """Training loss over steps, averaged over seeds up to the shortest run."""
    length = min(len(r["curve"]) for r in group)
    steps = [float(group[0]["curve"][i][0]) for i in range(length)]
    return steps, [statistics.mean(r["curve"][i][1] for r in group) for i in range(length)]


def plots(results: Sequence[Result], speed: Speed) -> Figure:
    """Training loss, validation loss by timestep relative to the first variant, and loss against speed."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    curve, by_time, against = figure.subplots(1, 3)
    groups = by_variant(results)
    times = [float(time) for time in results[0]["validation_loss"]]
    first = next(iter(groups.values()))
    base = [statistics.mean(r["validation_loss"][str(time)] for r in first) for time in times]
    for variant, group in groups.items():
        curve.plot(*_mean_curve(group), label=variant)
        ratios = [[r["validation_loss"][str(time)] / base[i] for r in group] for i, time in enumerate(times)]
        by_time.errorbar(
            times, [statistics.mean(v) for v in ratios],
            [statistics.stdev(v) if len(v) > 1 else 0.0 for v in ratios], label=variant, capsize=2,
        )  # fmt: skip
        if speed:
            losses = [r["mean_validation_loss"] for r in group]
            against.scatter([statistics.mean(speed[variant])] * len(losses), losses, label=variant)
    for axes, x_label, y_label in (
        (curve, "step", "training loss"),
        (by_time, "timestep (1 is noise)", f"validation loss / {next(iter(groups))}"),
        (against, "images/s in training", "mean validation loss"),
    ):
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.3)
    by_time.legend()
    return figure


def write_report(out: Path, results: Sequence[Result], settings: dict[str, Any], speed: Speed) -> None:
    """OUT/compare.md, compare.json and compare.png, each replaced whole."""
    seconds = sum(float(r.get("seconds", 0)) for r in results)
    text = "\n\n".join(
        [
            "# Routers at matched activated FLOPs",
            f"{len(results)} runs of {settings['steps']} steps on the embedded scenes, {seconds / 60:.0f} minutes in "
            "all; EMA weights. Mean +- standard deviation over seeds. Differences smaller than the deviation mean "
            "nothing. Speed was measured in short runs that took turns.",
            table(results, speed),
            loss_by_time(results),
            "![training loss, validation loss by timestep, loss against speed](compare.png)",
        ]
    )
    figure = out / "compare.tmp.png"
    plots(results, speed).savefig(figure, dpi=110)
    os.replace(figure, out / "compare.png")
    content = json.dumps(
        {"settings": settings, "results": list(results), "images_per_second": speed}, indent=2, default=str
    )
    for name, body in (("compare.md", text + "\n"), ("compare.json", content + "\n")):
        temporary = out / f"{name}.tmp"
        temporary.write_text(body)
        os.replace(temporary, out / name)
