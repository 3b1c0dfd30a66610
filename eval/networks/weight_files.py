"""What the networks share when they read files of weights."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from trainer.config import ConfigError


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """State dict of a TorchScript archive; nothing in it is called."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the loader of this archived format is deprecated
        state: dict[str, Tensor] = torch.jit.load(str(path), map_location="cpu").state_dict()
    return state


@contextmanager
def must_fit(complaint: str) -> Iterator[None]:
    """Around a strict load: weights of another network raise ConfigError with `complaint` and the reason.

    A wrong pair of weights and network must not give wrong scores silently.
    """
    try:
        yield
    except (RuntimeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{complaint}: {' '.join(str(error).split())[:300]}") from error
