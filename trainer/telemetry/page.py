"""Write RUN/report.html: how a training run stands, from what lies in its folder.

    python -m trainer.telemetry.page RUN [--out FILE]

One file without scripts that needs no server and no network: loss, gradient norm, speed and learning rate over steps,
sample grids, routers, starts and incidents, settings. Training writes it at each sample grid and at its end.
"""

import argparse
import logging
import time
from pathlib import Path
from typing import Any

import yaml

from trainer.config import TrainConfig, command, command_parser, known_keys, leaves
from trainer.errors import require, sentence_of
from trainer.files import write_text
from trainer.formats.chart import short
from trainer.formats.page import escape, page, stat, table
from trainer.telemetry.metrics_file import METRICS, read_curves
from trainer.telemetry.run_history import History, Start, read_history
from trainer.telemetry.run_sections import coverage_section, curve_section, grid_section, router_table, time_table

NAME = "report.html"
SHOWN_INCIDENTS = 20
logger = logging.getLogger("ec_dit")
_STYLE = """
.headline { grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 14px; margin-bottom: 28px; }
.stat { padding: 12px 16px; } .stat .value { font-size: 30px; } .stat .unit { font-size: 15px; }
.bar { height: 6px; border-radius: 3px; background: var(--rule); margin: 6px 0; }
.bar div { height: 100%; border-radius: 3px; background: var(--blue); }
th { white-space: normal; } .scroll { overflow-x: auto; }
td.words { white-space: normal; min-width: 220px; } td.words, th.words { text-align: left; }
"""


class PageWriter:
    """Keeps the page of a run up to date; what goes wrong with it is said once and never ends the run."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.failed = run_dir, False

    def refresh(self) -> None:
        """Write the page anew."""
        try:
            write_page(self.run_dir, self.run_dir / NAME)
        except Exception as error:
            if not self.failed:
                logger.warning("the page %s could not be written: %s", self.run_dir / NAME, sentence_of(error))
            self.failed = True


def write_page(run_dir: Path, out: Path) -> None:
    """Write the page of a run folder."""
    write_text(out, build_page(run_dir))


def build_page(run_dir: Path) -> str:
    """The page of a run folder as one HTML text."""
    curves, rows = read_curves(run_dir)
    history, config = read_history(run_dir), _config(run_dir)
    train, newest = config.get("train", {}), curves[-1] if curves else {}
    step, last = int(newest.get("step", 0)), int(train.get("max_steps", 0))
    body = [
        f"<h1>{escape(run_dir.resolve().name)}</h1>",
        f'<p class="lead">{escape(_summary(history, step, last))}</p>',
        f'<div class="headline">{"".join(_stats(newest, step, last))}</div>',
        "<h2>Training</h2>",
        *(curve_section(curves) if curves else ["<p>No step is logged yet.</p>"]),
        *time_table(curves),
        *grid_section(run_dir, config.get("sample", {}).get("prompts", [])),
    ]
    routers = [*coverage_section(rows), *(router_table(rows[-1]) if rows else [])]
    body += ["<h2>Experts</h2>", *routers] if routers else []
    body += _history_section(history)
    if (run_dir / "eval" / NAME).is_file():
        body.append(f'<p>Scores: <a href="eval/{NAME}">eval/{NAME}</a></p>')
    body += _settings(config)
    return page(run_dir.resolve().name, body, _STYLE)


def _config(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "config.yaml"
    return dict(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _summary(history: History, step: int, last: int) -> str:
    """Where the run is, and since when."""
    parts = [f"step {step:,}" + (f" of {last:,}" if last else "")]
    start = history.starts[-1] if history.starts else None
    if start is not None:
        parts += [f"ended ({start.ended})" if start.ended else f"last heard of {history.newest}"]
        parts += [f"{start.processes} {'process' if start.processes == 1 else 'processes'}, {start.layout}"]
    count = history.num_resumed
    parts += [f"resumed {count} times" if count > 1 else "resumed once"] if count else []
    return f"{'; '.join(parts)}. Written {time.strftime('%Y-%m-%d %H:%M:%S')}."


def _stats(row: dict[str, Any], step: int, last: int) -> list[str]:
    """Boxes: how far, how well, how fast, how long still."""
    boxes = []
    if last:
        share = min(1.0, step / last)
        bar = f'<div class="bar"><div style="width: {share:.1%}"></div></div>'
        boxes.append(stat("done", f"{100 * share:.3g}", "%", bar + f"step {step:,} of {last:,}"))
    if "loss" in row:
        boxes.append(stat("loss", f"{row['loss']:.4f}", "", f"gradient norm {row.get('grad_norm', 0):.3g}"))
    if "images_per_second" in row:
        seconds, mfu = row.get("seconds_per_step"), row.get("mfu")
        notes = [f"{seconds:.3g} s per step" if seconds else "", f"MFU {mfu:.1%}" if mfu is not None else ""]
        boxes.append(stat("speed", short(row["images_per_second"]), "images/s", ", ".join(filter(None, notes))))
        if seconds and last > step:
            value, unit = _duration((last - step) * seconds)
            boxes.append(stat("still to go", value, unit, "at this speed"))
    bad = int(row.get("bad_steps", 0))
    return [*boxes, stat("skipped steps", f"{bad:,}", "", "loss or gradient norm not finite")] if bad else boxes


def _duration(seconds: float) -> tuple[str, str]:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.3g}", unit
    return f"{seconds:.0f}", "seconds"


def _history_section(history: History) -> list[str]:
    """Starts and incidents as tables."""
    if not history.starts:
        return []
    rows = [_start_row(start, newest=start is history.starts[-1]) for start in reversed(history.starts)]
    parts = [
        "<h2>Starts and incidents</h2>",
        table(["started", "processes", "from step", "to step", '<th class="words">end</th>'], rows),
    ]
    if not history.incidents:
        return [*parts, '<p class="muted">The log warns of nothing.</p>']
    newest = list(reversed(history.incidents))[:SHOWN_INCIDENTS]
    lines = [[escape(when), f'<td class="words">{escape(words)}</td>'] for when, words in newest]
    more = len(history.incidents) - len(newest)
    rest = [f'<p class="muted">{more} earlier ones are in train.log.</p>'] if more else []
    return [*parts, "<h3>Incidents, newest first</h3>", table(["when", '<th class="words">what</th>'], lines), *rest]


def _settings(config: dict[str, Any]) -> list[str]:
    """Every setting that has a value, by its name."""
    found = leaves(config, known_keys(TrainConfig))
    items = [f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in found.items() if v not in ("", None)]
    lines = f'<details class="card"><summary>config.yaml</summary><dl>{"".join(items)}</dl></details>'
    return ["<h2>Settings</h2>", lines] if items else []


def _start_row(start: Start, newest: bool) -> list[str]:
    end = start.ended or ("" if newest else "without a word")
    words = f'<td class="words">{escape(end)}</td>'
    return [escape(start.time), str(start.processes), f"{start.first:,}", f"{start.last:,}", words]


@command
def main(argv: list[str] | None = None) -> None:
    """Command line: a run."""
    parser: argparse.ArgumentParser = command_parser("trainer.telemetry.page", __doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--out", type=Path, help=f"file to write (default RUN/{NAME})")
    given = parser.parse_args(argv)
    run: Path = given.run
    require((run / METRICS).is_file(), f"{run} has no {METRICS}: name the folder of a run")
    out: Path = given.out or run / NAME
    require(not out.is_dir(), f"--out {out} is a folder: name a file in it")
    write_page(run, out)
    print(f"page: {out}")


if __name__ == "__main__":
    main()
