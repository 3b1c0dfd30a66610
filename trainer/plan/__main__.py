"""Entry point of `python -m trainer.plan`; trainer/plan/arguments.py says what it answers."""

import sys

from trainer.plan.arguments import parse

if __name__ == "__main__":
    given = parse(None)
    # Only now what takes seconds to import: --help has to be quick.
    from trainer.config import run_cli
    from trainer.plan.command import run

    run_cli(lambda: sys.exit(run(given)))
