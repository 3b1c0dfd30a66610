"""Command line of checkpoints: what is there, is it whole, weights to give away.

    python -m trainer.checkpoint list RUN
    python -m trainer.checkpoint verify RUN_OR_STEP
    python -m trainer.checkpoint export RUN_OR_STEP OUT --weights ema --dtype bf16 --push me/mine

`list` compares names and sizes, `verify` reads everything; both exit with code 1 if a checkpoint is broken, all of
them with code 2 where nothing is found or a setting is wrong.
`export` writes plain safetensors files, which `trainer.sample`, `eval.run` and `init_from` of a new run take; it
needs no GPU and little memory. Its README.md is a model card for you to finish, its folder `encoders` is the place of
codec and text encoder. Resuming on other processes needs no command: any topology reads any checkpoint.
"""

import sys
from pathlib import Path

from trainer.config import command_parser, interruptible


@interruptible("checkpoints are as they were, no part of an export is left; the same command starts again")
def main(argv: list[str] | None = None) -> None:
    """Run one subcommand and exit with its code."""
    parser = command_parser("trainer.checkpoint", __doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    listing = commands.add_parser("list", help="checkpoints of a run, checked by size")
    listing.add_argument("path", type=Path, metavar="RUN", help="run folder")
    verify = commands.add_parser("verify", help="read every byte and compare checksums")
    verify.add_argument("path", type=Path, metavar="RUN_OR_STEP", help="run folder, step folder or export")
    export = commands.add_parser("export", help="write the weights as safetensors files")
    export.add_argument("path", type=Path, metavar="RUN_OR_STEP", help="run folder (newest whole one) or step folder")
    export.add_argument("out", type=Path, metavar="OUT", help="new or empty folder")
    export.add_argument("--weights", default="ema", help="ema (the average, default) or model (the live weights)")
    export.add_argument("--dtype", default="bf16", help="bf16 (default) or fp32, of all tensors")
    export.add_argument("--shard-gb", type=float, default=4.0, help="largest file in GB (10^9 bytes); default 4")
    export.add_argument("--encoders", type=Path, metavar="DIR", help="folder of codec and text encoder, if moved")
    export.add_argument("--no-digests", action="store_true", help="export without having the encoders here")
    export.add_argument("--push", metavar="REPO", help="put it on the model hub as OWNER/NAME too, private at first")
    arguments = parser.parse_args(argv)
    from trainer.checkpoint import commands as bodies  # torch takes seconds, and --help needs none of it

    sys.exit(bodies.COMMANDS[arguments.command](arguments))


if __name__ == "__main__":
    main()
