"""The name of the node that this process runs on."""

import os
import socket


def node_name() -> str:
    """Slurm's own name where it started the process, by which nodes are left out; the host's may be longer."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
