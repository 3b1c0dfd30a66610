"""The frame of the programs of checks: join the others, run checks by name, say which of them held.

`tests_launcher.run_checks` starts them and reads what they say.
"""

import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

import deepspeed
import torch

from trainer.cluster.leave import run_and_leave
from trainer.distributed import World, detect_world, process_group


def run_named(names: Iterable[str], check: Callable[[World, str], None]) -> NoReturn:
    """The whole program: join the process group, then run the checks in turn on all ranks, up to the first error."""
    run_and_leave(lambda: _run(names, check))


def _run(names: Iterable[str], check: Callable[[World, str], None]) -> None:
    world = detect_world()
    deepspeed.utils.logger.setLevel("ERROR")
    with process_group(world):
        for name in names:
            check(world, name)
            sys.stdout.write(f"rank {world.rank}: {name} holds\n")  # in one piece: lines of two ranks must not mix
            sys.stdout.flush()
        torch.distributed.barrier()
