"""Starts a command once per rank, as torchrun does, but without the seconds in which that imports torch.

`python tests/start_ranks.py N [-m MODULE | FILE] ARGUMENTS`: when one rank fails the others are ended, and its
exit code is this one's, unlike torchrun's, whose is always 1. Signals to end go to all ranks.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from types import FrameType


def _free_port() -> int:
    """One that nobody gets meanwhile who asks for any: it lies below those, and the ranks need it only in seconds."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port := random.randrange(28000, 32000)))
            return port


def main() -> int:
    """Start, watch, end."""
    size, command = int(sys.argv[1]), [sys.executable, *sys.argv[2:]]
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
