"""Train, or resume if the run folder has a checkpoint.

    python -m trainer.train trainer/configs/debug.yaml
    torchrun --nproc-per-node 4 -m trainer.train trainer/configs/debug.yaml parallel.ep_size=2 train.micro_batch_size=2
    python -m trainer.train RECIPE init_from=EXPORT            # a new run from the weights of another

Also under `deepspeed --module`, `mpirun` and `srun`. SIGTERM, SIGUSR1, SIGHUP, Ctrl-C or the launcher's death saves at
the next step and ends the run; a second Ctrl-C ends it at once. A file RUN/stop does as the signals do, and no start
goes on until it is removed; RUN/save saves and goes on. Exit codes: 0 done or stopped (130 by Ctrl-C), 1 failed, 2
refused. A file named by the variable TRAIN_OUTCOME is told which of these it was, one named by TRAIN_INCIDENTS what
this process noticed of a failure; TRAIN_DEADLINE (Unix time) ends the run in time to save.
"""

import argparse
import os
import shutil
from typing import Any

from trainer.cluster.leave import run_and_leave
from trainer.loop.signals import StopSignal


class ShowSettings(argparse.Action):
    """Prints settings and ends the program, as `--help` does."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None) -> None:
        """Exit code 2 with one sentence where no setting's name begins with the prefix `values`."""
        from trainer.config import TrainConfig, run_cli
        from trainer.settings.describe import describe_settings

        width = min(120, shutil.get_terminal_size().columns)
        run_cli(lambda: print(describe_settings(TrainConfig, values, width)))
        parser.exit()


def parse(argv: list[str] | None) -> tuple[str, list[str]]:
    """Recipe and overrides from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="debug", help="YAML recipe, or its name in trainer/configs")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--settings", nargs="?", const="", action=ShowSettings, metavar="PREFIX",
        help="describe all settings, or those whose name begins with PREFIX (optim, data.mix), and exit",
    )  # fmt: skip
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # from the deepspeed launcher
    arguments = parser.parse_intermixed_args(argv)
    if "=" in arguments.config:
        return "debug", [arguments.config, *arguments.overrides]
    return arguments.config, arguments.overrides


def main(argv: list[str] | None = None) -> None:
    """Command line: a recipe and `key=value` overrides."""
    recipe, overrides = parse(argv)
    # The imports below take seconds, in which a signal must not kill the process.
    with StopSignal() as stop:
        start(recipe, overrides, stop)


def start(recipe: str, overrides: list[str], stop: StopSignal) -> None:
    """Import, read the configuration and train; ConfigError becomes one sentence for all ranks together."""
    import torch

    from trainer.cluster.outcome import Outcome, Recorder
    from trainer.config import load_config, run_cli
    from trainer.distributed import detect_world

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    world = detect_world()

    recorder = Recorder(rank=world.rank)
    outcome: list[Outcome] = []

    def body() -> None:
        with recorder.watching():
            config = load_config(recipe, overrides)
            import deepspeed.utils

            from trainer.engine.host_memory import keep_freed_memory
            from trainer.loop.run import train

            keep_freed_memory()
            deepspeed.utils.logger.setLevel("ERROR")
            outcome.append(train(config, world, stop))
            recorder.record(outcome[0])

    with open(os.devnull, "w") as silent:
        run_cli(body, None if world.is_main else silent)
    if stop.interrupted and outcome[0].kind == "stopped":  # so that what follows in a script is not begun
        raise SystemExit(130)


if __name__ == "__main__":
    run_and_leave(main)
