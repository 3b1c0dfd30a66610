"""Whether a job fits, and how fast it can be, before it waits in a queue.

    python -m trainer.plan ec_dit_m_64e --nodes 16 --device h100
    python -m trainer.plan RECIPE --world-size 64 --explain          # every formula with its numbers
    python -m trainer.plan RECIPE --nodes 2 --json                   # for scripts

Exit codes: 0 the configured job fits, 1 it does not (the smallest number of nodes is printed), 2 refused. Nothing is
started or written, and no device is needed.
"""

import argparse
import sys

from trainer.config import command, command_parser
from trainer.plan.devices import DEVICES


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags of `python -m trainer.plan`."""
    parser = command_parser("trainer.plan", __doc__)
    parser.add_argument("config", help="YAML recipe, or its name in trainer/configs")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--world-size", type=int, help="processes, one per device")
    size.add_argument("--nodes", type=int, help="nodes full of devices (default 1)")
    parser.add_argument("--device", default="h100", help=f"{', '.join(DEVICES)} or custom (default %(default)s)")
    for flag, meaning in (
        ("flops", "FLOP/s, dense bf16"), ("memory", "bytes"), ("hbm", "bytes/s of its memory"),
        ("node", "bytes/s and direction within the node"), ("nic", "bytes/s and direction to other nodes"),
    ):  # fmt: skip
        parser.add_argument(f"--{flag}", type=float, help=f"{meaning}, in place of the device's")
    parser.add_argument("--per-node", type=int, help="devices of a node")
    parser.add_argument("--channels", type=int, help="of the latent, where the latents are not there to be asked")
    parser.add_argument("--factor", type=int, help="pixels per latent value and axis, likewise")
    parser.add_argument("--text-dim", type=int, help="width of a text token, likewise")
    parser.add_argument("--text-tokens", type=int, help="longest caption in tokens, likewise")
    parser.add_argument("--explain", action="store_true", help="print every formula with its numbers")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    return parser.parse_intermixed_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    """Command line of the plan."""
    given = parse(argv)
    from trainer.plan.command import run  # torch takes seconds, and --help needs none of it

    sys.exit(run(given))


if __name__ == "__main__":
    main()
