"""Random numbers keyed by what they are for, never by rank, worker or world size.

Every draw of a sample (noise, timestep, mask, caption drop) is a function of the run's seed, the sample's
global index and the name of the stream; so is the initial value of a weight (seed, name, expert).
"""

import hashlib

import torch


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose stream is a function of the key alone, the same on every platform."""
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def sample_generator(seed: int, index: int, stream: str) -> torch.Generator:
    """The generator of one random quantity (`stream`) of sample number `index` since the run's start."""
    return keyed_generator(seed, index, stream)
