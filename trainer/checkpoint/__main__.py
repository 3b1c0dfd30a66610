"""Command line of checkpoints: what is there, is it whole, the pieces of another topology, weights to give away.

    python -m trainer.checkpoint list RUN
    python -m trainer.checkpoint verify RUN_OR_STEP
    python -m trainer.checkpoint reshape RUN --world-size 8 --ep-size 4 --verify
    python -m trainer.checkpoint export RUN_OR_STEP OUT --weights ema --dtype bf16

`list` compares names and sizes, `verify` reads everything; both exit with code 1 if a checkpoint is broken.
`reshape` rewrites the newest whole checkpoint, or that of `--step`, in the pieces of another topology, in
place or into another run folder (`--out`). Resuming does not need it. `export` writes plain safetensors files, which
`trainer.sample`, `eval.run` and `init_from` of a new run take; it needs no GPU and little memory.
"""

import argparse
import sys

from trainer.checkpoint.commands import add_export, add_list, add_reshape, add_verify
from trainer.config import run_cli


def main(argv: list[str] | None = None) -> None:
    """Run one subcommand and exit with its code."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (add_list, add_verify, add_reshape, add_export):
        add(commands)
    arguments = parser.parse_args(argv)
    run_cli(lambda: sys.exit(arguments.run(arguments)))


if __name__ == "__main__":
    main()
