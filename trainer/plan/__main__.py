"""Whether a job fits, and how fast it can be, before it waits in a queue.

    python -m trainer.plan ec_dit_m_64e --nodes 16 --device h100
    python -m trainer.plan RECIPE --world-size 64 --explain          # every formula with its numbers
    python -m trainer.plan RECIPE --nodes 2 --json                   # for scripts

Exit codes: 0 the configured job fits, 1 it does not (the smallest number of nodes is printed), 2 refused. Nothing is
started or written, and no device is needed.
"""

import sys

from trainer.config import run_cli
from trainer.plan.command import run

if __name__ == "__main__":
    run_cli(lambda: sys.exit(run(None)))
