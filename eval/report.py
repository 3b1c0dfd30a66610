"""Put reports of eval.run side by side: numbers, and where their protocols differ.

    python -m eval.report compare RUN RUN --out comparison.html

A difference that makes two numbers incomparable is named before the table.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.files import check_file
from eval.pages.numbers import flat_numbers
from trainer.config import ConfigError, command, command_parser, require
from trainer.files import write_text
from trainer.formats.page import escape, page, table

# Settings that describe what was scored, not how: runs are meant to differ in them.
_SUBJECT = {"checkpoint_step", "weights", "ema_decay", "versions"}
_HIDDEN = ("/low", "/high", "/correct", "/total")


@dataclass(frozen=True, kw_only=True)
class ReportScores:
    """A report's name, step, numbers, and the cards of its suites and of the sampling."""

    name: str
    step: int
    numbers: dict[str, float]
    cards: dict[str, dict[str, Any]]


def find_report(path: Path) -> Path:
    """report.json of a file, a folder of results, or a run; ConfigError if there is none, or several."""
    if path.is_file():
        return path
    for candidate in (path / "report.json", path / "eval" / "report.json"):
        if candidate.is_file():
            return candidate
    found = sorted(path.glob("eval/*/report.json"))
    require(bool(found), f"{path} has no report.json: run python -m eval.run {path}")
    require(len(found) == 1, f"{path} has {len(found)} reports: name one, for instance {found[0].parent}")
    return found[0]


def read_scores(path: Path) -> ReportScores:
    """What a report holds; ConfigError for a damaged one."""
    file = find_report(path)
    try:
        report = json.loads(file.read_text())
        results: Mapping[str, Any] = report["results"]
        cards = {name: dict(result.get("card", {})) for name, result in results.items()}
        cards["sampling"] = dict(report.get("sampling", {}))
        name, step = str(report["run"]), int(report["step"])
        return ReportScores(name=name, step=step, numbers=flat_numbers(results), cards=cards)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{file} is no report of eval.run ({error!r}): run the evaluation again") from error


def card_differences(scores: Sequence[ReportScores]) -> list[str]:
    """One sentence per setting that differs between the cards of a suite that all have."""
    found = []
    for suite in dict.fromkeys(name for item in scores for name in item.cards):
        cards = [item.cards[suite] for item in scores if item.cards.get(suite)]
        for key in dict.fromkeys(key for one in cards for key in one if key not in _SUBJECT):
            values = list(dict.fromkeys(json.dumps(one.get(key), sort_keys=True) for one in cards))
            if len(values) > 1:
                found.append(f"{suite}: {key} differs ({', '.join(value[:60] for value in values)})")
    return found


def _rows(scores: Sequence[ReportScores]) -> list[list[str]]:
    names = dict.fromkeys(name for item in scores for name in item.numbers if not name.endswith(_HIDDEN))
    return [
        [name.removesuffix("/value"), *(f"{item.numbers[name]:.5g}" if name in item.numbers else "" for item in scores)]
        for name in names
    ]


def comparison_text(scores: Sequence[ReportScores]) -> str:
    """The table for a terminal."""
    lines = [f"not the same protocol, {line}" for line in card_differences(scores)]
    rows = [["", *(f"{item.name} ({item.step})" for item in scores)], *_rows(scores)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def comparison_page(scores: Sequence[ReportScores]) -> str:
    """The same as a self-contained page."""
    header = ["", *(f"{escape(item.name)}<br>step {item.step:,}" for item in scores)]
    differences = card_differences(scores)
    notes = [f"<li>{escape(line)}</li>" for line in differences]
    body = [
        "<h1>Comparison</h1>",
        f'<p class="lead">{len(scores)} evaluations</p>',
        table(header, [[escape(row[0]), *row[1:]] for row in _rows(scores)]),
        "<h2>Protocols</h2>",
        f"<p>These settings differ; numbers of such suites must not be compared.</p><ul>{''.join(notes)}</ul>"
        if notes
        else "<p>All protocol cards agree.</p>",
    ]
    return page("Comparison", body)


@command
def main(argv: list[str] | None = None) -> None:
    """Command line: compare reports."""
    parser = command_parser("eval.report", __doc__)
    parser.add_argument("command", choices=["compare"])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, folders of results, or report.json files")
    parser.add_argument("--out", type=Path, help="also write a page to this file")
    given = parser.parse_args(argv)
    require(len(given.runs) >= 2, "compare needs two reports or more")
    if given.out is not None:
        check_file(given.out, "--out")
    scores = [read_scores(path) for path in given.runs]
    print(comparison_text(scores))
    if given.out is not None:
        write_text(given.out, comparison_page(scores))


if __name__ == "__main__":
    main()
