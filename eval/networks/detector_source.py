"""How a detector's own file tells the registry (`eval.networks.detectors`) to find, describe and load it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from eval.networks.protocols import Comparable, ObjectDetector
from eval.weights import find_weights_file


@dataclass(frozen=True, kw_only=True)
class DetectorSource:
    """One detector of the registry, or a family of them whose weights are in a folder that the user names."""

    comparable: Comparable
    find: Callable[[str], Path]
    """What follows the colon in --detector (empty without one) to the weights; ConfigError if they are not here."""
    card: Callable[[Path], dict[str, str]]
    """The card that a detector with these weights would have; loads nothing."""
    load: Callable[[Path], ObjectDetector]
    """The detector with these weights; ConfigError if they are those of another network."""
    takes_folder: bool = False
    """Whether it is named with a folder, NAME:DIR."""


def listed_weights(name: str) -> Callable[[str], Path]:
    """`find` of a detector whose weights are the entry `name` of eval/weights_table.py."""
    return lambda _: find_weights_file(name)
