"""The report of an evaluation: report.json, and report.html with every picture inside it.

The page is drawn from report.json, the scored pictures and the run's own files (metrics.jsonl, samples/).
One function per section; a section of a suite that was not run is left out. Shapes: N pictures.

    python -m eval.report compare RUN RUN --out comparison.html        # numbers and protocols side by side
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.metrics.geneval import FAULTS
from eval.pages.allocation import word_lines
from eval.pages.charts import compute_chart, coverage_chart, moved_chart, region_chart, training_chart
from eval.pages.compute_map import ComputeMaps, compute_by_region
from eval.pages.page import card, escape, figure_grid, file_uri, image, interval_plot, page, table, verdict_figure
from eval.pictures.generate import write_text
from trainer.config import require, run_cli

SHOWN_PER_TAG = 16
SHOWN_MAPS = 6
SHOWN_GRIDS = 6
CONTROLS = ("chance", "shuffled", "untrained", "ceiling")


@dataclass(frozen=True, kw_only=True)
class ReportInput:
    """What the page shows. `report` is the content of report.json; `pictures` uint8 [N, H, W, 3] in the
    order of `texts` and `tags`; `maps` with `object_mask_Nhw` when the model has experts.
    """

    report: dict[str, Any]
    texts: Sequence[str]
    tags: Sequence[str]
    pictures: Tensor
    run_dir: Path
    maps: ComputeMaps | None = None
    object_mask_Nhw: Tensor | None = None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, without the half line that a killed run may leave; empty if there is no file."""
    path = run_dir / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _range(score: Mapping[str, float]) -> str:
    return f'<span class="range">{_percent(score["low"])} to {_percent(score["high"])}</span>'


def _stat(name: str, value: str, unit: str, note: str) -> str:
    return (
        f'<div class="stat"><div class="name">{name}</div><div class="value">{value}'
        f'<span class="unit">&thinsp;{unit}</span></div><div class="range">{note}</div></div>'
    )


def _header(content: ReportInput) -> list[str]:
    report = content.report
    model = ", ".join(f"{escape(name)} {escape(value)}" for name, value in report["model"].items())
    stats = []
    geneval, fid = report["results"].get("geneval"), report["results"].get("fid")
    if geneval:
        controls = geneval["controls"]
        note = (
            f"95 % interval {_range(geneval['overall'])}; shuffled captions "
            f"{_percent(controls['shuffled']['overall'])}, true pictures {_percent(controls['ceiling']['overall'])}"
        )
        stats.append(_stat("GenEval rules on unseen scenes", _percent(geneval["overall"]["value"]), "%", note))
    if fid:
        note = f"true pictures reach {fid['true']:.1f}, the untrained model {fid['untrained']:.1f}"
        stats.append(_stat("FID to training scenes, lower is better", f"{fid['generated']:.1f}", "", note))
    return [
        f"<h1>{escape(report['run'])} at step {report['step']:,}</h1>",
        f'<p class="lead">{model}</p>',
        f'<div class="headline">{"".join(stats)}</div>',
    ]


def _scores(content: ReportInput) -> list[str]:
    geneval = content.report["results"].get("geneval")
    if not geneval:
        return []
    rows = []
    for tag, score in [*geneval["tags"].items(), ("overall", geneval["overall"])]:
        controls = {name: geneval["controls"][name].get(tag) for name in CONTROLS}
        known = {name: value for name, value in controls.items() if value is not None}
        rows.append(
            [
                escape(tag.replace("_", " ")),
                str(score["total"]),
                f"{_percent(score['value'])}",
                _range(score),
                interval_plot(score["value"], score["low"], score["high"], known),
                *("" if value is None else _percent(value) for value in controls.values()),
            ]
        )
    header = ["category", "n", "% correct", "95 % interval", "", *CONTROLS]
    others = ", ".join(f"{_percent(value)} at {name}" for name, value in geneval["thresholds"].items())
    return [
        "<h2>Does the picture show what the caption asks for?</h2>",
        "<p>Every prompt combines objects or colours that training never showed together. A detector finds the "
        "objects; GenEval's rules compare them with the caption. Overall is the unweighted mean of the categories.</p>",
        table(header, rows, last_is_total=True),
        '<p class="key">Grey ticks are the controls. <b>chance</b>: true pictures judged by other captions of the '
        "category. <b>shuffled</b>: these pictures judged by other captions. <b>untrained</b>: the same model before "
        "its first step. <b>ceiling</b>: true pictures of these captions, judged by the same detector.</p>",
        f'<p class="key">Pictures correct: {_percent(geneval["images"]["value"])} % of {geneval["images"]["total"]}. '
        f"Background as asked, whatever stands on it: {_percent(geneval['background']['value'])} %. "
        f"Overall with another threshold of the detector: {escape(others)}.</p>",
        *_faults(geneval),
        card("Protocol of this score", {**geneval["card"], "versions": content.report["versions"]}),
    ]


def _faults(geneval: Mapping[str, Any]) -> list[str]:
    """Failure kinds by category; nothing when no picture failed."""
    if not geneval["faults"]:
        return []
    kinds = [kind for kind in FAULTS if any(kind in faults for faults in geneval["faults"].values())]
    rows = [
        [escape(tag.replace("_", " ")), *(str(faults.get(kind, "")) for kind in kinds)]
        for tag, faults in geneval["faults"].items()
    ]
    titles = {"no_target": "no object to stand beside"}
    header = ["pictures that failed", *(titles.get(kind, f"{kind}") for kind in kinds)]
    return ["<h3>Why pictures fail</h3>", f'<div class="narrow">{table(header, rows)}</div>']


def _pictures(content: ReportInput) -> list[str]:
    geneval = content.report["results"].get("geneval")
    samples = content.report["pictures_per_prompt"]
    unjudged = {"correct": None, "reason": ""}
    parts = [
        "<h2>Pictures</h2>",
        f"<p>The first {SHOWN_PER_TAG} of each category, not selected; the rest folds out below.</p>",
    ]
    for tag in dict.fromkeys(content.tags):
        figures = []
        for number in (i for i, other in enumerate(content.tags) if other == tag):
            for i in range(number * samples, (number + 1) * samples):
                verdict: Mapping[str, Any] = geneval["verdicts"][i] if geneval else unjudged
                text = content.texts[number]
                figures.append(verdict_figure(content.pictures[i], text, verdict["correct"], verdict["reason"]))
        parts += [f"<h3>{escape(tag.replace('_', ' '))}</h3>", figure_grid(figures[:SHOWN_PER_TAG])]
        rest = figures[SHOWN_PER_TAG:]
        if rest:
            parts.append(f'<details class="more"><summary>{len(rest)} more</summary>{figure_grid(rest)}</details>')
    return parts


def _fid(content: ReportInput) -> list[str]:
    fid = content.report["results"].get("fid")
    if not fid:
        return []
    names = {
        "true": "true pictures of these captions",
        "generated": "generated pictures",
        "untrained": "untrained model",
    }
    rows = [[f"<b>{name}</b>" if key == "generated" else name, f"{fid[key]:.2f}"] for key, name in names.items()]
    return [
        "<h2>Do the pictures look like the training scenes?</h2>",
        f"<p>Frechet distance of Inception features between {fid['card']['pictures']} drawn training scenes and as "
        "many other pictures. With so few the value is biased upwards: read it against that of true pictures, which a "
        "perfect model would reach, and compare only values of the same number of pictures.</p>",
        f'<div class="beside">{table(["pictures", "FID"], rows)}'
        f"{card('Protocol of this score', {**fid['card'], 'versions': content.report['versions']})}</div>",
    ]


def _training(content: ReportInput) -> list[str]:
    rows = read_metrics(content.run_dir)
    if not rows:
        return []
    parts = ["<h2>Training</h2>", image(training_chart(rows), "loss, learning rate, gradient norm, speed")]
    grids = sorted((content.run_dir / "samples").glob("step_*.png"))
    if grids:
        last = len(grids) - 1
        chosen = sorted({round(i * last / (SHOWN_GRIDS - 1)) for i in range(SHOWN_GRIDS)})
        figures = [
            f"<figure>{image(file_uri(grids[i].read_bytes(), 'image/png'), grids[i].stem, 'wide')}"
            f"<figcaption>step {int(grids[i].stem.removeprefix('step_')):,}</figcaption></figure>"
            for i in chosen
        ]
        prompts = ", ".join(escape(prompt) for prompt in content.report["config"]["sample"]["prompts"])
        parts += [
            "<h3>Pictures drawn during training</h3>",
            f'<p class="key">{prompts}</p>',
            f'<div class="strip">{"".join(figures)}</div>',
        ]
    coverage = coverage_chart(rows)
    if coverage:
        parts += [
            "<h3>How many experts take a token</h3>",
            "<p>Each expert chooses its tokens, so a token may be taken by none or by several. Shares of all "
            "tokens, over training.</p>",
            image(coverage, "share of tokens by number of experts"),
        ]
    return parts


def _compute(content: ReportInput) -> list[str]:
    maps = content.maps
    if maps is None:
        return []
    shown = ComputeMaps(
        captions=maps.captions[:SHOWN_MAPS],
        pictures_NHWC=maps.pictures_NHWC[:SHOWN_MAPS],
        times=maps.times,
        layers=maps.layers,
        experts_NTLhw=maps.experts_NTLhw[:SHOWN_MAPS],
        capacity_factor=maps.capacity_factor,
        num_experts=maps.num_experts,
    )
    parts = [
        "<h2>Where the compute goes</h2>",
        f"<p>Experts that took each patch, averaged over sampling (by block) and over blocks (by time). White is "
        f"the uniform level of {maps.capacity_factor:g} experts per patch, red more, blue less.</p>",
        image(compute_chart(shown), "experts per patch"),
    ]
    regions = None
    if content.object_mask_Nhw is not None:
        regions = compute_by_region(maps, content.object_mask_Nhw)
    if regions:
        inside, outside = regions
        parts += [
            f"<p>Over {len(maps.captions)} prompts, patches on found objects are taken by {inside.mean():.2f} experts, "
            f"the others by {outside.mean():.2f}.</p>",
            image(region_chart(maps, inside, outside), "experts per patch on objects and background"),
        ]
    if maps.moved_TL is not None and not maps.moved_TL.isnan().all():
        parts += [
            "<h3>With the caption and without</h3>",
            "<p>Share of the compute that lies on other patches with the caption than with empty text, while both "
            "are evaluated for guidance.</p>",
            image(moved_chart(maps), "share of compute moved by the caption"),
        ]
    return parts + word_lines(maps.words)


def _closing(content: ReportInput) -> list[str]:
    notes = content.report["notes"]
    return ["<h2>Notes</h2>", *(f'<p class="muted">{escape(note)}</p>' for note in notes)] if notes else []


SECTIONS: tuple[Callable[[ReportInput], list[str]], ...] = (
    _header,
    _scores,
    _pictures,
    _fid,
    _compute,
    _training,
    _closing,
)


def render_report(content: ReportInput) -> str:
    """The page as one HTML text."""
    assert content.pictures.dtype == torch.uint8
    title = f"{content.report['run']} at step {content.report['step']}"
    return page(title, [part for section in SECTIONS for part in section(content)])


def _main(argv: list[str] | None) -> None:
    from eval.pages.compare import comparison_page, comparison_text, read_scores

    parser = argparse.ArgumentParser(prog="eval.report", description="Put reports of eval.run side by side.")
    parser.add_argument("command", choices=["compare"])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, folders of results, or report.json files")
    parser.add_argument("--out", type=Path, help="also write a page to this file")
    given = parser.parse_args(argv)
    require(len(given.runs) >= 2, "compare needs two reports or more")
    scores = [read_scores(path) for path in given.runs]
    print(comparison_text(scores))
    if given.out is not None:
        write_text(given.out, comparison_page(scores))


def main(argv: list[str] | None = None) -> None:
    """Command line: compare reports."""
    run_cli(lambda: _main(argv))


if __name__ == "__main__":
    main()
