"""The page of a comparison, OUT/compare.html, and its numbers as OUT/compare.json: what follows, and what does not.

Everything is read from OUT/runs, so that a comparison in progress has a page, too.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.compare import figures
from benchmarks.compare.kinds import BINS, OFFSET
from benchmarks.compare.records import Runs, finished, parameters_of, training_flops_of
from benchmarks.compare.scenes import OBJECTS_PER_SCENE
from benchmarks.compare.statistics import Estimate, estimate, fit_line, loss_of, reduction, speedup, validation_curve
from benchmarks.compare.studies import STUDIES, VARIANTS, Job
from benchmarks.compare.training import Record, RunConfig
from benchmarks.compare.validation import PLACES, TIMES
from benchmarks.interleaved import write_json
from trainer.files import write_text
from trainer.formats.chart import plots
from trainer.formats.page import card, escape, image, page, stat, table

PAIR = ("dense", "expert_choice")
Jobs = Mapping[str, list[Job]]
EXPERTS = {"dense": 1, "experts_4": 4, "experts_8": 8, "expert_choice": 16, "experts_32": 32}
FACTORS = {"factor_0.5": 0.5, "expert_choice": 1.0, "factor_2": 2.0, "factor_4": 4.0}


def write_report(out: Path, jobs: Jobs) -> None:
    """Write page and numbers of the runs that are finished."""
    runs = {name: finished(group, out) for name, group in jobs.items()}
    config_of = {job.variant: job.config for group in jobs.values() for job in group}
    path = out / "where.json"
    where = json.loads(path.read_text()) if path.is_file() else {}
    body = [
        "<h1>Does expert choice pay?</h1>",
        '<p class="lead">Diffusion transformers on drawn scenes, dense and as mixtures, at equal activated FLOPs.</p>',
        *_verdict(runs["pair"]),
        *_pair_section(runs["pair"], config_of),
        *(part for name in STUDIES if name != "pair" for part in _study_section(name, runs[name], config_of)),
        *_where_section(where),
        card("Protocol", _protocol(jobs["pair"][0].config, runs)),
    ]
    write_text(out / "compare.html", page("Does expert choice pay?", body))
    write_json(out / "compare.json", _numbers(runs, where))


def _verdict(pair: Runs) -> list[str]:
    """The main numbers, and in words what they say."""
    if not all(pair.get(name) for name in PAIR):
        return ["<p>The main pair has not been run to its end yet.</p>"]
    lower, fewer = reduction(pair[PAIR[0]], pair[PAIR[1]]), speedup(pair[PAIR[0]], pair[PAIR[1]])
    seeds = len(set(pair[PAIR[0]]) & set(pair[PAIR[1]]))
    if math.isnan(lower.margin):
        words = "One seed alone: a lead, not a finding."
    elif not lower.is_clear:
        words = "The difference is within its interval: these runs do not say which is better."
    else:
        better, worse = (
            ("Expert choice", "the dense model") if lower.value > 0 else ("The dense model", "expert choice")
        )
        words = (
            f"{better} has the lower validation loss after equal steps and activated FLOPs, and the difference to "
            f"{worse} is larger than its interval. It holds for models of this size on these scenes, for the loss and "
            "not for pictures that people judged, and per activated FLOP: the experts hold more parameters, which take "
            "memory, and time where the machine does not hide their exchange."
        )
    return [
        '<div class="headline">',
        stat("validation loss of expert choice, lower by", f"{lower.value:.2f}", "%", _interval(lower, seeds)),
        stat("fewer steps to the dense model's final loss", f"{fewer.value:.2f}", "x", _interval(fewer, seeds)),
        "</div>",
        f"<p>{words}</p>",
    ]


def _interval(value: Estimate, seeds: int) -> str:
    if math.isnan(value.margin):
        return "one seed"
    return f"{value.value - value.margin:.2f} to {value.value + value.margin:.2f}, {seeds} seeds, 95 %"


def _pair_section(pair: Runs, config_of: Mapping[str, RunConfig]) -> list[str]:
    """Curves against steps, FLOPs and time; losses by time and place."""
    if not pair:
        return []
    axes: dict[str, figures.Axis] = {
        "steps": lambda record, steps: [float(s) for s in steps],
        "activated PFLOPs": lambda record, steps: [
            s * record.of["batch_size"] * training_flops_of(_config(record.of, config_of)) / 1e15 for s in steps
        ],
        "minutes in training steps": lambda record, steps: [s / record.step * record.seconds / 60 for s in steps],
    }
    shown = {VARIANTS[name].words: list(records.values()) for name, records in pair.items()}
    parts = ["<h2>Dense and expert choice</h2>", _charts(shown, axes),
             _table(pair, config_of)]  # fmt: skip
    return parts + (_where_lower(pair) if all(pair.get(name) for name in PAIR) else [])


def _charts(shown: Mapping[str, list[Record]], axes: Mapping[str, figures.Axis]) -> str:
    """One chart an axis, beside each other where there is room."""
    return plots([image(figures.curves(shown, title, axis), "validation loss") for title, axis in axes.items()])


def _where_lower(pair: Runs) -> list[str]:
    """Tables of the difference: by time and place at the end, and by place in the course of training."""
    base, other = (pair[name] for name in PAIR)
    places = (*PLACES, "all")
    by_time = [
        [f"t = {time}" if time != "mean" else time, *(str(reduction(base, other, time, p)) for p in places)]
        for time in (*map(str, TIMES), "mean")
    ]
    steps = validation_curve(next(iter(base.values())))[0]
    by_step = [[str(step), *(str(reduction(base, other, "mean", p, step)) for p in places)] for step in steps]
    note = (
        "Lower by, in %; by time (1 is noise) and by what a token shows: background, or an object of a kind that is met"
    )
    return [
        "<h3>Where it is lower</h3>", f"<p>{note} more or less often.</p>",
        f'<div class="scroll">{table(["", *places], by_time)}</div>',
        "<h3>When it comes to be lower</h3>", f"<p>The same over training; {_views(next(iter(base.values())))}.</p>",
        f'<div class="scroll">{table(["step", *places], by_step)}</div>',
    ]  # fmt: skip


def _views(record: Record) -> str:
    """How often a kind of each bin is drawn in 1,000 steps."""
    weights = [1 / (rank + OFFSET) for rank in range(record.of["num_kinds"])]
    objects = 1000 * record.of["batch_size"] * OBJECTS_PER_SCENE
    shown = {name: objects * sum(weights[r] for r in ranks) / sum(weights) / len(ranks) for name, ranks in BINS.items()}
    return "in 1,000 steps a kind is drawn " + ", ".join(f"{n:.0f} times ({name})" for name, n in shown.items())


def _config(of: Mapping[str, Any], config_of: Mapping[str, RunConfig]) -> RunConfig:
    """The settings among those of this comparison that cost the same as a record's."""
    return next(
        c
        for c in config_of.values()
        if dataclasses.asdict(c.moe) == of["moe"] and c.model.mlp_ratio == of["model"]["mlp_ratio"]
    )


def _table(runs: Runs, config_of: Mapping[str, RunConfig]) -> str:
    """One row for each variant: loss, difference to the first, parameters, FLOPs, speed."""
    base = next(iter(runs))
    rows = []
    for name, records in runs.items():
        total, active = parameters_of(config_of[name])
        losses = estimate([loss_of(record) for record in records.values()])
        lower = "" if name == base else str(reduction(runs[base], records))
        speed = max(r.step * r.of["batch_size"] / r.seconds for r in records.values())
        extra = f' <span class="range">{escape(VARIANTS[name].extra)}</span>' if VARIANTS[name].extra else ""
        flops = training_flops_of(config_of[name]) / 1e9
        rows.append([escape(VARIANTS[name].words) + extra, str(losses), lower, f"{active / 1e6:.2f}",
                     f"{total / 1e6:.2f}", f"{flops:.2f}", f"{speed:.0f}"])  # fmt: skip
    header = ["", "validation loss", "lower by, %", "activated, M", "parameters, M", "GFLOPs an image", "images/s"]
    return f'<div class="scroll">{table(header, rows)}</div>'


def _study_section(name: str, runs: Runs, config_of: Mapping[str, RunConfig]) -> list[str]:
    """Question, table, curves, and a fitted line where the study has an axis."""
    others = set(STUDIES[name].variants) - set(PAIR)
    if len(runs) < 2 or (others and not others & set(runs)):  # the pair alone answers another question
        return []
    shown = {VARIANTS[variant].words: list(records.values()) for variant, records in runs.items()}
    records = next(iter(runs.values()))
    steps, seeds = next(iter(records.values())).step, "one seed" if len(records) == 1 else f"{len(records)} seeds"
    axes: dict[str, figures.Axis] = {"steps": lambda record, steps: [float(s) for s in steps]}
    chart = _charts(shown, axes)
    parts = [f"<h2>{escape(STUDIES[name].question)}</h2>", f'<p class="muted">{steps} steps, {seeds}.</p>',
             _table(runs, config_of), f'<div class="narrow">{chart}</div>']  # fmt: skip
    for axis, label in ((EXPERTS, "experts"), (FACTORS, "capacity factor")):
        if name == {"experts": "experts", "capacity factor": "capacity"}[label] and len(runs) > 2:
            parts += _line_parts(
                {axis[variant]: loss_of(next(iter(records.values()))) for variant, records in runs.items()}, label
            )
    return parts


def _line_parts(points: Mapping[float, float], label: str) -> list[str]:
    line = fit_line(list(points), list(points.values()))
    words = f"Each doubling of the {label} changes the loss by {line.slope} (least squares; interval of the slope)."
    return [f'<div class="narrow">{image(figures.line_chart(points, line, label), label)}</div>', f"<p>{words}</p>"]


def _where_section(where: Mapping[str, Any]) -> list[str]:
    if not where:
        return []
    header = ["t", "correlation with detail", "highest of 200 shuffled", "experts per token: objects", "background",
              "share taken by none: objects", "background"]  # fmt: skip
    rows = [[time, *(f"{value:.3f}" for value in found.values())] for time, found in where.items()]
    note = (
        "Correlation, over the tokens of 256 held-out scenes, of how many experts take a token (in all layers) "
        "with the clean picture's detail under it; beside it the highest of 200 with other pictures' detail."
    )
    return [
        "<h2>Where do the experts compute?</h2>",
        f"<p>{note}</p>",
        f'<div class="scroll">{table(header, rows)}</div>',
    ]


def _protocol(config: RunConfig, runs: Mapping[str, Runs]) -> dict[str, Any]:
    devices = {r.device for group in runs.values() for records in group.values() for r in records.values()}
    optim, model = config.optim, config.model
    shorter = ", ".join(name.replace("_", " ") for name, study in STUDIES.items() if study.share < 1)
    return {
        "data": f"scenes of 64 x 64 pixels, {config.num_kinds} kinds of objects, drawn on the fly: none met twice",
        "latents": "4 x 4 cosine transform, 16 channels, patch 2: 64 tokens; captions by MiniLM's first layer",
        "model": f"width {model.dim}, {model.num_layers} blocks; dense: MLP ratio {model.mlp_ratio}",
        "training": f"{config.steps} steps of {config.batch_size} scenes ({shorter}: half), AdamW, learning "
        f"rate {optim.learning_rate:g}, {optim.warmup_steps} steps of warm-up, cosine to 0, bf16 with fp32 masters",
        "loss": f"velocity, mean of t = {', '.join(map(str, TIMES))}; 512 held-out scenes, fixed noise; weights "
        f"averaged over steps ({config.ema})",
        "pairs": "runs of one seed see the same scenes, noise and times; 95 % intervals of paired differences",
        "time": "what the clock showed during training steps, with all that ran beside them, pauses included",
        "devices": ", ".join(sorted(devices)),
    }


def _numbers(runs: Mapping[str, Runs], where: Mapping[str, Any]) -> dict[str, Any]:
    """Final losses by study, variant and seed; the pair's difference; the maps."""
    pair = runs["pair"]
    losses = {
        study: {
            name: {seed: r.measured[str(r.step)]["mean"] for seed, r in records.items()}
            for name, records in group.items()
        }
        for study, group in runs.items()
    }
    found: dict[str, Any] = {"final": losses, "where": where}
    if all(pair.get(name) for name in PAIR):
        base, other = (pair[name] for name in PAIR)
        found["lower_percent"] = dataclasses.asdict(reduction(base, other))
        found["fewer_steps"] = dataclasses.asdict(speedup(base, other))
    return found
