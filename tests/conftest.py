"""Shared pieces of the suite: one thread per process, and a way to start real multi-process runs."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for skip_list, simulated_ranks, tests_launcher and their like
from skip_list import pytest_configure
from slurm_cluster import Cluster, NoPackagesError, why_not
from tests_launcher import Launcher

from eval.pictures.image_files import read_picture
from eval.weights import fetch
from trainer.config import ConfigError

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
torch.set_num_threads(1)


__all__ = ["pytest_configure"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For workers side by side: tests that share an expensive fixture stay together, and the longest come first."""
    for item in items:
        if name := shared_by(item):
            item.add_marker(pytest.mark.xdist_group(name))
    items.sort(key=lambda item: ("cluster" not in shared_by(item), item.get_closest_marker("slow") is None))


def shared_by(item: pytest.Item) -> str:
    """The group of tests that this one shares a fixture with; empty if it stands alone."""
    if not isinstance(item, pytest.Function):
        return ""
    if "cluster" in item.fixturenames:
        return "cluster"
    definitions = item._fixtureinfo.name2fixturedefs.values()
    return item.path.stem if any(found[-1].scope == "module" for found in definitions) else ""


@pytest.fixture
def launcher() -> Launcher:
    """Runs repository commands, on one or more processes."""
    return Launcher()


@pytest.fixture(scope="session")
def yolo() -> None:
    """Weights of the small offline detector, fetched once on a machine."""
    try:
        fetch("yolov3-tiny")
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def photographs() -> dict[str, torch.Tensor]:
    """A cup of coffee and a motorcycle, uint8 [H, W, 3], from the package that carries them."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("scikit-image, which carries the photographs, is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    return {name: read_picture(folder / f"{name}.png") for name in ("coffee", "motorcycle_left")}


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
