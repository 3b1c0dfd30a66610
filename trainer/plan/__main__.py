"""Entry point of `python -m trainer.plan`; trainer/plan/arguments.py says what it answers."""

import sys

from trainer.config import run_cli
from trainer.plan.arguments import parse


def main() -> None:
    """Parse before anything heavy is imported: --help has to be quick."""
    given = parse(None)
    from trainer.plan.command import run

    sys.exit(run(given))


if __name__ == "__main__":
    run_cli(main)
