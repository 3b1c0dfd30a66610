"""Shared pieces of the suite: one thread per process, and a way to start real multi-process runs."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for tests_launcher and slurm_cluster
from slurm_cluster import Cluster, NoPackagesError, why_not
from tests_launcher import Launcher

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
torch.set_num_threads(1)


@pytest.fixture
def launcher() -> Launcher:
    """Runs repository commands, on one or more processes."""
    return Launcher()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A real Slurm with three nodes, for the whole session."""
    if reason := why_not():
        pytest.skip(reason)
    try:
        found = Cluster(nodes=3)
    except NoPackagesError as error:
        pytest.skip(f"Slurm's packages cannot be installed: {error}")
    yield found
    found.stop()
