"""The states of the global random generators, as tensors.

Training draws from generators keyed by seed and sample, so these matter only to what a user adds.
"""

import json
import random

import numpy as np
import torch
from torch import Tensor


def rng_tensors() -> dict[str, Tensor]:
    """{entry: uint8 tensor}: torch on the host and on this process's GPU, numpy and Python."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    tensors = {
        "rng/torch": torch.get_rng_state(),
        "rng/python": _packed(random.getstate()),
        "rng/numpy": _packed([kind, np.asarray(keys).tolist(), *rest]),
    }
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore_rng(tensors: dict[str, Tensor]) -> None:
    """Inverse of `rng_tensors`, for the entries that are there."""
    torch.set_rng_state(tensors["rng/torch"])
    version, internal, gauss = _unpacked(tensors["rng/python"])
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = _unpacked(tensors["rng/numpy"])
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])


def _packed(content: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)


def _unpacked(tensor: Tensor) -> list:  # type: ignore[type-arg]
    content = json.loads(tensor.numpy().tobytes())
    assert isinstance(content, list)
    return content
