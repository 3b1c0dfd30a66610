"""What the batch scripts in slurm/ ask: `python -m trainer.cluster COMMAND ...`.

    check --world-size N CONFIG [key=value ...]    refuse a wrong configuration; print run_dir and data.images
    verdict RUN --outcome FILE ...                 after a start: print done, again or fail; the reason goes to stderr
    exclude RUN --available NODE,... --needed N    print the nodes to leave out of the next start, with commas
    report RUN --facts FILE                        remember the nodes that trainer.doctor found bad
    state RUN                                      print the newest checkpoint's step and the last step of the run

`check` prints `done` as a third line when nothing is left to train.
"""

import argparse
import os
import sys
from pathlib import Path

from trainer.cluster import bad_nodes
from trainer.cluster.outcome import Outcome
from trainer.cluster.verdict import last_words, newest_step, settle, silent_nodes
from trainer.config import load_config, run_cli

SILENT_HOURS = 1.0


def check(args: argparse.Namespace) -> None:
    """Everything that can be known without the nodes."""
    config, done = load_config(args.config, args.overrides), False
    if args.world_size:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # the head may have no GPU
        from trainer.distributed import World
        from trainer.loop.start_checks import check_start

        run = check_start(config, World(rank=0, local_rank=0, size=args.world_size, local_size=args.local_size))
        last = config.train.stop_at_step or config.train.max_steps
        done = run.checkpoint is not None and newest_step(Path(config.run_dir)) >= last
    print(Path(config.run_dir).resolve(), config.data.images, *["done"] * done, sep="\n")


def verdict(args: argparse.Namespace) -> None:
    """Judge a start that has ended."""
    outcome = Outcome.read(args.outcome)
    silent = silent_nodes(args.logs)
    found = settle(args.run, outcome, job=args.job, told=bool(args.told or silent))
    print(found.sentence, file=sys.stderr)
    if outcome is None or outcome.kind == "failed":
        for line in last_words(args.logs):
            print(line, file=sys.stderr)
        for node in silent:  # Slurm may need minutes to notice
            bad_nodes.add(args.run, node, "fell silent", SILENT_HOURS)
    print(found.action)


def exclude(args: argparse.Namespace) -> None:
    """Nodes for ExcNodeList."""
    print(",".join(bad_nodes.excluded(args.run, args.available.split(","), args.needed)))


def report(args: argparse.Namespace) -> None:
    """Remember what the doctor wrote, one `NODE REASON` a line."""
    for line in args.facts.read_text().splitlines():
        node, _, reason = line.partition(" ")
        bad_nodes.add(args.run, node, reason, args.hours)


def state(args: argparse.Namespace) -> None:
    """Where a run is."""
    if newest_step(args.run) < 0:
        print(-1, -1)
        return
    from trainer.checkpoint.folder import checkpoint_dir
    from trainer.checkpoint.state import read_state

    saved = read_state(checkpoint_dir(args.run, newest_step(args.run)))
    print(saved["step"], saved["config"]["train"]["stop_at_step"] or saved["config"]["train"]["max_steps"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trainer.cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    sub = commands.add_parser("check")
    sub.set_defaults(action=check)
    sub.add_argument("config")
    sub.add_argument("overrides", nargs="*")
    sub.add_argument("--world-size", type=int, default=0)
    sub.add_argument("--local-size", type=int, default=0)
    for command in (verdict, exclude, report, state):
        sub = commands.add_parser(command.__name__)
        sub.set_defaults(action=command)
        sub.add_argument("run", type=Path)
        if command is verdict:
            sub.add_argument("--outcome", type=Path, required=True)
            sub.add_argument("--job", required=True)
            sub.add_argument("--told", type=int, default=0)
            sub.add_argument("--logs", nargs="*", type=Path, default=[])
        if command is exclude:
            sub.add_argument("--available", required=True)
            sub.add_argument("--needed", type=int, required=True)
        if command is report:
            sub.add_argument("--facts", type=Path, required=True)
            sub.add_argument("--hours", type=float, default=24.0)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Command line of the batch scripts."""
    args = _parser().parse_args(argv)
    run_cli(lambda: args.action(args))


if __name__ == "__main__":
    main()
