"""Put reports of eval.run side by side: numbers, and where their protocols differ.

python -m eval.report compare RUN RUN --out comparison.html
"""

from pathlib import Path

from trainer.config import command, command_parser, require
from trainer.files import write_text


@command
def main(argv: list[str] | None = None) -> None:
    """Command line: compare reports."""
    parser = command_parser("eval.report", __doc__)
    parser.add_argument("command", choices=["compare"])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, folders of results, or report.json files")
    parser.add_argument("--out", type=Path, help="also write a page to this file")
    given = parser.parse_args(argv)
    from eval.pages.compare import comparison_page, comparison_text, read_scores

    require(len(given.runs) >= 2, "compare needs two reports or more")
    scores = [read_scores(path) for path in given.runs]
    print(comparison_text(scores))
    if given.out is not None:
        write_text(given.out, comparison_page(scores))


if __name__ == "__main__":
    main()
