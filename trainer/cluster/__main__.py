"""What the batch scripts in slurm/ ask about a run: `python -m trainer.cluster COMMAND ...`.

    verdict RUN --outcome FILE ...                 after a start: print done, again, halt, fail or refused, what
                                                   trainer/cluster/verdict.py says; the reason goes to stderr
    exclude RUN --available NODE,... --needed N    print the nodes to leave out of the next start, with commas
    report RUN --facts FILE                        remember the nodes that trainer.doctor found bad

None imports torch: the answers are wanted within the grace time of a preemption. What a script asks before a start is
`python -m trainer.doctor --only-config`.
"""

import argparse
import sys
from pathlib import Path

from trainer.cluster import bad_nodes
from trainer.cluster.outcome import Outcome
from trainer.cluster.verdict import has_lost_or_hung, last_words, out_of_memory, settle, silent_nodes
from trainer.config import command_parser

SILENT_HOURS = 1.0


def verdict(args: argparse.Namespace) -> None:
    """Judge a start that has ended."""
    outcome = Outcome.read(args.outcome)
    found = settle(args.run, outcome, job=args.job, told=bool(args.told or has_lost_or_hung(args.logs)))
    print(found.sentence, file=sys.stderr)
    if outcome is None or outcome.kind == "failed":
        for line in (*out_of_memory(args.launcher, args.logs), *last_words(args.logs)):
            print(line, file=sys.stderr)
        for node in silent_nodes(args.logs):  # Slurm may need minutes to notice
            bad_nodes.add(args.run, node, "fell silent or hung", SILENT_HOURS)
    print(found.action)


def exclude(args: argparse.Namespace) -> None:
    """Print the nodes for ExcNodeList."""
    print(",".join(bad_nodes.excluded(args.run, args.available.split(","), args.needed)))


def report(args: argparse.Namespace) -> None:
    """Remember what the doctor wrote, one `NODE REASON` a line."""
    for line in args.facts.read_text().splitlines():
        node, _, reason = line.partition(" ")
        bad_nodes.add(args.run, node, reason, args.hours)


def main(argv: list[str] | None = None) -> None:
    """Command line of the batch scripts."""
    parser = command_parser("trainer.cluster", __doc__)
    commands = parser.add_subparsers(required=True)
    for command in (verdict, exclude, report):
        sub = commands.add_parser(command.__name__)
        sub.set_defaults(action=command)
        sub.add_argument("run", type=Path)
        if command is verdict:
            sub.add_argument("--outcome", type=Path, required=True)
            sub.add_argument("--job", required=True)
            sub.add_argument("--told", type=int, default=0)
            sub.add_argument("--launcher", type=Path, help="what srun itself said")
            sub.add_argument("--logs", nargs="*", type=Path, default=[])
        if command is exclude:
            sub.add_argument("--available", required=True)
            sub.add_argument("--needed", type=int, required=True)
        if command is report:
            sub.add_argument("--facts", type=Path, required=True)
            sub.add_argument("--hours", type=float, default=24.0)
    args = parser.parse_args(argv)
    args.action(args)


if __name__ == "__main__":
    main()
