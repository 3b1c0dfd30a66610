"""Starts a command once per rank, as torchrun does, but without the seconds in which that imports torch.

`python tests/start_ranks.py N [-m MODULE | FILE] ARGUMENTS`: when one rank fails the others are ended, and its
exit code is this one's, unlike torchrun's, whose is always 1. Signals to end go to all ranks.

A rank that ends well must do so by `run_and_leave` of trainer/cluster/leave.py if it has joined a process group.
"""

import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType


def _free_port() -> int:
    """One that nobody gets meanwhile who asks for any: it lies below those, and the ranks need it only in seconds."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port := random.randrange(28000, 32000)))
            return port


def run_rank(command: list[str]) -> None:
    """In the process of a rank: `-m MODULE` or `FILE` and arguments as Python runs them, then the look at threads."""
    is_module = command[0] == "-m"
    sys.argv = command[1:] if is_module else command
    sys.path[0] = os.getcwd() if is_module else str(Path(command[0]).parent.resolve())
    try:
        if is_module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    if left := [name for name in threads if "gloo" in name]:
        sys.exit(f"{left} are alive: {' '.join(command[:2])} was to end by run_and_leave")


def main() -> int:
    """Start, watch, end."""
    if sys.argv[1] == "--rank":
        run_rank(sys.argv[2:])
        return 0
    size, command = int(sys.argv[1]), [sys.executable, __file__, "--rank", *sys.argv[2:]]
    port = str(_free_port())
    shared = os.environ | {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(size)
    ]

    def pass_on(number: int, _: FrameType | None) -> None:
        for rank in ranks:
            rank.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
        time.sleep(0.05)
    for rank in ranks:
        rank.terminate()
    for rank in ranks:
        try:
            rank.wait(30)
        except subprocess.TimeoutExpired:
            rank.kill()
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
