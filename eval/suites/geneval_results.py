"""Results of GenEval's own program, or of ours, summarised: `python -m eval.suites.geneval_results results.jsonl`.

The file has one JSON object per picture with filename, tag, prompt and correct. Completeness is checked against the
prompts (553 for the official set, four pictures each), so that a run that lost prompts is not taken for a score.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from eval.metrics.geneval import Fault, PictureVerdict, Summary, summarize
from eval.pictures.prompt_files import json_rows, read_prompts
from trainer.config import command, command_parser, require

_KEYS = ("filename", "tag", "prompt", "correct")


def read_results(path: Path) -> list[dict[str, Any]]:
    """Rows of a results file; ConfigError for a missing, empty or damaged one."""
    require(path.is_file(), f"{path} is not a file: give a results.jsonl of GenEval")
    rows = []
    for number, row in json_rows(path):
        require(all(key in row for key in _KEYS), f"{path} line {number} lacks one of {', '.join(_KEYS)}")
        rows.append(row)
    require(bool(rows), f"{path} is empty")
    return rows


def check_complete(rows: list[dict[str, Any]], prompt_set: str, samples: int) -> None:
    """ConfigError unless every prompt of the set has exactly `samples` pictures."""
    asked = Counter([prompt.text for prompt in read_prompts(prompt_set)] * samples)
    found = Counter(row["prompt"] for row in rows)
    wrong = [text for text in asked | found if asked[text] != found[text]]
    require(
        not wrong,
        f"{len(wrong)} prompts have not {samples} pictures each, first '{wrong[0] if wrong else ''}': "
        f"{found.total()} rows where {asked.total()} are due",
    )


def summarize_results(rows: list[dict[str, Any]]) -> Summary:
    """The summary of a file's rows; reasons are kept as texts, without a kind."""
    verdicts = [PictureVerdict(faults=() if row["correct"] else (Fault(kind="unknown", reason=""),)) for row in rows]
    return summarize([row["tag"] for row in rows], [row["prompt"] for row in rows], verdicts)


@command
def main(argv: list[str] | None = None) -> None:
    """Command line of the reader."""
    parser = command_parser("eval.suites.geneval_results", __doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--prompts", default="geneval", help="the set that must be complete")
    parser.add_argument("--samples", type=int, default=4, help="pictures per prompt")
    given = parser.parse_args(argv)
    rows = read_results(given.results)
    check_complete(rows, given.prompts, given.samples)
    summary = summarize_results(rows)
    for tag, score in [*summary.tags.items(), ("overall", summary.overall)]:
        print(f"{tag:14s} {score.value:7.2%}  ({score.low:.1%} to {score.high:.1%})  {score.correct} / {score.total}")
    print(f"{'pictures':14s} {summary.images.value:7.2%}\n{'prompts':14s} {summary.prompts.value:7.2%}")


if __name__ == "__main__":
    main()
